"""Reuse over bundles: what the export adds, that it runs as eager torch does, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from svd_engine import BundleError, ProfileError, Reuse, SettingsError, VideoEngine
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.output import VideoOutput
from svd_engine.request import Settings
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.profile import Profile
from svd_export.cli import main as export
from svd_export.to_onnx import export_bundle
from svd_export.triton import QueueLimits, write_repository
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support import damage, tensorrt_plans
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH
from tests.support.shared import made_once

CPU = torch.device("cpu")
IMAGE = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
CALL: dict[str, Any] = {
    "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 4, "output_type": "pt",
}  # fmt: skip


@pytest.fixture(scope="session")
def reusing_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, one half of guidance a call, branch 1."""
    profile = Profile(FRAMES, HEIGHT, WIDTH, 1, "single", FRAMES)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/reusing",
        lambda folder: export_bundle(checkpoint, folder, [profile], torch.float32, reuse_branch=1),
    )


@pytest.fixture
def folder(reusing_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return damage.copy(reusing_bundle, tmp_path)


def video(engine: VideoEngine, seeds: tuple[int, ...] = (0,), **other: Any) -> VideoOutput:
    with engine:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = engine(IMAGE, generator=generators, num_videos_per_prompt=len(seeds), **{**CALL, **other})
    assert isinstance(made, VideoOutput)
    return made


def of_bundle(folder: Path, reuse: Reuse | None = None) -> VideoEngine:
    return VideoEngine.from_bundle(folder, backend="onnxruntime", device="cpu", reuse=reuse)


def of_checkpoint(folder: Path, reuse: Reuse | None = None) -> VideoEngine:
    return VideoEngine.from_checkpoint(str(folder), backend="eager", device="cpu", reuse=reuse)


# The export


def test_three_denoisers_share_one_file_of_weights(reusing_bundle: Path) -> None:
    """Full and shallow add nothing to it: their graphs refer to places that the plain one refers to."""
    bundle = Bundle(reusing_bundle)
    plain, full, shallow = [e for e in bundle.manifest.networks if "denoiser" in e.spec.network]
    assert [e.weights for e in (plain, full, shallow)] == ["denoiser.bin"] * 3
    assert [t.name for t in full.spec.outputs] == ["denoised", "feature"]
    assert shallow.spec.inputs[-1] == full.spec.outputs[-1]
    of_plain, of_full, of_shallow = (
        places(bundle.graph(e.spec, "onnxruntime")) for e in (plain, full, shallow)
    )
    assert of_full == of_plain > of_shallow


def places(graph: Path) -> set[tuple[int, int]]:
    """Offset and length of the weights that lie outside."""
    model = onnx.load(str(graph), load_external_data=False)
    infos = [
        onnx.external_data_helper.ExternalDataInfo(t) for t in model.graph.initializer if t.external_data
    ]
    return {(info.offset or 0, info.length or 0) for info in infos}


def test_the_manifest_and_info_say_so(reusing_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reuse = Bundle(reusing_bundle).manifest.reuse
    assert reuse is not None
    assert (reuse.branch, reuse.kept) == (1, 3)
    assert call(main, "info", reusing_bundle) == 0
    assert "a full and a shallow denoiser, branch 1" in capsys.readouterr().out


def test_verify_compares_all_three(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(export, "verify", folder) == 0
    rows = {(row.network.partition("-")[0], row.output) for row in Bundle(folder).manifest.parity}
    assert {("denoiser", "denoised"), ("full_denoiser", "denoised"), ("full_denoiser", "feature")} < rows
    assert ("shallow_denoiser", "denoised") in rows
    assert "shallow_denoiser-b1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (-1, "reuse branch: expected a whole number of at least 0"),
        (3, "reuse branch: expected 0 to 2 for this checkpoint, got 3"),
    ],
)
def test_a_branch_that_is_none(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], branch: int, message: str
) -> None:
    assert call(export, "onnx", tiny_checkpoint, "-o", tmp_path / "b", "--reuse-branch", branch) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_triton_serves_each_as_a_model(reusing_bundle: Path, tmp_path: Path) -> None:
    names = write_repository(Bundle(reusing_bundle), tmp_path / "models", QueueLimits())
    assert [name.partition("-")[0] for name in names] == [
        "denoiser", "full_denoiser", "image_encoder", "shallow_denoiser", "svd", "svd_stream", "vae_decoder",
        "vae_encoder",
    ]  # fmt: skip
    config = (tmp_path / "models" / names[1] / "config.pbtxt").read_text()
    assert 'name: "feature"' in config.partition("output [")[2].partition("instance_group")[0]


