"""The work that a stage asks for, counted over the networks as diffusers publishes them.

So every subject is divided by the same number; a rewrite that saves work shows as a higher share of the
ceiling, of useful work as in "model FLOP utilisation".
"""

from __future__ import annotations

import torch

from svd_bench.documents.results import Setting
from svd_bench.subjects.cases import profile_of
from svd_engine.checkpoint.configs import Configs
from svd_engine.checkpoint.weights import build
from svd_engine.networks.modules import COMPONENT_OF, wrap
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec


def stage_flop(stage: str, setting: Setting, architecture: Architecture, configs: Configs) -> float | None:
    """FLOP of one call of a stage, of the whole video for whole_video; None for a stage without networks."""
    profile = profile_of(setting)
    image, encoder, denoiser, *decoders = specs_of(profile, architecture, FLOAT32)  # of any precision
    if stage == "whole_video":
        by_frames = {spec.inputs[0].shape[0]: network_flop(spec, configs) for spec in decoders}
        once = network_flop(image, configs) + network_flop(encoder, configs)
        calls = setting.steps * (2 if setting.guidance == "single" else 1)
        steps = calls * network_flop(denoiser, configs)
        return once + steps + setting.batch * sum(by_frames[frames] for frames in profile.chunks)
    by_stage = {
        "image_encoder": image,
        "vae_encoder": encoder,
        "denoiser_step": denoiser,
        "vae_decoder": decoders[0],
    }
    return network_flop(by_stage[stage], configs) if stage in by_stage else None


def network_flop(spec: NetworkSpec, configs: Configs) -> float:
    """FLOP of one call: matrix products, convolutions and attention, 2 per multiply-add.  Runs nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    component = COMPONENT_OF[spec.network]
    module = wrap(spec, build(component, configs[component])).to("meta").eval()
    inputs = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in spec.inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return float(counter.get_total_flops())
