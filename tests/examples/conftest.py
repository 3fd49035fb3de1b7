"""The C++ programs, built once a session, plain and under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.examples import debian
from tests.support.paths import PHOTOGRAPH, ROOT
from tests.support.shared import made_once

CPP = ROOT / "examples" / "cpp"
SANITISED = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
SAID = "said.txt"
FOUND = 99  # exit code of a sanitizer's finding
SANITIZERS = {"ASAN_OPTIONS": f"exitcode={FOUND}", "UBSAN_OPTIONS": f"exitcode={FOUND}"}


@dataclass(frozen=True)
class Programs:
    plain: Path  # svd_generate
    sanitised: Path
    checks: Path  # tests/examples/checks.cpp, sanitised
    compiling: str  # what the compilers and CMake said


@dataclass(frozen=True)
class Generate:
    """svd_generate with the runtime of the installed wheel."""

    program: Path
    runtime: Path

    def __call__(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        """Runs it on words as they are given; the environment tells sanitizers from our exit codes."""
        words = [str(word) for word in arguments]
        done = subprocess.run(
            [self.program, *words], env={**os.environ, **SANITIZERS},
            capture_output=True, text=True, timeout=120, **options,  # type: ignore[call-overload]
        )  # fmt: skip
        assert done.returncode != FOUND, done.stderr
        return done

    def video(
        self, bundle: Path, out: Path, *arguments: object, photo: Path = PHOTOGRAPH, **options: object
    ) -> subprocess.CompletedProcess[str]:
        return self(bundle, photo, "-o", out, "--runtime", self.runtime, *arguments, **options)


@pytest.fixture(scope="session")
def runtime() -> Path:
    """ONNX Runtime's library in its wheel."""
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")
    return library


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    missing = [tool for tool in ("cmake", "g++", "make") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install cmake g++ make")
    try:
        usr = debian.usr()
    except debian.NotHere as error:
        pytest.skip(f"the C++ examples' headers cannot be had here: {error}")
    folder = made_once(tmp_path_factory, "cpp", lambda folder: build(folder, usr))
    said = (folder / SAID).read_text()
    return Programs(
        folder / "plain" / "svd_generate", folder / "sanitised" / "svd_generate", folder / "checks", said
    )


def build(folder: Path, usr: Path) -> None:
    """Every program, at the same time, and what compilers and CMake said."""
    folder.mkdir()
    include = ":".join(map(str, debian.includes()))
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", *SANITISED.split(), f"-I{CPP}"]
    flags += [f"-isystem{usr}/include/onnxruntime"]
    libraries = [debian.library(name) for name in ("libpng16", "libz", "libturbojpeg", "libcrypto")]
    checks = [
        "g++", *flags, Path(__file__).with_name("checks.cpp"), "-o", folder / "checks", *libraries, "-ldl",
        "-pthread",
    ]  # fmt: skip
    builds = {
        "plain": _cmake(folder / "plain", "-O2"),
        "sanitised": _cmake(folder / "sanitised", SANITISED),
        "checks": " ".join(map(str, checks)),
    }
    running = {
        name: subprocess.Popen(
            command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "CPATH": include},
        )
        for name, command in builds.items()
    }  # fmt: skip
    said = {name: process.communicate()[0] for name, process in running.items()}
    failed = [name for name, process in running.items() if process.returncode]
    assert not failed, "\n".join(said[name] for name in failed)
    (folder / SAID).write_text("\n".join(said.values()))


def _cmake(build: Path, flags: str) -> str:
    """As the README of the example says, but with the unpacked packages in the place of installed ones."""
    usr = debian.usr()
    settings = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": f"'-Werror {flags}'",
        "CMAKE_PREFIX_PATH": usr,
        "PNG_LIBRARY": debian.library("libpng16"),
        "ZLIB_LIBRARY": debian.library("libz"),
        "TURBOJPEG_LIBRARY": debian.library("libturbojpeg"),
        "OPENSSL_CRYPTO_LIBRARY": debian.library("libcrypto"),
        "PNG_PNG_INCLUDE_DIR": usr / "include",
        "ZLIB_INCLUDE_DIR": usr / "include",
        "OPENSSL_INCLUDE_DIR": usr / "include",
    }
    given = " ".join(f"-D{name}={value}" for name, value in settings.items())
    return f"cmake -S {CPP} -B {build} -G 'Unix Makefiles' {given} && cmake --build {build}"


@pytest.fixture(scope="session")
def generate(programs: Programs, runtime: Path) -> Generate:
    """Sanitised: what every test runs unless it says otherwise."""
    return Generate(programs.sanitised, runtime)
