"""A place that does not satisfy a rewrite's precondition stays as it was, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_blocks import UpBlockSpatioTemporal, UpBlockTemporalDecoder
from torch import nn

from svd_engine.networks.rewrites import (
    ORT_CPU_REWRITES,
    REWRITES,
    TENSORRT_REWRITES,
    apply_rewrites,
    winograd_rows,
)
from tests.engine.rewrite_networks import call_unet, call_vae, random_unet, random_vae, relative_difference

TOKEN, CONV, BLEND = "single-token-cross-attention", "temporal-conv2d", "resnet-blend"
QKV, FRAMES, TIMESTEP = "fused-qkv", "frames-in-place", "timestep-projections"
POSITIONS, PHASE = "frame-positions", "phase-upsample"
CONVOLUTIONS = "feed-forward-convolutions"
ON_A_CPU = (*REWRITES, *ORT_CPU_REWRITES)


class OtherProcessor(AttnProcessor2_0):
    pass


class OtherUnet(UNetSpatioTemporalConditionModel):
    pass


class OtherTransformer(TransformerSpatioTemporalModel):
    pass


class OtherBlock(UpBlockSpatioTemporal):
    pass


class OtherResBlock(SpatioTemporalResBlock):
    pass


class OtherResnet(ResnetBlock2D):
    pass


# parts of the UNet, by a short name
PARTS: dict[str, Callable[[Any], Any]] = {
    "unet": lambda unet: unet,
    "transformer": lambda unet: unet.down_blocks[0].attentions[0],
    "spatial": lambda unet: PARTS["transformer"](unet).transformer_blocks[0],
    "temporal": lambda unet: PARTS["transformer"](unet).temporal_transformer_blocks[0],
    "spatial.attn1": lambda unet: PARTS["spatial"](unet).attn1,
    "spatial.attn2": lambda unet: PARTS["spatial"](unet).attn2,
    "temporal.attn1": lambda unet: PARTS["temporal"](unet).attn1,
    "temporal.attn2": lambda unet: PARTS["temporal"](unet).attn2,
    "resnet": lambda unet: unet.down_blocks[0].resnets[0],
    "resnet.spatial": lambda unet: PARTS["resnet"](unet).spatial_res_block,
    "resnet.temporal": lambda unet: PARTS["resnet"](unet).temporal_res_block,
    "block": lambda unet: unet.up_blocks[0],
    "upsampler": lambda unet: unet.up_blocks[0].upsamplers[0],
}
PLACES = {  # rewritten when nothing stands in the way
    "single-token-cross-attention": 12,
    "temporal-conv2d": 24,
    "resnet-blend": 12,
    "fused-qkv": 12,
    "frames-in-place": 6,
    "timestep-projections": 24,
    "frame-positions": 6,
    "phase-upsample": 1,
}


def over_frames(**changes: Any) -> nn.Module:
    return nn.Conv3d(32, 32, (3, 1, 1), **{"padding": (1, 0, 0), **changes})


# rewrite, part, what is set there, places lost, the reason given
CASES: list[tuple[str, str, dict[str, Any], int, str]] = [
    (TOKEN, "spatial", {"attn2": None}, 2, "there is no cross-attention"),
    (TOKEN, "temporal", {"attn2": None}, 2, "there is no cross-attention"),
    (TOKEN, "spatial", {"norm_type": "ada_norm"}, 2, "its norms are of type ada_norm, not layer_norm"),
    (TOKEN, "spatial.attn2", {"is_cross_attention": False}, 2, "is to the tokens themselves"),
    (TOKEN, "spatial.attn2", {"residual_connection": True}, 2, "a residual sum of its own"),
    (TOKEN, "temporal.attn2", {"processor": OtherProcessor()}, 2, "its processor is OtherProcessor"),
    (TOKEN, "unet", {"__class__": OtherUnet}, 12, "OtherUnet is not diffusers' UNetSpatioTemporal"),
    (TOKEN, "transformer", {"__class__": OtherTransformer}, 12, "OtherTransformer has a forward of its own"),
    (TOKEN, "block", {"__class__": OtherBlock}, 12, "OtherBlock has a forward of its own"),
    (POSITIONS, "unet", {"__class__": OtherUnet}, 6, "OtherUnet is not diffusers' UNetSpatioTemporal"),
    (CONV, "resnet.temporal", {"conv1": nn.Conv3d(32, 32, 3, padding=1)}, 2, "(3, 3, 3) mixes pixels"),
    (CONV, "resnet.temporal", {"conv2": over_frames(groups=2)}, 2, "it has a stride, a dilation or groups"),
    (CONV, "resnet.temporal", {"conv2": over_frames(padding_mode="replicate")}, 2, "is not zeros before"),
    (CONV, "resnet", {"__class__": OtherResBlock}, 2, "OtherResBlock has a forward of its own"),
    (CONV, "resnet.spatial", {"__class__": OtherResnet}, 2, "its halves are not diffusers' ResnetBlock2D"),
    (BLEND, "resnet.temporal", {"conv_shortcut": nn.Conv3d(32, 32, 1)}, 1, "changes the number of channels"),
    (QKV, "spatial.attn1", {"group_norm": nn.GroupNorm(32, 32)}, 1, "a residual sum, and not both"),
    (QKV, "spatial.attn1", {"norm_q": nn.LayerNorm(8)}, 1, "it has norm_q"),
    (QKV, "spatial.attn1", {"is_cross_attention": True}, 1, "it attends to the context"),
    (QKV, "spatial.attn1", {"scale": 1.0}, 1, "its scores are scaled by 1.0"),
    (QKV, "spatial.attn1", {"inner_kv_dim": 8}, 1, "keys and values have fewer heads than queries"),
    (QKV, "spatial.attn1", {"rescale_output_factor": 2.0}, 1, "its output is divided by 2.0"),
    (FRAMES, "temporal", {"is_res": False}, 1, "its feed-forward changes the number of channels"),
    (FRAMES, "temporal", {"_chunk_size": 2, "_chunk_dim": 1}, 1, "its feed-forward is chunked"),
    (FRAMES, "temporal.attn1", {"processor": OtherProcessor()}, 1, "its processor is OtherProcessor"),
    (FRAMES, "temporal", {"attn1": nn.Identity()}, 1, "Identity is not diffusers' Attention"),
    (TIMESTEP, "resnet.temporal", {"time_emb_proj": None}, 24, "one of its halves takes no timestep"),
    (TIMESTEP, "resnet.spatial", {"skip_time_act": True}, 24, "its timestep is more than a shift"),
    (TIMESTEP, "resnet.spatial", {"nonlinearity": nn.ReLU()}, 24, "its activation is not SiLU"),
    (TIMESTEP, "resnet.spatial", {"output_scale_factor": 2.0}, 24, "its output is divided by 2.0"),
    (TIMESTEP, "resnet.spatial", {"downsample": nn.Identity()}, 24, "it resamples"),
    (TIMESTEP, "unet", {"__class__": OtherUnet}, 24, "the whole network: OtherUnet is not diffusers'"),
    (PHASE, "upsampler", {"conv": nn.Conv2d(64, 64, 5, padding=2)}, 1, "is not a plain 3x3 one"),
    (PHASE, "upsampler", {"conv": nn.Identity()}, 1, "it is not interpolation followed by a convolution"),
]
UNCALLABLE = (
    "_chunk_dim",
    "attn1",
    "norm_type",
)  # settings with which diffusers' own module cannot be called


@pytest.mark.parametrize(("name", "part", "changes", "lost", "reason"), CASES)
def test_left_alone(name: str, part: str, changes: dict[str, Any], lost: int, reason: str) -> None:
    unet = random_unet()
    for attribute, value in changes.items():
        setattr(PARTS[part](unet), attribute, value)
    unet.double()
    expected = None if set(changes) & set(UNCALLABLE) else call_unet(unet)
    (applied,) = [a for a in apply_rewrites(unet, rewrites=REWRITES) if a.name == name]
    assert applied.places == PLACES[name] - lost
    assert applied.left_alone
    path = "the whole network" if part == "unet" and name == TIMESTEP else ""
    assert all(line.startswith(path) for line in applied.left_alone)
    assert all(": " in line for line in applied.left_alone)
    assert any(reason in line for line in applied.left_alone), applied.left_alone
    if expected is not None:  # the other rewrites hold, and what was left alone still works with them
        assert relative_difference(call_unet(unet), expected) <= 1e-12


def test_the_path_is_named() -> None:
    unet = random_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.scale = 1.0
    (applied,) = [a for a in apply_rewrites(unet) if a.name == QKV]
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert applied.left_alone == (f"{path}: its scores are scaled by 1.0",)


LAYOUT: list[tuple[str, dict[str, Any], str]] = [
    ("spatial.attn1", {"scale": 1.0}, "its scores are scaled by 1.0"),
    ("spatial", {"_chunk_size": 2, "_chunk_dim": 1}, "its feed-forward is chunked"),
    ("spatial", {"pos_embed": nn.Identity()}, "it adds positions of its own"),
    ("temporal", {"_chunk_size": 2, "_chunk_dim": 1}, "its feed-forward is chunked"),
    ("transformer", {"proj_out": nn.Conv2d(1, 1, 1)}, "its last layer is not linear"),
    ("spatial", {"attn2": None}, "its cross-attention is not to a single token"),
]


@pytest.mark.parametrize(("part", "changes", "reason"), LAYOUT)
def test_tokens_that_stay_as_they_lie(part: str, changes: dict[str, Any], reason: str) -> None:
    unet = random_unet()
    for attribute, value in changes.items():
        setattr(PARTS[part](unet), attribute, value)
    (applied,) = [a for a in apply_rewrites(unet, rewrites=TENSORRT_REWRITES) if a.name == "attention-layout"]
    assert (applied.places, applied.left_alone) == (5, (f"down_blocks.0.attentions.0: {reason}",))


IN_PARTS: list[tuple[str, dict[str, Any], str]] = [
    ("temporal", {"ff_in": nn.Identity()}, "its feed-forward is not diffusers' FeedForward"),
    ("temporal", {"norm3": nn.GroupNorm(4, 32)}, "its normalisations are not of single tokens"),
]


@pytest.mark.parametrize(("part", "changes", "reason"), IN_PARTS)
def test_feed_forwards_that_stay_whole(part: str, changes: dict[str, Any], reason: str) -> None:
    unet = random_unet()
    for attribute, value in changes.items():
        setattr(PARTS[part](unet), attribute, value)
    (rewrite,) = [r for r in TENSORRT_REWRITES if r.name == "feed-forward-in-parts"]
    (applied,) = apply_rewrites(unet, rewrites=[rewrite])
    assert len(applied.left_alone) == 1
    assert applied.left_alone[0].startswith("down_blocks.0.attentions.0.")
    assert applied.left_alone[0].endswith(f": {reason}")


def test_feed_forwards_of_other_layers_stay_products() -> None:
    unet = random_unet()
    feed_forward = PARTS["spatial"](unet).ff
    feed_forward.net[0] = GELU(32, 128).double()
    expected = call_unet(unet)
    (applied,) = [a for a in apply_rewrites(unet, rewrites=ON_A_CPU) if a.name == CONVOLUTIONS]
    path = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    reason = f"{path}: its first layer is GELU, not two products as split-geglu makes them"
    assert (applied.places, applied.left_alone) == (17, (reason,))
    assert relative_difference(call_unet(unet), expected) <= 1e-12


def test_feed_forwards_that_end_in_dropout_become_convolutions() -> None:
    unet = random_unet()
    PARTS["spatial"](unet).ff.net.append(nn.Dropout(0.5).eval())
    expected = call_unet(unet)
    (applied,) = [a for a in apply_rewrites(unet, rewrites=ON_A_CPU) if a.name == CONVOLUTIONS]
    assert (applied.places, applied.left_alone) == (18, ())
    assert relative_difference(call_unet(unet), expected) <= 1e-12


def test_a_blend_of_two_layers_keeps_its_tokens() -> None:
    unet = random_unet(transformer_layers_per_block=2)
    expected = call_unet(unet)
    (applied,) = [a for a in apply_rewrites(unet, rewrites=TENSORRT_REWRITES) if a.name == "attention-layout"]
    assert applied.places == 0
    assert all(line.endswith("its blend is not one sum") for line in applied.left_alone)
    assert relative_difference(call_unet(unet), expected) <= 1e-12


def test_bfloat16_keeps_its_upsampling() -> None:
    unet = random_unet(torch.bfloat16)
    (applied,) = [
        a for a in apply_rewrites(unet, rewrites=TENSORRT_REWRITES) if a.name == "transposed-upsample"
    ]
    assert applied.places == 0
    assert "in which compilers have no transposed convolution" in applied.left_alone[0]


def test_a_decoder_that_upsamples_nowhere() -> None:
    vae = random_vae()
    vae.decoder.up_blocks[0].upsamplers = None
    (applied,) = [a for a in apply_rewrites(vae, rewrites=TENSORRT_REWRITES) if a.name == "frames-in-groups"]
    assert applied.left_alone == ("the whole network: nothing is upsampled before its last block",)


class OtherDecoder(TemporalDecoder):
    pass


class OtherUpBlock(UpBlockTemporalDecoder):
    pass


APART: list[tuple[str, dict[str, Any], str]] = [
    ("", {"__class__": OtherDecoder}, "the whole network: OtherDecoder has a forward of its own"),
    ("up_blocks.1", {"__class__": OtherUpBlock}, "the whole network: OtherUpBlock has a forward of its own"),
    (
        "up_blocks.0.resnets.1",
        {"__class__": OtherResBlock},
        "the whole network: up_blocks.0.resnets.1: OtherResBlock has a forward of its own",
    ),
]


@pytest.mark.parametrize(("part", "changes", "reason"), APART)
def test_a_decoder_whose_frames_stay_together(part: str, changes: dict[str, Any], reason: str) -> None:
    vae = random_vae()
    for attribute, value in changes.items():
        setattr(vae.decoder.get_submodule(part), attribute, value)
    expected = call_vae(vae)
    applied = {a.name: a for a in apply_rewrites(vae, rewrites=ON_A_CPU)}
    assert (applied["frames-apart"].places, applied["frames-apart"].left_alone) == (0, (reason,))
    assert relative_difference(call_vae(vae), expected) <= 1e-12


def test_convolutions_that_winograd_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dilated one with its reason; one of few channels and those of the UNet without a word."""
    monkeypatch.setattr(winograd_rows, "LEAST", 64)
    unet, vae = random_unet(), random_vae()
    resnet = vae.decoder.mid_block.resnets[0].spatial_res_block
    resnet.conv1 = nn.Conv2d(64, 64, 3, padding=2, dilation=2).double()
    expected = call_vae(vae)
    (of_vae,), (of_unet,) = (apply_rewrites(n, rewrites=[ORT_CPU_REWRITES[-1]]) for n in (vae, unet))
    assert of_unet.places == len(of_unet.left_alone) == 0
    (reason,) = of_vae.left_alone
    assert reason.startswith("mid_block.resnets.0.spatial_res_block.conv1: it is not a plain 3x3 one")
    assert type(vae.decoder.up_blocks[1].resnets[2].spatial_res_block.conv1) is nn.Conv2d  # of 32 channels
    assert of_vae.places > 0
    assert relative_difference(call_vae(vae), expected) <= 1e-12


def test_the_decoder_of_a_vae() -> None:
    """Its last convolution over frames, outside any resnet, and one of a resnet's."""
    vae = random_vae()
    vae.decoder.time_conv_out = nn.Conv3d(3, 3, 3, padding=1).double()
    vae.decoder.mid_block.resnets[0].temporal_res_block.conv1 = nn.Conv3d(64, 64, 3, padding=1).double()
    expected = call_vae(vae)
    (applied,) = [a for a in apply_rewrites(vae) if a.name == CONV]
    assert applied.places == 14
    assert applied.left_alone == (
        "mid_block.resnets.0: its kernel (3, 3, 3) mixes pixels",
        "time_conv_out: its kernel (3, 3, 3) mixes pixels",
    )
    assert relative_difference(call_vae(vae), expected) <= 1e-12
