"""Stable Video Diffusion as an engine: `VideoEngine` is what users call, `errors` is what it raises.

Importing this package costs no torch: `VideoEngine` is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from svd_engine._version import __version__

if TYPE_CHECKING:
    from svd_engine.engine import VideoEngine as VideoEngine

__all__ = ["VideoEngine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "VideoEngine":
        from svd_engine.engine import VideoEngine

        return VideoEngine
    raise AttributeError(f"module 'svd_engine' has no attribute {name!r}")
