"""Two threads share one C++ backend: `svd::generate` makes one video at a time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.examples import debian
from tests.examples.conftest import CPP


def test_two_threads_do_not_mix_their_videos(tiny_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++: apt-get install g++")
    try:
        usr = debian.usr()
    except debian.NotHere as error:
        pytest.skip(f"the C++ examples' headers cannot be had here: {error}")
    program, source = tmp_path / "threads", Path(__file__).with_name("threads.cpp")
    includes = [f"-I{CPP}", f"-isystem{usr}/include/onnxruntime"]
    includes += [f"-isystem{folder}" for folder in debian.includes()]
    libraries = [debian.library("libcrypto"), "-ldl", "-pthread"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O0"]
    subprocess.run(["g++", *flags, *includes, source, "-o", program, *libraries], check=True)
    done = subprocess.run([program, tiny_bundle], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0 of 40 videos wrong\n"), done.stderr
