"""Animate a photograph in this process.

python generate.py bundles/svd-xt photo.jpg video.mp4
"""

import sys

import torch

from svd_engine import VideoEngine, load_image


def main(bundle: str, photograph: str, video: str) -> None:
    with VideoEngine.from_bundle(bundle) as engine:  # or VideoEngine.from_checkpoint("svd-xt"): no export
        result = engine(
            load_image(photograph), fit="crop", motion_bucket_id=127, generator=torch.manual_seed(42)
        )
    result.save(video)
    print(result.report.model_dump_json(indent=1))  # backend and device of every stage, times, memory


if __name__ == "__main__":
    main(*sys.argv[1:])
