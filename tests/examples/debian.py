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
    _make_folders(work)
    _download(work, PACKAGES, (HEADERS_FROM,))
    _unpack(work, unpacked)


def program(name: str) -> Path:
    """A package, and what it needs and this machine lacks: their /usr.  Downloads them the first time.

    Its libraries are at none of the places where they are looked for (LD_LIBRARY_PATH).  Raises NotHere.
    """
    unpacked = FOLDER / name
    FOLDER.mkdir(exist_ok=True)
    with filelock.FileLock(FOLDER / f"{name}.lock"):
        if not unpacked.is_dir():
            work = FOLDER / f"{name}-work"
            _make_folders(work)
            _download_with_needs(work, name)
            _unpack(work, unpacked)
    return unpacked / "usr"


def _make_folders(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial", "debs", "root"):
        (work / folder).mkdir(parents=True)


def _unpack(work: Path, unpacked: Path) -> None:
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


def _download(work: Path, packages: tuple[str, ...], further_releases: tuple[str, ...]) -> None:
    flags = _update(work, Path(os.devnull), further_releases)
    _run("apt-get", *flags, "download", "-qq", *packages, cwd=work / "debs")


def _download_with_needs(work: Path, package: str) -> None:
    flags = _update(work, Path("/var/lib/dpkg/status"), ())
    only = ("--yes", "--download-only", "--no-install-recommends", "-qq", "-o", "Debug::NoLocking=1")
    _run("apt-get", *flags, "install", *only, package, cwd=work)
    for file in (work / "cache/archives").glob("*.deb"):
        file.rename(work / "debs" / file.name)


def _update(work: Path, installed: Path, further_releases: tuple[str, ...]) -> list[str]:
    """Fetches the lists of packages; the flags with which apt-get knows them, and what is installed."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if release.get("ID") != "debian" or missing or not KEYRING.is_file():
        raise NotHere("needs a Debian with apt, dpkg and debian-archive-keyring")
    own = release["VERSION_CODENAME"]
    releases = dict.fromkeys((own, *further_releases))
    entries = [f"deb [signed-by={KEYRING}] {MIRROR} {name} main\n" for name in releases]
    (work / "sources.list").write_text("".join(entries))
    options = [
        f"Dir::Etc::SourceList={work}/sources.list", "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={work}/lists", f"Dir::State::status={installed}", f"Dir::Cache={work}/cache",
        "Acquire::Languages=none",
        f"APT::Default-Release={own}", f"APT::Sandbox::User={os.environ.get('USER', 'root')}",
    ]  # fmt: skip
    flags = [flag for option in options for flag in ("-o", option)]
    _run("apt-get", *flags, "update", "-qq", "--error-on=any", cwd=work)
    return flags


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NotHere(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
