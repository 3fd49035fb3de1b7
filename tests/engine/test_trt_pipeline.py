"""The whole pipeline over the TensorRT backend, whose double computes with ONNX Runtime: the same frames.

It shows that every tensor arrives where it belongs.  What TensorRT itself computes needs a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svd_engine import VideoEngine
from svd_engine.backends.choose import Choice
from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.bundle.reading import Bundle
from svd_engine.cli.main import main
from svd_engine.errors import BackendError
from tests.conftest import HEIGHT, WIDTH
from tests.support import tensorrt_double
from tests.support.commands import call
from tests.support.tensorrt_double import Fault, TensorRT
from tests.support.tensorrt_plans import specs

CPU = torch.device("cpu")


@pytest.fixture
def trt(planned: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """Computes each network with ONNX Runtime; "the GPU" is the CPU."""
    double = tensorrt_double.install(monkeypatch)
    backend = OrtBackend(Bundle(planned), CPU)
    networks = {spec.key: backend.open(spec) for spec in specs(planned)}
    double.compute = lambda key, inputs: networks[key](**inputs)

    def choose(backend: str, device: str, bundle: Bundle) -> Choice:
        assert (backend, device) == ("tensorrt", "auto")
        return Choice("tensorrt", CPU, "asked for")

    monkeypatch.setattr("svd_engine.residency.source.choose_for_bundle", choose)
    return double


def video(engine: VideoEngine, steps: int, guidance: float = 3.0) -> Tensor:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    frames = engine(
        image, num_inference_steps=steps, max_guidance_scale=guidance,
        generator=torch.manual_seed(0), output_type="pt",
    ).frames  # fmt: skip
    assert isinstance(frames, Tensor)
    return frames


def test_25_steps_give_the_frames_of_onnx_runtime(
    planned: Path, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame by frame, bit by bit; the denoiser recorded once and replayed 24 times."""
    with VideoEngine.from_bundle(planned, backend="tensorrt") as engine:
        frames = video(engine, steps=25)
        assert [n for n in trt.order() if n in ("cuda.capture", "cuda.replay")] == [
            "cuda.capture", *["cuda.replay"] * 24,
        ]  # fmt: skip
        again = video(engine, steps=2)
    monkeypatch.undo()
    with VideoEngine.from_bundle(planned, backend="onnxruntime", device="cpu") as engine:
        assert torch.equal(frames, video(engine, steps=25))
        assert torch.equal(again, video(engine, steps=2))
    assert trt.order().count("cuda.capture") == 1


def test_both_profiles_of_a_bundle_in_one_engine(
    planned: Path, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second needs more memory than was shared so far."""
    with VideoEngine.from_bundle(planned, backend="tensorrt") as engine:
        made = [video(engine, steps=3, guidance=guidance) for guidance in (3.0, 1.0, 3.0)]
    monkeypatch.undo()
    with VideoEngine.from_bundle(planned, backend="onnxruntime", device="cpu") as engine:
        expected = [video(engine, steps=3, guidance=guidance) for guidance in (3.0, 1.0, 3.0)]
    assert not torch.equal(expected[0], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_an_engine_that_was_closed_loads_again(planned: Path, trt: TensorRT) -> None:
    engine = VideoEngine.from_bundle(planned, backend="tensorrt")
    first = video(engine, steps=2)
    engine.close()
    freed = [name for name in trt.order() if name.endswith("freed")]
    assert freed.count("ICudaEngine.freed") == freed.count("IExecutionContext.freed") == 5
    assert "Runtime.freed" in freed
    assert torch.equal(video(engine, steps=2), first)
    engine.close()


def test_one_network_at_a_time(planned: Path, trt: TensorRT) -> None:
    """Every network is gone, with its share of memory, before the next one is loaded; the frames stay."""
    with VideoEngine.from_bundle(planned, backend="tensorrt") as engine:
        expected = video(engine, steps=3)
    trt.calls.clear()
    with VideoEngine.from_bundle(planned, backend="tensorrt", swap_networks=True) as engine:
        assert torch.equal(video(engine, steps=3), expected)
        assert trt.order().count("cuda.replay") == 2
    shared = [name for name, given in trt.calls if "TensorRT's activations" in given]
    assert shared == ["cuda.empty", "cuda.freed"] * 5
    life = [name for name in trt.order() if name in ("Runtime.deserialize_cuda_engine", "ICudaEngine.freed")]
    assert life == ["Runtime.deserialize_cuda_engine", "ICudaEngine.freed"] * 5


def test_a_failure_half_way(planned: Path, trt: TensorRT) -> None:
    engine = VideoEngine.from_bundle(planned, backend="tensorrt")
    trt.faults["cuda.replay"] = Fault(raises=BackendError("GPU", expected="life", got="none", remedy="Wait."))
    with pytest.raises(BackendError), engine:
        video(engine, steps=4)
    assert trt.order().count("ICudaEngine.freed") == 5


def test_the_command_and_its_report(
    planned: Path, trt: TensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every stage ran, by which plan, and why."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    arguments = ["-o", tmp_path / "out.gif", "--bundle", planned, "--backend", "tensorrt", "--steps", 2]
    assert call(main, "generate", tmp_path / "in.png", *arguments, "--report", tmp_path / "run.json") == 0
    assert "tensorrt on cpu (asked for)" in capsys.readouterr().err
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["chosen_because"] == "asked for"
    plans = [plan.file for plan in Bundle(planned).manifest.plans]
    for stage in ("image_encoder", "vae_encoder", "denoiser", "vae_decoder"):
        placed = report["stages"][stage]
        assert placed["backend"] == "tensorrt"
        assert placed["dtype"] == ("float32" if stage == "vae_encoder" else "float16")
        version, _, plan = placed["detail"].partition(", ")
        assert version == "TensorRT 10.14.1.48"
        assert plan in plans
        assert plan.startswith(stage)
