"""SVD networks with seeded random weights: the real architectures, and a small one for tests.

Knows the published configs, as data, and how to draw a tensor.  Reads no files, knows no modules.

Every tensor is drawn from its own generator, seeded with its name, so its values depend neither on the
order of loading nor on the other tensors.  Draws are uniform, not normal: a scaled uniform float32 is
the same on every CPU, where the logarithm and cosine behind a normal one are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svd_engine.checkpoint.safetensors_header import Stated
    from svd_engine.checkpoint.weights import Shapes
    from svd_engine.spec.weights import Component

WEIGHTS_SEED = 0
LAST_OF_A_BRANCH = (  # what is added to a residual stream, and what leaves a network
    "conv2.weight",
    "proj_out.weight",
    "to_out.0.weight",
    "net.2.weight",
    "out_proj.weight",
    "fc2.weight",
    "decoder.conv_out.weight",
)


def svd_configs(frames: int) -> dict[str, dict[str, Any]]:
    """The configs of stabilityai/stable-video-diffusion-img2vid (14 frames) and its -xt (25)."""
    unet = {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "sample_size": 96,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "num_attention_heads": [5, 10, 20, 20],
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 1024,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 768,
        "num_frames": frames,
    }
    vae = {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "sample_size": 768,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
        "force_upcast": True,
    }
    image_encoder = {  # CLIP ViT-H/14
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
    }
    feature_extractor = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "crop_size": {"height": 224, "width": 224},
    }
    return {
        "unet": unet,
        "vae": vae,
        "image_encoder": image_encoder,
        "scheduler": scheduler,
        "feature_extractor": feature_extractor,
    }


SV3D_FRAMES, SV3D_SIZE = 21, [72, 72]  # in latent pixels: 576 x 576


def sv3d_configs(per_frame: bool) -> dict[str, dict[str, Any]]:
    """Of SV3D_u, whose decoder takes each frame as an image, or of SV3D_p, which is told each frame's camera:
    sv3d_u.yaml and sv3d_p.yaml of Stability's scripts."""
    configs = svd_configs(SV3D_FRAMES)
    configs["unet"] |= {
        "sample_size": SV3D_SIZE,
        "projection_class_embeddings_input_dim": 1280 if per_frame else 256,
    }
    if not per_frame:
        configs["vae"] |= image_decoder(len(configs["vae"]["block_out_channels"]))
    return configs | {"generation": sv3d_generation()}


def image_decoder(levels: int) -> dict[str, Any]:
    """What the config of a VAE says whose decoder takes each frame as an image."""
    return {"_class_name": "AutoencoderKL", "up_block_types": ["UpDecoderBlock2D"] * levels}


def sv3d_generation() -> dict[str, Any]:
    """What Stability's configs of SV3D recommend: sv3d_u.yaml and sv3d_p.yaml, and 50 steps in its script."""
    return {
        "num_inference_steps": 50,
        "guider": "triangle",
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 2.5,
    }


def small_configs() -> dict[str, dict[str, Any]]:
    """SVD's block types and depths at a fraction of the width: 14 frames of 128x192, seconds on a CPU."""
    configs = svd_configs(frames=14)
    configs["unet"] |= {
        "sample_size": [16, 24],  # latent pixels of the native size
        "block_out_channels": [32, 64, 64, 64],
        "num_attention_heads": [1, 2, 2, 2],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
    }
    configs["vae"] |= {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}
    configs["image_encoder"] |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 32,
        "projection_dim": 64,
    }
    return configs


@dataclass(frozen=True)
class RandomWeights:
    seed: int = WEIGHTS_SEED

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: draw(self.seed, f"{component}.{name}", shape, dtype) for name, shape in expected.items()
        }

    def files(self, _component: Component) -> list[Path]:
        return []

    def stated(self, _component: Component) -> list[Stated]:
        return []

    def identity(self, _component: Component) -> Iterator[bytes]:
        yield f"random weights, seed {self.seed}".encode()


def draw(seed: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor called `name`: float32 values, uniform around a mean, rounded to `dtype`."""
    import numpy as np
    import torch

    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest(), "big")
    values = np.random.Generator(np.random.PCG64(key)).random(shape, dtype=np.float32)  # [0, 1)
    mean, deviation = statistics(name, shape)
    values -= np.float32(0.5)
    values *= np.float32(sqrt(12) * deviation)
    values += np.float32(mean)
    return torch.from_numpy(values).to(dtype)


def statistics(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations of order one through the network."""
    if name.endswith("mix_factor"):
        return 0.0, 0.5  # sigmoid of it mixes space and time
    if len(shape) > 1:  # matrices and convolutions: one over the fan-in
        gain = 0.5 if name.endswith(LAST_OF_A_BRANCH) else 1.0  # or sums over many layers would grow
        return 0.0, gain / sqrt(prod(shape[1:]))
    if name.endswith(".weight"):
        return 1.0, 0.1  # norms
    return 0.0, 0.02  # biases, CLIP's class embedding
