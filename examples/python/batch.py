"""Animate several photographs, one after the other, with one engine; print every denoising step.

    python batch.py bundles/svd-xt videos photo1.jpg photo2.jpg ...

The networks are loaded once, by the first call.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from svd_engine import VideoEngine, load_image


def main(bundle: str, folder: str, *photographs: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with VideoEngine.from_bundle(bundle) as engine:
        engine.set_progress_bar_config(disable=True)  # the callback below prints instead
        for photograph in photographs:
            name = Path(photograph).stem

            def on_step(
                engine: VideoEngine, step: int, _: Tensor, tensors: dict[str, Tensor], name: str = name
            ) -> dict[str, Tensor]:
                latents = tensors["latents"]  # [videos, frames, 4, height / 8, width / 8]
                print(f"{name}: step {step + 1} of {engine.num_timesteps}, std {latents.std():.2f}")
                return tensors  # or {"latents": others}, to go on from those

            generator = torch.Generator("cpu").manual_seed(42)
            result = engine(
                load_image(photograph), fit="crop", generator=generator, callback_on_step_end=on_step
            )
            result.save(Path(folder) / f"{name}.mp4")


if __name__ == "__main__":
    main(*sys.argv[1:])
