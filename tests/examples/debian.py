"""Debian packages without root: downloaded, unpacked into a folder that git ignores, and kept there.

ONNX Runtime's headers are in trixie only, and headers fit every release.  What is linked has to fit this
machine's C library, so everything else comes from its own release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import filelock

from tests.support.paths import ROOT

FOLDER = ROOT / ".debian"
HEADERS_FROM = "trixie"
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = (
    "libonnxruntime-dev", "nlohmann-json3-dev", "libpng-dev", "zlib1g-dev", "libturbojpeg0-dev", "libssl-dev",
)  # fmt: skip


class NotHere(Exception):
    """Why the packages cannot be had on this machine."""


def usr() -> Path:
    """The packages' /usr.  Downloads them the first time.  Raises NotHere."""
    unpacked = FOLDER / "root"
    FOLDER.mkdir(exist_ok=True)
    with filelock.FileLock(FOLDER / "lock"):
        if not unpacked.is_dir():
            _fetch(FOLDER / "work", unpacked)
    return unpacked / "usr"


def _fetch(work: Path, unpacked: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial", "debs", "root"):
        (work / folder).mkdir(parents=True)
    _download(work)
    for package in (work / "debs").glob("*.deb"):
        _run("dpkg", "-x", str(package), str(work / "root"), cwd=work)
    (work / "root").rename(unpacked)  # so that an interrupted download is none
    shutil.rmtree(work)


def library(name: str) -> Path:
    """A static library: it needs no package at run time."""
    (found,) = (usr() / "lib").glob(f"*/{name}.a")
    return found


def includes() -> list[Path]:
    architecture = library("libcrypto").parent.name  # OpenSSL has headers of its own for each
    return [usr() / "include", usr() / "include" / architecture]


def _download(work: Path) -> None:
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if release.get("ID") != "debian" or missing or not KEYRING.is_file():
        raise NotHere("needs a Debian with apt, dpkg and debian-archive-keyring")
    own = release["VERSION_CODENAME"]
    releases = dict.fromkeys((own, HEADERS_FROM))
    entries = [f"deb [signed-by={KEYRING}] {MIRROR} {name} main\n" for name in releases]
    (work / "sources.list").write_text("".join(entries))
    options = [
        f"Dir::Etc::SourceList={work}/sources.list", "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={work}/lists", "Dir::State::status=/dev/null", f"Dir::Cache={work}/cache",
        "Acquire::Languages=none",
        f"APT::Default-Release={own}", f"APT::Sandbox::User={os.environ.get('USER', 'root')}",
    ]  # fmt: skip
    flags = [flag for option in options for flag in ("-o", option)]
    _run("apt-get", *flags, "update", "-qq", "--error-on=any", cwd=work)
    _run("apt-get", *flags, "download", "-qq", *PACKAGES, cwd=work / "debs")


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NotHere(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
