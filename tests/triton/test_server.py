"""A real server: what it answers, over HTTP and gRPC, and its queue."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tritonclient.utils import InferenceServerException

from svd_engine import VideoEngine
from svd_engine.media.image import decode_image
from svd_engine.media.video import to_uint8
from tests.triton.asking import (
    LONG_CALL,
    SHORT,
    SHORT_CALL,
    Running,
    Stream,
    ask,
    counted,
    outcomes,
    photograph,
    request,
    until,
)
from tests.triton.conftest import QUEUE
from tests.triton.server import Server

SIZE = (SHORT.frames, SHORT.height, SHORT.width, 3)


def frames_of(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_picture_in_an_mp4_out(server: Server, protocol: str) -> None:
    result = ask(server, protocol, request(**SHORT_CALL))
    (video,) = result.as_numpy("video")
    assert frames_of(video).shape == SIZE
    assert result.as_numpy("frames") is None  # opt-in
    assert result.as_numpy("seed").tolist() == [7]
    report = json.loads(result.as_numpy("report")[0])
    assert report["settings"]["steps"] == 2
    assert {stage["backend"] for stage in report["stages"].values()} == {"onnxruntime"}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_frames_are_the_engine_s(server: Server, bundle: Path, protocol: str) -> None:
    """In this process, another environment, the same arguments give the same pixels, up to one rounding."""
    arguments: dict[str, Any] = {
        "num_inference_steps": 3, "fps": 5, "motion_bucket_id": 30.5, "noise_aug_strength": 0.1,
        "min_guidance_scale": 1.5, "max_guidance_scale": 2.5, "num_videos_per_prompt": 2,
    }  # fmt: skip
    kinds = {int: np.int32, float: np.float32}
    arrays = {name: np.array([value], kinds[type(value)]) for name, value in arguments.items()}
    arrays["fit"] = np.array([b"crop"], object)
    sent = request(seed=np.uint64([2**64 - 1]), output_type=np.array([b"frames"], object), **arrays)
    result = ask(server, protocol, sent)
    with VideoEngine.from_bundle(bundle, device="cpu") as engine:
        expected = engine(
            decode_image(photograph()), output_type="pt", fit="crop",
            generator=torch.Generator().manual_seed(2**64 - 1), **arguments,
        ).frames  # fmt: skip
    got = result.as_numpy("frames").astype(int)
    assert got.shape == (2, *SIZE)
    assert np.abs(got - np.stack([to_uint8(video) for video in expected])).max() <= 1
    assert result.as_numpy("video") is None


def test_sigmas_and_latents_as_diffusers_takes_them(server: Server) -> None:
    """Other noise levels and other noise change the video; the same ones give it again."""
    videos = set()
    sigmas, noise = np.float32([50, 1, 0]), np.random.default_rng(0).normal(size=(1, 2, 4, 16, 24))
    for given in ({}, {"sigmas": sigmas}, {"latents": noise.astype(np.float32)}):
        first, again = (
            ask(server, "grpc", request(**SHORT_CALL, **given)).as_numpy("video")[0] for _ in "ab"
        )
        assert first == again
        videos.add(first)
    assert len(videos) == 3


def test_without_a_seed_it_draws_one_and_says_which(server: Server) -> None:
    call = {"num_inference_steps": np.int32([1])}
    first, second = (ask(server, "grpc", request(**call)) for _ in range(2))
    assert first.as_numpy("seed")[0] != second.as_numpy("seed")[0]
    again = ask(server, "grpc", request(seed=first.as_numpy("seed"), **call))
    assert again.as_numpy("video")[0] == first.as_numpy("video")[0] != second.as_numpy("video")[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_picture_formats(server: Server, kind: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(content, kind)
    sent = {**request(**SHORT_CALL), "image": np.array([content.getvalue()], object)}
    assert frames_of(ask(server, "http", sent).as_numpy("video")[0]).shape == SIZE


def test_fifty_requests_from_four_clients(server: Server) -> None:
    """All answered; the same seed gives the same bytes, whoever asks, over whichever protocol."""

    def one(number: int) -> tuple[int, bytes]:
        seed = number % 5
        sent = request(num_inference_steps=np.int32([2]), seed=np.uint64([seed]))
        return seed, bytes(ask(server, ("http", "grpc")[number % 2], sent).as_numpy("video")[0])

    before = outcomes(server)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(one, range(50)))
    assert len(answers) == 50
    assert len(set(answers)) == len({video for _, video in answers}) == 5
    counted(server, before, done=50)


def test_the_stream_tells_every_step_and_shows_what_comes(server: Server) -> None:
    call = {"num_inference_steps": np.int32([5]), "seed": np.uint64([7])}
    stream = Stream(server, request(preview_every=np.int32([2]), **call))
    steps = [stream.next() for _ in range(5)]
    last = stream.next()
    stream.cancel()
    assert [int(result.as_numpy("step")[0]) for result in steps] == [1, 2, 3, 4, 5]
    previews = [result.as_numpy("preview") for result in steps]
    assert [preview is not None for preview in previews] == [False, True, False, True, False]
    for preview in (previews[1], previews[3]):
        with Image.open(io.BytesIO(preview[0])) as shown:
            assert (shown.format, shown.size) == ("WEBP", (SHORT.width // 2, SHORT.height // 2))
    assert last.as_numpy("video")[0] == ask(server, "grpc", request(**call)).as_numpy("video")[0]


def test_metrics(server: Server) -> None:
    stages = ("preprocess", "image_encoder", "vae_encoder", "denoiser", "vae_decoder", "encode")
    name = "svd_stage_milliseconds_total"
    before = {stage: server.metric(name, model="svd", stage=stage) for stage in stages}
    ask(server, "http", request(**SHORT_CALL))
    assert all(server.metric(name, model="svd", stage=stage) > before[stage] for stage in stages)


# The queue


def test_twenty_requests_into_a_queue_of_four(server: Server) -> None:
    """Refused at once, while the long one runs; what had a place in the queue is answered."""
    long = Running(server, request(**LONG_CALL))
    time.sleep(0.5)
    many = [Running(server, request(**SHORT_CALL)) for _ in range(20)]
    until(lambda: sum(not each.answers.empty() for each in many) >= 20 - QUEUE, "the refusals")
    refused = [each for each in many if not each.answers.empty()]
    assert long.answers.empty()
    assert server.metric("nv_inference_pending_request_count", model="svd") == 20 - len(refused)
    for each in refused:
        _, error = each.answer()
        assert "Exceeds maximum queue size" in str(error)
        assert error.status() == "StatusCode.UNAVAILABLE"
    assert long.cancel() == "StatusCode.CANCELLED"
    assert all(each.answer()[0] is not None for each in many if each not in refused)


def test_a_request_whose_time_is_over_never_starts(server: Server) -> None:
    """It asks for less time than the server's 100 s, and is answered while the one before it still runs."""
    before = outcomes(server)
    long = Running(server, request(**LONG_CALL))
    time.sleep(0.5)
    late = Running(server, request(**SHORT_CALL), timeout=200_000)  # microseconds
    _, error = late.answer()
    assert "Request timeout expired" in str(error)
    assert error.status() == "StatusCode.UNAVAILABLE"
    assert long.answers.empty()
    assert long.cancel() == "StatusCode.CANCELLED"
    counted(server, before, cancelled=1)


def test_nothing_leaks(server: Server) -> None:
    """Memory of server and model and what lies in /dev/shm, after 60 requests of every kind."""

    def some(count: int) -> None:
        for number in range(count):
            if number % 4 == 0:
                with pytest.raises(InferenceServerException):
                    ask(server, "http", {**request(), "image": np.array([b"hello"], object)})
            elif number % 4 == 1:
                ask(server, "grpc", request(output_type=np.array([b"frames"], object), **SHORT_CALL))
            elif number % 4 == 2:
                running = Running(server, request(num_inference_steps=np.int32([100])))
                time.sleep(0.05)
                running.cancel()
            else:
                ask(server, "http", request(**SHORT_CALL))

    def held() -> tuple[int, dict[str, int]]:
        processes = [psutil.Process(server.process.pid), *server.stubs()]
        shared = {path.name: path.stat().st_size for path in Path("/dev/shm").glob("triton_python*")}
        return sum(process.memory_info().rss for process in processes), shared

    some(20)
    resident, shared = held()
    some(60)
    now, shared_now = held()
    assert shared_now == shared
    assert now - resident < 32 * 2**20
