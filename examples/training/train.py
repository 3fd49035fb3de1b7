"""Trains the demo checkpoint from nothing: one command, resumable; seed and number of workers fix the run.

    python examples/training/train.py RUN --output DEMO

RUN holds states and logs; started again after an interruption, each stage goes on where it was saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import assemble
import autoencoder
import canvases
import denoiser
import workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--decoder-steps", type=int, default=900)
    parser.add_argument("--denoiser-steps", type=int, default=denoiser.STEPS)
    parser.add_argument("--shards", type=int, default=canvases.SHARDS, help=f"of {canvases.SHARD} canvases")
    a = parser.parse_args()

    def stage(work: Callable[..., None], *arguments: object) -> None:
        workers.run(a.workers, partial(work, *arguments))

    vae, unet, encoded = a.run / "autoencoder", a.run / "denoiser", a.run / "canvases"
    stage(autoencoder.train, vae, a.seed, a.decoder_steps)
    stage(canvases.encode, encoded, a.seed, a.shards)
    stage(denoiser.train, unet, encoded, a.shards, a.seed, a.denoiser_steps)
    scale = denoiser.latent_scale(canvases.load(encoded, a.shards))
    assemble.assemble(vae, unet, scale, a.seed, a.output)


if __name__ == "__main__":
    main()
