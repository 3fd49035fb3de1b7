"""What a training run keeps: weights, their moving average, optimiser, step and a log of losses."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import workers
from torch import nn

SAVE_EVERY = 100  # steps
DECAY = 0.3  # of a run's steps, the last ones: the learning rate falls


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Warm-up, then constant, then a line to zero over the last DECAY of the run.

    A constant middle lets an interrupted run go on with another number of steps.
    """
    left = (steps - step) / (DECAY * steps)
    return peak * min((step + 1) / warmup, 1.0, max(left, 0.0))


class Run:
    """One network in training, saved as `folder`/state.pt; opened again it goes on where it was saved."""

    def __init__(self, folder: Path, network: nn.Module, ema_decay: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.network, self.ema_decay = folder, network, ema_decay
        self.step, self.seconds = 0, 0.0
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=0, betas=(0.9, 0.99), weight_decay=1e-3
        )
        self._began = time.monotonic()
        path = folder / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            network.load_state_dict(state["network"])
            self.ema = state["ema"]
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.seconds = state["step"], state["seconds"]

    def update(self, loss: torch.Tensor, lr: float) -> float:
        """One step of the optimiser and of the moving average; returns the norm of the gradient."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        workers.average(p.grad for p in self.parameters.values() if p.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), 1.0))
        self.optimiser.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay
            )
        return norm

    def log(self, **values: Any) -> None:
        if workers.rank():
            return
        line = json.dumps({"step": self.step, "seconds": round(self._seconds(), 1), **values})
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def save(self) -> None:
        """Written aside and renamed: a run killed here loses what came after the last save, no more."""
        if workers.rank():
            return
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self._seconds(),
        }
        aside = self.folder / "state.pt.part"
        torch.save(state, aside)
        os.replace(aside, self.folder / "state.pt")

    def averaged(self) -> dict[str, torch.Tensor]:
        """The network's state with the moving average of its parameters."""
        return {**self.network.state_dict(), **self.ema}

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._began
