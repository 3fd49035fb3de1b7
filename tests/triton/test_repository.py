"""What `svd-export triton` writes, against Triton's own schema and the graphs of the bundle."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from svd_engine import VideoEngine
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import SettingsError
from svd_engine.serving.triton.inputs import CALL
from svd_export.cli import main
from svd_export.triton import QueueLimits, seconds, write_repository
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support import damage, tensorrt_plans
from tests.support.commands import call

VIDEO_MODELS = ["svd", "svd_stream"]


def config(path: Path) -> Any:
    """Strict: an unknown field or a wrong type is an error."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def written(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "models"
    command = ("triton", tiny_bundle, "-o", folder, "--instances", 2, "--max-queue", 3, "--timeout", "1.5m")
    assert call(main, *command) == 0
    return folder


def test_every_model_has_the_name_of_its_folder_and_a_file(written: Path, tiny_bundle: Path) -> None:
    networks = {entry.spec.key for entry in Bundle(tiny_bundle).manifest.networks}
    assert {path.name for path in written.iterdir()} == {*VIDEO_MODELS, *networks}
    for folder in written.iterdir():
        assert config(folder / "config.pbtxt").name == folder.name
        file = "model.py" if folder.name in VIDEO_MODELS else "model.onnx"
        assert (folder / "1" / file).is_file()
    files = [path for path in written.rglob("*") if not path.is_dir()]
    assert not [path for path in files if path.is_symlink() or path.stat().st_nlink > 1]


def test_the_bundle_comes_along(written: Path) -> None:
    """Whole, so the repository works where the bundle is not."""
    Bundle(written / "svd/1/bundle").check_hashes()
    bundle = config(written / "svd_stream/config.pbtxt").parameters["bundle"].string_value
    assert (written / "svd_stream" / bundle).resolve() == written / "svd/1/bundle"


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_queue_instances_and_transactions(written: Path, name: str) -> None:
    model = config(written / name / "config.pbtxt")
    policy = model.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (3, 90_000_000)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    (group,) = model.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_AUTO)
    assert model.model_transaction_policy.decoupled is (name == "svd_stream")
    assert (model.backend, model.max_batch_size) == ("python", 0)


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_every_argument_of_the_engine_is_an_optional_input(written: Path, name: str) -> None:
    """Under the names of diffusers' call; what has no place in a request is named here."""
    theirs = inspect.signature(VideoEngine.__call__).parameters
    elsewhere = {
        "self", "image", "generator", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs", "cancel", "observer",
    }  # fmt: skip
    assert {tensor.name for tensor in CALL} - {"image", "seed"} == set(theirs) - elsewhere
    ours = {"output_type", *(["preview_every"] if name == "svd_stream" else [])}
    inputs = config(written / name / "config.pbtxt").input
    assert {tensor.name for tensor in inputs} == {tensor.name for tensor in CALL} | ours
    assert [tensor.name for tensor in inputs if not tensor.optional] == ["image"]


def test_the_frames_shared_memory_is_stated(written: Path) -> None:
    size = FRAMES * HEIGHT * WIDTH * 3
    assert f"takes up to {size} bytes" in (written / "svd/config.pbtxt").read_text()


def test_the_networks_dims_are_the_graphs(written: Path, tiny_bundle: Path) -> None:
    for entry in Bundle(tiny_bundle).manifest.networks:
        folder = written / entry.spec.key
        model, graph = config(folder / "config.pbtxt"), onnx.load(folder / "1/model.onnx").graph
        assert (model.backend, model.max_batch_size) == ("onnxruntime", 0)
        for stated, real in ((model.input, graph.input), (model.output, graph.output)):
            shapes = {t.name: [d.dim_value for d in t.type.tensor_type.shape.dim] for t in real}
            assert {
                t.name: list(t.reshape.shape if t.HasField("reshape") else t.dims) for t in stated
            } == shapes
            assert {t.type.tensor_type.elem_type for t in real} == {onnx.TensorProto.FLOAT}
            assert {t.data_type for t in stated} == {model_config_pb2.TYPE_FP32}
        (group,) = model.instance_group
        assert group.count == 1


def test_the_networks_warm_up_with_every_input(written: Path, tiny_bundle: Path) -> None:
    for entry in Bundle(tiny_bundle).manifest.networks:
        folder = written / entry.spec.key
        model = config(folder / "config.pbtxt")
        (sample,) = model.model_warmup
        assert {name: list(i.dims) for name, i in sample.inputs.items()} == {
            tensor.name: list(tensor.dims) for tensor in model.input
        }
        for name, data in sample.inputs.items():
            if data.WhichOneof("input_data_type") == "input_data_file":
                assert np.fromfile(folder / "warmup" / name, np.float32).tolist() == [1.0]
            else:
                assert data.zero_data


def test_a_plan_is_a_tensorrt_model_on_a_gpu(tiny_half_bundle: Path, tmp_path: Path) -> None:
    """When it holds its weights; a stripped one, which Triton cannot complete, is left out."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    specs = {spec.network: spec for spec in tensorrt_plans.specs(folder)}
    whole = tensorrt_plans.add_plan(folder, specs["denoiser"], stripped=False)
    tensorrt_plans.add_plan(folder, specs["vae_decoder"], stripped=True)
    names = write_repository(Bundle(folder), tmp_path / "models", QueueLimits())
    (name,) = set(names) - {*VIDEO_MODELS, *(entry.spec.key for entry in Bundle(folder).manifest.networks)}
    assert f"{name}.plan" == whole.file
    model = config(tmp_path / "models" / name / "config.pbtxt")
    assert (model.name, model.backend) == (name, "tensorrt")
    assert model.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert [tensor.name for tensor in model.input] == [tensor.name for tensor in specs["denoiser"].inputs]
    copied = tmp_path / "models" / name / "1/model.plan"
    assert copied.read_bytes() == (folder / whole.file).read_bytes()


@pytest.mark.parametrize(("text", "value"), [("120s", 120.0), ("2m", 120.0), ("500ms", 0.5), ("1.5s", 1.5)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--timeout", "120"), "timeout: expected a duration such as 120s, 2m or 500ms, got '120'"),
        (("--timeout", "0s"), "timeout: expected a duration"),
        (("--timeout", "-1s"), "timeout: expected a duration"),
        (("--instances", "0"), "instances: expected a whole number of at least 1"),
        (("--max-queue", "0"), "max-queue: expected a whole number of at least 1"),
    ],
)
def test_wrong_options(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    assert call(main, "triton", tiny_bundle, "-o", tmp_path / "models", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_or_a_taken_place_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    damage.flip(folder / "denoiser.bin")
    assert call(main, "triton", folder, "-o", tmp_path / "models") == 1
    assert "file denoiser.bin of bundle" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert call(main, "triton", tiny_bundle, "-o", folder) == 1
    assert "expected a name that is free" in capsys.readouterr().err


def test_a_service_s_numbers_are_checked() -> None:
    with pytest.raises(SettingsError, match="instances"):
        QueueLimits(instances=True)
