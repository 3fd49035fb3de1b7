"""What a subject must pass before it is timed: the right output, made where it was asked to be made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svd_engine.errors import BackendError, BackendUnavailable, NonFiniteOutput
from svd_engine.networks.parity import TOLERANCES
from svd_engine.spec.network import Placement
from svd_engine.spec.precision import DType

# differences add up over the steps
VIDEO_TOLERANCES: dict[DType, float] = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}


def tolerance(stage: str, dtype: DType, device: torch.device) -> float:
    """cuDNN convolves float32 in TF32, of float16's precision, unless it is told not to."""
    if dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        dtype = "float16"
    return (VIDEO_TOLERANCES if stage == "whole_video" else TOLERANCES)[dtype]


def check_output(what: str, got: Tensor, reference: Tensor, allowed: float) -> float:
    """The difference of `got` from `reference`: max abs over the reference's largest absolute value.

    Raises NonFiniteOutput for NaN or infinity, BackendError for another shape or more than `allowed`.
    """
    if got.shape != reference.shape:
        raise BackendError(
            f"output of {what}",
            expected=f"shape {list(reference.shape)}",
            got=str(list(got.shape)),
            remedy="Nothing was timed: report this with the command line.",
        )
    bad = int((~got.isfinite()).sum())
    if bad:
        raise NonFiniteOutput(
            f"output of {what}",
            expected="finite numbers",
            got=f"NaN or infinity in {bad} of {got.numel()} values",
            remedy="Nothing was timed: try another --dtype.",
        )
    other = reference.to(got.device, torch.float64)
    difference = float((got.double() - other).abs().max() / other.abs().max())
    if not difference <= allowed:  # written so that NaN, of a reference of zeros, fails
        raise BackendError(
            f"output of {what}",
            expected=f"diffusers' own within {allowed:g} of its largest value",
            got=f"a difference of {difference:.3g}",
            remedy="Nothing was timed: find the cause with `svd-export verify` or --without-rewrite NAME.",
        )
    return difference


def check_outputs(
    what: str, got: Mapping[str, Tensor], reference: Mapping[str, Tensor], allowed: float
) -> float:
    """The largest difference among the outputs of a network.  Raises what `check_output` raises."""
    return max(check_output(f"{what} {name}", got[name], reference[name], allowed) for name in reference)


def check_placement(what: str, placement: Placement, backend: str, device: str, dtype: str) -> None:
    """Raises BackendUnavailable when something else ran than was asked for."""
    asked, got = (backend, device, dtype), (placement.backend, placement.device, placement.dtype)
    if got != asked:
        raise BackendUnavailable(
            f"what ran {what}",
            expected=" ".join(asked),
            got=" ".join(got),
            remedy="A backend that fell back is not timed: `svd-engine info` says what works here.",
        )
