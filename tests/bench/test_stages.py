"""Real networks, the smallest there are, through every stage: what is recorded is what ran."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svd_bench.contest import runs as running
from svd_bench.contest import stages as module
from svd_bench.contest.contest import Bench
from svd_bench.contest.stages import check_video, measure_stages, panning
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import Setting
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.timing import timer_for
from svd_bench.subjects.cases import Case, checkpoint_of, subjects
from svd_bench.subjects.opening import open_case, stage_spec, video_call
from svd_engine.backends.registry import BACKENDS
from svd_engine.errors import BackendError, BackendUnavailable, SettingsError
from svd_engine.install import install_line
from svd_engine.media.video import write_video
from svd_engine.networks.parity import example_inputs
from svd_engine.networks.rewrites import REWRITES, rewrites_for
from svd_engine.spec.model import Architecture
from svd_engine.spec.network import check_inputs
from svd_engine.spec.precision import FLOAT32
from tests.bench import documents
from tests.bench.fakes import CEILING
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import stability_file

CPU = torch.device("cpu")
TINY = Setting(
    model="tiny", random_weights=False, frames=FRAMES, height=HEIGHT, width=WIDTH, decode_chunk=CHUNK, steps=2
)


def bench() -> Bench:
    recorder = Recorder("run", documents.environment())
    return Bench(CPU, timer_for(CPU), recorder, CEILING, open_case, lambda _: Peaks(), repeat=1)


def test_stages_of_the_smallest_networks(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    here = bench()
    chosen = subjects(
        ["eager", "onnxruntime"], ["diffusers"], str(tiny_checkpoint), "cpu", "float32", str(tiny_bundle)
    )
    wanted = [stage for stage in module.STAGES if stage != "whole_video"]
    measure_stages(here, chosen, TINY, wanted)
    rows = here.recorder.results().rows
    by_stage: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        by_stage.setdefault(row.stage, []).append((row.subject, row.backend))
    three = [("diffusers", "eager"), ("svd-engine", "eager"), ("svd-engine", "onnxruntime")]
    assert by_stage == {
        "image_encoder": three,
        "vae_encoder": three,
        "denoiser_step": three,
        "sampler": [("diffusers", "torch"), ("svd-engine", "torch")],
        "vae_decoder": three,
        "video_encode": [("svd-engine", "libx264")],
    }
    steps = [row for row in rows if row.stage == "denoiser_step"]
    everywhere = {rewrite.name for rewrite in REWRITES}
    eager, in_bundle = (set(step.rewrites) for step in steps[1:])
    assert eager - everywhere == {"feed-forward-slices", "linear-as-convolution", "channels-last"}
    assert in_bundle - everywhere == {"feed-forward-convolutions", "temporal-rows"}
    assert eager & everywhere == in_bundle & everywhere
    assert steps[0].rewrites == ()
    assert "single-token-cross-attention" in eager
    assert all(row.flop == steps[0].flop for row in steps)
    assert all(0 < (row.max_abs_difference or 0) < 1e-4 for row in steps[1:])
    assert {row.dtype for row in rows} == {"float32", "uint8"}


def test_bfloat16_is_held_against_float32(tiny_checkpoint: Path) -> None:
    here = bench()
    chosen = subjects(["eager"], ["diffusers"], str(tiny_checkpoint), "cpu", "bfloat16", None)
    measure_stages(here, chosen, TINY, ["vae_decoder"])
    theirs, ours = here.recorder.results().rows
    assert (theirs.dtype, ours.dtype) == ("bfloat16", "bfloat16")
    assert 1e-4 < (theirs.max_abs_difference or 0) < 0.1  # it is not its own reference
    assert 1e-4 < (ours.max_abs_difference or 0) < 0.1


def test_the_sampler_alone_needs_no_peer(tiny_checkpoint: Path) -> None:
    here = bench()
    measure_stages(
        here, subjects(["eager"], [], str(tiny_checkpoint), "cpu", "float32", None), TINY, ["sampler"]
    )
    assert [(r.subject, r.max_abs_difference) for r in here.recorder.results().rows] == [("svd-engine", None)]


def test_a_wrong_sampler_is_never_timed(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "c_skip", lambda sigma: 1 / (sigma**2 + 2))
    here = bench()
    chosen = subjects(["eager"], ["diffusers"], str(tiny_checkpoint), "cpu", "float32", None)
    with pytest.raises(BackendError, match="output of sampler"):
        measure_stages(here, chosen, TINY, ["sampler"])
    assert here.recorder.results().rows == ()


@pytest.mark.parametrize("guidance", ["batched", "none"])
def test_whole_videos_of_both_are_the_same_frames(guidance: str) -> None:
    """On the demo's networks: diffusers resizes for an image encoder of 224 pixels only."""
    here = bench()
    chosen = subjects(["eager"], ["diffusers"], "demo", "cpu", "float32", None)
    setting = documents.setting(
        model="demo", frames=2, height=64, width=64, decode_chunk=2, steps=2, guidance=guidance
    )
    measure_stages(here, chosen, setting, ["whole_video"])
    theirs, ours = here.recorder.results().rows
    assert theirs.max_abs_difference == 0
    assert 0 < (ours.max_abs_difference or 0) < 1e-3
    assert ours.flop == theirs.flop
    assert set(ours.rewrites) <= {rewrite.name for rewrite in rewrites_for("eager", "cpu")}


