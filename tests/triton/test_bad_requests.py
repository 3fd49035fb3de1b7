"""A real server refuses bad requests over HTTP and gRPC, says why, and goes on."""

from __future__ import annotations

import io
import json
import socket
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.triton.asking import SHORT_CALL, Stream, ask, photograph, request
from tests.triton.server import Server


def picture(size: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("1", size).save(content, "PNG")
    return content.getvalue()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not a picture": ({"image": np.array([b"hello"], object)}, "a whole picture in one of the formats"),
    "an empty picture": ({"image": np.array([b""], object)}, "expected a picture, got an empty file"),
    "half a picture": ({"image": np.array([photograph()[:900]], object)}, "a whole picture"),
    "a huge picture": ({"image": np.array([picture((9000, 9000))], object)}, "at most 64,000,000 pixels"),
    "two pictures": ({"image": np.array([photograph()] * 2, object)}, "unexpected shape"),
    "pixels": ({"image": np.zeros((1,), np.uint8)}, "data-type"),
    "steps as a float": ({"num_inference_steps": np.float32([2])}, "data-type"),
    "no steps": ({"num_inference_steps": np.int32([0])}, "num_inference_steps: expected a whole"),
    "too many steps": ({"num_inference_steps": np.int32([2**31 - 1])}, "at most 100, got 2147483647"),
    "another size": ({"height": np.int32([64])}, "expected one of its profiles"),
    "a negative size": ({"width": np.int32([-8])}, "width: expected a whole number of at least 1"),
    "an odd size": ({"width": np.int32([50])}, "width: expected a multiple of"),
    "other frames": ({"num_frames": np.int32([10**9])}, "expected one of its profiles"),
    "another chunk": ({"decode_chunk_size": np.int32([1])}, "expected one of its profiles"),
    "no speed": ({"fps": np.int32([0])}, "fps: expected a whole number of at least 1"),
    "an absurd speed": ({"fps": np.int32([2**31 - 1])}, "fps: expected at most 240"),
    "motion": ({"motion_bucket_id": np.float32([1024])}, "motion_bucket_id: expected 0 to 1023"),
    "noise NaN": ({"noise_aug_strength": np.float32([np.nan])}, "expected a finite number"),
    "noise below 0": ({"noise_aug_strength": np.float32([-1])}, "noise_aug_strength: expected 0 or more"),
    "guidance": ({"max_guidance_scale": np.float32([np.inf])}, "max_guidance_scale: expected a finite"),
    "sigmas that rise": ({"sigmas": np.float32([1, 2])}, "fall strictly"),
    "no sigmas": ({"sigmas": np.zeros(0, np.float32)}, "two or more finite noise levels"),
    "too many sigmas": ({"sigmas": np.linspace(700, 0, 999, dtype=np.float32)}, "expected at most 100 steps"),
    "videos": ({"num_videos_per_prompt": np.int32([1000])}, "num_videos_per_prompt: expected at most 4"),
    "latents": ({"latents": np.zeros((1, 2, 4, 8, 8), np.float32)}, "latents: expected shape"),
    "output type": ({"output_type": np.array([b"gif"], object)}, "output_type: expected mp4 or frames"),
    "fit": ({"fit": np.array([b"cover"], object)}, "fit: expected stretch, crop, pad, got 'cover'"),
    "no UTF-8": ({"output_type": np.array([b"\xff"], object)}, "output_type: expected mp4 or frames"),
    "unknown": ({"strength": np.float32([1])}, "unexpected inference input 'strength'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(server: Server, case: str) -> None:
    """Refused as the client's fault, with the reason; the server goes on."""
    arrays, message = BAD[case]
    for protocol, status in (("http", "400"), ("grpc", "StatusCode.INVALID_ARGUMENT")):
        with pytest.raises(InferenceServerException) as caught:
            ask(server, protocol, {**request(**SHORT_CALL), **arrays})
        assert caught.value.status() == status
        assert message in str(caught.value)
    assert ask(server, "grpc", request(**SHORT_CALL)).as_numpy("video") is not None


def test_a_bad_preview(server: Server) -> None:
    stream = Stream(server, request(preview_every=np.int32([-1])))
    with pytest.raises(
        InferenceServerException, match="preview_every: expected a whole number of at least 0"
    ):
        stream.next()
    stream.cancel()


def test_a_request_without_a_picture(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="image: expected an encoded picture"):
        ask(server, "http", SHORT_CALL)


@pytest.mark.parametrize("ending", ["closed", "garbage", "short"])
def test_a_truncated_body(server: Server, ending: str) -> None:
    """Half a body and a closed connection; a JSON header cut off; fewer bytes than the header promises."""
    content = photograph()
    header = json.dumps({"inputs": [{
        "name": "image", "shape": [1], "datatype": "BYTES",
        "parameters": {"binary_data_size": len(content) + 4 + 1000 * (ending == "short")},
    }]}).encode()  # fmt: skip
    if ending == "garbage":
        header = header[: len(header) // 2]
    body = header + len(content).to_bytes(4, "little") + content
    promised = len(body) * (2 if ending == "closed" else 1)
    with socket.create_connection(("127.0.0.1", server.http)) as connection:
        connection.sendall(
            f"POST /v2/models/svd/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {promised}\r\n"
            f"Inference-Header-Content-Length: {len(header)}\r\n\r\n".encode()
            + body
        )
        if ending != "closed":
            status = connection.recv(4096).split()[1]
            assert status == {"garbage": b"500", "short": b"400"}[ending]  # 500 is this server's choice
    assert ask(server, "http", request(**SHORT_CALL)).as_numpy("video") is not None
