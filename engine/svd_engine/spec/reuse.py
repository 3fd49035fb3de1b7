"""Reuse between evaluations of the denoiser, after DeepCache (Ma et al. 2023, https://arxiv.org/abs/2312.00858).

The deep part of the UNet changes slowly from one noise level to the next.  A *full* denoiser gives, beside
D, the *feature*: what enters the shallow end of its upward path.  A *shallow* denoiser takes that feature in
place of computing it anew, and runs the outermost modules of both paths only.  Lossy.

Letters in shapes: B videos, G halves of guidance in a call, F frames, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from svd_engine.errors import SettingsError
from svd_engine.spec.bounds import Channels, Kept, PixelScale
from svd_engine.spec.tensors import NetworkSpec, TensorSpec
from svd_engine.values import at_least, finite

SHALLOW = "shallow_denoiser"  # its network's name


@dataclass(frozen=True)
class Reuse:
    """How much is reused.  Raises SettingsError for a value out of range.

    interval: of so many evaluations one is full, the first; 2 or more.  branch: DeepCache's number, 0 for the
    shallowest; a higher one computes more and errs less; None is a bundle's own, and 0 over a checkpoint.
    threshold: reuse only while the input of the UNet, scaled to variance 1, has changed by less than this
    since the last full evaluation (sum of the relative mean absolute changes from one evaluation to the next,
    as TeaCache, https://arxiv.org/abs/2411.19108, counts them); None reuses by the interval alone.
    """

    interval: int
    branch: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", at_least("reuse interval", self.interval, 2))
        if self.branch is not None:
            object.__setattr__(self, "branch", at_least("reuse branch", self.branch, 0))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", finite("reuse threshold", self.threshold, 0.0))


@dataclass(frozen=True)
class Feature:
    """Where the shallow end of the upward path begins.  kept: resnets of that end, with what follows each."""

    kept: Kept
    channels: Channels
    downscale: PixelScale  # of latent pixels

    @property
    def branch(self) -> int:
        """DeepCache's number."""
        return self.kept - 2


def feature_of(channels: Sequence[int], layers: int, branch: int) -> Feature:
    """The feature of a UNet of so many channels a level, the outermost first.

    layers: resnets of a downward block; an upward one has one more.  Raises SettingsError for a branch beyond
    the last.
    """
    per_block = layers + 1
    last = len(channels) * per_block - 2
    if branch > last:
        raise SettingsError(
            "reuse branch",
            expected=f"0 to {last} for this checkpoint",
            got=str(branch),
            remedy="Take a lower one.",
        )
    kept = branch + 2
    level, from_end = divmod(kept - 1, per_block)
    first_of_block = from_end == per_block - 1
    before = min(level + 1, len(channels) - 1) if first_of_block else level  # whose width enters there
    return Feature(kept, channels[before], 2**level)


def reusing_specs(denoiser: NetworkSpec, feature: Feature) -> tuple[NetworkSpec, NetworkSpec]:
    """Full and shallow denoiser of the shapes of a plain one: one gives the feature, the other takes it."""
    batch, frames, _, height, width = denoiser.inputs[0].shape
    halves = 2 if denoiser.guidance == "batched" else 1
    size = (ceil(height / feature.downscale), ceil(width / feature.downscale))
    state = TensorSpec("feature", (batch, halves, frames, feature.channels, *size))
    key, common = f"{denoiser.key}-reuse{feature.kept}", (denoiser.precision, denoiser.guidance, feature.kept)
    full = NetworkSpec("denoiser", f"full_{key}", denoiser.inputs, (*denoiser.outputs, state), *common)
    shallow = NetworkSpec(SHALLOW, f"shallow_{key}", (*denoiser.inputs, state), denoiser.outputs, *common)
    return full, shallow
