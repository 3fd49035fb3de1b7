"""TensorRT for RTX over the recording double: its runtime configuration, kernels that are compiled on the
card and kept, its own CUDA graphs, its word on plans that cannot run, and the failure of each."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import VideoEngine, info
from svd_engine.backends import choose
from svd_engine.backends.fake import FUNCTIONS
from svd_engine.backends.tensorrt import jit_cache
from svd_engine.backends.tensorrt.network import TrtBackend, TrtNetwork
from svd_engine.bundle.flavours import TENSORRT_RTX, Host, capability_target
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BackendUnavailable, OutputError, SettingsError
from svd_engine.networks.parity import example_inputs
from tests.support import damage, tensorrt_double, tensorrt_plans
from tests.support.networks import only
from tests.support.tensorrt_double import GPU, EngineValidity, Fault, TensorRT
from tests.support.tensorrt_plans import denoiser, specs

CPU = torch.device("cpu")
VERSION = "1.7.1.116"
HOST = Host("tensorrt-rtx", VERSION, GPU, (8, 9))
CARDS = capability_target(((8, 6), (8, 9), (12, 0)))


@pytest.fixture
def folder(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a plan of every network for three kinds of RTX cards."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    for spec in specs(folder):
        tensorrt_plans.add_plan(folder, spec, host=HOST, target=CARDS)
    return folder


@pytest.fixture
def trt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """It computes what the fake backend does."""
    double = tensorrt_double.install(monkeypatch, VERSION, TENSORRT_RTX, (8, 9))
    by_key = {spec.key: spec for spec in specs(folder)}
    double.compute = lambda key, inputs: FUNCTIONS[by_key[key].network](inputs, by_key[key])
    monkeypatch.setattr("svd_engine.backends.tensorrt.network.driver_version", lambda: "580.65")
    return double


def opened(folder: Path, cache: Path | None = None, network: str = "denoiser") -> TrtNetwork:
    spec = next(spec for spec in specs(folder) if spec.network == network)
    made = TrtBackend(Bundle(folder), CPU, TENSORRT_RTX, jit_cache=cache).open(spec)
    assert isinstance(made, TrtNetwork)
    return made


def test_opening_a_network(trt: TensorRT, folder: Path) -> None:
    """A configuration with the caller's memory, its own graphs, and a cache; then the context."""
    network = opened(folder)
    tensors = len(network.spec.inputs) + 1
    assert [name for name in trt.order() if not name.endswith("freed")] == [
        "Runtime.__init__",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_runtime_config",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "ICudaEngine.create_execution_context",
        *["cuda.empty"] * tensors,
        *["IExecutionContext.set_tensor_address"] * tensors,
    ]
    assert trt.called("ICudaEngine.create_execution_context") == [("USER_MANAGED", "WHOLE_GRAPH_CAPTURE")]
    assert network.placement.backend == "tensorrt-rtx"
    assert network.placement.detail.startswith(f"TensorRT for RTX {VERSION}, denoiser-")


def test_only_the_denoiser_is_captured(trt: TensorRT, folder: Path) -> None:
    opened(folder, network="vae_encoder")
    assert trt.called("ICudaEngine.create_execution_context") == [("USER_MANAGED", "DISABLED")]


def test_the_runtime_captures_and_not_we(trt: TensorRT, folder: Path) -> None:
    network = opened(folder)
    inputs = example_inputs(network.spec)
    for _ in range(3):
        assert torch.equal(only(network(**inputs)), only(FUNCTIONS["denoiser"](inputs, network.spec)))
    assert len(trt.called("IExecutionContext.execute_async_v3")) == 3
    assert trt.called("cuda.capture", "cuda.replay") == []


