"""The torch modules of one checkpoint: what eager runs, torch.compile compiles and the exporter traces.

Each component is loaded on first use and shared by every network and profile that needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from svd_engine.checkpoint.opening import Checkpoint, Component
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.denoiser import Denoiser, GuidedDenoiser
from svd_engine.networks.encoders import ImageEncoder, VaeEncoder
from svd_engine.networks.rewrites import REWRITES, Applied, Rewrite, apply_rewrites, check_names
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.spec.weights import WeightFile

REWRITTEN: tuple[Component, ...] = ("unet", "vae")


class Modules:
    """`dtype` is that of weights and activations; the VAE encoder stays float32 whatever it is.

    With `one_at_a_time` a network that is asked for sends the one on `device` back to host memory.

    Raises SettingsError for a rewrite left out that is not among `rewrites`, before anything is loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        without_rewrites: Collection[str] = (),
        rewrites: Sequence[Rewrite] = REWRITES,
        one_at_a_time: bool = False,
    ) -> None:
        check_names(without_rewrites, rewrites)
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.without_rewrites = without_rewrites
        self.rewrites = rewrites
        self.one_at_a_time = one_at_a_time
        self.applied: dict[str, list[Applied]] = {}  # by component
        self.weight_files: dict[Component, tuple[WeightFile, ...]] = {}  # that were read
        self._components: dict[tuple[Component, torch.dtype], nn.Module] = {}
        self._networks: dict[str, nn.Module] = {}
        self._present: set[str] = set()  # of the networks, those on `device`

    def network(self, spec: NetworkSpec) -> nn.Module:
        """The module behind a row of the table, on `device`, in eval mode."""
        if spec.network == "denoiser":
            guided = any(tensor.name == "guidance" for tensor in spec.inputs)
            kind = "guided_denoiser" if guided else "denoiser"
        else:
            kind = spec.network
        if kind not in self._networks:
            self._networks[kind] = self._build(kind).eval()
        if kind not in self._present:
            if self.one_at_a_time:
                for other in self._present:
                    self._networks[other].to("cpu")
                self._present.clear()
            self._networks[kind].to(self.device)
            self._present.add(kind)
        return self._networks[kind]

    def dtype_of(self, spec: NetworkSpec) -> torch.dtype:
        return torch.float32 if spec.network == "vae_encoder" else self.dtype

    def places(self) -> dict[str, int]:
        """How many places each rewrite found in what is loaded so far, by "component/rewrite"."""
        return {f"{part}/{a.name}": a.places for part, done in self.applied.items() for a in done}

    def release(self, spec: NetworkSpec) -> None:
        """Forgets the network and the weights under it, so that the next one can have the memory."""
        component = COMPONENTS[spec.network]
        self._networks = {k: m for k, m in self._networks.items() if COMPONENTS[k] != component}
        self._components = {k: m for k, m in self._components.items() if k[0] != component}
        self._present &= self._networks.keys()

    def close(self) -> None:
        """Forgets every network and all weights."""
        self._networks.clear()
        self._components.clear()
        self._present.clear()

    def _build(self, kind: str) -> nn.Module:
        if kind == "image_encoder":
            return ImageEncoder(self._component("image_encoder", self.dtype))
        if kind == "vae_encoder":
            return VaeEncoder(self._component("vae", torch.float32))
        if kind == "vae_decoder":
            return VaeDecoder(self._component("vae", self.dtype))
        unet = self._component("unet", self.dtype)
        return GuidedDenoiser(unet) if kind == "guided_denoiser" else Denoiser(unet)

    def _component(self, component: Component, dtype: torch.dtype) -> nn.Module:
        if (component, dtype) not in self._components:
            module = self._load(component, dtype)
            if component in REWRITTEN:
                self.applied[component] = apply_rewrites(module, self.without_rewrites, self.rewrites)
            self._components[component, dtype] = module
        return self._components[component, dtype]

    def _load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """Hashes the files in another thread while their tensors are read: one pass over the disk."""
        self.checkpoint.weights.files(component)  # from the hub: fetched once, before two threads read them
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(self.checkpoint.weight_files, component)
            module = self.checkpoint.load(component, dtype)
            self.weight_files[component] = hashing.result()
        return module


COMPONENTS: dict[str, Component] = {
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
    "denoiser": "unet",
    "guided_denoiser": "unet",
}
