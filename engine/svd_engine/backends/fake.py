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

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(self.spec.network)
        return FUNCTIONS[self.spec.network](inputs, self.spec.output.shape)


class FakeBackend:
    name = "fake"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.calls: list[str] = []

    def open(self, spec: NetworkSpec) -> Network:
        return FakeNetwork(spec, self.calls)

    def close(self) -> None:
        self.calls.clear()


def _image_encoder(inputs: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    brightness = inputs["pixels"].mean(dim=(1, 2, 3))  # [B]
    return torch.tanh(brightness[:, None, None] * torch.linspace(-1, 1, shape[-1], dtype=torch.float32))


def _vae_encoder(inputs: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    small = torch.nn.functional.adaptive_avg_pool2d(inputs["pixels"], (shape[-2], shape[-1]))  # [B, 3, h, w]
    return torch.cat([small, small.mean(1, keepdim=True)], dim=1)


def _denoiser(inputs: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    x, sigma, first = inputs["x"], inputs["sigma"], inputs["first_latent"]
    ids = torch.tanh(inputs["time_ids"].sum(1) / 100 + inputs["embedding"].mean(dim=(1, 2)))  # [B]
    scale = inputs.get("guidance", torch.ones(shape[:2], dtype=torch.float32))  # [B, F]
    clean = first[:, None] * (1 + 0.1 * (scale * ids[:, None])[:, :, None, None, None])
    c_skip = preconditioning.c_skip(sigma)
    return c_skip * x + (1 - c_skip) * clean


def _vae_decoder(inputs: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.interpolate(inputs["latent"][:, :3], size=shape[-2:]).clamp(-1, 1)


FUNCTIONS: dict[str, Callable[[Mapping[str, Tensor], tuple[int, ...]], Tensor]] = {
    "image_encoder": _image_encoder,
    "vae_encoder": _vae_encoder,
    "denoiser": _denoiser,
    "vae_decoder": _vae_decoder,
}