def test_kernels_are_compiled_before_the_first_call_and_kept(
    trt: TensorRT, folder: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "kept"
    network = opened(folder, cache)
    assert network.needs_warm_up
    network.warm_up()
    assert not network.needs_warm_up
    assert f"compiling kernels of denoiser for this GPU, kept in {cache}" in notices.text
    (file,) = cache.iterdir()
    plan = Bundle(folder).plans(network.spec)[0]
    sha256 = Bundle(folder).manifest.files[plan.file].sha256
    assert file.name == f"{sha256[:16]}-nvidia-any-80gb-driver580.65-trtrtx{VERSION}.jit"
    network.warm_up()  # once
    assert len(trt.called("IExecutionContext.execute_async_v3")) == 1

    trt.calls.clear()
    again = opened(folder, cache)
    assert trt.called("IRuntimeCache.deserialize") == [(network.spec.key.encode(),)]
    written = file.stat().st_mtime_ns
    again(**example_inputs(again.spec))
    assert file.stat().st_mtime_ns == written  # nothing new was compiled


def test_a_first_call_without_warm_up_keeps_them_too(trt: TensorRT, folder: Path, tmp_path: Path) -> None:
    network = opened(folder, tmp_path / "kept")
    network(**example_inputs(network.spec))
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_without_a_cache_nothing_is_kept(trt: TensorRT, folder: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    network = opened(folder)
    network(**example_inputs(network.spec))
    assert trt.called("IRuntimeCache.serialize", "IRuntimeCache.deserialize") == []
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-1], lambda c: b"", lambda c: c[:-1] + b"!", lambda c: b"x" * 99]
)
def test_a_damaged_cache_is_started_anew(
    trt: TensorRT, folder: Path, tmp_path: Path, notices: pytest.LogCaptureFixture, spoil: object
) -> None:
    network = opened(folder, tmp_path / "kept")
    network.warm_up()
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))  # type: ignore[operator]
    trt.calls.clear()
    opened(folder, tmp_path / "kept").warm_up()
    assert f"JIT cache {file} is damaged: kernels are compiled anew" in notices.text
    assert trt.called("IRuntimeCache.deserialize") == []  # kernels are code
    assert file.read_bytes() == whole


