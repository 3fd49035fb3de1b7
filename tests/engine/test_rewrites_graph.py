"""What a rewrite makes dead is gone: from the module's weights, from what it calls, from ONNX."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common
from torch import nn
from torch.overrides import TorchFunctionMode

from svd_engine.networks.rewrites import (
    ORT_CPU_REWRITES,
    REWRITES,
    TENSORRT_REWRITES,
    TORCH_CPU_REWRITES,
    apply_rewrites,
    winograd_rows,
)
from svd_engine.networks.single_frames import one_for_all
from svd_export.simplify import simplify
from svd_export.to_onnx import without_stack_traces
from svd_export.unroll import unroll
from tests.engine.rewrite_networks import random_unet, random_vae, unet_inputs

TRANSFORMERS, RESNETS, DECODER_RESNETS = 4, 8, 8
EVERY = tuple(dict.fromkeys((*REWRITES, *ORT_CPU_REWRITES, *TORCH_CPU_REWRITES)))
Counts = Counter[str]


class Unet(nn.Module):
    """One output tensor, and the timestep and ids as inputs."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.unet(**inputs, return_dict=False)[0]


class Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latent: torch.Tensor) -> Any:
        frames = latent.shape[0]
        return self.decoder(latent, num_frames=frames, image_only_indicator=latent.new_zeros(1, frames))


NETWORKS = {  # name -> module to trace, its inputs
    "unet": (
        lambda: random_unet(torch.float32, layers_per_block=1),
        Unet,
        lambda: unet_inputs(dtype=torch.float32),
    ),
    "vae": (lambda: random_vae(torch.float32), Decoder, lambda: {"latent": torch.randn(3, 4, 6, 8)}),
}


