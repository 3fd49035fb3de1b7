"""What runs around the networks, timed with pytest-benchmark: `pytest benchmarks --benchmark-only`.

Nothing here asserts a time.  The networks of the dispatch rows are a few hundred thousand weights, so that
what a backend adds to a call (checks, guards, bindings) is most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svd_bench.contest.stages import panning
from svd_bench.gpu.context import tiny_checkpoint
from svd_bench.subjects.opening import PHOTOGRAPH
from svd_engine.backends.fake import FakeBackend
from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.backends.torch.compiled import CompiledBackend
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.bundle.reading import Bundle, sha256_of
from svd_engine.media.image import load_image, to_clip_pixels, to_vae_pixels
from svd_engine.media.video import to_uint8, write_video
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.sampling import samplers, schedules
from svd_engine.spec.model import Model
from svd_engine.spec.network import Backend
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_export.to_onnx import export_bundle

Timed = Callable[..., Any]  # pytest-benchmark's fixture
CPU = torch.device("cpu")
TINY = Profile(frames=2, height=32, width=32, decode_chunk=2)
LATENT = (1, 25, 4, 72, 128)  # of SVD-XT at 576x1024


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_checkpoint().model


def test_sampler_step(benchmark: Timed, model: Model) -> None:
    """The arithmetic of one Euler step at full size, without the network."""
    generator = torch.Generator().manual_seed(0)
    x, denoised = (torch.randn(LATENT, generator=generator) for _ in range(2))
    sigmas = schedules.karras(25, model.sigma_min, model.sigma_max)

    def step() -> torch.Tensor:
        return samplers.euler(lambda _x, _sigma: denoised, x, sigmas, steps=[0])

    assert benchmark(step).shape == LATENT


def test_preprocessing(benchmark: Timed, model: Model) -> None:
    """A photograph in memory to what the image encoder and the VAE read, at 576x1024."""
    photograph = load_image(PHOTOGRAPH)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = to_vae_pixels(photograph, 576, 1024)
        return pixels, to_clip_pixels(photograph, 224, model.clip_mean, model.clip_std)

    pixels, clip = benchmark(both)
    assert (pixels.shape, clip.shape) == ((1, 3, 576, 1024), (1, 3, 224, 224))


def test_hash_check(benchmark: Timed, tmp_path: Path) -> None:
    """64 MiB; a bundle's weights are a hundred times as many."""
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(2**26))
    assert len(benchmark(sha256_of, path)) == 64


def test_video_encode(benchmark: Timed, tmp_path: Path) -> None:
    """25 frames of 576x1024 to H.264, a photograph that pans."""
    frames = panning(25, 576, 1024)
    assert benchmark(write_video, frames, tmp_path / "video.mp4", 7).is_file()


def test_frames_to_bytes(benchmark: Timed) -> None:
    frames = torch.rand(25, 3, 576, 1024, generator=torch.Generator().manual_seed(0))
    assert benchmark(to_uint8, frames).shape == (25, 576, 1024, 3)


@pytest.fixture(scope="module", params=["fake", "eager", "compiled", "onnxruntime"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    checkpoint = tiny_checkpoint()
    if request.param == "onnxruntime":
        folder = tmp_path_factory.mktemp("bundle") / "tiny"
        export_bundle(checkpoint, folder, [TINY], torch.float32)
        made: Backend = OrtBackend(Bundle(folder), CPU)
    else:
        modules = Modules(checkpoint)
        made = {
            "fake": FakeBackend,
            "eager": lambda: EagerBackend(modules, CPU),
            "compiled": lambda: CompiledBackend(modules, CPU),
        }[request.param]()
    yield made
    made.close()


def test_dispatch(benchmark: Timed, backend: Backend, model: Model) -> None:
    """One call of the smallest image encoder, the fake's being nothing but the checks."""
    spec = specs_of(TINY, model.architecture, FLOAT32)[0]
    network = backend.open(spec)
    inputs = example_inputs(spec)
    network(**inputs)  # compiles
    output = benchmark(lambda: network(**inputs))["embedding"]
    assert output.shape == spec.outputs[0].shape
    network.close()
