"""Seeded inputs of each network, in the ranges that a real run has.  The same for every subject."""

from __future__ import annotations

import torch
from torch import Tensor

from svd_engine.networks.spec import NetworkSpec

SIGMA = 1.0  # noise level, in the middle of a schedule


def seeded_inputs(spec: NetworkSpec, device: torch.device) -> dict[str, Tensor]:
    """Drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = {t.name: torch.randn(t.shape, generator=generator) for t in spec.inputs}
    if spec.network == "vae_encoder":
        inputs["pixels"] = inputs["pixels"].clamp(-1, 1)
    if spec.network == "denoiser":
        batch, frames = inputs["x"].shape[:2]
        inputs["x"] *= (SIGMA**2 + 1) ** 0.5
        inputs["sigma"] = torch.tensor(SIGMA)
        inputs["time_ids"] = torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1)
        if "guidance" in inputs:
            inputs["guidance"] = torch.linspace(1, 3, frames).repeat(batch, 1)
    return {name: tensor.to(device) for name, tensor in inputs.items()}