# A call


@pytest.mark.parametrize(
    ("reuse", "call", "shallow"),
    [
        (Reuse(2), {}, [1, 3]),
        (Reuse(4, threshold=0.9), {}, None),
        (Reuse(2), {"max_guidance_scale": 1.0}, [1, 3]),
        (Reuse(3, branch=1), {"seeds": (0, 7)}, [1, 2]),
    ],
    ids=["2", "threshold", "unguided", "3, two videos"],
)
def test_onnx_runtime_reuses_as_eager_torch_does(
    tiny_checkpoint: Path, reusing_bundle: Path, reuse: Reuse, call: dict[str, Any], shallow: list[int] | None
) -> None:
    expected = video(of_checkpoint(tiny_checkpoint, Reuse(reuse.interval, 1, reuse.threshold)), **call)
    got = video(of_bundle(reusing_bundle, reuse), **call)
    torch.testing.assert_close(got.frames, expected.frames, rtol=0, atol=1e-4)
    ran = got.report.shallow_evaluations
    assert ran == expected.report.shallow_evaluations
    assert ran == shallow if shallow is not None else 0 < len(ran) < 3
    assert got.report.reuse == Reuse(reuse.interval, 1, reuse.threshold)
    assert "shallow_denoiser" in got.report.stages


def test_a_plain_call_is_that_of_any_bundle(tiny_checkpoint: Path, reusing_bundle: Path) -> None:
    got = video(of_bundle(reusing_bundle))
    torch.testing.assert_close(got.frames, video(of_checkpoint(tiny_checkpoint)).frames, rtol=0, atol=1e-4)
    assert got.report.reuse is None
    assert "shallow_denoiser" not in got.report.stages


