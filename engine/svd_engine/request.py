"""The one list of the parameters of a call: name, type, unit, range, default, a line of help.

The command's options (`call_options`), Triton's inputs and the checks of `Settings` are made from it;
`VideoEngine.__call__`, the C++ host and the documentation are held to it by tests.  A new parameter is a
field of `Settings`, an argument of `VideoEngine.__call__`, and what the pipeline does with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from svd_engine.errors import SettingsError
from svd_engine.sampling.registry import GUIDERS, SAMPLERS, SCHEDULES
from svd_engine.values import (
    FITS,
    Fit,
    angles,
    at_least,
    check_seed,
    finite,
    guidance_scales,
    noise_levels,
    one_of,
)

DECODINGS = ("auto", "whole", "streamed")

# Types of parameters.  `check` gives the value as a plain one, or raises SettingsError; `range` is for help.


@dataclass(frozen=True)
class Whole:
    """An int of at least `low`."""

    low: int
    range: ClassVar[str] = ""

    def check(self, name: str, value: object) -> int:
        return at_least(name, value, self.low)


@dataclass(frozen=True)
class Real:
    """A finite float from `low` to `high`; None is no limit."""

    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> str:
        return "" if self.high is None else f"{self.low} to {self.high}"

    def check(self, name: str, value: object) -> float:
        return finite(name, value, self.low, self.high)


@dataclass(frozen=True)
class OneOf:
    """A name out of a list."""

    choices: tuple[str, ...]
    range: ClassVar[str] = ""

    def check(self, name: str, value: object) -> str:
        return str(one_of(name, value, self.choices))


@dataclass(frozen=True)
class NoiseLevels:
    """Falling floats, one more than steps."""

    range: ClassVar[str] = ""

    def check(self, _name: str, value: object) -> tuple[float, ...]:
        return noise_levels(value)


@dataclass(frozen=True)
class FrameScales:
    """Floats, one for each frame."""

    range: ClassVar[str] = ""

    def check(self, _name: str, value: object) -> tuple[float, ...]:
        return guidance_scales(value)


@dataclass(frozen=True)
class Angles:
    """A float of degrees, or one for each frame, from `low` to `high`; None is no limit."""

    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> str:
        return "" if self.high is None else f"{self.low} to {self.high}"

    def check(self, name: str, value: object) -> float | tuple[float, ...]:
        return angles(name, value, self.low, self.high)


@dataclass(frozen=True)
class Seed:
    """An int of 64 bits; for `VideoEngine.__call__` a generator that was seeded with it."""

    range: ClassVar[str] = "0 to 2^64 - 1"

    def check(self, _name: str, value: object) -> int:
        return check_seed(value)


@dataclass(frozen=True)
class Photograph:
    """A picture: of any kind that `VideoEngine.__call__` takes in Python, an encoded file elsewhere."""

    range: ClassVar[str] = ""

    def check(self, _name: str, value: object) -> object:
        return value  # `image` checks it while it reads it


@dataclass(frozen=True)
class Latents:
    """Noise of variance 1, [N, F, 4, h, w]."""

    range: ClassVar[str] = ""

    def check(self, _name: str, value: object) -> object:
        return value  # the pipeline checks its shape, which depends on other parameters


Kind = Whole | Real | OneOf | NoiseLevels | FrameScales | Angles | Seed | Photograph | Latents


@dataclass(frozen=True)
class Parameter:
    kind: Kind
    help: str  # one line, without a full stop
    unit: str = ""
    name: str = ""  # as `VideoEngine.__call__` and Triton call it; diffusers' name
    option: str | None = None  # of `svd-engine generate`; None where the command offers none
    own: Literal["", "profile", "model"] = ""  # whose value a call that names none takes
    only_told: bool = (
        False  # it is for networks that have a conditioning field of this name, and nothing else
    )
    default: Any = None  # where nothing owns one; of an `own` parameter SVD's, if it has one
    field: str = ""  # of `Settings`
    usual: tuple[float, float] | None = None  # what a slider spans, within the range

    @property
    def call_default(self) -> Any:
        """Default of `VideoEngine.__call__`: None for what the profile or the model decides."""
        return None if self.own else self.default

    def describe(self) -> str:
        """The whole line: help, unit, range, and where a default that is not shown comes from."""
        notes = ", ".join(note for note in (self.unit, self.kind.range) if note)
        line = f"{self.help} ({notes})." if notes else f"{self.help}."
        if self.own == "profile":
            return f"{line} Default: the bundle's or checkpoint's own."
        svd = self.default if isinstance(self.default, str) else f"{self.default:g}" if self.own else ""
        return f"{line} Default: the model's own (SVD: {svd})." if self.own else line


@dataclass(frozen=True)
class Settings:
    """Every number of a call, as plain int and float.  Raises SettingsError for one that is out of range.

    Takes numbers of any kind: of Python, NumPy and torch, and whole ones written as 7.0.
    """

    frames: Annotated[
        int, Parameter(Whole(1), "Number of frames", name="num_frames", option="--frames", own="profile")
    ]
    height: Annotated[
        int, Parameter(Whole(1), "Height of the video", "pixels", option="--height", own="profile")
    ]
    width: Annotated[
        int, Parameter(Whole(1), "Width of the video", "pixels", option="--width", own="profile")
    ]
    fit: Annotated[
        Fit,
        Parameter(
            OneOf(FITS),
            "Stretch a photograph of another aspect ratio, crop its middle, or pad it with black",
            option="--fit",
        ),
    ] = "stretch"  # as diffusers does
    steps: Annotated[
        int,
        Parameter(
            Whole(1),
            "Denoising steps",
            name="num_inference_steps",
            option="--steps",
            own="model",
            usual=(1, 50),
        ),
    ] = 25
    sigmas: Annotated[
        tuple[float, ...] | None,
        Parameter(
            NoiseLevels(), "Noise levels in place of the steps: n + 1 levels make n steps", option="--sigmas"
        ),
    ] = None
    fps: Annotated[
        int,
        Parameter(
            Whole(1),
            "Playback rate, also given to SVD's network",
            "frames per second",
            option="--fps",
            usual=(1, 30),
        ),
    ] = 7
    motion_bucket_id: Annotated[
        float,
        Parameter(
            Real(0, 1023),
            "Amount of motion, more for a higher value",
            option="--motion-bucket-id",
            only_told=True,
            usual=(0, 255),  # what SVD was trained on
        ),
    ] = 127
    noise_aug_strength: Annotated[
        float,
        Parameter(
            Real(0),
            "Noise added to the photograph; with more the video departs further from it",
            "standard deviation, of pixels in [-1, 1]",
            option="--noise-aug-strength",
            own="model",
            usual=(0, 0.5),
        ),
    ] = 0.02
    min_guidance_scale: Annotated[
        float,
        Parameter(
            Real(),
            "Guidance scale of the first frame",
            option="--min-guidance-scale",
            own="model",
            usual=(1, 10),
        ),
    ] = 1.0
    max_guidance_scale: Annotated[
        float,
        Parameter(
            Real(),
            "Guidance scale of the last frame; guidance acts if one of the two is above 1",
            option="--max-guidance-scale",
            own="model",
            usual=(1, 10),
        ),
    ] = 3.0
    decode_chunk_size: Annotated[
        int | None,
        Parameter(Whole(1), "Frames decoded at once; fewer take less memory", option="--decode-chunk-size"),
    ] = None  # all at once, or what the bundle has
    decoding: Annotated[
        str,
        Parameter(
            OneOf(DECODINGS),
            "Decode all frames at once (whole), or layer by layer over decode_chunk_size frames at a time "
            "(streamed): the same video in less memory, slower; auto is whole, or independent chunks where "
            "decode_chunk_size is given",
            option="--decoding",
        ),
    ] = "auto"
    videos_per_image: Annotated[
        int,
        Parameter(Whole(1), "Videos of each photograph", name="num_videos_per_prompt", option="--num-videos"),
    ] = 1
    sampler: Annotated[
        str, Parameter(OneOf(tuple(SAMPLERS)), "Sampler, which denoises step by step", option="--sampler")
    ] = "euler"
    schedule: Annotated[
        str, Parameter(OneOf(tuple(SCHEDULES)), "Schedule of the steps' noise levels", option="--schedule")
    ] = "karras"
    guider: Annotated[
        str,
        Parameter(
            OneOf(tuple(GUIDERS)),
            "Guider, which spreads the two guidance scales over the frames",
            option="--guider",
            own="model",
        ),
    ] = "linear"
    guidance_scales: Annotated[
        tuple[float, ...] | None,
        Parameter(
            FrameScales(),
            "Guidance scales in place of the guider: one for each frame",
            option="--guidance-scales",
        ),
    ] = None
    churn: Annotated[
        float,
        Parameter(
            Real(0),
            "Noise that the samplers euler and heun add on their way, S_churn",
            option="--churn",
            usual=(0, 40),
        ),
    ] = 0.0
    rho: Annotated[
        float,
        Parameter(
            Real(0.1, 1000),  # as `spec.bounds.Rho`: a model's own is never refused
            "Exponent of the schedule karras: with more, more of the steps are at low noise",
            option="--rho",
            own="model",
            usual=(1, 20),
        ),
    ] = 7.0
    elevation: Annotated[
        float | tuple[float, ...] | None,
        Parameter(
            Angles(-90, 90),
            "Elevation of the camera, for SV3D_p: of every frame, or one for each; default 10",
            "degrees above the object",
            option="--elevation",
            only_told=True,
        ),
    ] = None
    azimuths: Annotated[
        tuple[float, ...] | None,
        Parameter(
            Angles(),
            "Azimuth of the camera, for SV3D_p: one for each frame, the last one the photograph's; default "
            "an even orbit",
            "degrees",
            option="--azimuths",
            only_told=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        for parameter in SETTINGS:
            value = getattr(self, parameter.field)
            if value is None and parameter.default is None and not parameter.own:
                continue
            object.__setattr__(self, parameter.field, parameter.kind.check(parameter.name, value))
        if self.sigmas is not None:
            object.__setattr__(self, "steps", len(self.sigmas) - 1)  # those that run
        if self.guidance_scales is not None and len(self.guidance_scales) != self.frames:
            raise SettingsError(
                "guidance_scales",
                expected=f"{self.frames} numbers, one for each frame",
                got=str(len(self.guidance_scales)),
                remedy="Pass as many factors as the video has frames.",
            )
        for name, value in (("elevation", self.elevation), ("azimuths", self.azimuths)):
            if value is None or (name == "elevation" and isinstance(value, float)):
                continue
            count = len(value) if isinstance(value, tuple) else None
            if count != self.frames:
                raise SettingsError(
                    name,
                    expected=f"{self.frames} numbers, one for each frame",
                    got="one number" if count is None else str(count),
                    remedy="Pass as many angles as the video has frames, or leave it out.",
                )

    @property
    def told(self) -> dict[str, Any]:
        """What networks may be told, by the names of conditioning fields.

        Azimuths are those from the last frame on, 0 to 360 degrees, as sgm's `simple_video_sample.py` has
        them: the last frame is the photograph's view.  Without any, an even orbit that ends there.
        """
        given = self.azimuths or tuple(360 * (n + 1) / self.frames for n in range(self.frames))
        return {**vars(self), "azimuths": tuple((angle - given[-1]) % 360 for angle in given)}

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance acts: the largest of the scales that are used is above 1.

        diffusers' `do_classifier_free_guidance` looks at `max_guidance_scale` while it encodes and at the
        largest scale of all frames in the loop, and stops with a RuntimeError where the two disagree, as at
        min 3, max 1.  Where diffusers gives a video, this is its answer.
        """
        if self.guidance_scales is not None:
            return max(self.guidance_scales) > 1
        low = self.min_guidance_scale if GUIDERS[self.guider].rises else self.max_guidance_scale
        return max(low, self.max_guidance_scale) > 1

    @property
    def slice_frames(self) -> int | None:
        """Frames that a streamed decoder holds at a time; None where it was not asked for."""
        return min(self.decode_chunk_size or 1, self.frames) if self.decoding == "streamed" else None

    def check_told(self, model: str, fields: Sequence[str]) -> None:
        """Raises SettingsError for a parameter that only speaks to networks of another model.

        fields: the names of what the model's networks are told beside the image.
        """
        for parameter in SETTINGS:
            value = getattr(self, parameter.field)
            if parameter.only_told and parameter.field not in fields and value != parameter.default:
                raise SettingsError(
                    parameter.name,
                    expected=f"it to be left out: the networks of {model} are told {', '.join(fields)}",
                    got=str(value),
                    remedy="Leave it out, or use a checkpoint that is told it.",
                )

    def check_size(self, multiple: int) -> None:
        """Raises SettingsError unless the networks can take the size."""
        for name, value in (("height", self.height), ("width", self.width)):
            if value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise SettingsError(
                    name,
                    expected=f"a multiple of {multiple} pixels",
                    got=str(value),
                    remedy=f"The nearest that works is {nearest}.",
                )


