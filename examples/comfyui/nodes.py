"""svd-engine's nodes for ComfyUI.  What a call takes is made from the engine's list, `svd_engine.request`.

Letters in shapes: B pictures, N videos, F frames, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import functools
import io as streams
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.input_impl import VideoFromFile
from comfy_api.latest import ComfyExtension, io

from svd_engine.arguments import DTYPES
from svd_engine.backends.registry import NAMES
from svd_engine.bundle.manifest import MANIFEST
from svd_engine.engine import VideoEngine
from svd_engine.errors import Cancelled, SettingsError
from svd_engine.media.video import to_uint8
from svd_engine.observer import Observer
from svd_engine.request import (
    LATENTS,
    PARAMETERS,
    SEED,
    SETTINGS,
    Angles,
    FrameScales,
    NoiseLevels,
    OneOf,
    Parameter,
    Real,
    Whole,
    check,
)
from svd_engine.serving.encode import encode

Engine = io.Custom("SVD_ENGINE")
CATEGORY = "video/svd-engine"
OWN = 0  # of a whole number: what the model, the bundle or the engine decides
MODELS_OWN = "the model's own"  # of a list of names
MOST = 2**31 - 1  # of a whole number in a widget
FIXED = {"num_frames", "height", "width"}  # that a LATENT has
DECODED = {"decode_chunk_size", "decoding", "num_videos_per_prompt"}  # of what is not decoded, and one video


# Parameters as inputs


def inputs_of(parameters: list[Parameter]) -> list[Any]:
    return [_input(parameter) for parameter in parameters]


def _input(parameter: Parameter) -> Any:
    """A widget; a socket for what has no number that could stand for "the model's own"."""
    name, kind, default = parameter.name, parameter.kind, parameter.call_default
    told = parameter.describe()
    if parameter is SEED:
        return io.Int.Input(
            name, default=default, min=0, max=2**64 - 1, control_after_generate=True, tooltip=told
        )
    match kind:
        case OneOf(choices):
            listed = [*([MODELS_OWN] if default is None else []), *choices]
            return io.Combo.Input(name, options=listed, default=default or MODELS_OWN, tooltip=told)
        case Whole(low):
            if default is None:
                meant = "that one" if parameter.own else "not set"
                return io.Int.Input(name, default=OWN, min=OWN, max=MOST, tooltip=f"{told} {OWN}: {meant}.")
            return io.Int.Input(name, default=default, min=low, max=MOST, tooltip=told)
        case Real(low, high):
            limits = {side: limit for side, limit in (("min", low), ("max", high)) if limit is not None}
            if default is None:
                return io.Float.Input(name, optional=True, force_input=True, tooltip=told)
            return io.Float.Input(name, default=default, step=0.01, tooltip=told, **limits)
        case NoiseLevels():
            return io.Sigmas.Input(name, optional=True, tooltip=told)
        case FrameScales():
            return io.String.Input(name, default="", tooltip=f"{told} Commas between; empty: the guider's.")
        case Angles():
            return io.String.Input(name, default="", tooltip=f"{told} Commas between; empty: not set.")
    return io.Latent.Input(name, optional=True, tooltip=told)


def arguments_of(parameters: list[Parameter], values: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments in what the widgets and sockets gave.  Raises SettingsError."""
    given = {parameter.name: values.get(parameter.name) for parameter in parameters}
    for parameter in parameters:
        value = given[parameter.name]
        if isinstance(parameter.kind, Whole) and parameter.call_default is None and value == OWN:
            given[parameter.name] = None
        if value == MODELS_OWN:
            given[parameter.name] = None
        if isinstance(parameter.kind, (FrameScales, Angles)):
            numbers = [_number(text) for text in value.split(",")] if value else None
            one = isinstance(parameter.kind, Angles) and numbers is not None and len(numbers) == 1
            given[parameter.name] = numbers[0] if one else numbers
        if parameter is LATENTS and value is not None:
            given[parameter.name] = value["samples"][None]  # [1, F, 4, h, w]
    check(given)
    return {name: value for name, value in given.items() if value is not None}


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text.strip()  # refused with the others' ranges


GENERATED = [p for p in PARAMETERS if p.name != "image"]
DENOISED = [SEED, *(p for p in SETTINGS if p.name not in FIXED | DECODED)]


# The engine, kept between runs

_opened: dict[tuple[object, ...], VideoEngine] = {}  # at most one


def opened(source: str, **options: Any) -> VideoEngine:
    """The engine of the last run if it is the same one, or else a new one in its place.

    options: of `VideoEngine.from_checkpoint`; a bundle has a dtype of its own.
    """
    key = (source, *options.items())
    if key not in _opened:
        free()
        _opened.clear()
        if (Path(source).expanduser() / MANIFEST).is_file():
            options.pop("dtype")
            engine = VideoEngine.from_bundle(Path(source).expanduser(), **options)
        else:
            engine = VideoEngine.from_checkpoint(source, **options)
        engine.set_progress_bar_config(disable=True)  # ComfyUI shows its own
        _opened[key] = engine
    return _opened[key]


def free() -> None:
    """Frees networks and weights; the next run loads them again."""
    for engine in _opened.values():
        engine.close()


def free_with_models() -> None:
    """Has ComfyUI's `unload_all_models` free the engine, too.

    Its button, its route `/free` and its answer to a GPU out of memory call that.  It keeps a list of models,
    but of its own patchers only, which an engine is none of.
    """
    manager = comfy.model_management
    unload = manager.unload_all_models

    @functools.wraps(unload)
    def unload_all_models(*arguments: Any, **named: Any) -> Any:
        free()
        return unload(*arguments, **named)

    manager.unload_all_models = unload_all_models


