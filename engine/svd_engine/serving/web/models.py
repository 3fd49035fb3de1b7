"""The engines that a page offers, by the names that its visitors choose from.  Knows no web."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svd_engine.bundle.manifest import MANIFEST
from svd_engine.checkpoint.opening import check_tells_frames
from svd_engine.engine import VideoEngine
from svd_engine.errors import SettingsError
from svd_engine.residency.budget import Memory


def open_models(
    sources: Sequence[str],
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    swap_networks: bool = False,
    memory: Memory | None = "auto",
) -> dict[str, VideoEngine]:
    """An engine of each bundle's folder or checkpoint.  Loads no networks yet.

    They are named by the last part of their path, or by all of it where two would have the same name.
    Arguments as of `VideoEngine.from_bundle` and `from_checkpoint`; dtype is that of the checkpoints.
    Raises what these raise, and SettingsError for one that is given twice, and for a single file that hides
    the frames it was trained on.
    """
    names = _names(sources)
    models = {}
    for name, source in zip(names, sources, strict=True):
        if (Path(source) / MANIFEST).is_file():
            models[name] = VideoEngine.from_bundle(
                source, backend=backend, device=device, swap_networks=swap_networks, memory=memory
            )
        else:
            check_tells_frames(source)
            models[name] = VideoEngine.from_checkpoint(
                source, backend=backend, device=device, dtype=dtype, swap_networks=swap_networks,
                memory=memory,
            )  # fmt: skip
    return models


def _names(sources: Sequence[str]) -> list[str]:
    short = [Path(source).name or source for source in sources]
    names = [s if short.count(s) == 1 else source for s, source in zip(short, sources, strict=True)]
    if len(set(names)) < len(names):
        raise SettingsError(
            "bundles and checkpoints",
            expected="each once",
            got=", ".join(names),
            remedy="Leave out the second.",
        )
    return names


def describe(engine: VideoEngine) -> str:
    """One line: what it makes, and on what."""
    own = engine.default
    return (
        f"{own.frames} frames of {own.width} x {own.height} pixels; "
        f"{engine.choice.backend} on {engine.choice.device}"
    )
