"""SV3D_p as chenguolin/sv3d-diffusers has it: a diffusers folder whose pipeline and UNet are its own classes.

Its UNet is diffusers' with a second layer of sinusoids, 2 addition_time_embed_dim wide, for the two angles.
That layer has no weights and its numbers are those of Stability's embedder, so every tensor has the name and
the shape that diffusers' class gives it, and the network computes the same.  What differs are three keys of
its config.  The pipeline's own defaults (25 steps, a triangle whose top is one frame earlier) are not taken:
SV3D's are Stability's, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svd_engine.checkpoint.random_weights import SV3D_FRAMES, SV3D_SIZE

PORT_PIPELINE = "StableVideo3DDiffusionPipeline"
PORT_UNET = "SV3DUNetSpatioTemporalConditionModel"
DIFFUSERS_UNET = "UNetSpatioTemporalConditionModel"
UNSET_FRAMES = 25  # the class's default, which its converter leaves in the config; its script asks for 21


def unet_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of this layout's UNet, as diffusers' class takes it; any other config as it is."""
    if config.get("_class_name") != PORT_UNET:
        return config
    frames = config.get("num_frames", UNSET_FRAMES)
    size = config.get("sample_size") or SV3D_SIZE
    return {
        **config,
        "_class_name": DIFFUSERS_UNET,
        "num_frames": SV3D_FRAMES if frames == UNSET_FRAMES else frames,
        "sample_size": size if isinstance(size, list) else [size, size],  # latent pixels of a square
    }
