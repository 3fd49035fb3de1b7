"""The two halves of guidance at the same time, each on a device of its own.

    D = D_u + g (D_c - D_u)

Neither half needs a tensor of the other, and guidance commutes with the preconditioning, which is affine in
the network's output: this is exact.  What passes between the devices is x there and D_u back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svd_engine.spec.network import Network
from svd_engine.torch_state import own_torch_state


@dataclass
class OtherHalf:
    """The unconditional half: a denoiser of single guidance on `device`, for one call of the engine."""

    network: Network
    device: torch.device
    exchanged_bytes: int = 0  # between the devices so far
    _there: dict[str, Tensor] = field(default_factory=dict)  # what stays the same from step to step

    def beside(
        self,
        here: Callable[[], Tensor],
        there: Callable[[Network, Mapping[str, Tensor]], Tensor],
        changing: Mapping[str, Tensor],
        lasting: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(here(), there(network, inputs) brought here); an error of either ends both first.

        The inputs are `changing` and `lasting`; the latter are moved at the first call only.
        """
        if not self._there:
            self._there = {name: self._moved(tensor, self.device) for name, tensor in lasting.items()}
        inputs = {name: self._moved(tensor, self.device) for name, tensor in changing.items()} | self._there

        def run() -> Tensor:
            current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
            with own_torch_state(), current:  # both belong to a thread
                return there(self.network, inputs)

        with ThreadPoolExecutor(1, "svd_engine other half") as thread:  # leaves when both have ended
            other = thread.submit(run)
            mine = here()
        return mine, self._moved(other.result(), mine.device)

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.exchanged_bytes += tensor.numel() * tensor.element_size()
        return tensor.to(device)
