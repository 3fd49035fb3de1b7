"""Networks for Turing: built by the real compiler, and the same function as before they were prepared.

Nothing here runs a plan.  What a prepared network computes is read off its layers, as the bindings give them
back, and computed by torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from svd_export import turing
from svd_export.compiled import compile_graph
from tests.export.test_tensorrt_table import saved

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX: pip install tensorrt-rtx-cu13")
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
PRODUCTS = {
    "a linear layer": ((2, 5, 16), (16, 24)),
    "scores of one image": ((1, 1, 9, 16), (1, 1, 16, 9)),
    "scores of two images and heads": ((2, 3, 9, 16), (2, 3, 16, 9)),
    "two matrices": ((12, 16), (16, 24)),
}


def product(folder: Path, *shapes: tuple[int, ...], kind: int = FLOAT) -> Path:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    return saved(folder, [node], dict(zip("ab", ((kind, shape) for shape in shapes), strict=True)), ["y"])


def gated(folder: Path, kind: int = HALF) -> Path:
    """The feed-forward of a transformer block: what the compiler fuses, and for Turing cannot."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["g"]),
        helper.make_node("Gelu", ["g"], ["gelu"]),
        helper.make_node("MatMul", ["x", "u"], ["v"]),
        helper.make_node("Mul", ["v", "gelu"], ["y"]),
    ]
    return saved(
        folder, nodes, {"x": (kind, (512, 64)), "w": (kind, (64, 256)), "u": (kind, (64, 256))}, ["y"]
    )


@pytest.fixture
def parsed() -> Callable[[Path], Any]:
    logger, kept = trt.Logger(trt.Logger.ERROR), []

    def parse(graph: Path) -> Any:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(graph))
        kept.append((builder, parser))
        return network

    return parse


def computed(network: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The output of a network of the few kinds of layers that are here."""
    values = dict(inputs)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    while network.get_output(0).name not in values:
        ready = [x for x in layers if all(x.get_input(i).name in values for i in range(x.num_inputs))]
        assert any(x.get_output(0).name not in values for x in ready)
        for layer in ready:
            arguments = [values[layer.get_input(i).name] for i in range(layer.num_inputs)]
            values[layer.get_output(0).name] = of_layer(layer, *arguments)
    return values[network.get_output(0).name]


def of_layer(layer: Any, x: Tensor, *others: Tensor) -> Tensor:
    kind = layer.type.name
    layer.__class__ = {
        "SHUFFLE": trt.IShuffleLayer, "CONVOLUTION": trt.IConvolutionLayer, "CAST": trt.ICastLayer
    }.get(kind, layer.__class__)  # fmt: skip
    match kind:
        case "SHUFFLE":
            first, second = tuple(layer.first_transpose), tuple(layer.second_transpose)
            x = x.permute(first[: x.dim()]).reshape(tuple(layer.reshape_dims))
            return x.permute(second[: x.dim()])
        case "CONVOLUTION":
            (weights,) = others
            return F.conv2d(x, weights, groups=layer.num_groups)
        case "CAST":
            return x.to({trt.float16: torch.float16, trt.float32: torch.float32}[layer.to_type])
        case "MATRIX_MULTIPLY":
            return x @ others[0]
        case "ACTIVATION":
            return F.gelu(x)
        case "ELEMENTWISE":
            return x * others[0]
    raise AssertionError(kind)


def kinds(network: Any) -> Counter[str]:
    return Counter(network.get_layer(i).type.name for i in range(network.num_layers))


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_a_convolution(case: str, tmp_path: Path, parsed: Callable[[Path], Any]) -> None:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in PRODUCTS[case])
    network = parsed(product(tmp_path, *PRODUCTS[case]))
    turing.prepare(network, trt)
    assert kinds(network)["CONVOLUTION"] == 1
    assert tuple(network.get_output(0).shape) == (a @ b).shape
    assert (computed(network, {"a": a, "b": b}) - a @ b).abs().max() < 1e-5


@pytest.mark.parametrize("case", PRODUCTS)
def test_the_compiler_takes_it(case: str, tmp_path: Path) -> None:
    compile_graph(product(tmp_path, *PRODUCTS[case]), "sm75")


def test_products_of_half_precision_stay(tmp_path: Path, parsed: Callable[[Path], Any]) -> None:
    network = parsed(product(tmp_path, *PRODUCTS["two matrices"], kind=HALF))
    before = kinds(network)
    turing.prepare(network, trt)
    assert kinds(network) == before


def test_a_gelu_is_computed_in_float32(tmp_path: Path, parsed: Callable[[Path], Any]) -> None:
    network = parsed(gated(tmp_path))
    turing.prepare(network, trt)
    assert kinds(network)["CAST"] == 2
    random = np.random.default_rng(0)
    shapes = {"x": (512, 64), "w": (64, 256), "u": (64, 256)}
    inputs = {k: torch.from_numpy(random.normal(0, 0.3, s).astype(np.float16)) for k, s in shapes.items()}
    x, w, u = inputs.values()
    expected = (x @ u) * F.gelu((x @ w).float()).half()
    assert torch.equal(computed(network, inputs), expected)


def test_a_gelu_of_float32_stays(tmp_path: Path, parsed: Callable[[Path], Any]) -> None:
    network = parsed(gated(tmp_path, FLOAT))
    turing.prepare(network, trt)
    assert kinds(network)["CAST"] == 0


def test_the_compiler_takes_a_gated_product(tmp_path: Path) -> None:
    compile_graph(gated(tmp_path), "sm75")
