"""Requests to a running server, over both protocols, and what waits for them."""

from __future__ import annotations

import io
import queue
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from svd_engine.spec.profile import Profile
from tests.support.paths import PHOTOGRAPH
from tests.triton.server import Server

SHORT = Profile(2, 32, 48, decode_chunk=2)
PROTOCOLS: dict[str, ModuleType] = {"http": tritonclient.http, "grpc": tritonclient.grpc}
LONG_CALL: dict[str, Any] = {  # nobody waits for its end
    "num_frames": np.int32([25]), "num_inference_steps": np.int32([100]),
    "num_videos_per_prompt": np.int32([4]),
}  # fmt: skip
SHORT_CALL: dict[str, Any] = {"num_inference_steps": np.int32([2]), "seed": np.uint64([7])}


def photograph() -> bytes:
    content = io.BytesIO()
    Image.open(PHOTOGRAPH).resize((96, 64)).save(content, "PNG")
    return content.getvalue()


def tensors(protocol: str, arrays: dict[str, np.ndarray]) -> list[Any]:
    from tritonclient.utils import np_to_triton_dtype

    made = []
    for name, array in arrays.items():
        kind = np_to_triton_dtype(array.dtype)
        tensor = PROTOCOLS[protocol].InferInput(name, list(array.shape), kind)
        made.append(tensor.set_data_from_numpy(array))
    return made


def request(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": np.array([photograph()], object), **arrays}


def client(server: Server, protocol: str) -> Any:
    port = {"http": server.http, "grpc": server.grpc}[protocol]
    options = {"network_timeout": 100.0, "connection_timeout": 100.0} if protocol == "http" else {}
    return PROTOCOLS[protocol].InferenceServerClient(f"127.0.0.1:{port}", **options)


def ask(server: Server, protocol: str, arrays: dict[str, np.ndarray], **options: Any) -> Any:
    """The answer of svd.  Raises InferenceServerException."""
    with client(server, protocol) as connection:
        return connection.infer("svd", tensors(protocol, arrays), **options)


class Running:
    """A gRPC request that was sent and not awaited; `answers` receives (result, error)."""

    def __init__(self, server: Server, arrays: dict[str, np.ndarray], **options: Any) -> None:
        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client = client(server, "grpc")
        self.call = self.client.async_infer(
            "svd", tensors("grpc", arrays), lambda result, error: self.answers.put((result, error)), **options
        )

    def answer(self) -> tuple[Any, Any]:
        try:
            return self.answers.get(timeout=60)
        finally:
            self.client.close()

    def cancel(self) -> str:
        """The status with which it ended."""
        self.call.cancel()
        return str(self.answer()[1].status())


class Stream:
    """A request to svd_stream; iterates over (result, error)."""

    def __init__(self, server: Server, arrays: dict[str, np.ndarray]) -> None:
        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client = client(server, "grpc")
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))
        self.client.async_stream_infer("svd_stream", tensors("grpc", arrays))

    def next(self) -> Any:
        """The next response.  Raises the error in its place."""
        result, error = self.answers.get(timeout=60)
        if error is not None:
            raise error
        return result

    def cancel(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def outcomes(server: Server, model: str = "svd") -> dict[str, int]:
    """How the requests that reached a model ended, so far."""
    names = ("done", "cancelled", "refused", "failed")
    return {name: int(server.metric("svd_requests_total", model=model, outcome=name)) for name in names}


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited a minute for {what}"
        time.sleep(0.02)


def counted(server: Server, before: dict[str, int], model: str = "svd", **more: int) -> None:
    """Waits until the outcomes are those of before and `more`, and holds that no other changed."""
    wanted = {name: count + more.get(name, 0) for name, count in before.items()}
    until(lambda: sum(outcomes(server, model).values()) >= sum(wanted.values()), f"{more} of {model}")
    assert outcomes(server, model) == wanted