def test_a_compiled_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: that it is asked for is what is held."""
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compiled.append(f"{type(module).__name__} {how}")
    )
    [peer] = subjects([], ["diffusers-compile"], "demo", "cpu", "float32", None)
    setting = documents.setting(model="demo", frames=2, height=64, width=64, decode_chunk=2, steps=1)
    how = "{'fullgraph': True, 'dynamic': False}"
    open_case(Case(subject=peer, stage="vae_decoder", setting=setting)).close()
    assert compiled == [f"VaeDecoder {how}"]
    compiled.clear()
    running = open_case(Case(subject=peer, stage="whole_video", setting=setting))
    assert compiled == [f"UNetSpatioTemporalConditionModel {how}", f"TemporalDecoder {how}"]
    running()
    assert running.placements[0].backend == "torch.compile"


@pytest.mark.parametrize("name", ["openvino", "Eager", ""])
def test_a_backend_that_there_is_not(name: str) -> None:
    with pytest.raises(SettingsError, match=f"backend: expected {', '.join(BACKENDS)}, got '"):
        subjects([name], [], "demo", "cpu", "float32", None)


def test_tensorrt_runs_a_bundle_or_says_what_to_install(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    (subject,) = subjects(["tensorrt"], [], str(tiny_checkpoint), "cpu", "float32", str(tiny_bundle))
    assert subject.bundle == str(tiny_bundle)
    with pytest.raises(BackendUnavailable, match=re.escape(install_line("tensorrt"))):
        open_case(Case(subject=subject, stage="denoiser_step", setting=TINY))


def test_without_a_bundle_tensorrt_gets_one_with_plans(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def export(_checkpoint: Any, folder: Path, *_: Any) -> None:
        shutil.copytree(tiny_bundle, folder)

    monkeypatch.setattr("svd_export.to_onnx.export_bundle", export)
    monkeypatch.setattr("svd_export.to_tensorrt.build_plans", lambda bundle, **_: built.append(bundle.folder))
    chosen = subjects(["eager", "tensorrt"], [], str(tiny_checkpoint), "cpu", "float32", None)
    with running.ready_subjects(chosen, TINY, lambda _: None) as (eager, tensorrt):
        assert eager.bundle is None
        assert built == [Path(str(tensorrt.bundle))]
        assert built[0].is_dir()
    assert not built[0].exists()


def test_a_peer_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="peer: expected diffusers, diffusers-compile, got 'onediff'"):
        subjects([], ["onediff"], "demo", "cpu", "float32", None)


def test_random_weights_have_a_name_of_their_own() -> None:
    assert checkpoint_of("random:svd-xt").model.frames == 25
    assert checkpoint_of("random:svd").model.random_weights


def test_a_file_that_does_not_tell_its_frames_is_to_be_converted(
    stability_pipeline: Any, tmp_path: Path
) -> None:
    stability_file.write(tmp_path / "mine.safetensors", stability_pipeline)
    with pytest.raises(SettingsError, match=r"does not tell the frames\. .*Run: svd-export convert /.*/mine"):
        checkpoint_of(str(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize("stage", ["image_encoder", "vae_encoder", "denoiser_step", "vae_decoder"])
def test_inputs_fit_the_table(stage: str) -> None:
    spec = stage_spec(
        stage, documents.setting(frames=5, height=64, width=128, decode_chunk=2), Architecture(), FLOAT32
    )
    check_inputs(spec, example_inputs(spec), "cpu")


def test_both_pipelines_are_called_alike() -> None:
    call = video_call(TINY)
    assert (call["num_frames"], call["decode_chunk_size"], call["output_type"]) == (FRAMES, CHUNK, "pt")
    assert call["image"].width / call["image"].height == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    assert call["max_guidance_scale"] == 3


def test_a_step_without_guidance_is_one_half() -> None:
    setting = documents.setting(frames=5, height=64, width=128, decode_chunk=5, guidance="none")
    assert stage_spec("denoiser_step", setting, Architecture(), FLOAT32).guidance == "single"
    call = video_call(setting)
    assert (call["min_guidance_scale"], call["max_guidance_scale"]) == (1, 1)


def test_a_video_that_is_not_these_frames_is_refused(tmp_path: Path) -> None:
    frames = panning(3, 64, 96)
    assert frames.shape == (3, 64, 96, 3)
    path = write_video(frames, tmp_path / "a.mp4", 7)
    check_video(path, frames)
    with pytest.raises(BackendError, match=r"a.mp4: expected \[2, 64, 96, 3\] within 8.0 .*PyAV"):
        check_video(path, frames[:2])
    with pytest.raises(BackendError, match="levels away"):
        check_video(path, np.ascontiguousarray(255 - frames))


def test_a_wrong_video_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(frames: Any, path: Path, fps: int) -> Path:
        return write_video(255 - frames, path, fps)

    monkeypatch.setattr("svd_engine.media.video.write_video", wrong)
    here = bench()
    with pytest.raises(BackendError, match="encoded video"):
        module.video_encode(here, documents.setting(frames=2, height=64, width=64))
    assert here.recorder.results().rows == ()
