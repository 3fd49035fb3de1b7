"""Trains the decoder's temporal blocks on short clips; everything else of the autoencoder stays.

The loss is that of the images plus the error of the change from frame to frame, which is what flickers.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import autoencoder
import linear_start
import numpy as np
import run_state
import torch
import workers
from clips import draw_clip
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from images import Source
from numpy.random import Generator
from run_state import Run, learning_rate
from torch import Tensor


def make(trained: Path) -> AutoencoderKLTemporalDecoder:
    """The autoencoder of a run of `autoencoder.py`; only what mixes frames learns."""
    vae = autoencoder.averaged(trained)
    vae.requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, SpatioTemporalResBlock):
            module.temporal_res_block.requires_grad_(True)
            module.time_mixer.requires_grad_(True)
    vae.decoder.time_conv_out.requires_grad_(True)
    return vae


def batch(source: Source, rng: Generator, count: int, frames: int, size: int) -> Tensor:
    """[count, frames, 3, size, size] in [-1, 1]."""
    clips = np.stack([draw_clip(source, rng, frames, size, size) for _ in range(count)])
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).contiguous().float() / 127.5 - 1


def loss_of(vae: AutoencoderKLTemporalDecoder, x: Tensor, generator: torch.Generator) -> Tensor:
    frames = x.shape[1]
    z = linear_start.encoded(x.flatten(0, 1))
    z = z + 0.05 * torch.randn(z.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = vae.decode(z, num_frames=frames).sample.float().view_as(x)
    error = y - x
    still = (error.square().mean((1, 2, 3, 4)) + 1e-4).sqrt().mean()
    change = (error.diff(dim=1).square().mean((1, 2, 3, 4)) + 1e-4).sqrt().mean()
    return still + change


def train(folder: Path, trained: Path, seed: int, steps: int, frames: int = 4, lr: float = 3e-4) -> None:
    source, vae = Source(seed), make(trained)
    run = Run(folder, vae, ema_decay=0.99)
    losses: list[float] = []
    while run.step < steps:
        rng = np.random.default_rng([seed, 5, run.step, workers.rank()])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        loss = loss_of(vae, batch(source, rng, 1, frames, 64), generator)
        losses.append(float(loss.detach()))
        run.update(loss, learning_rate(run.step, steps, lr, warmup=20))
        if run.step % run_state.SAVE_EVERY == 0 or run.step == steps:
            run.log(loss=round(float(np.mean(losses)), 4))
            losses.clear()
            run.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("autoencoder", type=Path, help="its run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    workers.run(a.workers, partial(train, a.folder, a.autoencoder, a.seed, a.steps))
