"""Checks a caller's arguments that are no numbers: names out of a list, and random generators."""

from __future__ import annotations

import torch

from svd_engine.errors import SettingsError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)  # what `callback_on_step_end_tensor_inputs` may name
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """fp32, fp16 or bf16; "auto" is fp16 on a GPU and fp32 on the CPU.  Raises SettingsError."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    one_of("dtype", name, tuple(DTYPES))
    return DTYPES[name]


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises SettingsError unless `value` is allowed."""
    if value not in allowed:
        raise SettingsError(name, expected=", ".join(allowed), got=repr(value), remedy="Choose one of these.")


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
