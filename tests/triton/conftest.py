"""A small bundle with a short and a long profile, its model repository, and a real server on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.spec.profile import Profile
from svd_export.cli import main
from svd_export.to_onnx import export_bundle
from tests.support.commands import call
from tests.triton.asking import SHORT
from tests.triton.server import Server, install

LONG = Profile(25, SHORT.height, SHORT.width, decode_chunk=1)
QUEUE = 4


@pytest.fixture(scope="session")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "bundle"
    export_bundle(open_checkpoint(str(tiny_checkpoint)), folder, [SHORT, LONG], torch.float32)
    return folder


@pytest.fixture(scope="session")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    assert call(main, "triton", bundle, "-o", folder, "--max-queue", QUEUE, "--timeout", "100s") == 0
    return folder


@pytest.fixture(scope="session")
def tritonserver() -> None:
    """Installed, or the tests of a running server are skipped; where CI is set they fail instead."""
    try:
        install()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode().strip().splitlines()[-1:]
        message = f"nvidia-pytriton, which carries a Triton server, cannot be installed here: {reason}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(f"{message}. Linux on x86-64 or ARM and a package index would run this.")


@pytest.fixture(scope="session")
def server(repository: Path, tritonserver: None) -> Iterator[Server]:
    with Server(repository, repository.with_name("log"), "svd", "svd_stream") as started:
        started.wait_ready()
        yield started
