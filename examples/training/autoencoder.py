"""Trains the decoder on single images: latents of the encoder, which is set, -> pixels in [-1, 1].

The temporal blocks are the identity (their last convolutions are zero, the last layer passes the middle
frame) and stay it: frames are decoded one by one.  Half of each batch is moved *in latent
space* and compared with the image moved in pixel space, as in EQ-VAE (Kouzelis et al. 2025), because clips
are made of latents moved.  Noise on the latents keeps the decoder tolerant of the denoiser's errors.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import configs
import linear_start
import numpy as np
import run_state
import torch
import workers
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from images import Source
from numpy.random import Generator
from run_state import Run, learning_rate
from torch import Tensor, nn
from torch.nn import functional as F

from svd_bench.quality.held_out import held_out
from svd_engine.media.image import to_vae_pixels


def make(seed: int) -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(**configs.VAE)
    linear_start.set_weights(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def averaged(run: Path) -> AutoencoderKLTemporalDecoder:
    """The autoencoder of a run with averaged weights."""
    vae = AutoencoderKLTemporalDecoder(**configs.VAE)
    state = torch.load(run / "state.pt", weights_only=True)
    vae.load_state_dict({**state["network"], **state["ema"]})
    return vae.eval()


def without_time(vae: AutoencoderKLTemporalDecoder) -> None:
    """Takes temporal blocks out of the forward pass, where they are the identity and cost a fifth of it."""
    for module in vae.modules():
        if isinstance(module, SpatioTemporalResBlock):
            module.temporal_res_block.requires_grad_(False)
            module.time_mixer.requires_grad_(False)
            module.forward = partial(_spatial, module.spatial_res_block)
    vae.decoder.time_conv_out.requires_grad_(False)


def _spatial(block: nn.Module, hidden: Tensor, temb: Tensor | None = None, **_: object) -> Tensor:
    return block(hidden, temb)


def batch(source: Source, rng: Generator, count: int, size: int) -> Tensor:
    crops = np.stack([source.crop(rng, size, size) for _ in range(count)])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def small_motions(rng: Generator, count: int) -> Tensor:
    """[count, 2, 3]: shifts, zooms and turns in coordinates of [-1, 1], as `affine_grid` reads them."""
    zoom, angle = np.exp(rng.normal(0, 0.08, count)), rng.normal(0, 0.1, count)
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    shift = rng.uniform(-0.25, 0.25, (count, 2, 1))
    theta = np.concatenate([np.stack([c, -s, s, c], 1).reshape(count, 2, 2), shift], 2)
    return torch.from_numpy(theta).float()


def moved(images: Tensor, theta: Tensor) -> Tensor:
    """Square images, of pixels or of latents, [N, C, S, S], each seen through its motion."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def loss_of(vae: AutoencoderKLTemporalDecoder, x: Tensor, rng: Generator) -> Tensor:
    """Mean over images of the root of the squared error: halfway from MSE to mean PSNR."""
    z = linear_start.encoded(x)
    count = len(x) // 2
    theta = small_motions(rng, count)
    target = torch.cat([moved(x[:count], theta), x[count:]])
    into = torch.cat([moved(z[:count], theta), z[count:]])
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    into = into + 0.05 * torch.randn(into.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = vae.decode(into, num_frames=1).sample.float()
    inner = torch.ones_like(y[:, :1])
    inner[:count] = F.pad(inner[:count, :, 8:-8, 8:-8], (8, 8, 8, 8))  # what came in from outside is unknown
    return (((y - target) * inner).square().mean((1, 2, 3)) + 1e-4).sqrt().mean()


def evaluate(vae: AutoencoderKLTemporalDecoder, run: Run) -> dict[str, float]:
    """PSNR of the held-out photographs under the averaged weights; leaves the network as it was."""
    kept = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(run.averaged())
    psnr = held_out_psnr(vae)
    vae.load_state_dict(kept)
    return {"psnr": round(float(np.mean(list(psnr.values()))), 2)} | {k: round(v, 2) for k, v in psnr.items()}


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLTemporalDecoder) -> dict[str, float]:
    values = {}
    for name, image in held_out(configs.HEIGHT, configs.WIDTH).items():
        x = to_vae_pixels(image, configs.HEIGHT, configs.WIDTH)
        y = vae.decode(vae.encode(x).latent_dist.mode(), num_frames=1).sample.clamp(-1, 1)
        values[name] = -10 * float(((y - x) / 2).square().mean().log10())
    return values


def train(folder: Path, seed: int, steps: int, count: int = 8, size: int = 64, lr: float = 7e-4) -> None:
    source = Source(seed)
    vae = make(seed)
    without_time(vae)
    run = Run(folder, vae, ema_decay=0.998)
    losses: list[float] = []
    while run.step < steps:
        rng = np.random.default_rng([seed, 2, run.step, workers.rank()])
        loss = loss_of(vae, batch(source, rng, count // workers.count(), size), rng)
        losses.append(float(loss.detach()))
        norm = run.update(loss, learning_rate(run.step, steps, lr))
        if run.step % run_state.SAVE_EVERY == 0 or run.step == steps:
            run.log(
                loss=round(float(np.mean(losses)), 4),
                norm=round(norm, 2),
            )
            losses.clear()
            run.save()
        if (run.step % 500 == 0 or run.step == steps) and workers.rank() == 0:
            run.log(**evaluate(vae, run))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    workers.run(a.workers, partial(train, a.folder, a.seed, a.steps, a.count, a.size, a.lr))
