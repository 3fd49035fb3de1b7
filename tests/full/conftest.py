"""What the full-size tests share: SVD-XT as one file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.checkpoint.weights import build
from svd_engine.spec.weights import COMPONENTS
from tests.support.stability_file import tensors_of


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SVD-XT in Stability's layout, fp16, with noise that repeats for weights: 4.5 GB."""
    configs = random_checkpoint("svd-xt").configs
    networks = SimpleNamespace(**{part: build(part, configs[part]) for part in COMPONENTS})
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(networks).items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = tmp_path_factory.mktemp("single") / "svd_xt.safetensors"
    noise = memoryview((0.02 * torch.randn(2**24, generator=torch.manual_seed(0))).half().numpy()).cast("B")
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, end, len(noise)):
            stream.write(noise[: end - begin])
    yield file
    file.unlink()
