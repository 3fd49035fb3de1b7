"""Trains the denoiser on clips of latents: EDM's loss with SVD's preconditioning and conditions.

F is the UNet, r^2 = sigma^2 + 1: D(x; sigma) = x / r^2 - sigma / r F(x / r; ln(sigma) / 4).
EDM's weight makes the loss the plain squared error of F, the prediction of v.  Three steps of four see
windows of 8x14 latent pixels, which cost a quarter.

While the learning rate falls, steps see whole clips only, with less noise, and the error's flicker counts,
too: how its means over blocks change from frame to frame.  To the plain loss a wall that is a grey level
brighter in every other frame is next to nothing.  What the network cannot know (a dropped image, what will
enter the picture) is off alike in neighbouring frames and drops out, so that details do not suffer; they did
when the means themselves counted.  What minimises the sum is what minimises each: the expectation of v.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from types import MethodType

import canvases
import configs
import numpy as np
import run_state
import torch
import workers
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor
from latent_clips import draw_clip
from numpy.random import Generator
from run_state import Run, learning_rate
from torch import Tensor, nn
from torch.nn import functional as F

P_MEAN, P_STD = 0.7, 1.6  # of ln(sigma): shifted to more noise, as in the paper's section 4 and appendix D
P_MEAN_LAST = -0.3  # ours, not the paper's, while the learning rate falls: where flicker is seen, and removed
DROPOUT = 0.12  # of the image: embedding and latent zeroed together, the unconditional half of guidance
BLOCKS = (1, 2, 4, 8)  # latent pixels, each way: what flickers
WINDOW = (8, 14)  # latent pixels
STEPS = 6000


def split_geglu(layer: GEGLU, x: Tensor) -> Tensor:
    """GEGLU as two products: the halves of one cost a fifth of a step, to cut and to join their gradients."""
    (value, gate), (to_value, to_gate) = layer.proj.weight.chunk(2), layer.proj.bias.chunk(2)
    return F.linear(x, value, to_value) * F.gelu(F.linear(x, gate, to_gate))


def make(seed: int) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(**configs.UNET)
    nn.init.zeros_(unet.conv_out.weight)
    # products and a softmax: torch's own attention takes longer to train on a CPU
    unet.set_attn_processor(AttnProcessor())
    for part in unet.modules():
        if isinstance(part, GEGLU):
            part.forward = MethodType(split_geglu, part)
    return unet


def draw_batch(
    data: dict[str, Tensor], rng: Generator, count: int, window: tuple[int, int], p_mean: float
) -> dict[str, Tensor]:
    """`count` clips of `window` latent pixels, and the conditions as the UNet gets them."""
    rows = rng.integers(len(data["clean"]), size=count)
    clips = [draw_clip(data, int(row), rng, window) for row in rows]
    kept = torch.from_numpy(rng.random(count) >= DROPOUT).float()
    ids = [
        [c.fps - 1, c.motion_bucket, float(data["strength"][row])] for c, row in zip(clips, rows, strict=True)
    ]
    return {
        "video": torch.stack([c.video for c in clips]),
        "first_latent": torch.stack([c.first for c in clips]) * kept[:, None, None, None],
        "embedding": data["embedding"][rows][:, None] * kept[:, None, None],
        "time_ids": torch.tensor(ids),
        "sigma": torch.from_numpy(np.exp(rng.normal(p_mean, P_STD, count))).float(),
    }


def error_of(
    unet: UNetSpatioTemporalConditionModel, batch: dict[str, Tensor], scale: float, noise: Tensor
) -> Tensor:
    """What F is off, [count, frames, 4, h, w]."""
    y, sigma = batch["video"] * scale, batch["sigma"][:, None, None, None, None]
    root = (sigma**2 + 1).sqrt()
    x = (y + sigma * noise) / root
    first = batch["first_latent"][:, None].expand(-1, y.shape[1], -1, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(
            torch.cat([x, first], 2), 0.25 * batch["sigma"].log(), batch["embedding"], batch["time_ids"],
            return_dict=False,
        )[0]  # fmt: skip
    target = (noise - sigma * y) / root  # v
    error: Tensor = prediction.float() - target
    return error


def flicker_of(error: Tensor) -> Tensor:
    """Mean square of how an error's means over BLOCKS change from frame to frame, [count].

    A mean over n pixels counts n / 2 times: independent errors give their mean square once for each size.
    Blocks at the edges may be cut.
    """

    def of(size: int) -> Tensor:
        means = F.avg_pool2d(error.flatten(0, 1), size, ceil_mode=True)
        changes = means.unflatten(0, error.shape[:2]).diff(dim=1)
        return changes.square().mean((1, 2, 3, 4)) * size**2 / 2

    return torch.stack([of(size) for size in BLOCKS]).sum(0)


def latent_scale(data: dict[str, Tensor]) -> float:
    """The VAE's scaling_factor: makes latents of standard deviation one."""
    return 1 / float(data["clean"].std())


def train(
    folder: Path, encoded: Path, shards: int, seed: int, steps: int, count: int = 16, lr: float = 1.5e-3
) -> None:
    data = canvases.load(encoded, shards)
    scale = latent_scale(data)
    unet = make(seed)
    run = Run(folder, unet, ema_decay=0.999)
    whole = tuple(configs.UNET["sample_size"])
    losses: list[Tensor] = []
    flickers: list[Tensor] = []
    sigmas: list[Tensor] = []
    while run.step < steps:
        rng = np.random.default_rng([seed, 4, run.step, workers.rank()])
        last = run.step >= steps * (1 - run_state.DECAY)
        small = not last and run.step % 4 != 3
        share = count // workers.count()
        size, window = (share, WINDOW) if small else (max(share // 4, 1), whole)
        batch = draw_batch(data, rng, size, window, P_MEAN_LAST if last else P_MEAN)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        error = error_of(unet, batch, scale, torch.randn(batch["video"].shape, generator=generator))
        square, flicker = error.square().mean((1, 2, 3, 4)), flicker_of(error)
        loss = square + flicker if last else square
        losses.append(square.detach())
        flickers.append(flicker.detach())
        sigmas.append(batch["sigma"])
        run.update(loss.mean(), learning_rate(run.step, steps, lr))
        if run.step % run_state.SAVE_EVERY == 0 or run.step == steps:
            every, at = torch.cat(losses), torch.cat(sigmas)
            low, high = at < 1, at > 6
            middle = ~low & ~high
            parts = {
                k: round(float(every[m].mean()), 4)
                for k, m in (("low", low), ("mid", middle), ("high", high))
            }
            flickered = round(float(torch.cat(flickers).mean()), 4)
            run.log(loss=round(float(every.mean()), 4), **parts, flicker=flickered)
            losses.clear()
            flickers.clear()
            sigmas.clear()
            run.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("canvases", type=Path)
    parser.add_argument("--shards", type=int, default=canvases.SHARDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    workers.run(a.workers, partial(train, a.folder, a.canvases, a.shards, a.seed, a.steps, a.count, a.lr))
