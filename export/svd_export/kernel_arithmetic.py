"""Floating-point operations of a compiled kernel, from the shapes of its tensors as the compiler logs them.

2 per multiply-add, of convolutions, matrix products and attention; what else a kernel does (normalisation,
activation, softmax) is bound by memory traffic, and so are products of one row, which the compiler makes of
sums.  Channels that the compiler pads count: they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Dimensions = tuple[int, ...]

FUSED_ATTENTION = "_gemm_mha"  # in the name of a kernel that attends without writing the scores
CONVOLUTION = "correlation"  # kinds of layers
TRANSPOSED_CONVOLUTION = "deconv"
PRODUCTS = ("gemm", "runtime_fusion")
FUSED_CONVOLUTION = "Corr"  # in the name of a runtime_fusion that is one


def kernel_flop(
    name: str,
    kind: str,
    inputs: Sequence[Dimensions],
    constants: Sequence[Dimensions],
    made: Sequence[Dimensions],
) -> int:
    """Of one run of the kernel; 0 where it multiplies no matrices, or none that its tensors show."""
    if FUSED_ATTENTION in name and len(inputs) > 1:
        return _attention(inputs[0], inputs[1])
    if not made:
        return 0
    if kind == CONVOLUTION or (kind in PRODUCTS and FUSED_CONVOLUTION in name):
        return _convolution(constants, made[0])
    if kind == TRANSPOSED_CONVOLUTION and inputs:  # weights [in, out / groups, *kernel]
        return _convolution(constants, inputs[0])
    if kind in PRODUCTS:
        return 2 * prod(made[0]) * _summed([*inputs, *constants], made[0])
    return 0


def _convolution(constants: Sequence[Dimensions], pixels: Dimensions) -> int:
    """Weights [out, in / groups, *kernel], the largest of its constants; the others scale and add."""
    return 2 * prod(pixels) * prod(max(constants, key=prod)[1:]) if constants else 0


def _attention(queries: Dimensions, keys: Dimensions) -> int:
    """Two products.  Queries [heads, tokens, width], keys turned already: [heads, width, keys]."""
    return 4 * prod(queries) * keys[-1]


def _summed(operands: Sequence[Dimensions], made: Dimensions) -> int:
    """K of [.., M, K] x [.., K, N] = [.., M, N], among tensors of which some are added; 0 without a pair."""
    matrices = [shape for shape in operands if len(shape) > 1]
    sides = [
        a[-1]
        for i, a in enumerate(matrices)
        for j, b in enumerate(matrices)
        if i != j and (a[-2], b[-1]) == made[-2:] and a[-1] == b[-2]
    ]
    return max(sides, default=0)
