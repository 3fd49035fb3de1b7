"""Give a call a deadline: cancel it from another thread when its time is over.

    python cancel.py bundles/svd-xt photo.jpg video.mp4 60

A call looks at `cancel` while it waits for its turn, before every run of a network and between the slices of
a streamed decoder.
"""

import sys
import threading

import torch

from svd_engine import Cancelled, VideoEngine, load_image


def main(bundle: str, photograph: str, video: str, seconds: str) -> None:
    cancel = threading.Event()  # anything with its is_set()
    deadline = threading.Timer(float(seconds), cancel.set)
    with VideoEngine.from_bundle(bundle) as engine:
        deadline.start()
        try:
            generator = torch.manual_seed(42)
            result = engine(load_image(photograph), fit="crop", generator=generator, cancel=cancel)
        except Cancelled as cancelled:
            print(f"no video after {seconds} s: {cancelled}")
            return
        finally:
            deadline.cancel()
    result.save(video)
    print(f"wrote {video}")


if __name__ == "__main__":
    main(*sys.argv[1:])
