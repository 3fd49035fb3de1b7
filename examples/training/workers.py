"""Training in several processes on one machine: each takes its share of a batch, gradients are averaged.

On a shared CPU single-threaded processes waste less than threads, which wait for each other in every layer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing import parent_process

import torch
from torch import distributed, multiprocessing


def run(count: int, work: Callable[[], None]) -> None:
    """Calls `work` in `count` processes that see each other; in this one where there is one."""
    torch.set_num_threads(1)
    if count == 1:
        work()
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (count, os.path.join(folder, "store"), work), nprocs=count)


def _join(rank: int, count: int, store: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    work()
    distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average(gradients: Iterable[torch.Tensor]) -> None:
    """In place, over all workers.

    Ends a worker whose command was killed, for another run may begin in its folder.
    """
    if count() == 1:
        return
    parent = parent_process()
    if parent is None or not parent.is_alive():
        raise SystemExit("the command that started this worker is gone")
    tensors = list(gradients)
    flat = torch.cat([g.flatten() for g in tensors])
    distributed.all_reduce(flat)
    flat /= count()
    for tensor, part in zip(tensors, flat.split([g.numel() for g in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
