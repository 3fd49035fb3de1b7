"""A network as one call of the engine sees it.

Each run may stop the call, is told to its observer, and says in the engine's words that memory ran out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from svd_engine.observer import UNOBSERVED, Observer
from svd_engine.spec.network import Network


class InterruptibleNetwork(Network):
    """`check` is called before each run; what it raises ends the call.  The network stays its owner's.

    shortage: from the allocator's word to the error of a run that memory did not suffice for.
    """

    def __init__(
        self,
        network: Network,
        check: Callable[[], None],
        shortage: Callable[[str], Exception],
        observer: Observer = UNOBSERVED,
    ) -> None:
        super().__init__(network.spec, network.placement)
        self.network, self.check, self.shortage, self.observer = network, check, shortage, observer

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.check()
        outputs = self._outputs(inputs)
        self.placement = self.network.placement  # a swapped one knows it from here on
        self.observer.on_network_run(self.spec.network)
        return outputs

    def _outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self.network.run(inputs)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise self.shortage(
            said
        )  # out here: the other error holds the run's frames, and they its activations


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch, ONNX Runtime or TensorRT says so, which on the CPU is in words only."""
    told = re.search(
        "can't allocate memory|failed to allocate memory|out ?of ?memory", str(error), re.IGNORECASE
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or told is not None
