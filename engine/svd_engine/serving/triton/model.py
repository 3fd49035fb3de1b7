"""TritonPythonModel: Triton's requests in, its responses and errors out, one request at a time.

Queue length and deadline are Triton's own (`dynamic_batching` in config.pbtxt): with a queue policy it hands
out no request before an instance is free, so one whose time is over never gets here.  What is cancelled
while it waits, Triton releases; a running request is asked before every call of a network.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from svd_engine.errors import ImageError, NonFiniteOutput, SettingsError
from svd_export.triton_model import inputs
from svd_export.triton_model.metrics import Metrics


class TritonPythonModel:
    """Imports torch when an instance starts: Triton also loads this file only to look at it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle and makes one video.  What is raised here leaves the model not ready."""
        from svd_export.triton_model.service import Service

        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.max_steps = int(parameters["max_num_inference_steps"])
        self.max_videos = int(parameters["max_num_videos_per_prompt"])
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        self.service = Service(Path(args["model_repository"], parameters["bundle"]), device)
        self.service.warm_up()
        self.serves = True
        self.metrics = Metrics(pb_utils.MetricFamily, args["model_name"])
        engine = self.service.engine
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
        self.service.close()

    def _answer(self, request: Any, cancelled: Callable[[], bool], send: Callable[[Any], None] | None) -> Any:
        """The last response to a request, which is counted.  Everything that can go wrong is one as well."""
        from svd_export.triton_model.watch import Cancelled

        try:
            response, outcome = self._generate(request, cancelled, send), "done"
            self.serves = True
        except Cancelled:
            response, outcome = _error(pb_utils.TritonError.CANCELLED, "cancelled by the client"), "cancelled"
        except (SettingsError, ImageError) as error:
            response, outcome = _error(pb_utils.TritonError.INVALID_ARG, str(error)), "refused"
        except Exception as error:  # of a network or the machine: this request fails, the next may not
            pb_utils.Logger.log_error(traceback.format_exc())
            response, outcome = _error(pb_utils.TritonError.INTERNAL, str(error)), "failed"
            if not isinstance(error, NonFiniteOutput):
                self._reopen()
        self.metrics.count(outcome)
        return response

    def _generate(
        self, request: Any, cancelled: Callable[[], bool], send: Callable[[Any], None] | None
    ) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        asked = inputs.read(given, self.max_steps, self.max_videos)

        def on_step(done: int, preview: bytes | None) -> None:
            assert send is not None
            send(_response(step=np.array([done], np.int32), preview=_bytes(preview) if preview else None))

        made = self.service.make(asked, cancelled, on_step if send else None)
        self.metrics.time(made.stage_ms)
        return _response(
            video=_bytes(*made.videos) if made.videos else None,
            frames=made.frames,
            seed=np.array([asked.seed], np.uint64),
            report=_bytes(made.report.encode()),
        )

    def _reopen(self) -> None:
        """A network failed: loads everything anew.  What fails twice is not ready until it works."""
        self.service.close()
        try:
            self.service.warm_up()
        except Exception as error:
            self.serves = False
            pb_utils.Logger.log_error(f"not ready: {error}")


def _response(**outputs: np.ndarray | None) -> Any:
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in outputs.items() if array is not None]
    )


def _error(code: int, message: str) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(message, code))


def _bytes(*contents: bytes) -> np.ndarray:
    return np.array(contents, dtype=np.object_)
