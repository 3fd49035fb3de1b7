"""The peers: diffusers' own modules and pipeline on the same weights, eager and under torch.compile.

Nothing of this engine's speed is in them: no rewrites, no backend of ours.  As a stage, a module stands in
the thin wrapper that gives it the network's tensors (`networks.denoiser`, say), which adds arithmetic on
latents only; as a whole video, diffusers' pipeline runs untouched.  `diffusers-compile` compiles what
diffusers' documentation compiles, UNet and VAE decoder, and in a stage whatever the stage is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from svd_engine.backends.torch.eager import EagerNetwork
from svd_engine.checkpoint.opening import Checkpoint, Component
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.denoiser import Denoiser, GuidedDenoiser
from svd_engine.networks.encoders import ImageEncoder, VaeEncoder
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline

PEERS = {"diffusers": "eager", "diffusers-compile": "torch.compile"}  # name: backend in results
COMPONENTS: dict[str, Component] = {
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "denoiser": "unet",
    "vae_decoder": "vae",
}


def wrapped(spec: NetworkSpec, load: Callable[[Component], nn.Module]) -> nn.Module:
    """The published module behind a row of the tensor table, taking the table's tensors."""
    module = load(COMPONENTS[spec.network])
    if spec.network == "image_encoder":
        return ImageEncoder(module)
    if spec.network == "vae_encoder":
        return VaeEncoder(module)
    if spec.network == "vae_decoder":
        return VaeDecoder(module)
    guided = any(tensor.name == "guidance" for tensor in spec.inputs)
    return GuidedDenoiser(module) if guided else Denoiser(module)


class PeerNetwork(EagerNetwork):
    """diffusers' module, called as ours is; the class tells the two apart."""


class PeerBackend:
    """diffusers' modules behind the engine's contract; each is loaded when it is opened."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, compiled: bool
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.compiled = checkpoint, dtype, device, compiled
        self.name = "torch.compile" if compiled else "eager"

    def open(self, spec: NetworkSpec) -> Network:
        dtype = torch.float32 if spec.network == "vae_encoder" else self.dtype  # as the pipeline upcasts it
        module = (
            wrapped(spec, lambda component: self.checkpoint.load(component, dtype)).to(self.device).eval()
        )
        if self.compiled:
            module.compile(fullgraph=True, dynamic=False)
        name = str(dtype).removeprefix("torch.")
        detail = f"diffusers' module, torch {torch.__version__}"
        return PeerNetwork(spec, lambda: module, Placement(self.name, str(self.device), name, detail))

    def close(self) -> None:
        """Modules belong to their networks; nothing else is held."""


def pipeline(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, compiled: bool
) -> StableVideoDiffusionPipeline:
    """diffusers' StableVideoDiffusionPipeline over the checkpoint, as its own loader would make it."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    made = StableVideoDiffusionPipeline(
        vae=checkpoint.load("vae", dtype),
        image_encoder=checkpoint.load("image_encoder", dtype),
        unet=checkpoint.load("unet", dtype),
        scheduler=EulerDiscreteScheduler.from_config(dict(checkpoint.configs["scheduler"])),
        feature_extractor=CLIPImageProcessor(**checkpoint.configs["feature_extractor"]),
    ).to(device)
    made.set_progress_bar_config(disable=True)
    if compiled:
        made.unet.compile(fullgraph=True, dynamic=False)
        made.vae.decoder.compile(fullgraph=True, dynamic=False)
    return made
