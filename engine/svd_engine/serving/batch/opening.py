"""The engine that the workers of a batch open, as data that travels to other processes and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.reading import Bundle, sha256_of
from svd_engine.checkpoint.opening import DEMO, HUB, open_checkpoint
from svd_engine.engine import VideoEngine


def wherever(source: str | Path) -> str:
    """A path as it is from every folder; the name of a checkpoint stays one."""
    path = Path(source).expanduser()
    return str(path.absolute()) if str(source) not in (DEMO, *HUB) and path.exists() else str(source)


@dataclass(frozen=True)
class Opening:
    """A bundle or a checkpoint, and how to open it.

    checkpoint: as the arguments of `open_checkpoint`.  options: further ones of `VideoEngine.from_bundle` or
    `from_checkpoint`.
    """

    bundle: Path | None
    checkpoint: Mapping[str, Any] | None
    options: Mapping[str, Any]

    def open(self) -> VideoEngine:
        """Raises what the two constructors raise."""
        if self.bundle is not None:
            engine = VideoEngine.from_bundle(self.bundle, **self.options)
        else:
            engine = VideoEngine.from_checkpoint(open_checkpoint(**self.checkpoint or {}), **self.options)
        engine.set_progress_bar_config(disable=True)  # a batch has one of its own
        return engine

    def on(self, device: str) -> Opening:
        return replace(self, options={**self.options, "device": device})

    @cached_property
    def digest(self) -> str:
        """Tells networks apart, wherever their files lie: another digest, another video.

        Of a bundle its manifest's hash, which holds those of its files; of a checkpoint the hash of its
        configs and weights, and the precision.  Backends and devices differ within tolerance: not in it.
        Raises BundleError or CheckpointError.
        """
        if self.bundle is not None:
            return sha256_of(Bundle(self.bundle).folder / MANIFEST)
        return f"{open_checkpoint(**self.checkpoint or {}).digest()} {self.options.get('dtype')}"
