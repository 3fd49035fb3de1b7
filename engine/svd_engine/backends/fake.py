"""A backend without weights, so that everything but the networks' arithmetic runs anywhere, at once.

Its outputs have the right shape, stay bounded and depend on every input, so a lost or swapped input
changes the video.  `calls` lists the networks in the order in which they ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from svd_engine.sampling import preconditioning
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class FakeNetwork(Network):
    def __init__(self, spec: NetworkSpec, calls: list[str]) -> None:
        super().__init__(spec, Placement("fake", "cpu", "float32"))
        self.calls = calls

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls.append(self.spec.network)
        return FUNCTIONS[self.spec.network](inputs, self.spec)


class FakeBackend:
    name = "fake"
    movable = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.calls: list[str] = []

    def open(self, spec: NetworkSpec) -> Network:
        return FakeNetwork(spec, self.calls)

    def close(self) -> None:
        self.calls.clear()


def _image_encoder(inputs: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    brightness = inputs["pixels"].mean(dim=(1, 2, 3))  # [B]
    channels = torch.linspace(-1, 1, spec.outputs[0].shape[-1], dtype=torch.float32)
    return {"embedding": torch.tanh(brightness[:, None, None] * channels)}


def _vae_encoder(inputs: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    h, w = spec.outputs[0].shape[-2:]
    small = torch.nn.functional.adaptive_avg_pool2d(inputs["pixels"], (h, w))  # [B, 3, h, w]
    return {"latent": torch.cat([small, small.mean(1, keepdim=True)], dim=1)}


def _denoiser(inputs: Mapping[str, Tensor], _spec: NetworkSpec) -> dict[str, Tensor]:
    x, sigma, first = inputs["x"], inputs["sigma"], inputs["first_latent"]
    told = inputs["time_ids"].flatten(1).sum(1) / 100
    ids = torch.tanh(told + inputs["embedding"].mean(dim=(1, 2)))  # [B]
    scale = inputs.get("guidance", torch.ones(x.shape[:2], dtype=torch.float32))  # [B, F]
    clean = first[:, None] * (1 + 0.1 * (scale * ids[:, None])[:, :, None, None, None])
    c_skip = preconditioning.c_skip(sigma)
    return {"denoised": c_skip * x + (1 - c_skip) * clean}


def _vae_decoder(inputs: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    size = spec.outputs[0].shape[-2:]
    return {"frames": torch.nn.functional.interpolate(inputs["latent"][:, :3], size=size).clamp(-1, 1)}


FUNCTIONS: dict[str, Callable[[Mapping[str, Tensor], NetworkSpec], dict[str, Tensor]]] = {
    "image_encoder": _image_encoder,
    "vae_encoder": _vae_encoder,
    "denoiser": _denoiser,
    "vae_decoder": _vae_decoder,
}