def test_a_foreign_cache_is_started_anew(
    trt: TensorRT, folder: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    network = opened(folder, tmp_path / "kept")
    network.warm_up()
    (file,) = (tmp_path / "kept").iterdir()
    jit_cache.JitCache(file).write(b"of an older driver")
    opened(folder, tmp_path / "kept").warm_up()
    assert "of another machine or driver: kernels are compiled anew" in notices.text
    assert jit_cache.JitCache(file).read() == network.spec.key.encode()


def test_a_cache_that_is_not_taken(
    trt: TensorRT, folder: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    trt.faults["IRuntimeConfig.set_runtime_cache"] = Fault(returns=False)
    opened(folder, tmp_path / "kept").warm_up()
    assert "did not take its JIT cache: nothing is kept" in notices.text
    assert not (tmp_path / "kept").exists()


def test_nothing_to_serialise(trt: TensorRT, folder: Path, tmp_path: Path) -> None:
    trt.faults["IRuntimeCache.serialize"] = Fault(returns=None)
    opened(folder, tmp_path / "kept").warm_up()
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_cannot_be_written(
    trt: TensorRT, folder: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """The default one may be read-only: that is said, and the video is made."""
    (tmp_path / "file").write_text("")
    network = opened(folder, tmp_path / "file" / "kept")
    network(**example_inputs(network.spec))
    assert "cannot be written" in notices.text or "cannot be read" in notices.text


def test_a_folder_that_was_named_must_be_writable(
    trt: TensorRT, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    here = choose.Choice("tensorrt-rtx", CPU, "asked for")
    monkeypatch.setattr("svd_engine.residency.source.choose_for_bundle", lambda *_: here)
    with pytest.raises(OutputError, match="of the JIT cache: expected a folder that can be written"):
        VideoEngine.from_bundle(folder, backend="tensorrt-rtx", jit_cache=tmp_path / "file" / "kept")


def test_no_folder_for_a_backend_that_compiles_nothing(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(SettingsError, match="jit_cache with backend onnxruntime: expected it to be left out"):
        VideoEngine.from_bundle(folder, backend="onnxruntime", jit_cache=kept)
    with VideoEngine.from_bundle(folder, device="cpu", jit_cache=kept) as engine:
        assert engine.choice.backend == "onnxruntime"
    assert not kept.exists()


@pytest.mark.parametrize("wrong", [7, True, "", ["a"]])
def test_a_jit_cache_that_is_no_folder(folder: Path, wrong: Any) -> None:
    with pytest.raises(SettingsError, match='jit_cache: expected "auto", the path of a folder'):
        VideoEngine.from_bundle(folder, jit_cache=wrong)


def test_a_full_disk_leaves_no_partial_file(
    tmp_path: Path, notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    jit_cache.JitCache(tmp_path / "kept" / "a.jit").write(b"kernels")
    assert "cannot be written: [Errno 28]" in notices.text
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "variable", "rest"),
    [("linux", "XDG_CACHE_HOME", ""), ("win32", "LOCALAPPDATA", ""), ("darwin", "HOME", "Library/Caches")],
)
def test_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, rest: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert jit_cache.default_folder() == tmp_path / rest / "svd-engine" / "jit"


def test_a_plan_that_does_not_load_says_why(trt: TensorRT, folder: Path) -> None:
    trt.faults["Runtime.deserialize_cuda_engine"] = Fault(returns=None, says="CUDA error 35")
    trt.faults["Runtime.get_engine_validity"] = Fault(returns=(EngineValidity.INVALID, 2 | 4))
    with pytest.raises(BackendError) as caught:
        opened(folder)
    assert caught.value.got == "CUDA error 35; unsupported cc, old cuda driver"
    assert caught.value.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt-rtx"


@pytest.mark.parametrize(
    "call", ["ICudaEngine.create_execution_context", "IExecutionContext.execute_async_v3"]
)
def test_what_fails_says_which_flavour(trt: TensorRT, folder: Path, call: str) -> None:
    trt.faults[call] = Fault(returns=None, says="no")
    with pytest.raises(BackendError, match=r"TensorRT for RTX.* got no"):
        opened(folder).warm_up()


def test_a_whole_video_has_a_stage_for_the_compiler(
    trt: TensorRT, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second video has none: kernels are there."""
    monkeypatch.setattr(choose, "resolve", lambda device: CPU)
    monkeypatch.setattr(
        choose, "choose_for_bundle", lambda *_: choose.Choice("tensorrt-rtx", CPU, "asked for")
    )
    monkeypatch.setattr("svd_engine.residency.source.choose_for_bundle", choose.choose_for_bundle)
    engine = VideoEngine.from_bundle(folder, backend="tensorrt-rtx", jit_cache=tmp_path / "kept")
    call = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    image = torch.rand(1, 3, engine.default.height, engine.default.width)
    with engine:
        first, second = engine(image, **call), engine(image, **call)
    assert "compile_kernels" in first.report.stage_ms
    assert "compile_kernels" not in second.report.stage_ms
    assert first.report.stages["denoiser"].backend == "tensorrt-rtx"
    assert len(list((tmp_path / "kept").iterdir())) == len(first.report.stages)


def test_auto_takes_a_fitting_rtx_plan(trt: TensorRT, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    choice = choose.choose_for_bundle("auto", "auto", Bundle(folder))
    assert choice.backend == "tensorrt-rtx"
    assert choice.reason == "a CUDA GPU, and a TensorRT for RTX plan for it of every network"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice = choose.choose_for_bundle("auto", "auto", Bundle(folder))
    assert choice.backend == "onnxruntime"
    assert "built for sm86, sm89, sm120, here is sm90" in choice.reason


def test_a_plan_for_another_card_or_version(
    trt: TensorRT, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(BackendUnavailable, match="built for sm86, sm89, sm120, here is sm90"):
            opened(folder)
    trt.__version__ = "1.8.0.1"
    with pytest.raises(BackendUnavailable, match=r"for RTX 1\.7\.1\.116, here is 1\.8\.0\.1"):
        opened(folder)


def test_plans_of_the_other_flavour_are_no_reason(trt: TensorRT, folder: Path) -> None:
    """TensorRT proper, asked for, says that there is none of its own."""
    assert "no plan" in choose.refusal(
        Bundle(folder), denoiser(folder), Host("tensorrt", "10.14.1.48", GPU, (8, 9))
    )


def test_info_asks_the_library(trt: TensorRT, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    first = next(iter(info.plan_facts(Bundle(folder)).values()))
    assert "TensorRT for RTX 1.7.1.116, for sm86, sm89, sm120, float16" in first
    assert first.endswith("; runs on cuda:0")
    trt.faults["Runtime.get_engine_validity"] = Fault(returns=(EngineValidity.INVALID, 4))
    first = next(iter(info.plan_facts(Bundle(folder)).values()))
    assert first.endswith(
        f"; not here: old cuda driver; run: svd-export tensorrt {folder} --flavour tensorrt-rtx"
    )
    trt.faults["Runtime.get_engine_validity"] = Fault(returns=(EngineValidity.INVALID, 0))
    assert "invalid, without a reason" in next(iter(info.plan_facts(Bundle(folder)).values()))
