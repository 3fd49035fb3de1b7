"""Stands between the engine and its networks: stops a generation between two calls, shows what passed.

A backend around the engine's own, so that cancelling works in every stage: before the encoders, at every
step, before every chunk of the decoder, without the engine knowing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from svd_engine.backends.network import Backend, Network
from svd_engine.networks.spec import NetworkSpec


class Cancelled(Exception):
    """The client cancelled or went away."""


class Watch:
    """What the networks of one request are asked and told."""

    def __init__(self, cancelled: Callable[[], bool] = lambda: False, keep: bool = False) -> None:
        self.cancelled, self.keep = cancelled, keep
        self.pixels: Tensor | None = None  # [B,3,H,W] in [-1, 1], of the first call of the VAE encoder
        self.latent: Tensor | None = None  # [B,4,h,w], its output
        self.denoised: Tensor | None = None  # [B,F,4,h,w], the first since it was last set to None

    def check(self) -> None:
        """Raises Cancelled."""
        if self.cancelled():
            raise Cancelled

    def after(self, network: str, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        if not self.keep:
            return
        if network == "vae_encoder" and self.latent is None:
            self.pixels, self.latent = inputs["pixels"], output.clone()
        if network == "denoiser" and self.denoised is None:
            self.denoised = output.clone()


class WatchedBackend:
    """The engine's backend, with a `watch` that each request replaces."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.watch = backend, Watch()
        self.name, self.device = backend.name, backend.device

    def open(self, spec: NetworkSpec) -> Network:
        return WatchedNetwork(self.backend.open(spec), self)

    def close(self) -> None:
        self.backend.close()


class WatchedNetwork(Network):
    def __init__(self, network: Network, owner: WatchedBackend) -> None:
        super().__init__(network.spec, network.placement)
        self.network, self.owner = network, owner

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.owner.watch.check()
        output = self.network.run(inputs)
        self.owner.watch.after(self.spec.network, inputs, output)
        return output

    def close(self) -> None:
        self.network.close()
