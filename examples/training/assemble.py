"""Writes a diffusers folder from trained parts: averaged weights, float16 safetensors, configs."""

from __future__ import annotations

import json
from pathlib import Path

import autoencoder
import configs
import torch
from canvases import MEAN, STD, image_encoder
from diffusers import (
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor

from svd_engine.checkpoint.random_weights import svd_configs


def assemble(vae_run: Path, unet_run: Path, latent_scale: float, seed: int, folder: Path) -> None:
    vae = autoencoder.averaged(vae_run)
    vae.register_to_config(scaling_factor=latent_scale)
    unet = UNetSpatioTemporalConditionModel(**configs.UNET)
    state = torch.load(unet_run / "state.pt", weights_only=True)
    unet.load_state_dict({**state["network"], **state["ema"]})
    size = configs.IMAGE_ENCODER["image_size"]
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.half(),
        image_encoder=image_encoder(seed).half(),
        unet=unet.eval().half(),
        scheduler=EulerDiscreteScheduler.from_config(svd_configs(configs.FRAMES)["scheduler"]),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=MEAN,
            image_std=STD,
        ),
    )
    pipeline.save_pretrained(folder)
    for config in folder.glob("*/config.json"):  # where it was made is nobody's business
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        if "dtype" in values:  # transformers loads in it, where diffusers loads float32
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    index = folder / "model_index.json"  # a name that every transformers knows
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor") + "\n")
    (folder / "generation_config.json").write_text(json.dumps(configs.GUIDANCE, indent=2) + "\n")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
