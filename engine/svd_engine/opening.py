"""An engine as data: which networks it has and how to open them, also in other processes and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import DEMO, HUB, open_checkpoint
from svd_engine.engine import VideoEngine
from svd_engine.spec.model import Model


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
            return VideoEngine.from_bundle(self.bundle, **self.options)
        named = dict(self.checkpoint or {})
        return VideoEngine.from_checkpoint(named.pop("source"), **named, **self.options)

    def on(self, device: str) -> Opening:
        return replace(self, options={**self.options, "device": device})

    def from_anywhere(self) -> Opening:
        """The same with paths that do not depend on the folder that a process is in."""
        options = dict(self.options)
        if isinstance(options.get("jit_cache"), Path):
            options["jit_cache"] = options["jit_cache"].absolute()
        if self.bundle is not None:
            return Opening(self.bundle.absolute(), None, options)
        named = dict(self.checkpoint or {})
        named |= {
            "source": wherever(named["source"]),
            "parts": {part: wherever(path) for part, path in named["parts"].items()},
            "lora": {wherever(file): scale for file, scale in named["lora"].items()},
        }
        return Opening(None, named, options)

    @cached_property
    def model(self) -> Model:
        """Raises BundleError or CheckpointError."""
        if self.bundle is not None:
            return Bundle(self.bundle).manifest.model
        return open_checkpoint(**self.checkpoint or {}).model

    @cached_property
    def digest(self) -> str:
        """Tells networks apart, wherever their files lie: another digest, another video.

        That of the bundle, or of the checkpoint with the precision; and reuse, which is lossy.  Backends
        and devices differ within tolerance: not in it.  Raises BundleError or CheckpointError.
        """
        reuse = f" {self.options['reuse']}" if self.options.get("reuse") else ""
        if self.bundle is not None:
            return Bundle(self.bundle).digest() + reuse
        return f"{open_checkpoint(**self.checkpoint or {}).digest()} {self.options.get('dtype')}{reuse}"
