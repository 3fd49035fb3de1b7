"""The state of torch that the engine computes in, whatever the program around it has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_torch_state() -> Iterator[None]:
    """No gradients, no autocast, new tensors on the CPU unless they say otherwise; for this thread alone.

    Inference mode is off: later calls could not write to buffers and weights made in it.  What the caller
    had set comes back, also after an error.  The default dtype is left alone, because it belongs to the
    whole process and other threads may be computing: code of the engine names its dtypes.  Deterministic
    algorithms, TF32 and the number of threads are the program's choice, and stay as they are.
    """
    with ExitStack() as state:
        state.enter_context(torch.inference_mode(False))
        state.enter_context(torch.no_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                state.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            state.enter_context(torch.device("cpu"))
        yield
