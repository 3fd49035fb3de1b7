"""A network is traced once a session, whichever of its exports comes first: the same again takes seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from svd_engine.spec.tensors import NetworkSpec
from tests.support.shared import made_once

Trace = Callable[[nn.Module, NetworkSpec], ir.Model]
PLAIN = (bool, int, float, str, tuple, list, type(None), torch.dtype)
LARGEST = 2**27  # bytes of weights that are kept


def once(trace: Trace, factory: pytest.TempPathFactory) -> Trace:
    """`trace`, of which `factory`'s session keeps what it has made."""

    def kept(module: nn.Module, spec: NetworkSpec) -> ir.Model:
        if sum(tensor.nbytes for _, tensor in tensors(module)) > LARGEST:
            return trace(module, spec)

        def make(folder: Path) -> None:
            folder.mkdir()
            ir.save(trace(module, spec), folder / "model.onnx")

        return ir.load(made_once(factory, f"trace/{key(module, spec)}", make) / "model.onnx")

    return kept


def key(module: nn.Module, spec: NetworkSpec) -> str:
    """Of all that decides a trace: the table, every part with its class and settings, the weights."""
    digest = hashlib.sha256(repr(spec).encode())
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if not k.startswith("_") and isinstance(v, PLAIN)}
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {settings}\n".encode())
    for name, tensor in tensors(module):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
