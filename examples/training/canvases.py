"""Encodes still images once, larger than a frame: what the denoiser's clips are cut from.

Each is encoded as it is and with noise (SVD's noise augmentation of the conditioning image).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import configs
import numpy as np
import torch
import workers
from images import Source
from linear_start import encoded
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SHARD = 25  # canvases
SHARDS = 24
SIZE = (216, 312)  # pixels: a frame and 44 more on every side
PLAIN = 0.2  # share of the canvases
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def image_encoder(seed: int) -> CLIPVisionModelWithProjection:
    """Stays as it is drawn: fixed random features of the image, which the denoiser learns to read."""
    torch.manual_seed(seed)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**configs.IMAGE_ENCODER)).eval()


def clip_pixels(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] -> [N, 3, 224, 224], normalised for CLIP."""
    small = F.interpolate(images / 2 + 0.5, (224, 224), mode="bicubic", antialias=True)
    return (small - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def shard(
    clip: CLIPVisionModelWithProjection,
    source: Source,
    seed: int,
    index: int,
) -> dict[str, Tensor]:
    """clean, noisy [N, 4, h, w]; strength [N]; embedding [N, D]: float16, N = SHARD."""
    rows: dict[str, list[Tensor]] = {}
    for i in range(index * SHARD, (index + 1) * SHARD):
        rng = np.random.default_rng([seed, 3, i])
        plain = rng.random() < PLAIN
        image = source.plain(rng, *SIZE) if plain else source.crop(rng, *SIZE, collage=0.35)
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()[None].float() / 127.5 - 1
        strength = float(np.exp(rng.normal(-3.4, 0.8)))
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(i))
        both = encoded(torch.cat([pixels, pixels + strength * noise]))
        middle = pixels[:, :, 44:-44, 44:-44]
        row = {
            "clean": both[0],
            "noisy": both[1],
            "strength": torch.tensor(strength),
            "embedding": clip(clip_pixels(middle)).image_embeds[0],
        }
        for name, tensor in row.items():
            rows.setdefault(name, []).append(tensor.half())
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


def encode(folder: Path, seed: int, shards: int) -> None:
    """Writes `shards` files; those that are there stay."""
    clip, source = image_encoder(seed), Source(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(workers.rank(), shards, workers.count()):
        path = folder / f"{index:04d}.pt"
        if not path.exists():
            aside = path.with_suffix(".part")
            torch.save(shard(clip, source, seed, index), aside)
            aside.rename(path)
            print(path, flush=True)


def load(folder: Path, shards: int) -> dict[str, Tensor]:
    parts = [torch.load(folder / f"{i:04d}.pt", weights_only=True) for i in range(shards)]
    return {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    workers.run(a.workers, partial(encode, a.folder, a.seed, a.shards))
