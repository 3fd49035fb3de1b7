"""A network as one call of the engine sees it.

Each run may stop the call, is told to its observer, and says in the engine's words that memory ran out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from svd_engine.errors import Cancelled
from svd_engine.observer import UNOBSERVED, Observer
from svd_engine.spec.network import Network, OnPart, unheard


class InterruptibleNetwork(Network):
    """`check` is called before each run, and between two parts of one that runs in parts; what it raises ends
    the call.  The network stays its owner's.

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
        return self.run_in_parts(inputs, unheard)

    def run_in_parts(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        self.check()
        outputs = self._outputs(inputs, on_part)
        self.placement = self.network.placement  # a swapped one knows it from here on
        self.observer.on_network_run(self.spec.network)
        return outputs

    def _outputs(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        def after_part(done: int, parts: int) -> None:
            on_part(done, parts)
            if done < parts:
                self.check()

        stopped, said = None, ""
        try:
            return self.network.run_in_parts(inputs, after_part)
        except Cancelled as error:
            stopped = error.with_traceback(None)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            said = str(error).strip().partition("\n")[0] or type(error).__name__
        # out here: the traceback holds the frames of the run, and they its activations
        raise stopped or self.shortage(said)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether torch, ONNX Runtime or TensorRT says so, which on the CPU is in words only."""
    told = re.search(
        "can't allocate memory|failed to allocate memory|out ?of ?memory", str(error), re.IGNORECASE
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or told is not None
