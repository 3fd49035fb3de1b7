"""Where a document was measured: what it must say, and what it must not give away."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from svd_bench.measuring import environment as module
from svd_bench.measuring.children import in_utf8
from svd_bench.measuring.environment import anonymous, commit, environment
from svd_bench.measuring.nvml import Gpu
from tests.bench.test_nvml import stand_in


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    got = environment(torch.device("cpu"), None, ["svd-bench", "run", "--out", "/home/me/results"])
    assert got.command == "svd-bench run --out results"
    assert got.device == got.cpu
    assert (got.device_memory, got.driver, got.cuda, got.compute_capability) == (None, None, None, None)
    assert got.cores == len(os.sched_getaffinity(0))
    assert got.host_memory == psutil.virtual_memory().total
    assert got.versions["torch"] == torch.__version__
    assert got.measured_at.endswith("+00:00")


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=5, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    got = environment(torch.device("cuda", 0), Gpu(stand_in(), "a"), ["svd-bench"])
    assert (got.device, got.device_memory, got.compute_capability) == ("NVIDIA H200", 5, "9.0")
    assert got.driver == "580.1"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("/home/me/x.json", "x.json"), ("--out=/home/me/x", "--out=x"), ("~/x", "x"), ("../up/x", "x"),
        ("results/x", "results/x"), ("owner/name", "owner/name"), ("--repeat=5", "--repeat=5"), ("25", "25"),
    ],
)  # fmt: skip
def test_a_command_names_no_folder_of_this_machine(argument: str, told: str) -> None:
    assert anonymous(argument) == told


def test_the_commit_and_whether_it_is_all(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True)
        return done.stdout.decode().strip()

    assert commit(tmp_path) == "unknown"
    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{head}+dirty"


def test_without_git_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == "unknown"


def test_a_cpu_without_a_model_is_named_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Path, "read_text", lambda path, encoding: "processor : 0\n")
    assert module.cpu_name() == platform.machine()


def test_a_system_without_proc_and_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, encoding: str) -> str:
        raise OSError

    monkeypatch.setattr(module.Path, "read_text", missing)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert module.cpu_name() == (platform.processor() or platform.machine())
    assert module.cores() == os.cpu_count()


def test_a_child_reads_and_writes_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system gives pipes, as Windows does."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    echo = [sys.executable, "-S", "-c", "print(input())"]
    done = subprocess.run(echo, input="視", capture_output=True, encoding="utf-8", env=in_utf8(), check=True)
    assert done.stdout == "視\n"
