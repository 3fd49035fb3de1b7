"""Generate videos from images with Stable Video Diffusion: open a `VideoEngine` and call it.

Every error that it raises on purpose is a `SvdEngineError`.  Importing this package does not import torch or
Pillow; they are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svd_engine._version import __version__
from svd_engine.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    Cancelled,
    CheckpointError,
    ExportError,
    ImageError,
    NonFiniteOutput,
    NotOffered,
    OutputError,
    ParityError,
    ProfileError,
    SettingsError,
    SvdEngineError,
    TensorMismatch,
)

if TYPE_CHECKING:
    from svd_engine.checkpoint import open_checkpoint as open_checkpoint
    from svd_engine.engine import VideoEngine as VideoEngine
    from svd_engine.image import load_image as load_image
    from svd_engine.output import VideoOutput as VideoOutput
    from svd_engine.report import RunReport as RunReport
    from svd_engine.video import write_video as write_video

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "ExportError",
    "ImageError",
    "NonFiniteOutput",
    "NotOffered",
    "OutputError",
    "ParityError",
    "ProfileError",
    "RunReport",
    "SettingsError",
    "SvdEngineError",
    "TensorMismatch",
    "VideoEngine",
    "VideoOutput",
    "__version__",
    "load_image",
    "open_checkpoint",
    "write_video",
]

_LOADED_ON_USE = {
    "RunReport": "report",
    "VideoEngine": "engine",
    "VideoOutput": "output",
    "load_image": "image",
    "open_checkpoint": "checkpoint",
    "write_video": "video",
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_ON_USE:
        return getattr(import_module(f"svd_engine.{_LOADED_ON_USE[name]}"), name)
    raise AttributeError(f"module 'svd_engine' has no attribute {name!r}")
