"""Networks of tests: the one output of most of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def only(outputs: Mapping[str, Tensor]) -> Tensor:
    """The output of a network that has one."""
    (output,) = outputs.values()
    return output
