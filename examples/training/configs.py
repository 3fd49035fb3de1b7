"""The networks: SVD's architecture and layout at a width that fits a package."""

from __future__ import annotations

from typing import Any

HEIGHT, WIDTH, FRAMES = 128, 224, 14
VAE_SCALE = 8

VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    # 96 at both ends: see linear_start on norms of 32 groups
    "block_out_channels": [96, 64, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": HEIGHT,
    "force_upcast": False,
}

IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 224,
    "projection_dim": 32,
}

UNET: dict[str, Any] = {
    "sample_size": [HEIGHT // VAE_SCALE, WIDTH // VAE_SCALE],
    "in_channels": 8,
    "out_channels": 4,
    # transformers at the finest level: the number of a frame enters in them, and moves the details
    "down_block_types": [
        "CrossAttnDownBlockSpatioTemporal",
        "DownBlockSpatioTemporal",
        "DownBlockSpatioTemporal",
    ],
    "up_block_types": ["UpBlockSpatioTemporal", "UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
    "block_out_channels": [64, 64, 64],
    "num_attention_heads": [2, 2, 2],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_frames": FRAMES,
}

GUIDANCE = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.5}  # 3 grows coloured fringes
