"""What a checkpoint is told beside the image: numbers, each a sinusoidal embedding inside the denoiser.

They travel in one tensor, `time_ids`, a column for each field: [B, fields], or [B, F, fields] as soon as one
field differs from frame to frame.  The table, the pipeline's tensor, the inputs that networks are compared
on and the manifest are made from the fields of a family: SVD's, SV3D_u's and SV3D_p's are below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from svd_engine.errors import SettingsError
from svd_engine.spec.bounds import Channels, Finite
from svd_engine.values import finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FieldName = Annotated[str, Field(max_length=64, pattern="^[a-z][a-z0-9_]*$")]


@dataclass(frozen=True, kw_only=True)
class ConditioningField:
    """One number for a video, or one for each of its frames.

    Its range is that of the parameter of a call with this name; the network is told the parameter times
    `scale` plus `offset`.
    """

    name: FieldName
    width: Channels  # of its embedding
    default: Finite  # that networks are compared on
    low: Finite | None = None  # None: no limit
    high: Finite | None = None
    scale: Finite = 1.0
    offset: Finite = 0.0
    per: Literal["video", "frame"] = "video"


Fields = Annotated[tuple[ConditioningField, ...], Field(min_length=1, max_length=16)]
Values = Mapping[str, float | Sequence[float] | None]  # by field; a sequence holds a number for each frame


@dataclass(frozen=True)
class Conditioning:
    fields: Fields  # in the order of the columns

    @property
    def width(self) -> int:
        """Channels of all embeddings together: the UNet's `projection_class_embeddings_input_dim`."""
        return sum(field.width for field in self.fields)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @property
    def per_frame(self) -> bool:
        return any(field.per == "frame" for field in self.fields)

    @property
    def defaults(self) -> dict[str, float]:
        return {field.name: field.default for field in self.fields}

    def shape(self, videos: int, frames: int) -> tuple[int, ...]:
        """Of `time_ids`: [videos, fields], or [videos, frames, fields]."""
        rows = (videos, frames) if self.per_frame else (videos,)
        return (*rows, len(self.fields))

    def rows(self, values: Values, frames: int) -> list[list[float]]:
        """What one video is told: one row, or with a field per frame a row for each of its `frames`.

        None stands for the field's default.
        Raises SettingsError for a number out of its field's range, and for another count of numbers than the
        field takes.
        """
        count = frames if self.per_frame else 1
        columns = [_column(field, values[field.name], frames, count) for field in self.fields]
        return [list(row) for row in zip(*columns, strict=True)]

    def time_ids(
        self, values: Values, videos: int, frames: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The tensor of `shape`, float32: `rows` for every video.  Raises what `rows` raises."""
        import torch

        rows = torch.tensor(self.rows(values, frames), dtype=torch.float32, device=device)
        return rows.expand(self.shape(videos, frames))


def svd_conditioning(width: int = 256) -> Conditioning:
    """SVD's: it was trained on the frame rate less one.  width: of each embedding, 256 in SVD itself."""
    return Conditioning(
        (
            ConditioningField(name="fps", width=width, default=7.0, low=1.0, offset=-1.0),
            ConditioningField(name="motion_bucket_id", width=width, default=127.0, low=0.0, high=1023.0),
            ConditioningField(name="noise_aug_strength", width=width, default=0.02, low=0.0),
        )
    )


def sv3d_u_conditioning(width: int = 256) -> Conditioning:
    """SV3D_u's: the noise on the photograph alone, of which it was trained on next to none."""
    return Conditioning((_sv3d_noise(width),))


def sv3d_p_conditioning(width: int = 256) -> Conditioning:
    """SV3D_p's: the same, and where the camera is in each frame, in embeddings of twice the width.

    The network is told the polar angle, pi / 2 less the elevation, and the azimuth, both in radians; calls
    give degrees.  Source: scripts/sampling/configs/sv3d_p.yaml of Stability-AI/generative-models.
    """
    degree = pi / 180
    elevation = ConditioningField(
        name="elevation", width=2 * width, default=10.0, low=-90.0, high=90.0, scale=-degree, offset=pi / 2,
        per="frame",
    )  # fmt: skip
    azimuth = ConditioningField(
        name="azimuths", width=2 * width, default=0.0, low=0.0, high=360.0, scale=degree, per="frame"
    )
    return Conditioning((_sv3d_noise(width), elevation, azimuth))


def _sv3d_noise(width: int) -> ConditioningField:
    return ConditioningField(name="noise_aug_strength", width=width, default=1e-5, low=0.0)


def conditioning_of(width: int, total: int) -> Conditioning | None:
    """The family whose embeddings have `total` channels, the first of them `width`; None where none has."""
    families = (svd_conditioning(width), sv3d_u_conditioning(width), sv3d_p_conditioning(width))
    return next((family for family in families if family.width == total), None)


def _column(
    field: ConditioningField, value: float | Sequence[float] | None, frames: int, count: int
) -> list[float]:
    if value is None:
        value = field.default
    if not isinstance(value, Sequence):
        return [_told(field, value)] * count
    if field.per == "video" or len(value) != frames:
        raise SettingsError(
            field.name,
            expected=f"one number, or one for each of {frames} frames"
            if field.per == "frame"
            else "one number",
            got=f"{len(value)} numbers",
            remedy="Pass as many.",
        )
    return [_told(field, number) for number in value]


def _told(field: ConditioningField, number: float) -> float:
    return finite(field.name, number, field.low, field.high) * field.scale + field.offset
