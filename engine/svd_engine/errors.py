"""Every error this project raises on purpose.

    SvdEngineError                 exit code 1
    ├── SettingsError              exit code 2: an argument out of range, also a ValueError
    │   └── ProfileError           a setting that this bundle's static profiles cannot do
    ├── NotOffered                 a name of diffusers' pipelines that an engine lacks, also an AttributeError
    ├── ImageError                 the input image cannot be used
    ├── OutputError                the result cannot be written where it was asked for
    ├── Cancelled                  the caller cancelled a call or a job, waiting or running
    ├── QueueFull                  a job service has no place for another job
    ├── WaitedTooLong              a job's time was over before its turn came
    ├── CheckpointError            the checkpoint is missing, of another family, or has wrong weights
    ├── BundleError                the bundle is missing, incomplete, altered or of another version
    ├── ExportError                a network cannot be exported, or the export cannot be written
    │   └── ParityError            an exported network differs from torch beyond its tolerance
    └── BackendError               a backend cannot do its work
        ├── BackendUnavailable     not installed, or the device asked for is not here
        ├── TensorMismatch         a network was called with a wrong name, dtype or shape
        ├── NonFiniteOutput        a network produced NaN or infinity
        └── OutOfMemory            memory ran out while a network ran; the engine stays usable

A message has four parts, so that a user can act on it: what is wrong and where, what was expected,
what was got, and what to do.  The remedy names settings as Python does (`dtype="bf16"`) and commands in
backticks or after "Run:"; the command line words the settings with its options (`cli.console.in_options`).
"""

from __future__ import annotations

import functools


class SvdEngineError(Exception):
    """Base of the tree. `str(error)` holds all four parts; `exit_code` is what a command returns."""

    exit_code = 1

    def __init__(self, what: str, *, expected: str, got: str, remedy: str) -> None:
        self.problem = f"{what}: expected {expected}, got {got}"
        super().__init__(f"{self.problem}. {remedy}")
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy

    def __reduce__(self) -> tuple[object, ...]:
        """By pickle, with all four parts: an error of another process arrives as it was raised."""
        parts = {"expected": self.expected, "got": self.got, "remedy": self.remedy}
        return functools.partial(type(self), self.what, **parts), ()


class SettingsError(SvdEngineError, ValueError):
    exit_code = 2


class ProfileError(SettingsError):
    pass


class NotOffered(SvdEngineError, AttributeError):
    exit_code = 2


class ImageError(SvdEngineError):
    pass


class OutputError(SvdEngineError):
    pass


class Cancelled(SvdEngineError):
    pass


class QueueFull(SvdEngineError):
    pass


class WaitedTooLong(SvdEngineError):
    pass


class CheckpointError(SvdEngineError):
    pass


class BundleError(SvdEngineError):
    pass


class ExportError(SvdEngineError):
    pass


class ParityError(ExportError):
    pass


class BackendError(SvdEngineError):
    pass


class BackendUnavailable(BackendError):
    pass


class TensorMismatch(BackendError):
    pass


class NonFiniteOutput(BackendError):
    pass


class OutOfMemory(BackendError):
    pass
