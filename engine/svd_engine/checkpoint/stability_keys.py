"""Stability's own names for SVD's tensors, as a table from diffusers' and transformers' names.

`svd.safetensors`, `svd_xt.safetensors` and `sv3d_u.safetensors` hold all parts in one file under the module
names of Stability-AI/generative-models (scripts/sampling/configs/ there): `model` is the UNet,
`first_stage_model` the VAE, `conditioner.embedders.0` CLIP in open_clip's form, `conditioner.embedders.3`, in
SV3D `.1`, the VAE that the photograph is encoded with.  Knows names and how values are laid out; reads no
file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from svd_engine.spec.weights import Component

UNET = "model.diffusion_model."
# SVD's and SV3D's AutoencoderKLModeOnly: encoder, quant_conv, image decoder, post_quant_conv
CONDITIONERS = (
    "conditioner.embedders.3.encoder.",
    "conditioner.embedders.1.encoder.",
)
# AutoencodingEngine: temporal decoder, or in SV3D_u an image decoder, and neither quant_conv nor
# post_quant_conv; in *_image_decoder.safetensors AutoencoderKL, which has them
FIRST_STAGE = "first_stage_model."
CLIP = "conditioner.embedders.0.open_clip.model.visual."

NOT_READ = {  # what else such files hold, by the beginning of its keys; the first that fits counts
    "model_ema.": "averaged weights of training",
    "conditioner.embedders.0.open_clip.model.": "the text half of CLIP",
    **dict.fromkeys(CONDITIONERS, "the conditioner's own image decoder"),
    "first_stage_model.encoder.": "the first stage's encoder, which the conditioner's replaces",
    "first_stage_model.quant_conv.": "the first stage's encoder, which the conditioner's replaces",
    "denoiser.": "the table of noise levels",
    "optimizer": "training state",
}

Form = Literal["same", "transposed", "1x1 convolution", "query", "key", "value", "identity"]
THIRDS: Mapping[Form, int] = {"query": 0, "key": 1, "value": 2}  # of open_clip's in_proj, along dimension 0


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file, and how: "identity" is made, not read."""

    key: str
    form: Form = "same"

    def shape(self, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Of the stored tensor, for a tensor of shape `expected` in the module."""
        if self.form in THIRDS:
            return 3 * expected[0], *expected[1:]
        if self.form == "1x1 convolution":
            return *expected, 1, 1
        return expected[::-1] if self.form == "transposed" else expected


def prefixes(component: Component, keys: Collection[str]) -> tuple[str, ...]:
    """What the keys of a component begin with."""
    if component == "unet":
        return (UNET,)
    if component == "image_encoder":
        return (CLIP,)
    encoder, decoder = vae_encoder_prefix(keys), vae_decoder_prefix(keys)
    return f"{encoder}encoder.", f"{encoder}quant_conv.", f"{decoder}decoder.", f"{decoder}post_quant_conv."


def vae_encoder_prefix(keys: Collection[str]) -> str:
    """Whose VAE encoder is read: the conditioner's, and the first stage's where that has none."""
    return next((prefix for prefix in CONDITIONERS if _has(keys, f"{prefix}encoder.")), FIRST_STAGE)


def vae_decoder_prefix(keys: Collection[str]) -> str:
    """Whose VAE decoder is read: the first stage's, and the conditioner's where that has none."""
    others = (prefix for prefix in CONDITIONERS if _has(keys, f"{prefix}decoder."))
    return FIRST_STAGE if _has(keys, f"{FIRST_STAGE}decoder.") else next(others, FIRST_STAGE)


def _has(keys: Collection[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def stored(component: Component, name: str, config: Mapping[str, Any], keys: Collection[str]) -> Stored:
    """Where the tensor that diffusers or transformers call `name` lies.

    config: of the component, as diffusers writes it.  keys: of the file, which say where the VAE encoder is.
    """
    if component == "unet":
        return Stored(UNET + unet_key(name, config))
    if component == "image_encoder":
        return clip_tensor(name)
    return vae_tensor(name, config, keys)


# UNet -------------------------------------------------------------------------------------------------

UNET_STEMS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TRANSFORMER = {
    "temporal_transformer_blocks": "time_stack",
    "time_pos_embed.linear_1": "time_pos_embed.0",
    "time_pos_embed.linear_2": "time_pos_embed.2",
}


def unet_key(name: str, config: Mapping[str, Any]) -> str:
    """Blocks are numbered through: `entries` to a level, its resnets and its down- or upsampler's place."""
    entries = config["layers_per_block"] + 1
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, kind, rest = found[1], found[3], found[5]
        level, layer = int(found[2]), int(found[4])
        blocks, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
        block = f"{blocks}.{first + level * entries + layer}"
        if kind == "resnets":
            return f"{block}.0.{_unet_resnet(rest)}"
        if kind == "attentions":
            return f"{block}.1.{_renamed(rest, UNET_TRANSFORMER)}"
        last = f"{blocks}.{first + level * entries + entries - 1}"
        if kind == "downsamplers":
            return f"{last}.0.op.{rest.removeprefix('conv.')}"
        attends = config["up_block_types"][level].startswith("CrossAttn")
        return f"{last}.{2 if attends else 1}.{rest}"
    if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", name):
        return f"middle_block.{2 * int(found[1])}.{_unet_resnet(found[2])}"
    if name.startswith("mid_block.attentions.0."):
        return f"middle_block.1.{_renamed(name.removeprefix('mid_block.attentions.0.'), UNET_TRANSFORMER)}"
    return _renamed(name, UNET_STEMS)


def _unet_resnet(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "time_mixer":
        return name
    return ("time_stack." if part == "temporal_res_block" else "") + _renamed(rest, UNET_RESNET)


# VAE --------------------------------------------------------------------------------------------------

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_TEMPORAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_STEMS = {"conv_norm_out": "norm_out", "time_conv_out": "conv_out.time_mix_conv"}


def vae_tensor(name: str, config: Mapping[str, Any], keys: Collection[str]) -> Stored:
    """A quant_conv or post_quant_conv that the first stage does not have is one that changes nothing."""
    half, _, rest = name.partition(".")
    encodes = half in ("encoder", "quant_conv")
    where = vae_encoder_prefix(keys) if encodes else vae_decoder_prefix(keys)
    if half in ("quant_conv", "post_quant_conv"):
        absent = where == FIRST_STAGE and not _has(keys, f"{where}{half}.")
        return Stored(where + name, "identity" if absent else "same")
    form: Form = "same"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest):
        level = _vae_level(found[1], int(found[2]), config)
        key = f"{found[1]}.{level}.block.{found[3]}.{_vae_resnet(found[4])}"
    elif found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.(.+)", rest):
        level = _vae_level(found[1], int(found[2]), config)
        key = f"{found[1]}.{level}.{found[3]}sample.{found[4]}"
    elif found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", rest):
        key = f"mid.block_{int(found[1]) + 1}.{_vae_resnet(found[2])}"
    elif rest.startswith("mid_block.attentions.0."):
        own = rest.removeprefix("mid_block.attentions.0.")
        key = f"mid.attn_1.{_renamed(own, VAE_ATTENTION)}"
        if own.endswith(".weight") and not own.startswith("group_norm"):
            form = "1x1 convolution"
    else:
        key = _renamed(rest, VAE_STEMS)
    return Stored(f"{where}{half}.{key}", form)


def _vae_level(side: str, level: int, config: Mapping[str, Any]) -> int:
    """Stability counts the decoder's levels from the finest."""
    return level if side == "down" else len(config["block_out_channels"]) - 1 - level


def _vae_resnet(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "time_mixer":
        return rest
    if part == "temporal_res_block":
        return f"time_stack.{_renamed(rest, VAE_TEMPORAL_RESNET)}"
    return _renamed(rest if part == "spatial_res_block" else name, VAE_RESNET)


# CLIP -------------------------------------------------------------------------------------------------

CLIP_STEMS = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding": "conv1",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm": "ln_pre",
    "vision_model.post_layernorm": "ln_post",
}
CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_PROJECTIONS: Mapping[str, Form] = {"q": "query", "k": "key", "v": "value"}


def clip_tensor(name: str) -> Stored:
    if name == "visual_projection.weight":
        return Stored(f"{CLIP}proj", "transposed")
    found = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if not found:
        return Stored(CLIP + _renamed(name, CLIP_STEMS))
    block = f"{CLIP}transformer.resblocks.{found[1]}."
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", found[2]):
        return Stored(f"{block}attn.in_proj_{projection[2]}", CLIP_PROJECTIONS[projection[1]])
    return Stored(block + _renamed(found[2], CLIP_LAYER))


def _renamed(name: str, stems: Mapping[str, str]) -> str:
    """`name` with the stem of it that the table has in its other form; unchanged without one."""
    for stem, other in stems.items():
        if name == stem or name.startswith(f"{stem}."):
            return other + name.removeprefix(stem)
    return name
