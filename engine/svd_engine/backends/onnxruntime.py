"""ONNX Runtime, on the CPU or a CUDA GPU, over a bundle's graphs.

Inputs and outputs are bound by address, so nothing is copied on the way in or out, and on a GPU no
latent visits the host between steps.  The provider asked for is the provider used, or an error:
ONNX Runtime itself falls back to the CPU without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svd_engine.backends.segmented import SegmentedDecoder
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BackendUnavailable
from svd_engine.host_memory import give_back_freed, total_bytes
from svd_engine.install import install_line
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec

Element = type[np.generic] | int  # a type of numpy's, or the number of one that onnx alone has
ELEMENTS: dict[torch.dtype, Element] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: 16,
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtNetwork(Network):
    def __init__(self, spec: NetworkSpec, session: Any, placement: Placement) -> None:
        super().__init__(spec, placement)
        self.session = session
        self.device = torch.device(placement.device)
        self.outputs = {
            t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device=self.device)
            for t in spec.outputs
        }

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        binding = self.session.io_binding()
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            binding.bind_input(name, *self._where(tensor))
        for name, tensor in self.outputs.items():
            binding.bind_output(name, *self._where(tensor))
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime, {self.spec.key} on {self.placement.device}",
                expected="a run without error",
                got=str(error).strip(),
                remedy="If memory ran out, export a smaller profile (decode chunk, single guidance).",
            ) from error
        return dict(self.outputs)

    def _where(self, tensor: Tensor) -> tuple[str, int, Element, list[int], int]:
        element = ELEMENTS[tensor.dtype]
        return self.device.type, self.device.index or 0, element, list(tensor.shape), tensor.data_ptr()

    def close(self) -> None:
        del self.session, self.outputs


class OrtBackend:
    name = "onnxruntime"
    movable = False

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.runtime = load_runtime(device)
        self.bundle = bundle
        self.device = device

    def open(self, spec: NetworkSpec) -> Network:
        if isinstance(spec, StreamedSpec):
            segments = self.bundle.segments(spec)
            for segment in segments:
                self._graph(segment)  # what is wrong with its files shows now, not in the middle of a call
            return SegmentedDecoder(spec, segments, self)
        path = self._graph(spec)
        provider = PROVIDERS[self.device.type]
        session = self._session(path, provider)
        used = session.get_providers()
        if used[0] != provider:
            raise BackendUnavailable(
                f"ONNX Runtime provider for {spec.key}",
                expected=provider,
                got=", ".join(used),
                remedy=f"Install it ({install_line(self.device.type)}) and the CUDA and cuDNN libraries that "
                'it needs, or use device="cpu".',
            )
        detail = f"onnxruntime {self.runtime.__version__} {used[0]}"
        placement = Placement("onnxruntime", str(self.device), str(spec.precision), detail)
        return OrtNetwork(spec, session, placement)

    def _graph(self, spec: NetworkSpec) -> Path:
        return self.bundle.graph(spec, "onnxruntime", _memory(self.device))

    def _session(self, path: Path, provider: str) -> Any:
        options = self.runtime.SessionOptions()
        options.log_severity_level = 3  # errors only; they come back as exceptions as well
        options.enable_mem_pattern = False  # its block comes on top of what the first run's arena holds
        settings = {"device_id": str(self.device.index or 0)} if self.device.type == "cuda" else {}
        try:
            session = self.runtime.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime {self.runtime.__version__} loading {path.name}",
                expected="a graph that it can run",
                got=str(error).strip(),
                remedy="Try a newer onnxruntime, or run `svd-export onnx CHECKPOINT -o BUNDLE --dtype fp32`.",
            ) from error
        give_back_freed()  # weights that it copied into another layout
        return session

    def close(self) -> None:
        """Sessions belong to their networks; nothing else is held."""


def _memory(device: torch.device) -> int:
    """Bytes that `device` has, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_bytes()


def load_runtime(device: torch.device) -> Any:
    """The onnxruntime module, once it is sure that it has a provider for `device`."""
    install = install_line(device.type)
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            "backend onnxruntime",
            expected="the package onnxruntime",
            got="none installed",
            remedy=f"Run: {install}",
        ) from error
    provider, available = PROVIDERS[device.type], onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendUnavailable(
            f"backend onnxruntime on {device}",
            expected=provider,
            got=", ".join(available),
            remedy=f"onnxruntime and onnxruntime-gpu cannot share an environment: "
            f"run `pip uninstall -y onnxruntime` and then {install}",
        )
    return onnxruntime
