"""The config.pbtxt of every model of a repository, as text.  Knows Triton's schema, writes no files."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from svd_engine.bundle.manifest import Manifest
from svd_engine.serving.triton.inputs import CALL, OUTPUT_TYPE, PREVIEW_EVERY, Tensor
from svd_engine.spec.tensors import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    from svd_export.triton import QueueLimits

ONE = struct.pack("<f", 1.0)
MAX_STEPS = 100
MAX_VIDEOS = 4
VIDEO = (
    Tensor("video", "TYPE_STRING", (-1,)),  # an mp4 file each
    Tensor("frames", "TYPE_UINT8", (-1, -1, -1, -1, 3)),  # [N,F,H,W,3]
    Tensor("seed", "TYPE_UINT64"),
    Tensor("report", "TYPE_STRING"),  # JSON
)
PROGRESS = (
    Tensor("step", "TYPE_INT32"),  # steps done
    Tensor("preview", "TYPE_STRING"),  # an animated WebP of latent size
)


def video_model(name: str, manifest: Manifest, limits: QueueLimits, *, stream: bool) -> str:
    """The whole pipeline as one model over the Python backend."""
    frames = max(prod((p.frames, p.height, p.width, 3)) for p in manifest.profiles)
    inputs = (*CALL, OUTPUT_TYPE, *((PREVIEW_EVERY,) if stream else ()))
    outputs = (*(PROGRESS if stream else ()), *VIDEO)
    bundle = "../svd/1/bundle" if stream else "1/bundle"
    decoupled = "model_transaction_policy { decoupled: true }\n" if stream else ""
    return f"""\
# {manifest.model.name}: {"; ".join(map(str, manifest.profiles))}
# Shared memory: every request and response passes through /dev/shm.  An mp4 takes its own size;
# output_type "frames" takes up to {frames} bytes ({frames / 2**20:.1f} MiB) a video.  Containers have
# 64 MiB by default: start them with `docker run --shm-size=1g`.
name: "{name}"
backend: "python"
max_batch_size: 0
{_list("input", map(_tensor, inputs))}
{_list("output", map(_tensor, outputs))}
{decoupled}# One request at a time in an instance: `count` of them on every GPU, or on the CPU without one.
instance_group [{{ kind: KIND_AUTO, count: {limits.instances} }}]
# More than max_queue_size waiting, or waiting for longer than the timeout: refused.  A request may ask for
# less time, not for more.
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {limits.max_queue}
    default_timeout_microseconds: {round(limits.timeout * 1e6)}
    timeout_action: REJECT
    allow_timeout_override: true
  }}
}}
parameters [
  {{ key: "bundle", value: {{ string_value: "{bundle}" }} }},
  {{ key: "max_num_inference_steps", value: {{ string_value: "{MAX_STEPS}" }} }},
  {{ key: "max_num_videos_per_prompt", value: {{ string_value: "{MAX_VIDEOS}" }} }}
]
"""


def network_model(spec: NetworkSpec, backend: str, name: str | None = None) -> str:
    """One network at its static shapes, over Triton's onnxruntime or tensorrt backend."""
    kind = "KIND_GPU" if backend == "tensorrt" else "KIND_AUTO"
    return f"""\
name: "{name or spec.key}"
backend: "{backend}"
max_batch_size: 0
{_list("input", map(_static, spec.inputs))}
{_list("output", map(_static, spec.outputs))}
instance_group [{{ kind: {kind}, count: 1 }}]
model_warmup [{{
  name: "static_shapes"
  count: 1
{_list("  inputs", map(_warm_up, spec.inputs))}
}}]
"""


def _list(name: str, entries: Iterable[str]) -> str:
    return f"{name} [\n  " + ",\n  ".join(entries) + "\n]"


def _tensor(tensor: Tensor) -> str:
    optional = ", optional: true" if tensor.optional else ""
    return f'{{ name: "{tensor.name}", data_type: {tensor.datatype}, dims: {list(tensor.dims)}{optional} }}'


def _static(tensor: TensorSpec) -> str:
    """Triton has no tensors without dimensions: a scalar is one element, reshaped."""
    scalar = "" if tensor.shape else ", reshape: { shape: [] }"
    return f'{{ name: "{tensor.name}", data_type: TYPE_FP32, dims: {list(tensor.shape or (1,))}{scalar} }}'


def _warm_up(tensor: TensorSpec) -> str:
    """Zeros; for the noise level one, from a file, since zero has no logarithm."""
    data = "zero_data: true" if tensor.shape else f'input_data_file: "{tensor.name}"'
    value = f"data_type: TYPE_FP32, dims: {list(tensor.shape or (1,))}, {data}"
    return f'{{ key: "{tensor.name}", value: {{ {value} }} }}'
