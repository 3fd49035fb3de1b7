"""Writes networks of diffusers and transformers as Stability's code saves its own: one file, its names.

Walks the modules in the order in which Stability's constructors make theirs, and numbers blocks as they do;
shares nothing with the engine's table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def write(path: Path, pipeline: Any, dtype: torch.dtype = torch.float32) -> Path:
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors_of(pipeline).items()}, path)
    return path


def tensors_of(pipeline: Any) -> Tensors:
    """Every tensor that SVD's networks need, under Stability's names."""
    return {
        **under("model.diffusion_model", unet(pipeline.unet)),
        **under("first_stage_model.decoder", decoder(pipeline.vae.decoder)),
        **under("conditioner.embedders.3.encoder.encoder", encoder(pipeline.vae.encoder)),
        **own("conditioner.embedders.3.encoder.quant_conv", pipeline.vae.quant_conv),
        **under("conditioner.embedders.0.open_clip.model.visual", clip(pipeline.image_encoder)),
    }


def image_decoder_tensors(pipeline: Any, vae: Any) -> Tensors:
    """As `tensors_of`, of svd_image_decoder.safetensors: `vae`, an AutoencoderKL, is the first stage."""
    tensors = {k: t for k, t in tensors_of(pipeline).items() if not k.startswith("first_stage_model.")}
    return tensors | under("first_stage_model", image_vae(vae))


def sv3d_tensors(unet_: Any, clip_: Any, vae: Any, first_stage: Any) -> Tensors:
    """Of sv3d_u.safetensors and sv3d_p.safetensors: `first_stage` is the decoder that frames go through."""
    made = decoder(first_stage) if hasattr(first_stage, "time_conv_out") else image_decoder(first_stage)
    return {
        **under("model.diffusion_model", unet(unet_)),
        **under("first_stage_model.decoder", made),
        **under("conditioner.embedders.1.encoder", image_vae(vae)),
        **under("conditioner.embedders.0.open_clip.model.visual", clip(clip_)),
    }


def image_vae(vae: Any) -> Tensors:
    return {
        **under("encoder", encoder(vae.encoder)),
        **under("decoder", image_decoder(vae.decoder)),
        **own("quant_conv", vae.quant_conv),
        **own("post_quant_conv", vae.post_quant_conv),
    }


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def own(name: str, module: nn.Module) -> Tensors:
    return under(name, module.state_dict())


def unet(net: Any) -> Tensors:
    tensors = {
        **own("time_embed.0", net.time_embedding.linear_1),
        **own("time_embed.2", net.time_embedding.linear_2),
        **own("label_emb.0.0", net.add_embedding.linear_1),
        **own("label_emb.0.2", net.add_embedding.linear_2),
        **own("input_blocks.0.0", net.conv_in),
        **under("middle_block.0", unet_resnet(net.mid_block.resnets[0])),
        **under("middle_block.1", transformer(net.mid_block.attentions[0])),
        **under("middle_block.2", unet_resnet(net.mid_block.resnets[1])),
        **own("out.0", net.conv_norm_out),
        **own("out.2", net.conv_out),
    }
    number = 1
    for block in net.down_blocks:
        for layer, resnet in enumerate(block.resnets):
            tensors |= under(f"input_blocks.{number}.0", unet_resnet(resnet))
            if hasattr(block, "attentions"):
                tensors |= under(f"input_blocks.{number}.1", transformer(block.attentions[layer]))
            number += 1
        if block.downsamplers:
            tensors |= own(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
            number += 1
    number = 0
    for block in net.up_blocks:
        for layer, resnet in enumerate(block.resnets):
            modules = [unet_resnet(resnet)]
            if hasattr(block, "attentions"):
                modules.append(transformer(block.attentions[layer]))
            if block.upsamplers and layer == len(block.resnets) - 1:
                modules.append(own("conv", block.upsamplers[0].conv))
            for slot, module in enumerate(modules):
                tensors |= under(f"output_blocks.{number}.{slot}", module)
            number += 1
    return tensors


def unet_resnet(block: Any) -> Tensors:
    def res(module: Any) -> Tensors:
        tensors = {
            **own("in_layers.0", module.norm1),
            **own("in_layers.2", module.conv1),
            **own("emb_layers.1", module.time_emb_proj),
            **own("out_layers.0", module.norm2),
            **own("out_layers.3", module.conv2),
        }
        if module.conv_shortcut is not None:
            tensors |= own("skip_connection", module.conv_shortcut)
        return tensors

    return {
        **res(block.spatial_res_block),
        **under("time_stack", res(block.temporal_res_block)),
        "time_mixer.mix_factor": block.time_mixer.mix_factor,
    }


def transformer(block: Any) -> Tensors:
    return {
        **own("norm", block.norm),
        **own("proj_in", block.proj_in),
        **own("transformer_blocks", block.transformer_blocks),
        **own("time_stack", block.temporal_transformer_blocks),
        **own("time_pos_embed.0", block.time_pos_embed.linear_1),
        **own("time_pos_embed.2", block.time_pos_embed.linear_2),
        **own("time_mixer", block.time_mixer),
        **own("proj_out", block.proj_out),
    }


def encoder(net: Any) -> Tensors:
    tensors = vae_ends(net)
    for level, block in enumerate(net.down_blocks):
        for layer, resnet in enumerate(block.resnets):
            tensors |= under(f"down.{level}.block.{layer}", vae_resnet(resnet))
        if block.downsamplers:
            tensors |= own(f"down.{level}.downsample.conv", block.downsamplers[0].conv)
    for layer, resnet in enumerate(net.mid_block.resnets, 1):
        tensors |= under(f"mid.block_{layer}", vae_resnet(resnet))
    return tensors


def decoder(net: Any) -> Tensors:
    tensors = {**vae_ends(net), **own("conv_out.time_mix_conv", net.time_conv_out)}
    for level, block in enumerate(reversed(net.up_blocks)):
        for layer, resnet in enumerate(block.resnets):
            tensors |= under(f"up.{level}.block.{layer}", temporal_vae_resnet(resnet))
        if block.upsamplers:
            tensors |= own(f"up.{level}.upsample.conv", block.upsamplers[0].conv)
    for layer, resnet in enumerate(net.mid_block.resnets, 1):
        tensors |= under(f"mid.block_{layer}", temporal_vae_resnet(resnet))
    return tensors


def image_decoder(net: Any) -> Tensors:
    tensors = vae_ends(net)
    for level, block in enumerate(reversed(net.up_blocks)):
        for layer, resnet in enumerate(block.resnets):
            tensors |= under(f"up.{level}.block.{layer}", vae_resnet(resnet))
        if block.upsamplers:
            tensors |= own(f"up.{level}.upsample.conv", block.upsamplers[0].conv)
    for layer, resnet in enumerate(net.mid_block.resnets, 1):
        tensors |= under(f"mid.block_{layer}", vae_resnet(resnet))
    return tensors


def vae_ends(net: Any) -> Tensors:
    attention = net.mid_block.attentions[0]
    tensors = {
        **own("conv_in", net.conv_in),
        **own("norm_out", net.conv_norm_out),
        **own("conv_out", net.conv_out),
        **own("mid.attn_1.norm", attention.group_norm),
    }
    linears = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
    for name, linear in linears.items():
        tensors[f"mid.attn_1.{name}.weight"] = linear.weight[:, :, None, None]
        tensors[f"mid.attn_1.{name}.bias"] = linear.bias
    return tensors


def vae_resnet(module: Any) -> Tensors:
    tensors: Tensors = {}
    for name in ("norm1", "conv1", "norm2", "conv2"):
        tensors |= own(name, getattr(module, name))
    if module.conv_shortcut is not None:
        tensors |= own("nin_shortcut", module.conv_shortcut)
    return tensors


def temporal_vae_resnet(block: Any) -> Tensors:
    time = block.temporal_res_block
    return {
        **vae_resnet(block.spatial_res_block),
        **own("time_stack.in_layers.0", time.norm1),
        **own("time_stack.in_layers.2", time.conv1),
        **own("time_stack.out_layers.0", time.norm2),
        **own("time_stack.out_layers.3", time.conv2),
        "mix_factor": block.time_mixer.mix_factor,
    }


def clip(net: Any) -> Tensors:
    vision = net.vision_model
    tensors = {
        "class_embedding": vision.embeddings.class_embedding,
        "positional_embedding": vision.embeddings.position_embedding.weight,
        "proj": net.visual_projection.weight.t(),
        **own("conv1", vision.embeddings.patch_embedding),
        **own("ln_pre", vision.pre_layrnorm),
        **own("ln_post", vision.post_layernorm),
    }
    for number, layer in enumerate(vision.encoder.layers):
        attention, block = layer.self_attn, f"transformer.resblocks.{number}"
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        tensors |= {
            **own(f"{block}.ln_1", layer.layer_norm1),
            **own(f"{block}.ln_2", layer.layer_norm2),
            **own(f"{block}.attn.out_proj", attention.out_proj),
            **own(f"{block}.mlp.c_fc", layer.mlp.fc1),
            **own(f"{block}.mlp.c_proj", layer.mlp.fc2),
            f"{block}.attn.in_proj_weight": torch.cat([p.weight for p in projections]),
            f"{block}.attn.in_proj_bias": torch.cat([p.bias for p in projections]),
        }
    return tensors


def extras() -> Tensors:
    """What files hold beside the networks: the rest of CLIP, averaged weights, the conditioner's decoder."""
    return {
        "conditioner.embedders.0.open_clip.model.token_embedding.weight": torch.zeros(4, 4),
        "conditioner.embedders.0.open_clip.model.logit_scale": torch.zeros(()),
        "conditioner.embedders.3.encoder.decoder.conv_in.weight": torch.zeros(2),
        "conditioner.embedders.3.encoder.post_quant_conv.weight": torch.zeros(2),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2),
        "model_ema.num_updates": torch.zeros((), dtype=torch.int64),
        "mine.extra": torch.zeros(1),
    }
