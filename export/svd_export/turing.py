"""What a network needs before TensorRT for RTX compiles it for Turing cards (sm75).

    GELU in float16       is fused into the product before it, and there is no kernel of that fusion ("empty
                          runtime-fusion MVMF for '__myl_Fc'"): in float32, between casts, it is not fused;
                          its result is rounded once as before, and the gate is written once more
    product in float32    there is none ("FP32 GEMM is not supported"), and there are convolutions: with the
                          second matrix as the weights of a 1x1 convolution, matrices of a batch as groups

Both are the same functions.  A plan is built so when Turing is among its targets, for the others too.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt_rtx


def prepare(network: tensorrt_rtx.INetworkDefinition, module: Any) -> None:
    """Edits a parsed network in place.  `module` is the bindings that it belongs to."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers = Readers(network, layers)
    for layer in layers:
        if layer.type == module.LayerType.ACTIVATION:
            layer.__class__ = module.IActivationLayer  # how these bindings give a layer its own attributes
            if layer.type == module.ActivationType.GELU_ERF:
                widen(layer, network, module, readers)
        elif layer.type == module.LayerType.MATRIX_MULTIPLY:
            layer.__class__ = module.IMatrixMultiplyLayer
            convolve(layer, network, module, readers)


class Readers:
    """Who reads a tensor, to give them another one."""

    def __init__(self, network: Any, layers: list[Any]) -> None:
        self.network = network
        self.of: dict[str, list[tuple[Any, int]]] = {}
        for layer in layers:
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:  # an optional one that is left out
                    self.of.setdefault(tensor.name, []).append((layer, index))

    def move(self, old: Any, new: Any) -> None:
        for layer, index in self.of.get(old.name, ()):
            layer.set_input(index, new)
        self.of[new.name] = self.of.pop(old.name, [])
        if old.is_network_output:
            self.network.unmark_output(old)
            old.name, new.name = f"{old.name}_before", old.name
            self.network.mark_output(new)


def widen(gelu: Any, network: Any, module: Any, readers: Readers) -> None:
    """A GELU of float16, in float32 between casts."""
    x, y = gelu.get_input(0), gelu.get_output(0)
    if x.dtype != module.float16:
        return
    gelu.set_input(0, network.add_cast(x, module.float32).get_output(0))
    readers.move(y, network.add_cast(y, module.float16).get_output(0))


def convolve(product: Any, network: Any, module: Any, readers: Readers) -> None:
    """a [..., M, K] times b [..., K, N] in float32, as a 1x1 convolution of M pixels with K channels."""
    a, b, out = product.get_input(0), product.get_input(1), product.get_output(0)
    if {a.dtype, b.dtype} != {module.float32}:
        return
    plain, turned = module.MatrixOperation.NONE, module.MatrixOperation.TRANSPOSE
    groups = prod(b.shape[:-2])
    if {product.op0, product.op1} - {plain, turned} or (
        groups > 1 and tuple(a.shape[:-2]) != tuple(b.shape[:-2])
    ):
        return
    inner = b.shape[-2 if product.op1 == plain else -1]
    outer = b.shape[-1 if product.op1 == plain else -2]
    if groups == 1 and product.op0 == turned and prod(a.shape[:-2]) > 1:
        return  # its rows do not lie together
    rows = prod(a.shape) // (groups * inner)

    def arranged(x: Any, shape: tuple[int, ...], turn: bool, then: tuple[int, ...]) -> Any:
        first = network.add_shuffle(x)
        first.reshape_dims = shape
        if turn:
            first.second_transpose = (0, 2, 1)
        last = network.add_shuffle(first.get_output(0))
        last.reshape_dims = then
        return last.get_output(0)

    as_rows, as_columns = (groups, rows, inner), (groups, inner, rows)
    x = arranged(
        a, as_rows if product.op0 == plain else as_columns, product.op0 == plain, (1, groups * inner, rows, 1)
    )
    as_given = (groups, inner, outer) if product.op1 == plain else (groups, outer, inner)
    weights = arranged(b, as_given, product.op1 == plain, (groups * outer, inner, 1, 1))
    convolution = network.add_convolution_nd(x, groups * outer, (1, 1), module.Weights(), module.Weights())
    convolution.set_input(1, weights)
    convolution.num_groups = groups
    made = arranged(convolution.get_output(0), (groups, outer, rows), True, tuple(out.shape))
    readers.move(out, made)
