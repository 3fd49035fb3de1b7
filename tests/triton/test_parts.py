"""The pieces of the served model without a server: inputs, metrics, the model itself."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svd_engine.errors import BackendError, ImageError, NonFiniteOutput, SettingsError
from svd_engine.media.image import decode_image, load_image
from svd_engine.serving.triton import inputs
from svd_engine.serving.triton.metrics import REQUEST_OUTCOMES
from svd_engine.serving.watch import Watch
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support.paths import PHOTOGRAPH

PICTURE = {"image": np.array([PHOTOGRAPH.read_bytes()], object)}


def asked(**arrays: np.ndarray) -> inputs.Request:
    return inputs.read({**PICTURE, **arrays}, 100, 4, 25)


def test_absent_inputs_keep_the_engine_s_defaults() -> None:
    assert asked(seed=np.uint64([3])) == inputs.Request(PICTURE["image"][0], 3, "mp4", 0, {})


def test_inputs_become_python_s_numbers() -> None:
    given = asked(fps=np.int32([5]), noise_aug_strength=np.float32([0.5]), sigmas=np.float32([2, 1]))
    assert given.sampling == {"fps": 5, "noise_aug_strength": 0.5, "sigmas": [2.0, 1.0]}
    assert type(given.sampling["fps"]) is int


def test_names_and_lists_of_the_sampling() -> None:
    given = asked(
        sampler=np.array([b"heun"], object), schedule=np.array([b"ays"], object),
        guidance_scales=np.float32([1, 2.5]), churn=np.float32([0.5]),
    )  # fmt: skip
    assert given.sampling == {
        "sampler": "heun", "schedule": "ays", "guidance_scales": [1.0, 2.5], "churn": 0.5
    }  # fmt: skip


@pytest.mark.parametrize("sampler", [b"heun", b"dpmpp-2s-ancestral"])
def test_the_limit_counts_evaluations(sampler: bytes) -> None:
    """A step of some samplers is two; whether there is such a sampler is the engine's to say."""
    named = {"sampler": np.array([sampler], object)}
    asked(**named, num_inference_steps=np.int32([50]))
    for more in ({"num_inference_steps": np.int32([51])}, {"sigmas": np.arange(52, 0, -1, np.float32)}):
        with pytest.raises(SettingsError, match="evaluations of the denoiser: expected at most 100, got 102"):
            asked(**named, **more)
    asked(sampler=np.array([b"lms"], object), num_inference_steps=np.int32([100]))
    asked(sampler=np.array([b"none"], object), num_inference_steps=np.int32([100]))


def test_without_steps_the_model_s_own_count() -> None:
    """SV3D has 50, a model of few steps 4."""
    heun = {**PICTURE, "sampler": np.array([b"heun"], object)}
    inputs.read(heun, 8, 4, 4)
    with pytest.raises(SettingsError, match="evaluations of the denoiser: expected at most 8, got 100"):
        inputs.read(heun, 8, 4, 50)


