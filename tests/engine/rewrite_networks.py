"""Small UNets and VAEs with everything random, and calls on them, for the tests of the rewrites."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn

CONTEXT = 32  # size of a context token
Call = Callable[[Any], Tensor]


def random_unet(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Two levels, cross-attention at the first and in the middle; 6 transformers, 12 resnets."""
    made = copy.deepcopy(_unet(dtype, **changes))
    torch.manual_seed(0)  # what a caller draws is the same, whether or not this was made before
    return made


@cache
def _unet(dtype: torch.dtype, **changes: Any) -> Any:
    config = {
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": CONTEXT,
        "num_attention_heads": (4, 8),
        "projection_class_embeddings_input_dim": 96,
        "addition_time_embed_dim": 32,
    }
    torch.manual_seed(0)
    return random_(UNetSpatioTemporalConditionModel(**{**config, **changes}), dtype)


def random_vae(dtype: torch.dtype = torch.float64) -> Any:
    """Two levels; 8 resnets in the decoder."""
    made = copy.deepcopy(_vae(dtype))
    torch.manual_seed(0)
    return made


@cache
def _vae(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    return random_(vae, dtype)


def random_(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Moves every parameter off its default: equal blends and norms of one would hide mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter += 0.3 * torch.randn_like(parameter) / inputs**0.5
    return network.to(dtype).eval()


def unet_inputs(
    frames: int = 3,
    height: int = 8,
    width: int = 12,
    tokens: int = 1,
    dtype: torch.dtype = torch.float64,
    videos: int = 2,
) -> dict[str, Tensor]:
    """Two videos with conditioning of their own, or the first of them."""
    rng = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)[:videos]

    return {
        "sample": draw(2, frames, 8, height, width),
        "timestep": torch.tensor(1.3, dtype=torch.float64),
        "encoder_hidden_states": draw(2, tokens, CONTEXT),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [9.0, 40.0, 0.1]])[:videos],
    }


@torch.no_grad()
def call_unet(unet: Any, **shape: Any) -> Tensor:
    """-> [videos, F, 4, h, w]"""
    prediction: Tensor = unet(**unet_inputs(**shape), return_dict=False)[0]
    return prediction


@torch.no_grad()
def call_vae(vae: Any, frames: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """-> [frames, 3, 12, 16]"""
    rng = torch.Generator().manual_seed(1)
    latent = torch.randn(frames, 4, 6, 8, generator=rng, dtype=torch.float64).to(dtype)
    video: Tensor = vae.decode(latent, num_frames=frames).sample
    return video


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value of what was expected."""
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
