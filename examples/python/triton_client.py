"""Asks a Triton server for a video, over gRPC or HTTP.  Needs tritonclient[http,grpc] and nothing of ours.

    python triton_client.py photo.jpg -o video.mp4 --seed 42 --set num_inference_steps=25
    python triton_client.py photo.jpg -o video.mp4 --progress --preview preview.webp
    python triton_client.py photo.jpg -o video.mp4 --protocol http --url localhost:8000

Over gRPC, Ctrl-C, --timeout and the end of this process cancel the request: the server stops it at its next
step.  Over HTTP the server does not see a client leave (tritonserver 2.51), and makes the video to its end.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

URLS = {"grpc": "localhost:8001", "http": "localhost:8000"}
TYPES: dict[str, type] = {
    "seed": np.uint64, "height": np.int32, "width": np.int32, "num_frames": np.int32,
    "num_inference_steps": np.int32, "min_guidance_scale": np.float32, "max_guidance_scale": np.float32,
    "fps": np.int32, "motion_bucket_id": np.float32, "noise_aug_strength": np.float32,
    "decode_chunk_size": np.int32, "num_videos_per_prompt": np.int32, "preview_every": np.int32,
    "churn": np.float32, "rho": np.float32,
    "fit": np.object_, "sampler": np.object_, "schedule": np.object_, "guider": np.object_,  # names
}  # fmt: skip
OnStep = Callable[[int, bytes | None], None]  # (steps done, an animated WebP or None)


def tensors(client: Any, image: bytes, parameters: dict[str, Any]) -> list[Any]:
    """`client` is tritonclient.http or tritonclient.grpc; `image` a JPEG, PNG or WebP file's content."""
    from tritonclient.utils import np_to_triton_dtype

    arrays = {"image": np.array([image], dtype=np.object_)}
    arrays.update({name: np.array([value], dtype=TYPES[name]) for name, value in parameters.items()})
    made = []
    for name, array in arrays.items():
        tensor = client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def over_http(url: str, image: bytes, parameters: dict[str, Any], timeout: float, wait: float) -> bytes:
    """The mp4.  `timeout` ends the waiting here, not the work there."""
    import tritonclient.http as triton

    with triton.InferenceServerClient(url, connection_timeout=timeout, network_timeout=timeout) as client:
        answer = client.infer("svd", tensors(triton, image, parameters), timeout=round(wait * 1e6))
        return bytes(answer.as_numpy("video")[0])


def over_grpc(url: str, image: bytes, parameters: dict[str, Any], timeout: float, wait: float) -> bytes:
    """The mp4.  Waits beside the call, so that Ctrl-C gets through and cancels it."""
    import tritonclient.grpc as triton

    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
    with triton.InferenceServerClient(url) as client:
        call = client.async_infer(
            "svd", tensors(triton, image, parameters), lambda result, error: answers.put((result, error)),
            client_timeout=timeout, timeout=round(wait * 1e6),
        )  # fmt: skip
        try:
            answer, error = answers.get()
        except KeyboardInterrupt:
            call.cancel()
            raise
    if error is not None:
        raise error
    return bytes(answer.as_numpy("video")[0])


def streamed(
    url: str, image: bytes, parameters: dict[str, Any], timeout: float, wait: float, on_step: OnStep
) -> bytes:
    """The mp4, from the model that tells of its steps on the way."""
    import tritonclient.grpc as triton

    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=timeout)
        try:
            client.async_stream_infer(
                "svd_stream", tensors(triton, image, parameters), timeout=round(wait * 1e6)
            )
            while True:
                answer, error = answers.get()
                if error is not None:
                    raise error
                video, step, preview = (answer.as_numpy(name) for name in ("video", "step", "preview"))
                if video is not None:
                    return bytes(video[0])
                on_step(int(step[0]), None if preview is None else bytes(preview[0]))
        finally:
            client.stop_stream(cancel_requests=True)


def parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE of one of TYPES."""
    name, _, value = text.partition("=")
    try:
        if TYPES[name] is np.object_:
            return name, value.encode()
        return name, TYPES[name](float(value) if TYPES[name] is np.float32 else int(value))
    except (KeyError, ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=VALUE, NAME out of {', '.join(TYPES)}"
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="mp4 file to write")
    parser.add_argument("--protocol", choices=URLS, default="grpc")
    parser.add_argument("--url", help="host:port; default localhost:8001 for gRPC, localhost:8000 for HTTP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=parameter, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the answer")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds in the queue; 0: the server's limit")
    parser.add_argument("--progress", action="store_true", help="print every step (gRPC, model svd_stream)")
    parser.add_argument("--preview", type=Path, help="with --progress: WebP to write on the way")
    asked = parser.parse_args()
    if (asked.progress and asked.protocol == "http") or (asked.preview and not asked.progress):
        parser.error("--progress needs gRPC, and --preview needs --progress")

    def on_step(done: int, preview: bytes | None) -> None:
        print(f"step {done}", file=sys.stderr, flush=True)
        if preview is not None:
            asked.preview.write_bytes(preview)

    parameters = {"seed": asked.seed, **dict(asked.set)}
    if asked.preview:
        parameters.setdefault("preview_every", 5)
    call = (
        asked.url or URLS[asked.protocol], asked.image.read_bytes(), parameters, asked.timeout, asked.wait
    )  # fmt: skip
    try:
        if asked.progress:
            video = streamed(*call, on_step)
        else:
            video = over_http(*call) if asked.protocol == "http" else over_grpc(*call)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except Exception as error:  # the two protocols raise different classes for the same faults
        print(f"error: {error}", file=sys.stderr)
        return 1
    asked.output.write_bytes(video)
    print(f"wrote {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
