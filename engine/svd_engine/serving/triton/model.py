"""TritonPythonModel: Triton's requests in, its responses and errors out, one request at a time.

Queue length and deadline are Triton's own (`dynamic_batching` in config.pbtxt): with a queue policy it hands
out no request before an instance is free, so one whose time is over never gets here.  What is cancelled
while it waits, Triton releases; a running request is asked before every call of a network.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from svd_engine.serving.triton import inputs
from svd_engine.serving.triton.metrics import Metrics

if TYPE_CHECKING:
    from svd_engine.serving.one_video import VideoRequest


@dataclass
class ClientCancels:
    """Triton's way to ask, as the engine's `cancel`."""

    is_set: Callable[[], bool]


class TritonPythonModel:
    """Imports torch when an instance starts: Triton also loads this file only to look at it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle and makes one video.  What is raised here leaves the model not ready."""
        from svd_engine import VideoEngine
        from svd_engine.serving.one_video import warm_up

        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.max_steps = int(parameters["max_num_inference_steps"])
        self.max_videos = int(parameters["max_num_videos_per_prompt"])
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        bundle = Path(args["model_repository"], parameters["bundle"])
        self.engine = engine = VideoEngine.from_bundle(bundle, device=device)
        engine.set_progress_bar_config(disable=True)
        warm_up(engine)
        self.serves = True
        self.metrics = Metrics(pb_utils.MetricFamily, args["model_name"])
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {engine.choice.backend} on {engine.choice.device} "
            f"({engine.choice.reason}), {engine.default}"
        )

    def is_ready(self) -> bool:
        """Asked by Triton 26.03 and newer; older servers take a living process for a ready one."""
        return self.serves

    def execute(self, requests: Iterable[Any]) -> list[Any] | None:
        if not self.decoupled:
            return [self._answer(request, request.is_cancelled, None) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            answer = self._answer(request, sender.is_cancelled, sender.send)
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def finalize(self) -> None:
        self.engine.close()

    def _answer(self, request: Any, cancelled: Callable[[], bool], send: Callable[[Any], None] | None) -> Any:
        """The last response to a request, which is counted.  Everything that can go wrong is one as well."""
        from svd_engine.serving.one_video import Status, must_reopen, status_after

        try:
            response, outcome = self._generate(request, cancelled, send), Status.DONE
            self.serves = True
        except Exception as error:
            outcome = status_after(error)
            if outcome is Status.CANCELLED:
                response = _error(pb_utils.TritonError.CANCELLED, "cancelled by the client")
            elif outcome is Status.REFUSED:
                response = _error(pb_utils.TritonError.INVALID_ARG, str(error))
            else:  # of a network or the machine: this request fails, the next may not
                pb_utils.Logger.log_error(traceback.format_exc())
                response = _error(pb_utils.TritonError.INTERNAL, str(error))
            if must_reopen(error):
                self._reopen()
        self.metrics.count(outcome)
        return response

    def _generate(
        self, request: Any, cancelled: Callable[[], bool], send: Callable[[Any], None] | None
    ) -> Any:
        from svd_engine.media.video import as_bytes
        from svd_engine.serving.encode import encode
        from svd_engine.serving.one_video import make_video, watch

        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        asked = inputs.read(given, self.max_steps, self.max_videos, self.engine.model.steps)
        wanted = _video_request(asked)

        def on_step_end(done: int, preview: np.ndarray | None) -> None:
            assert send is not None
            shown = None if preview is None else _bytes(encode(preview, ".webp", asked.fps))
            send(_response(step=np.array([done], np.int32), preview=shown))

        watched = watch(self.engine, wanted, on_step_end if send else None)
        made = make_video(self.engine, wanted, watched, ClientCancels(cancelled))
        started = time.perf_counter()
        frames = [as_bytes(video) for video in made.frames]
        as_files = asked.output_type == "mp4"
        files = [encode(video, ".mp4", asked.fps) for video in frames] if as_files else []
        self.metrics.time({**made.report.stage_ms, "encode": (time.perf_counter() - started) * 1e3})
        return _response(
            video=_bytes(*files) if as_files else None,
            frames=None if as_files else np.stack(frames),
            seed=np.array([asked.seed], np.uint64),
            report=_bytes(made.report.model_dump_json().encode()),
        )

    def _reopen(self) -> None:
        """A network failed: loads everything anew.  What fails twice is not ready until it works."""
        from svd_engine.serving.one_video import warm_up

        self.engine.close()
        try:
            warm_up(self.engine)
        except Exception as error:
            self.serves = False
            pb_utils.Logger.log_error(f"not ready: {error}")


def _video_request(asked: inputs.Request) -> VideoRequest:
    import torch

    from svd_engine.media.image import decode_image
    from svd_engine.serving.one_video import VideoRequest

    arguments = {**asked.sampling, "output_type": "pt"}
    if "latents" in arguments:
        arguments["latents"] = torch.from_numpy(arguments["latents"].copy())  # Triton's are read-only
    return VideoRequest(
        decode_image(asked.image, transparency=True), asked.seed, asked.preview_every, arguments
    )


def _response(**outputs: np.ndarray | None) -> Any:
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in outputs.items() if array is not None]
    )


def _error(code: int, message: str) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(message, code))


def _bytes(*contents: bytes) -> np.ndarray:
    return np.array(contents, dtype=np.object_)
