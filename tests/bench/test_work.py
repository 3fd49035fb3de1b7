"""The counted work, counted again: FLOP by torch's own counter, bytes operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from svd_bench.cards.work import DECODED_FRAME, DENOISER_STEP, IMAGE_ENCODER, VAE_ENCODER, Work
from svd_engine.checkpoint.random_weights import svd_configs
from svd_engine.checkpoint.weights import build
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.denoiser import GuidedDenoiser
from svd_engine.networks.encoders import ImageEncoder, VaeEncoder

H, W = 576, 1024


class Attention(TorchFunctionMode):
    """Counts attention as one operation; on the meta device torch would take it apart."""

    flop = 0

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is not torch.nn.functional.scaled_dot_product_attention:
            return f(*args, **(kwargs or {}))
        query, key = args[:2]
        self.flop += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


class Traffic(TorchDispatchMode):
    """Counts what operations read and write, but for matrix products, convolutions and views."""

    bytes = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        name = f._overloadpacket
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
        free = view or name.__name__.startswith("empty") or name is torch.ops.aten._unsafe_view
        if not free and name not in flop_registry:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def count(network: nn.Module, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Work:
    inputs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = network.to("meta").to(dtype)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as flop,
        Traffic() as traffic,
        Attention() as attention,
    ):
        network(**inputs)
    return Work(flop.get_total_flops() + attention.flop, traffic.bytes)


def close(counted: Work, written: Work) -> None:
    assert counted.flop == pytest.approx(written.flop, rel=1e-4)
    assert counted.bytes == pytest.approx(written.bytes, rel=0.02)  # diffusers' versions differ a little


@pytest.mark.parametrize("frames", [14, 25])
def test_a_denoiser_step(frames: int) -> None:
    unet = build("unet", svd_configs(frames)["unet"])
    latent = (1, 4, H // 8, W // 8)
    counted = count(
        GuidedDenoiser(unet), torch.float16, x=(1, frames, *latent[1:]), sigma=(), first_latent=latent,
        embedding=(1, 1, 1024), time_ids=(1, 3), guidance=(1, frames),
    )  # fmt: skip
    close(counted, DENOISER_STEP[frames])


def test_decoding() -> None:
    decoder = VaeDecoder(build("vae", svd_configs(14)["vae"]))
    close(count(decoder, torch.float16, latent=(14, 4, H // 8, W // 8)), DECODED_FRAME * 14)


def test_the_encoders() -> None:
    configs = svd_configs(14)
    close(count(VaeEncoder(build("vae", configs["vae"])), torch.float32, pixels=(1, 3, H, W)), VAE_ENCODER)
    clip = ImageEncoder(build("image_encoder", configs["image_encoder"]))
    close(count(clip, torch.float16, pixels=(1, 3, 224, 224)), IMAGE_ENCODER)
