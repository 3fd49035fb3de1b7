"""The peers: diffusers' own modules and pipeline on the same weights, eager and under torch.compile.

Nothing of this engine's speed is in them: no rewrites, no backend of ours.  As a stage, a module stands in
the thin wrapper that gives it the network's tensors (`networks.denoiser`, say), which adds arithmetic on
latents only; as a whole video, diffusers' pipeline runs untouched.  `diffusers-compile` compiles what
diffusers' documentation compiles, UNet and VAE decoder, and in a stage whatever the stage is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from svd_engine.backends.torch.eager import EagerNetwork
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.networks.modules import COMPONENT_OF, wrap
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline

PEERS = {"diffusers": "eager", "diffusers-compile": "torch.compile"}  # name: backend in results


class PeerNetwork(EagerNetwork):
    """diffusers' module, called as ours is; the class tells the two apart."""


class PeerBackend:
    """diffusers' modules behind the engine's contract; each is loaded when it is opened."""

    movable = True

    def __init__(self, checkpoint: Checkpoint, device: torch.device, compiled: bool) -> None:
        self.checkpoint, self.device, self.compiled = checkpoint, device, compiled
        self.name = "torch.compile" if compiled else "eager"

    def open(self, spec: NetworkSpec) -> Network:
        dtype = getattr(torch, spec.precision.weights)
        module = wrap(spec, self.checkpoint.load(COMPONENT_OF[spec.network], dtype)).eval()
        if self.compiled:
            module.compile(fullgraph=True, dynamic=False)
        detail = f"diffusers' module, torch {torch.__version__}"
        placement = Placement(self.name, str(self.device), str(spec.precision), detail)
        return PeerNetwork(spec, module, placement)

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