class Calls(TorchFunctionMode):
    """Count calls of torch by name: far quicker than a trace of each rewrite, and the same operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def called(name: str, rewrites: Any) -> Counts:
    """What a network calls of torch, by name."""
    make, wrap, inputs = NETWORKS[name]
    network = make()
    apply_rewrites(network, rewrites=rewrites)
    with torch.no_grad(), Calls() as calls:
        wrap(network)(**inputs())
    return calls.counts


@pytest.fixture(scope="module")
def plain() -> dict[str, Counts]:
    return {name: called(name, ()) for name in NETWORKS}


# rewrite -> how many calls fewer the network makes
SHRINKS: dict[str, dict[str, dict[str, int]]] = {
    "single-token-cross-attention": {
        "unet": {
            "scaled_dot_product_attention": 2 * TRANSFORMERS,  # one of two in either block
            "layer_norm": 2 * TRANSFORMERS,
            "linear": 2 * 3 * TRANSFORMERS,  # of q, k, v and out, one is left
        }
    },
    "temporal-conv2d": {
        "unet": {"conv3d": 2 * RESNETS, "conv2d": -2 * RESNETS},
        "vae": {"conv3d": 2 * DECODER_RESNETS + 1, "conv2d": -2 * DECODER_RESNETS - 1},
    },
    "resnet-blend": {
        "unet": {"sigmoid": RESNETS, "where": RESNETS, "rsub": RESNETS},
        "vae": {"sigmoid": DECODER_RESNETS, "rsub": 2 * DECODER_RESNETS},
    },
    "transformer-blend": {"unet": {"sigmoid": TRANSFORMERS, "where": TRANSFORMERS, "mul": 2 * TRANSFORMERS}},
    "fused-qkv": {"unet": {"linear": 2 * 2 * TRANSFORMERS}, "vae": {"linear": 2}},
    "frames-in-place": {"unet": {"permute": 2 * TRANSFORMERS}},
    "split-geglu": {"unet": {"chunk": 3 * TRANSFORMERS, "linear": -3 * TRANSFORMERS}},
    "timestep-projections": {"unet": {"linear": 2 * RESNETS - 1}},
    "frame-positions": {"unet": {"linear": 2 * TRANSFORMERS, "sin": TRANSFORMERS, "cos": TRANSFORMERS}},
    "phase-upsample": {
        "unet": {"interpolate": 1, "conv2d": -3},
        "vae": {"interpolate": 1, "conv2d": -3},
    },
    "linear-as-convolution": {
        "unet": {"linear": 24 * TRANSFORMERS, "conv2d": -24 * TRANSFORMERS},
        "vae": {"linear": 4, "conv2d": -4},
    },
}


@pytest.mark.parametrize("rewrite", [r for r in EVERY if r.name in SHRINKS], ids=lambda rewrite: rewrite.name)
def test_dead_operators_are_not_called(rewrite: Any, plain: dict[str, Counts]) -> None:
    for name, by in SHRINKS[rewrite.name].items():
        counts = called(name, [rewrite])
        assert {op: plain[name][op] - counts[op] for op in by} == by


def weights(name: str, *rewrites: Any) -> dict[str, torch.Tensor]:
    network = NETWORKS[name][0]()
    apply_rewrites(network, rewrites=rewrites)
    state: dict[str, torch.Tensor] = network.state_dict()
    return {key: tensor for key, tensor in state.items() if not key.startswith(("encoder.", "quant_conv."))}


DEAD: dict[str, Callable[[str], bool]] = {  # weights that a rewrite removes
    "single-token-cross-attention": lambda key: (".norm2." in key and "transformer" in key)
    or (".attn2.to_" in key and "to_out" not in key),
    "resnet-blend": lambda key: ".resnets." in key and key.endswith("mix_factor"),
    "transformer-blend": lambda key: ".attentions." in key and key.endswith("mix_factor"),
    "fused-qkv": lambda key: ".attn2." not in key and any(f".to_{part}.weight" in key for part in "qkv"),
    "split-geglu": lambda key: ".net.0.proj." in key,
    "timestep-projections": lambda key: ".time_emb_proj." in key,
    "frame-positions": lambda key: ".time_pos_embed.linear_" in key,
}  # fmt: skip


@pytest.mark.parametrize("rewrite", [r for r in EVERY if r.name in DEAD], ids=lambda rewrite: rewrite.name)
def test_dead_weights_leave_the_module(rewrite: Any) -> None:
    dead = DEAD[rewrite.name]
    assert any(dead(key) for key in weights("unet"))
    assert not any(dead(key) for key in weights("unet", rewrite))
    assert not any(dead(key) for key in weights("vae", rewrite))


def test_no_weight_has_five_dimensions() -> None:
    for name in NETWORKS:
        assert any(tensor.ndim == 5 for tensor in weights(name).values())
        assert not any(tensor.ndim == 5 for tensor in weights(name, *REWRITES).values())


def test_the_weights_that_are_left() -> None:
    """Cross-attention and positions shrink the UNet; of the others only upsampling grows, 9 taps to 16."""
    numbers = {name: sum(t.numel() for t in weights(name).values()) for name in NETWORKS}
    rewritten = {name: sum(t.numel() for t in weights(name, *REWRITES).values()) for name in NETWORKS}
    upsampling = 64 * 64 * (16 - 9)
    assert rewritten["vae"] == numbers["vae"] + upsampling - DECODER_RESNETS  # mix_factor each
    assert rewritten["unet"] < numbers["unet"] + upsampling


def test_channels_last_reaches_the_output_of_every_convolution() -> None:
    unet = random_unet(torch.float32)
    apply_rewrites(unet, rewrites=EVERY)
    seen = []
    for part in unet.modules():
        if isinstance(part, nn.Conv2d) and part.out_channels > 4:
            part.register_forward_hook(
                lambda _part, _inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        unet(**unet_inputs(dtype=torch.float32))
    assert len(seen) > 20
    assert all(seen)


@cache
def exported(name: str, rewrites: tuple[Any, ...]) -> ir.Model:
    """The graph, once for each list of rewrites: only to be read."""
    make, wrap, inputs = NETWORKS[name]
    network = make()
    apply_rewrites(network, rewrites=rewrites)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with one_for_all(), without_stack_traces():
            program = torch.onnx.export(
                wrap(network), (), kwargs=inputs(), opset_version=20, dynamo=True, verbose=False,
                optimize=False,
            )  # fmt: skip
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    assert program is not None
    model: ir.Model = program.model
    simplify(model)
    unroll(model)
    return common.ShapeInferencePass()(model).model


def operators(model: ir.Model) -> Counts:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_unet() -> None:
    model = exported("unet", REWRITES)
    count = operators(model)
    assert count["Softmax"] == 2 * TRANSFORMERS  # diffusers: twice as many
    assert count["LayerNormalization"] == 5 * TRANSFORMERS  # diffusers: seven each
    assert count["Gelu"] == 3 * TRANSFORMERS
    assert not {"Resize", "Where", "ScatterND", "If", "Loop"} & set(count)
    assert {len(w.shape) for w in model.graph.initializers.values() if w.shape is not None} <= {0, 1, 2, 3, 4}
    temporal = [n for n in model.graph if n.op_type == "Conv" and tuple(n.inputs[1].shape)[2:] == (3, 1)]
    assert len(temporal) == 2 * RESNETS
    silus = count["InstanceNormalization"] - TRANSFORMERS + 3  # after norms of resnets; three of embeddings
    assert count["Sigmoid"] == silus  # no blend is left
    assert all("image" not in value.name for value in model.graph.inputs)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_decoder() -> None:
    count = operators(exported("vae", REWRITES))
    assert count["DepthToSpace"] == 1
    assert not {"Resize", "Where", "ScatterND", "Pad"} & set(count)  # padding is the convolutions' own
    assert count["Transpose"] <= operators(exported("vae", ()))["Transpose"]


@pytest.mark.filterwarnings("ignore")
def test_onnx_for_tensorrt() -> None:
    """Nothing between a product and attention but a view and a turn; no image of five dimensions."""
    unet, decoder = (exported(name, TENSORRT_REWRITES) for name in NETWORKS)
    count = operators(unet)
    assert count["Softmax"] == 2 * TRANSFORMERS
    assert (count["ConvTranspose"], operators(decoder)["ConvTranspose"]) == (1, 1)
    assert not {"Resize", "DepthToSpace"} & (set(count) | set(operators(decoder)))
    convolved = [n.inputs[0] for n in unet.graph if n.op_type == "Conv"]
    assert {len(value.shape) for value in convolved} == {4}  # type: ignore[union-attr, arg-type]
    normalised = [n.inputs[0] for n in unet.graph if n.op_type == "InstanceNormalization"]
    assert {len(value.shape) for value in normalised} == {3}  # type: ignore[union-attr, arg-type]


@pytest.fixture(scope="module")
def cpu_decoder() -> ir.Model:
    """The decoder's graph for ONNX Runtime on a CPU, convolutions from 32 channels on split into rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_rows, "LEAST", 32)
        return exported("vae", (*REWRITES, *ORT_CPU_REWRITES))


