"""The report of a run: complete, plain JSON, and about what really ran."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from svd_engine import VideoEngine, __version__, report
from svd_engine.spec.network import Network
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH

STEPS = 3
STAGES = ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")


@pytest.fixture(scope="module")
def run(tiny_bundle: Path) -> dict[str, Any]:
    """One run over ONNX Runtime, as it is read back from JSON."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (2**64 - 1, 7)]
    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        result = engine(
            torch.rand(1, 3, HEIGHT, WIDTH), num_inference_steps=STEPS, fps=12, generator=generators,
            num_videos_per_prompt=2, output_type="pt",
        )  # fmt: skip
    document: dict[str, Any] = json.loads(result.report.model_dump_json())
    return document


def test_settings_and_seeds(run: dict[str, Any], tiny_bundle: Path) -> None:
    assert run["settings"] == {
        "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fit": "stretch", "steps": STEPS, "sigmas": None,
        "fps": 12, "motion_bucket_id": 127, "noise_aug_strength": 0.02, "min_guidance_scale": 1.0,
        "max_guidance_scale": 3.0, "decode_chunk_size": None, "videos_per_image": 2, "sampler": "euler",
        "schedule": "karras", "guider": "linear", "guidance_scales": None, "churn": 0.0, "rho": 7.0,
        "decoding": "auto", "elevation": None, "azimuths": None,
    }  # fmt: skip
    assert run["seeds"] == [2**64 - 1, 7]
    assert (run["model"], run["random_weights"], run["source"]) == ("tiny", False, str(tiny_bundle))
    assert run["profile"].startswith(f"{FRAMES} frames, {HEIGHT}x{WIDTH}, batch 1, batched")
    assert run["chosen_because"] == "asked for"


def test_every_stage_says_where_it_ran(run: dict[str, Any]) -> None:
    rest = f"vae_decoder-t{FRAMES % CHUNK}-{HEIGHT}x{WIDTH}"
    assert tuple(run["stages"]) == (*STAGES, rest)
    for place in run["stages"].values():
        assert (place["backend"], place["device"], place["dtype"]) == ("onnxruntime", "cpu", "float32")
        assert place["detail"] == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"


def test_every_stage_and_step_has_its_milliseconds(run: dict[str, Any]) -> None:
    assert list(run["stage_ms"]) == ["preprocess", "load", *STAGES, "postprocess"]
    assert all(ms > 0 for ms in (*run["stage_ms"].values(), *run["step_ms"]))
    assert len(run["step_ms"]) == STEPS
    assert run["evaluation_ms"] == run["step_ms"]  # of the sampler euler
    assert sum(run["step_ms"]) <= run["stage_ms"]["denoiser"]
    assert sum(run["stage_ms"].values()) <= run["total_ms"]


def test_memory(run: dict[str, Any]) -> None:
    """In bytes: this process holds torch, so between 50 MiB and what the kernel says now."""
    assert 50 * 2**20 < run["peak_host_bytes"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert run["peak_device_bytes"] is None


def test_rewrites_by_component(run: dict[str, Any]) -> None:
    assert run["rewrites"]["unet/single-token-cross-attention"] == 8
    assert run["without_rewrites"] == []


def test_versions(run: dict[str, Any]) -> None:
    assert run["versions"]["svd-engine"] == __version__
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}
    listed = {name: installed[name] for name in report.PACKAGES if name in installed}
    assert {name: run["versions"].get(name) for name in report.PACKAGES if name in run["versions"]} == listed
    assert {"torch", "diffusers", "transformers", "onnx", "numpy", "av"} <= listed.keys()


def test_the_report_of_a_gpu_counts_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    assert report.peak_device_bytes(torch.device("cuda")) == 5


def test_without_a_generator_there_is_no_seed(tiny_engine: VideoEngine) -> None:
    result = tiny_engine(
        torch.rand(1, 3, HEIGHT, WIDTH), height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        decode_chunk_size=CHUNK, num_inference_steps=1, output_type="latent",
    )  # fmt: skip
    assert result.report.seeds == []
    assert "vae_decoder" not in result.report.stage_ms


def test_own_noise_levels_are_the_steps_that_ran(tiny_engine: VideoEngine) -> None:
    result = tiny_engine(
        torch.rand(1, 3, HEIGHT, WIDTH), height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        decode_chunk_size=CHUNK, sigmas=[80.0, 1.0, 0.0], output_type="latent",
    )  # fmt: skip
    assert (result.report.settings.steps, len(result.report.step_ms)) == (2, 2)


def test_the_second_chunk_size_of_the_decoder_has_its_own_placement(
    tiny_engine: VideoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two plans, say: each decoder's detail is its own."""
    network = tiny_engine.residency.network

    def placed(spec: NetworkSpec) -> Network:
        made = network(spec)
        monkeypatch.setattr(made, "placement", replace(made.placement, detail=spec.key))
        return made

    monkeypatch.setattr(tiny_engine.residency, "network", placed)
    result = tiny_engine(
        torch.rand(1, 3, HEIGHT, WIDTH), height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        decode_chunk_size=CHUNK, num_inference_steps=1, output_type="latent",
    )  # fmt: skip
    details = {name: place.detail for name, place in result.report.stages.items()}
    first, rest = (f"vae_decoder-t{frames}-{HEIGHT}x{WIDTH}" for frames in (CHUNK, FRAMES % CHUNK))
    assert details["vae_decoder"] == first
    assert details[rest] == rest