def test_tensorrt_gives_the_frames_of_onnx_runtime(
    reusing_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its double computes with ONNX Runtime; both denoisers are recorded once, and replayed after."""
    expected = video(of_bundle(reusing_bundle, Reuse(3)), num_inference_steps=9, max_guidance_scale=1.0)
    double = tensorrt_plans.with_onnxruntime(folder, monkeypatch)
    engine = VideoEngine.from_bundle(folder, backend="tensorrt", reuse=Reuse(3))
    got = video(engine, num_inference_steps=9, max_guidance_scale=1.0)
    assert torch.equal(got.frames, expected.frames)
    assert got.report.shallow_evaluations == [1, 2, 4, 5, 7, 8]
    assert double.order().count("cuda.capture") == 2
    assert double.order().count("cuda.replay") == 7  # of 9: each network's first one is launched


def test_the_command(reusing_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--bundle", reusing_bundle, "--device", "cpu", "--steps", 3, "--reuse", 3)
    assert call(main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.gif", *arguments) == 0
    assert "reuse: 2 of 3 evaluations ran the shallow denoiser only" in capsys.readouterr().out


# What is refused


def test_a_bundle_without_it(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--bundle", tiny_bundle, "--reuse", 2)
    assert call(main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.gif", *arguments) == 2
    said = capsys.readouterr().err
    assert "expected a bundle with a full and a shallow denoiser, got the plain one alone" in said
    assert "--guidance batched --guidance single --decode-chunk 2 --reuse-branch 0 --dtype fp32" in said
    with pytest.raises(ProfileError, match="--reuse-branch 2 --dtype fp32"):
        of_bundle(tiny_bundle, Reuse(2, branch=2))


def test_another_branch_than_the_bundle_s(reusing_bundle: Path) -> None:
    with pytest.raises(
        ProfileError, match="expected branch 1, which it was exported with, got branch 0"
    ) as caught:
        of_bundle(reusing_bundle, Reuse(2, branch=0))
    assert "Leave out the branch, or run: svd-export onnx" in caught.value.remedy
    assert "--reuse-branch 0" in caught.value.remedy


def test_what_is_no_reuse(reusing_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="reuse: expected"):
        VideoEngine.from_bundle(reusing_bundle, reuse=2)  # type: ignore[arg-type]


def test_reuse_within_a_budget(reusing_bundle: Path) -> None:
    """The two denoisers are held together, each with weights of its own; the plan counts both."""
    expected = video(of_bundle(reusing_bundle, Reuse(2)))
    on: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "reuse": Reuse(2)}
    engine = VideoEngine.from_bundle(reusing_bundle, memory=2**50, **on)
    planned = video(engine)
    assert torch.equal(planned.frames, expected.frames)
    full, shallow = planned.report.plan.stages[2:4]
    assert (full.network[:5], shallow.network[:8]) == ("full_", "shallow_")
    planner = engine.source.planner
    assert planner is not None
    settings = Settings(FRAMES, HEIGHT, WIDTH, steps=4)
    plans = planner.considered(settings, 1)
    weights = Bundle(reusing_bundle).manifest.files["denoiser.bin"].bytes
    assert [p.stages[2].held_bytes for p in plans if p.residency.name == "swapped"] == [2 * weights]
    assert planner.ceiling is not None
    usual = planner.usual(settings, 1)
    assert usual.peak_bytes - planner._runtime_bytes <= planner.ceiling(settings, 1)
    engine.source = replace(engine.source, planner=replace(planner, residencies=(Swapped,)))
    swapped = video(engine)
    assert swapped.report.plan.residency == "swapped"
    assert torch.equal(swapped.frames, expected.frames)


def test_exports_of_the_bundle_anew_keep_its_reuse(reusing_bundle: Path) -> None:
    assert "--reuse-branch 1 --dtype fp16" in Bundle(reusing_bundle).plans_command()


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle(folder)
    return str(caught.value)


def without(*names: str) -> Any:
    def change(manifest: dict[str, Any]) -> None:
        kept = [e for e in manifest["networks"] if not e["spec"]["key"].startswith(names)]
        manifest["networks"] = kept

    return change


CHANGES: dict[str, tuple[Any, str]] = {
    "a shallow one without a full one": (without("full_"), "network full_denoiser-b1"),
    "a full one without a shallow one": (without("shallow_"), "network shallow_denoiser-b1"),
    "nothing said of it": (
        lambda m: m.update(reuse=None),
        "a denoiser that reuses, and nothing said of reuse",
    ),
    "another branch": (lambda m: m["reuse"].update(kept=2), "reuse2 of bundle"),
    "another width": (lambda m: m["reuse"].update(channels=32), "feature float32 [1, 1, 3, 32,"),
    "another size": (lambda m: m["reuse"].update(downscale=4), "64, 4, 6]"),
    "one resnet": (lambda m: m["reuse"].update(kept=1), "reuse.kept"),
    "no channels": (lambda m: m["reuse"].update(channels=0), "reuse.channels"),
    "a vast feature": (
        lambda m: (m["reuse"].update(channels=65_536), m["profiles"][0].update(frames=1024)),
        "values in feature float32",
    ),
    "a branch that the network does not say": (
        lambda m: [e["spec"].update(kept=2) for e in m["networks"] if e["spec"]["kept"]],
        "3 resnets kept, got",
    ),
}


@pytest.mark.parametrize(("change", "part"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_does_not_agree_with_itself(folder: Path, change: Any, part: str) -> None:
    damage.edit(folder, change)
    assert part in refusal(folder)


@pytest.mark.parametrize("network", ["full_denoiser", "shallow_denoiser"])
def test_a_graph_of_another_feature(folder: Path, network: str) -> None:
    """Its hash is right: the table is not."""
    entry = next(e for e in Bundle(folder).manifest.networks if e.spec.key.startswith(network))
    name = entry.graphs["onnxruntime"]
    model = onnx.load(str(folder / name), load_external_data=False)
    (value,) = [v for v in (*model.graph.input, *model.graph.output) if v.name == "feature"]
    value.type.tensor_type.shape.dim[3].dim_value = 32
    (folder / name).write_bytes(model.SerializeToString())
    damage.trust(folder, name)
    with pytest.raises(
        BundleError, match=r"feature float32 \[1, 1, 3, 64, .*got .*feature float32 \[1, 1, 3, 32"
    ):
        video(of_bundle(folder, Reuse(2)))


def test_a_network_that_a_bundle_has_not(tiny_bundle: Path) -> None:
    with pytest.raises(ProfileError, match="--reuse-branch 0") as caught:
        Bundle(tiny_bundle).entries(["denoiser", "shallow_denoiser"])
    assert "expected some of image_encoder, vae_encoder, denoiser, vae_decoder" in str(caught.value)