def _of_settings() -> tuple[Parameter, ...]:
    """The parameters in the annotations of `Settings`, each with its names and its default."""
    hints = get_type_hints(Settings, include_extras=True)
    found = []
    for field in dataclasses.fields(Settings):
        (parameter,) = hints[field.name].__metadata__
        default = None if field.default is MISSING else field.default
        name = parameter.name or field.name
        found.append(dataclasses.replace(parameter, name=name, field=field.name, default=default))
    return tuple(found)


SETTINGS = _of_settings()
IMAGE = Parameter(Photograph(), "Photograph to animate", name="image")
SEED = Parameter(
    Seed(), "Random seed: the same seed makes the same video", name="seed", option="--seed", default=0
)
LATENTS = Parameter(Latents(), "Noise to start from", name="latents")
PARAMETERS = (IMAGE, SEED, *SETTINGS, LATENTS)


def check(call: Mapping[str, object]) -> None:
    """Raises SettingsError for a value out of range, before anything is opened.  None keeps a default."""
    for parameter in PARAMETERS:
        value = call.get(parameter.name)
        if value is not None:
            parameter.kind.check(parameter.name, value)
    check_together(call)


def check_together(call: Mapping[str, object]) -> None:
    """Raises SettingsError for a parameter that another one would leave without effect."""
    defaults = {p.name: p.call_default for p in SETTINGS}

    def given(name: str) -> bool:
        value = call.get(name)
        return value is not None and (defaults[name] is None or value != defaults[name])

    def refuse(name: str, beside: str) -> None:
        if given(name):
            raise SettingsError(
                name,
                expected=f"its default beside {beside}, which leaves it without effect",
                got=str(call[name]),
                remedy="Leave out one of the two.",
            )

    svd = {p.name: p.default for p in SETTINGS}
    sampler, schedule, guider = (call.get(n) or svd[n] for n in ("sampler", "schedule", "guider"))
    if given("sigmas"):
        refuse("schedule", "sigmas")
        refuse("rho", "sigmas")
    if call.get("decoding") == "whole":
        refuse("decode_chunk_size", "the decoding whole")
    if given("guidance_scales"):
        refuse("guider", "guidance_scales")
        refuse("min_guidance_scale", "guidance_scales")
        refuse("max_guidance_scale", "guidance_scales")
    if not SAMPLERS[str(sampler)].churns:
        refuse("churn", f"the sampler {sampler}")
    if not SCHEDULES[str(schedule)].curved:
        refuse("rho", f"the schedule {schedule}")
    if not GUIDERS[str(guider)].rises:
        refuse("min_guidance_scale", f"the guider {guider}")


def own_values(owners: Mapping[str, object], call: Mapping[str, object]) -> dict[str, Any]:
    """By field, what the profile or the model decides of a call; None in `call` leaves it to them.

    owners: by "profile" and "model", or one of them, what has the values as attributes.
    """
    return {
        p.field: getattr(owners[p.own], p.field)
        for p in SETTINGS
        if p.own in owners and call.get(p.name) is None
    }
