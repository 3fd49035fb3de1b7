"""The decoder of a bundle over slices of frames, as a chain of networks: what decoding all at once gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine.backends.segmented import SegmentedDecoder, of_video
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.network import Network, Placement, named_outputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.streaming import segments_of, streaming_of
from svd_engine.spec.tables import streamed_decoder
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import HEIGHT, WIDTH

CPU = torch.device("cpu")
Vae = Any  # diffusers is untyped


class TorchNetwork(Network):
    def __init__(self, spec: NetworkSpec, module: torch.nn.Module) -> None:
        super().__init__(spec, Placement("eager", "cpu", "float32"))
        self.module = module

    @torch.no_grad()
    def run(self, inputs: Any) -> dict[str, Tensor]:
        return named_outputs(self.spec, self.module(**inputs))


class TorchSegments:
    """A backend of torch modules, which notes what is opened."""

    name, device, movable = "eager", CPU, False

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.opened: list[int | None] = []

    def open(self, spec: NetworkSpec) -> Network:
        self.opened.append(spec.segment)
        return TorchNetwork(spec, self.modules.network(spec))

    def close(self) -> None: ...


@pytest.fixture(scope="module", params=["diffusers' layers", "for the CPU", "for TensorRT"])
def modules(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Modules:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    rewrites = {
        "diffusers' layers": (),
        "for the CPU": rewrites_for("onnxruntime", "cpu"),
        "for TensorRT": rewrites_for("tensorrt", "cuda"),
    }
    return Modules(checkpoint, (), rewrites[request.param])


def latent(frames: int) -> Tensor:
    shape = (frames, 4, HEIGHT // 2, WIDTH // 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames", [2, 5, 14])
def test_the_chain_gives_what_the_whole_decoder_gives(modules: Modules, frames: int) -> None:
    architecture = modules.checkpoint.model.architecture
    profile = Profile(frames, HEIGHT, WIDTH, decode_chunk=frames)
    given = latent(frames)
    with torch.no_grad():
        whole = VaeDecoder(modules.checkpoint.load("vae", torch.float32))(given)
    for size in (n for n in (1, 2, 3, 5, 8) if n < frames):
        spec = streamed_decoder(profile, architecture, FLOAT32, size)
        chain = segments_of(spec, streaming_of((32, 64), 1, size))
        backend = TorchSegments(modules)
        decoded = SegmentedDecoder(spec, chain, backend)(latent=given)["frames"]
        assert (decoded - whole).abs().max() <= 1e-5 * whole.abs().max(), size
        assert backend.opened == list(range(len(chain)))
