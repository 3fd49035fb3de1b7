"""Validates non-numeric arguments: names out of a list, random generators, callbacks and their answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from svd_engine.errors import SettingsError
from svd_engine.observer import Observer
from svd_engine.spec.precision import DTYPE_OPTIONS, DType
from svd_engine.values import one_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)  # what `callback_on_step_end_tensor_inputs` may name
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """fp32, fp16, bf16 or torch's own; "auto" is fp16 on a GPU and fp32 on the CPU.  Raises SettingsError."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[one_of("dtype", name, tuple(DTYPES))]


def dtype_name(dtype: torch.dtype) -> DType:
    """Of a type that networks compute in: "float16" of torch.float16."""
    names: dict[torch.dtype, DType] = {DTYPES[option]: name for name, option in DTYPE_OPTIONS.items()}
    return names[dtype]


def check_generators(generator: object, videos: int) -> None:
    """One generator for all videos, a list of one each, or none.  Raises SettingsError."""
    listed = generator if isinstance(generator, list) else [generator] * videos
    wrong = [g for g in listed if not (g is None or isinstance(g, torch.Generator))]
    if wrong or len(listed) != videos or (isinstance(generator, list) and None in listed):
        raise SettingsError(
            "generator",
            expected=f"a torch.Generator, or a list of {videos} (one for each video)",
            got=f"a list of {len(listed)}" if isinstance(generator, list) else type(generator).__name__,
            remedy="For reproducible videos pass torch.Generator('cpu').manual_seed(SEED).",
        )


def check_callback(callback: object, tensor_inputs: object) -> None:
    """Raises SettingsError unless the callback can be called and asks for tensors that there are."""
    if callback is not None and not callable(callback):
        raise SettingsError(
            "callback_on_step_end",
            expected="a function of (engine, step, timestep, callback_kwargs), or None",
            got=type(callback).__name__,
            remedy="Pass the function itself.",
        )
    if not isinstance(tensor_inputs, (list, tuple)):
        raise SettingsError(
            "callback_on_step_end_tensor_inputs",
            expected=f"a list out of {', '.join(CALLBACK_TENSORS)}",
            got=repr(tensor_inputs),
            remedy="Leave it out, or pass [] for none.",
        )
    for name in tensor_inputs:
        one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)


def check_watchers(cancel: object, observer: object) -> None:
    """Raises SettingsError unless `cancel` has an `is_set` to ask, and `observer` is an Observer."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise SettingsError(
            "cancel",
            expected="a threading.Event, or an object with its is_set",
            got=type(cancel).__name__,
            remedy="Pass the event that another thread sets.",
        )
    if observer is not None and not isinstance(observer, Observer):
        raise SettingsError(
            "observer",
            expected="an svd_engine.observer.Observer",
            got=type(observer).__name__,
            remedy="Derive its class from Observer.",
        )


def returned_tensors(returned: object) -> Mapping[str, object]:
    """What a callback gave back: a dict of the tensors that it replaces.  Raises SettingsError."""
    if isinstance(returned, Mapping) and set(returned) <= set(CALLBACK_TENSORS):
        return returned
    got = f"a dict of {', '.join(map(repr, returned))}" if isinstance(returned, Mapping) else repr(returned)
    raise SettingsError(
        "what callback_on_step_end returned",
        expected=f"a dict of none or some of {', '.join(CALLBACK_TENSORS)}",
        got=got,
        remedy="Return callback_kwargs, or {} to change nothing.",
    )