class _Progress(Observer):
    def __init__(self) -> None:
        self.bar: Any = None

    def on_evaluation(self, done: int, evaluations: int) -> None:
        self.bar = self.bar or comfy.utils.ProgressBar(evaluations)
        self.bar.update_absolute(done, evaluations)


class _Interrupt:
    """ComfyUI's, as the engine's `cancel`: looked at before every run of a network."""

    def is_set(self) -> bool:
        return bool(comfy.model_management.processing_interrupted())


def run(
    engine: VideoEngine, image: torch.Tensor, arguments: dict[str, Any], output_type: str
) -> torch.Tensor:
    """Frames [N,F,3,H,W] or latents [N,F,4,h,w], on the CPU.  image: [B,H,W,3]."""
    seed = arguments.pop(SEED.name)
    try:
        result = engine(
            image.movedim(-1, 1), generator=torch.Generator("cpu").manual_seed(seed), output_type=output_type,
            cancel=_Interrupt(), observer=_Progress(), **arguments,
        )  # fmt: skip
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise
    return result.frames.cpu().clone()


# Nodes


class LoadEngine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDEngineLoad",
            display_name="Load SVD engine",
            category=CATEGORY,
            description="Opens a bundle of svd-export, or a checkpoint. It stays in memory between runs.",
            inputs=[
                io.String.Input(
                    "source",
                    default="svd-xt",
                    tooltip="Folder of a bundle, or a checkpoint: a name, folder, single file or hub id.",
                ),
                io.Combo.Input("backend", options=list(NAMES), default="auto"),
                io.String.Input("device", default="auto", tooltip="auto, cpu, cuda or cuda:N."),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="Precision of a checkpoint; a bundle has its own.",
                ),
                io.Boolean.Input(
                    "swap_networks",
                    default=False,
                    tooltip="Keep one network in memory at a time: less memory, slower.",
                ),
                io.String.Input(
                    "memory",
                    default="",
                    tooltip="Memory budget: 8GiB, 0.9 (of all), auto (what is free); empty: no limit.",
                ),
            ],
            outputs=[Engine.Output(display_name="engine")],
        )

    @classmethod
    def execute(cls, memory: str, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(opened(**given, memory=memory or None))


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDEngineGenerate",
            display_name="Generate video (SVD engine)",
            category=CATEGORY,
            description="Animates every picture: its frames, and the video as mp4.",
            inputs=[Engine.Input("engine"), io.Image.Input("image"), *inputs_of(GENERATED)],
            outputs=[
                io.Image.Output(display_name="frames", is_output_list=True),
                io.Video.Output(display_name="video", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, engine: VideoEngine, image: torch.Tensor, **values: Any) -> io.NodeOutput:
        frames = run(engine, image, arguments_of(GENERATED, values), "pt")
        videos = [encode(to_uint8(video), ".mp4", values["fps"]) for video in frames]
        return io.NodeOutput(
            list(frames.movedim(2, -1)),  # N of [F, H, W, 3]
            [VideoFromFile(file=streams.BytesIO(video)) for video in videos],
        )


class Denoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDEngineDenoise",
            display_name="Denoise only (SVD engine)",
            category=CATEGORY,
            description="Takes the place of KSampler behind SVD_img2vid_Conditioning: its empty latent gives "
            "frames and size, VAE Decode takes the result.",
            inputs=[
                Engine.Input("engine"),
                io.Image.Input("image", tooltip="One picture, which conditions the video."),
                io.Latent.Input("latent", tooltip="Empty: number of frames and size."),
                *inputs_of(DENOISED),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls, engine: VideoEngine, image: torch.Tensor, latent: dict[str, torch.Tensor], **values: Any
    ) -> io.NodeOutput:
        frames, height, width = size_of(latent["samples"], engine.model.architecture.vae_scale)
        if len(image) != 1:
            raise SettingsError(
                "image", expected="one picture", got=str(len(image)), remedy="Take one of the batch."
            )
        arguments = arguments_of(DENOISED, values) | {"num_frames": frames, "height": height, "width": width}
        denoised = run(engine, image, arguments, "latent")[0]  # [F, 4, h, w], scaled
        return io.NodeOutput({"samples": denoised / engine.model.latent_scale})


def size_of(samples: torch.Tensor, scale: int) -> tuple[int, int, int]:
    """Frames, height and width of an empty latent [F,4,h,w].  Raises SettingsError for another one.

    scale: pixels for each latent pixel, 8 of SVD.
    """
    if samples.dim() != 4 or samples.shape[1] != 4 or bool(samples.any()):
        raise SettingsError(
            "latent",
            expected="an empty one, [F, 4, h, w]",
            got=f"{list(samples.shape)}{', not empty' * bool(samples.any())}",
            remedy="Connect that of SVD_img2vid_Conditioning, or of Empty Latent Image, a batch of frames.",
        )
    frames, _, height, width = samples.shape
    return frames, scale * height, scale * width


class FreeEngine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDEngineFree",
            display_name="Free SVD engine",
            category=CATEGORY,
            description="Frees the engine's memory after what is connected; the next run loads it again.",
            inputs=[io.Image.Input("after")],
            outputs=[io.Image.Output(display_name="images")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, after: torch.Tensor) -> io.NodeOutput:
        free()
        return io.NodeOutput(after)


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadEngine, Generate, Denoise, FreeEngine]


async def comfy_entrypoint() -> Extension:
    free_with_models()
    return Extension()
