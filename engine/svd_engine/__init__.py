"""Generate videos from images with Stable Video Diffusion: open a `VideoEngine` and call it.

Every error that it raises on purpose is a `SvdEngineError`.  Importing this package does not import torch or
Pillow; they are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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
    OutOfMemory,
    OutputError,
    ParityError,
    ProfileError,
    QueueFull,
    SettingsError,
    SvdEngineError,
    TensorMismatch,
    WaitedTooLong,
)

if TYPE_CHECKING:
    from svd_engine.checkpoint.opening import open_checkpoint as open_checkpoint
    from svd_engine.continuing import continue_video as continue_video
    from svd_engine.engine import VideoEngine as VideoEngine
    from svd_engine.image_conditioning import ImageConditioning as ImageConditioning
    from svd_engine.media.clip import read_video as read_video
    from svd_engine.media.image import load_image as load_image
    from svd_engine.media.video import write_video as write_video
    from svd_engine.output import VideoOutput as VideoOutput
    from svd_engine.report import RunReport as RunReport
    from svd_engine.spec.reuse import Reuse as Reuse

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "ExportError",
    "ImageConditioning",
    "ImageError",
    "NonFiniteOutput",
    "NotOffered",
    "OutOfMemory",
    "OutputError",
    "ParityError",
    "ProfileError",
    "QueueFull",
    "Reuse",
    "RunReport",
    "SettingsError",
    "SvdEngineError",
    "TensorMismatch",
    "VideoEngine",
    "VideoOutput",
    "WaitedTooLong",
    "__version__",
    "continue_video",
    "load_image",
    "open_checkpoint",
    "read_video",
    "write_video",
]

_LOADED_ON_USE = {
    "ImageConditioning": "image_conditioning",
    "Reuse": "spec.reuse",
    "RunReport": "report",
    "VideoEngine": "engine",
    "VideoOutput": "output",
    "continue_video": "continuing",
    "load_image": "media.image",
    "open_checkpoint": "checkpoint.opening",
    "read_video": "media.clip",
    "write_video": "media.video",
}


def __getattr__(name: str) -> object:
    if name in _LOADED_ON_USE:
        return getattr(import_module(f"svd_engine.{_LOADED_ON_USE[name]}"), name)
    raise AttributeError(f"module 'svd_engine' has no attribute {name!r}")
