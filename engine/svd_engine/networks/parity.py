"""How a network is compared with its reference: seeded inputs, and how far an output may be from it."""

from __future__ import annotations

import torch
from torch import Tensor

from svd_engine.spec.conditioning import Conditioning
from svd_engine.spec.model import SVD
from svd_engine.spec.precision import DType
from svd_engine.spec.tensors import NetworkSpec

# On max abs over the largest absolute value of a float32 reference.  In half precision the rounding of
# every layer, 2^-11 or 2^-8 each, adds up over a few hundred layers.
TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
SIGMA = 1.0  # noise level, in the middle of a schedule


def tolerance(spec: NetworkSpec) -> float:
    """What an output of a network in the precision of `spec` may differ by, as `TOLERANCES` counts it."""
    return TOLERANCES[spec.precision.activations]


def example_inputs(spec: NetworkSpec, conditioning: Conditioning = SVD) -> dict[str, Tensor]:
    """Inputs in the ranges that a real run has, on the CPU: the same numbers for every device.

    conditioning: of the model that the network belongs to.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = {
        t.name: torch.randn(t.shape, generator=generator).to(getattr(torch, t.dtype)) for t in spec.inputs
    }
    if spec.network == "vae_encoder":
        inputs["pixels"] = inputs["pixels"].clamp(-1, 1)
    if spec.network in ("denoiser", "shallow_denoiser"):
        batch, frames = inputs["x"].shape[:2]
        inputs["x"] *= (SIGMA**2 + 1) ** 0.5
        inputs["sigma"] = torch.tensor(SIGMA)
        inputs["time_ids"] = conditioning.time_ids(conditioning.defaults, batch, frames)
        if "guidance" in inputs:
            inputs["guidance"] = torch.linspace(1, 3, frames).repeat(batch, 1)
    for name in inputs.keys() & {"variance1", "variance2"}:
        inputs[name] = inputs[name].square() + 0.5
    if "inside" in inputs:
        inputs["inside"] = torch.ones_like(inputs["inside"])
        inputs["inside"][0] = 0  # the first frame of a video has none before it
    return inputs
