"""The pieces of the served model without a server: inputs, watching, previews, metrics, the model itself."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from svd_engine.backends.fake import FakeBackend
from svd_engine.errors import BackendError, ImageError, NonFiniteOutput, SettingsError
from svd_engine.image import decode_image, load_image, to_vae_pixels
from svd_engine.networks.spec import Architecture, Profile, specs_of
from svd_export.triton_model import inputs, preview
from svd_export.triton_model.metrics import OUTCOMES
from svd_export.triton_model.service import Service
from svd_export.triton_model.watch import Cancelled, Watch, WatchedBackend
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.paths import PHOTOGRAPH

PICTURE = {"image": np.array([PHOTOGRAPH.read_bytes()], object)}


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[Service]:
    made = Service(tiny_bundle, "cpu")
    made.warm_up()
    yield made
    made.close()


def asked(**arrays: np.ndarray) -> inputs.Request:
    return inputs.read({**PICTURE, **arrays}, 100, 4)


def test_absent_inputs_keep_the_engine_s_defaults() -> None:
    assert asked(seed=np.uint64([3])) == inputs.Request(PICTURE["image"][0], 3, "mp4", 0, {})


def test_inputs_become_python_s_numbers() -> None:
    given = asked(fps=np.int32([5]), noise_aug_strength=np.float32([0.5]), sigmas=np.float32([2, 1]))
    assert given.sampling == {"fps": 5, "noise_aug_strength": 0.5, "sigmas": [2.0, 1.0]}
    assert type(given.sampling["fps"]) is int


def test_a_picture_s_content_reads_like_its_file() -> None:
    content = PHOTOGRAPH.read_bytes()
    assert np.array_equal(decode_image(content), load_image(PHOTOGRAPH))
    for spoiled, got in ((b"", "an empty file"), (content[: len(content) // 2], "a whole picture")):
        with pytest.raises(ImageError, match=got):
            decode_image(spoiled)


def test_no_picture_is_refused() -> None:
    with pytest.raises(SettingsError, match="image: expected an encoded picture"):
        inputs.read({"seed": np.uint64([1])}, 100, 4)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_cancelling_stops_before_any_network(service: Service, calls: int) -> None:
    """Image encoder, VAE encoder, two steps, decoders: after `calls` of them no other runs."""
    asks = iter([False] * calls + [True])
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "after", lambda self, network, given, output: ran.append(network))
        with pytest.raises(Cancelled):
            service.make(asked(num_inference_steps=np.int32([2])), lambda: next(asks))
    assert ran == ["image_encoder", "vae_encoder", "denoiser", "denoiser", "vae_decoder"][:calls]


def test_between_requests_no_tensor_is_held(service: Service) -> None:
    steps: list[tuple[int, bool]] = []
    made = service.make(
        asked(num_inference_steps=np.int32([3]), preview_every=np.int32([3])),
        lambda: False,
        lambda done, shown: steps.append((done, shown is not None)),
    )
    assert steps == [(1, False), (2, False), (3, True)]
    assert (len(made.videos), made.frames) == (1, None)
    held = service.backend.watch
    assert (held.pixels, held.latent, held.denoised) == (None, None, None)


def test_watching_passes_on_what_a_backend_is() -> None:
    watched = WatchedBackend(FakeBackend())
    assert (watched.name, watched.device) == ("fake", torch.device("cpu"))
    for spec in specs_of(Profile(FRAMES, HEIGHT, WIDTH), Architecture()):
        watched.watch = Watch(lambda: True)
        network = watched.open(spec)
        assert (network.spec, network.placement.backend) == (spec, "fake")
        with pytest.raises(Cancelled):
            network(**{t.name: torch.zeros(t.shape) for t in spec.inputs})
    assert watched.backend.calls == []  # type: ignore[attr-defined]


def test_a_preview_of_an_encoded_photograph_looks_like_it() -> None:
    """A latent that is a linear image of the photograph, with noise in the fourth channel, is undone."""
    pixels = to_vae_pixels(decode_image(PHOTOGRAPH.read_bytes()), 64, 96)
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, (8, 12))
    mixed = torch.einsum("nchw,cd->ndhw", small, torch.randn(3, 3, generator=torch.manual_seed(0))) + 0.3
    latent = torch.cat([mixed, torch.randn(1, 1, 8, 12)], dim=1)
    shown = preview.project(latent, preview.fit(pixels, latent))
    assert float((shown - (small / 2 + 0.5)).abs().max()) < 1e-3


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
    sys.modules.pop("svd_export.triton_model.model", None)
    module = importlib.import_module("svd_export.triton_model.model")
    made = module.TritonPythonModel()
    limits = {"max_num_inference_steps": "100", "max_num_videos_per_prompt": "4", "bundle": tiny_bundle.name}
    config = {"parameters": {key: {"string_value": value} for key, value in limits.items()}}
    made.initialize({
        "model_config": json.dumps(config), "model_repository": str(tiny_bundle.parent), "model_name": "svd",
        "model_instance_name": "svd_0", "model_instance_kind": "CPU", "model_instance_device_id": "0",
    })  # fmt: skip
    yield made
    made.finalize()
    del sys.modules["svd_export.triton_model.model"]


def execute(model: Any) -> Any:
    tensors = [
        SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a)
        for name, array in {**PICTURE, "num_inference_steps": np.int32([1])}.items()
    ]
    (response,) = model.execute([SimpleNamespace(inputs=lambda: tensors, is_cancelled=lambda: False)])
    return response


def failing(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


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
    assert model.metrics._requests.values == {**dict.fromkeys(OUTCOMES, 0.0), "failed": 1.0, "done": 1.0}


def test_black_frames_fail_one_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is the request's or the checkpoint's fault; the networks are as good as before."""
    black = NonFiniteOutput("network", expected="numbers", got="NaN", remedy="None.")
    monkeypatch.setattr("svd_engine.pipeline.generate", failing(black))
    assert execute(model).error.code == "internal"
    assert model.is_ready()


def test_outcomes_are_counted_from_zero(model: Any) -> None:
    assert model.metrics._requests.values == dict.fromkeys(OUTCOMES, 0.0)
    execute(model)
    assert model.metrics._requests.values == {**dict.fromkeys(OUTCOMES, 0.0), "done": 1.0}
