"""What the rewrites share: walking a network, replacing a part, folding a number into its weights.

Knows torch modules; knows neither what a rewrite proves nor where diffusers uses a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """What one rewrite did: how many places, and why it left others as they were ("path: reason")."""

    places: int
    left_alone: tuple[str, ...] = ()


def parts(network: nn.Module, kind: type[Part]) -> list[tuple[str, Part]]:
    """Every part of that kind with its path, listed before anything is replaced."""
    return [(path, part) for path, part in network.named_modules() if isinstance(part, kind)]


def rewrite_each(
    places: list[tuple[str, Part]],
    obstacle: Callable[[Part], str | None],
    rewrite: Callable[[Part], nn.Module | None],
    network: nn.Module,
) -> Report:
    """Rewrites each place that has no obstacle; what `rewrite` returns, if anything, takes its place.

    A part that was replaced is forgotten at once, so `places` is emptied, whoever holds it: weights never
    stand there twice.
    """
    done, left_alone = 0, []
    places.reverse()
    while places:
        path, part = places.pop()
        reason = obstacle(part)
        if reason is not None:
            left_alone.append(f"{path}: {reason}")
            continue
        replacement = rewrite(part)
        if replacement is not None:
            network.set_submodule(path, replacement)
        done += 1
    return Report(done, tuple(left_alone))


def is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Stride, dilation and groups of one, zero padding of one: an image of the same size, nothing else."""
    once = conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
    return once and conv.kernel_size == (3, 3) and conv.padding_mode == "zeros"


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear around given tensors: weight [out, in], bias [out]."""
    with torch.device("meta"):  # no second copy of the weights
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = frozen(weight)
    if bias is not None:
        layer.bias = frozen(bias)
    return layer


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution, of the same memory: weight [out, in, 1, 1]."""
    with torch.device("meta"):  # no second copy of the weights
        conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = frozen(layer.weight[:, :, None, None])
    if layer.bias is not None:
        conv.bias = frozen(layer.bias)
    return conv


def scale_(parameter: Tensor | None, factor: float) -> None:
    """Multiplies in place, in float64, and rounds once."""
    if parameter is not None:
        parameter.copy_(parameter.double() * factor)