def test_a_picture_s_content_reads_like_its_file() -> None:
    content = PHOTOGRAPH.read_bytes()
    assert np.array_equal(decode_image(content), load_image(PHOTOGRAPH))
    for spoiled, got in ((b"", "an empty file"), (content[: len(content) // 2], "a whole picture")):
        with pytest.raises(ImageError, match=got):
            decode_image(spoiled)


def test_no_picture_is_refused() -> None:
    with pytest.raises(SettingsError, match="image: expected an encoded picture"):
        inputs.read({"seed": np.uint64([1])}, 100, 4, 25)


class StandIn(ModuleType):
    """As much of triton_python_backend_utils as the model uses."""

    class TritonError(Exception):
        CANCELLED, INVALID_ARG, INTERNAL = "cancelled", "invalid", "internal"

        def __init__(self, message: str, code: str) -> None:
            super().__init__(message)
            self.code = code

    class MetricFamily:
        COUNTER = "counter"

        def __init__(self, **_: Any) -> None:
            self.values: dict[str, float] = {}

        def Metric(self, labels: dict[str, str]) -> Any:
            key = labels.get("outcome") or labels["stage"]
            self.values[key] = 0.0
            return SimpleNamespace(increment=lambda by: self.values.update({key: self.values[key] + by}))

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Logger = SimpleNamespace(log_info=print, log_error=print)
    Tensor = staticmethod(lambda name, array: (name, array))

    @staticmethod
    def InferenceResponse(outputs: list[Any], error: Any = None) -> Any:
        return SimpleNamespace(outputs=dict(outputs), error=error)

    @staticmethod
    def using_decoupled_model_transaction_policy(config: dict[str, Any]) -> bool:
        return False


@pytest.fixture
def model(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name = "triton_python_backend_utils"
    monkeypatch.setitem(sys.modules, name, StandIn(name))
    sys.modules.pop("svd_engine.serving.triton.model", None)
    module = importlib.import_module("svd_engine.serving.triton.model")
    made = module.TritonPythonModel()
    limits = {"max_num_inference_steps": "100", "max_num_videos_per_prompt": "4", "bundle": tiny_bundle.name}
    config = {"parameters": {key: {"string_value": value} for key, value in limits.items()}}
    made.initialize({
        "model_config": json.dumps(config), "model_repository": str(tiny_bundle.parent), "model_name": "svd",
        "model_instance_name": "svd_0", "model_instance_kind": "CPU", "model_instance_device_id": "0",
    })  # fmt: skip
    yield made
    made.finalize()
    del sys.modules["svd_engine.serving.triton.model"]


def execute(model: Any, cancelled: Callable[[], bool] = lambda: False, **arrays: np.ndarray) -> Any:
    """The only response, or of a decoupled model the list of them."""
    tensors = [
        SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a)
        for name, array in {**PICTURE, "num_inference_steps": np.int32([1]), **arrays}.items()
    ]
    sent: list[Any] = []
    sender = SimpleNamespace(is_cancelled=cancelled, send=lambda response, flags=0: sent.append(response))
    request = SimpleNamespace(
        inputs=lambda: tensors, is_cancelled=cancelled, get_response_sender=lambda: sender
    )
    responses = model.execute([request])
    return sent if responses is None else responses[0]


def failing(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


NETWORKS = ["image_encoder", "vae_encoder", "denoiser", "denoiser", "vae_decoder", "vae_decoder"]


@pytest.mark.parametrize("calls", range(len(NETWORKS)))
def test_a_client_that_cancels_stops_its_request_before_any_network(
    model: Any, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Asked when its turn comes, then before every network: after `calls` of them no other runs."""
    asks = iter([False] * (calls + 1) + [True])
    ran: list[str] = []
    monkeypatch.setattr(Watch, "on_network_run", lambda self, network: ran.append(network))
    response = execute(model, lambda: next(asks), num_inference_steps=np.int32([2]))
    assert (response.error.code, str(response.error)) == ("cancelled", "cancelled by the client")
    assert ran == NETWORKS[:calls]
    assert model.metrics._requests.values == {**dict.fromkeys(REQUEST_OUTCOMES, 0.0), "cancelled": 1.0}
    assert execute(model).error is None


def test_a_bad_request_is_refused_and_counted(model: Any) -> None:
    for bad in ({"image": np.array([b"hello"], object)}, {"fps": np.int32([0])}):
        assert execute(model, **bad).error.code == "invalid"
    assert model.metrics._requests.values == {**dict.fromkeys(REQUEST_OUTCOMES, 0.0), "refused": 2.0}


def test_a_stream_tells_every_step_and_shows_what_is_due(model: Any) -> None:
    model.decoupled = True
    call = {"num_inference_steps": np.int32([3]), "preview_every": np.int32([2]), "seed": np.uint64([7])}
    *steps, last = execute(model, **call)
    assert [response.outputs["step"].tolist() for response in steps] == [[1], [2], [3]]
    assert ["preview" in response.outputs for response in steps] == [False, True, False]
    with Image.open(io.BytesIO(steps[1].outputs["preview"][0])) as shown:
        assert (shown.format, shown.size) == ("WEBP", (WIDTH // 2, HEIGHT // 2))
    assert last.outputs.keys() == {"video", "seed", "report"}
    del call["preview_every"]
    assert execute(model, **call)[-1].outputs["video"] == last.outputs["video"]


def test_frames_instead_of_files_and_the_caller_s_noise(model: Any) -> None:
    latents = np.zeros((1, FRAMES, 4, HEIGHT // 2, WIDTH // 2), np.float32)
    latents.flags.writeable = False  # as Triton's are
    response = execute(model, output_type=np.array([b"frames"], object), latents=latents)
    assert response.error is None
    assert response.outputs["frames"].shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert "video" not in response.outputs


BROKEN = BackendError("network", expected="a run", got="a failure", remedy="None.")


@pytest.mark.parametrize("error", [BROKEN, MemoryError("out of memory")], ids=str)
def test_what_fails_for_good_is_not_ready(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A network fails, and fails again when everything was loaded anew; then it works, and is ready again."""
    assert model.is_ready()
    with monkeypatch.context() as broken:
        broken.setattr("svd_engine.pipeline.generate", failing(error))
        refused = execute(model)
        assert (refused.error.code, str(refused.error)) == ("internal", str(error))
        assert not model.is_ready()
    assert execute(model).error is None
    assert model.is_ready()
    assert model.metrics._requests.values == {
        **dict.fromkeys(REQUEST_OUTCOMES, 0.0),
        "failed": 1.0,
        "done": 1.0,
    }


def test_black_frames_fail_one_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is the request's or the checkpoint's fault; the networks are as good as before."""
    black = NonFiniteOutput("network", expected="numbers", got="NaN", remedy="None.")
    monkeypatch.setattr("svd_engine.pipeline.generate", failing(black))
    assert execute(model).error.code == "internal"
    assert model.is_ready()


def test_outcomes_are_counted_from_zero(model: Any) -> None:
    assert model.metrics._requests.values == dict.fromkeys(REQUEST_OUTCOMES, 0.0)
    execute(model)
    assert model.metrics._requests.values == {**dict.fromkeys(REQUEST_OUTCOMES, 0.0), "done": 1.0}