def convolutions(model: ir.Model) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of input and weight."""
    return [tuple(tuple(v.shape) for v in node.inputs[:2]) for node in model.graph if node.op_type == "Conv"]  # type: ignore[union-attr, misc]


@pytest.mark.filterwarnings("ignore")
def test_frames_apart_leaves_one_frame_to_every_spatial_convolution(cpu_decoder: ir.Model) -> None:
    frames = [image[0] for image, weight in convolutions(cpu_decoder) if weight[2:] != (3, 1)]
    assert frames.count(3) == 1  # conv_in, which has four channels
    assert frames.count(1) == len(frames) - 1 > 3 * 18
    together, apart = (operators(m)["Transpose"] for m in (exported("vae", REWRITES), cpu_decoder))
    assert (
        together >= 2 * DECODER_RESNETS > apart
    )  # frames and channels no longer swap around a temporal half


@pytest.mark.filterwarnings("ignore")
def test_rows_are_short(cpu_decoder: ir.Model) -> None:
    over_frames = [image for image, weight in convolutions(cpu_decoder) if weight[2:] == (3, 1)]
    assert len(over_frames) == 2 * DECODER_RESNETS + 1
    assert all(image[3] <= 128 for image in over_frames)
    assert any(image[2] > 3 for image in over_frames)  # 192 pixels are two rows for each of 3 frames


@pytest.mark.filterwarnings("ignore")
def test_winograd_takes_two_thirds_of_the_products(cpu_decoder: ir.Model) -> None:
    def products(model: ir.Model) -> int:
        taken = 0
        for node in model.graph:
            if node.op_type == "Conv":
                weight, out = tuple(node.inputs[1].shape), tuple(node.outputs[0].shape)  # type: ignore[union-attr, arg-type]
                if min(weight[:2]) >= 32 and weight[2:] in ((3, 3), (1, 3)):
                    taken += prod(weight[1:]) * prod(out)
        return taken

    assert 3 * products(cpu_decoder) == 2 * products(exported("vae", (*REWRITES, *ORT_CPU_REWRITES[:2]))) > 0


@pytest.mark.parametrize("rewrites", [EVERY, TENSORRT_REWRITES], ids=["torch and CPU", "TensorRT"])
def test_torch_compile_takes_each_network_whole(rewrites: Any) -> None:
    """Captured by dynamo without a graph break, with every rewrite."""
    for make, wrap, inputs in NETWORKS.values():
        network = make()
        apply_rewrites(network, rewrites=rewrites)
        module, given = wrap(network), inputs()
        with torch.no_grad():
            expected = module(**given)
            got = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)(**given)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
