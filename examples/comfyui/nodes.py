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
from svd_engine.image_conditioning import ImageConditioning
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
Conditioning = list[list[Any]]  # ComfyUI's: [embedding, options] of each part
CATEGORY = "video/svd-engine"
OWN = 0  # of a whole number: what the model, the bundle or the engine decides
MODELS_OWN = "the model's own"  # of a list of names
MOST = 2**31 - 1  # of a whole number in a widget
FIXED = {"num_frames", "height", "width"}  # that a LATENT has
# of ComfyUI's CONDITIONING, by the names that `SVD_img2vid.encode_adm` and SV3D's look for
TOLD = {
    "motion_bucket_id": "motion_bucket_id",
    "fps": "fps",
    "augmentation_level": "noise_aug_strength",
    "elevation": "elevation",
    "azimuth": "azimuths",
}
UNTOLD = {"augmentation_level": 0.0}  # what `encode_adm` takes of SV3D_Conditioning, which does not say it
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
ENCODED = {"fit", *TOLD.values()}  # that a CONDITIONING has, or what made it
DENOISED = [SEED, *(p for p in SETTINGS if p.name not in FIXED | DECODED | ENCODED)]


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

    In ComfyUI 0.3.64 these call that: `prompt_worker` of `main.py`, between prompts, for either flag that the
    route `/free` of `server.py` sets; and `execution.py`, when a node ran out of the GPU's memory, and after
    each prompt under `--disable-smart-memory`.  ComfyUI keeps a list of models, but of its own patchers only,
    which an engine is none of.
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
    """ComfyUI's, as the engine's `cancel`: looked at before every run of a network, and within a long one."""

    def is_set(self) -> bool:
        return bool(comfy.model_management.processing_interrupted())


def run(
    engine: VideoEngine, image: torch.Tensor | ImageConditioning, arguments: dict[str, Any], output_type: str
) -> torch.Tensor:
    """Frames [N,F,3,H,W] or latents [N,F,4,h,w], on the CPU.  image: [B,3,H,W], or encoded."""
    seed = arguments.pop(SEED.name)
    try:
        result = engine(
            image, generator=torch.Generator("cpu").manual_seed(seed), output_type=output_type,
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
                    default="auto",
                    tooltip="Memory budget: auto (what is free), 8GiB, 0.9 (of all); none: no limit.",
                ),
            ],
            outputs=[Engine.Output(display_name="engine")],
        )

    @classmethod
    def execute(cls, memory: str, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(opened(**given, memory=None if memory == "none" else memory))


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
        frames = run(engine, image.movedim(-1, 1), arguments_of(GENERATED, values), "pt")
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
            description="Takes the place of KSampler between SVD_img2vid_Conditioning and VAE Decode.",
            inputs=[
                Engine.Input("engine"),
                io.Conditioning.Input("positive", tooltip="Of SVD_img2vid_Conditioning."),
                io.Conditioning.Input(
                    "negative", tooltip="Of the same node: all zeros, as the engine has it."
                ),
                io.Latent.Input("latent", tooltip="Empty: number of frames and size."),
                *inputs_of(DENOISED),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls,
        engine: VideoEngine,
        positive: Conditioning,
        negative: Conditioning,
        latent: dict[str, torch.Tensor],
        **values: Any,
    ) -> io.NodeOutput:
        frames, height, width = size_of(latent["samples"], engine.model.architecture.vae_scale)
        encoded, told = encoded_of(positive, negative)
        size = {"num_frames": frames, "height": height, "width": width}
        denoised = run(engine, encoded, arguments_of(DENOISED, values) | told | size, "latent")[0]
        return io.NodeOutput({"samples": denoised / engine.model.latent_scale})  # [F, 4, h, w]


def encoded_of(positive: Conditioning, negative: Conditioning) -> tuple[ImageConditioning, dict[str, Any]]:
    """What the denoiser is given of the picture, and the engine's arguments of what it is told beside.

    As ComfyUI 0.3.64 has it: `SVD_img2vid_Conditioning` pairs CLIP's embedding [1, 1, D] with a dict, whose
    `concat_latent_image` [1, 4, h, w] is what `VAE.encode` gave.  `model_base.SVD_img2vid.extra_conds` hands
    it to the network without `process_latent_in`, so it is not scaled, as an ImageConditioning's; and
    `encode_adm` takes one off the fps, as the engine does.  Raises SettingsError for what the engine would
    not do: conditioning of several parts, options of other nodes, a negative that is not zero.
    """
    embedding, options = _one_part("positive", positive)
    nothing, others = _one_part("negative", negative)
    if bool(nothing.any()) or bool(others["concat_latent_image"].any()):
        raise SettingsError(
            "negative",
            expected="zeros, which guidance leads away from",
            got="other numbers",
            remedy="Connect that of SVD_img2vid_Conditioning.",
        )
    told = UNTOLD | {name: value for name, value in options.items() if name in TOLD}
    for name, value in told.items():
        if others.get(name, UNTOLD.get(name)) != value:
            raise SettingsError(
                f"{name} of negative",
                expected=f"that of positive, {value}",
                got=str(others.get(name)),
                remedy="Connect both from the same node.",
            )
    return (
        ImageConditioning(embedding, options["concat_latent_image"]),
        {TOLD[name]: value for name, value in told.items()},
    )


def _one_part(name: str, given: Conditioning) -> tuple[torch.Tensor, dict[str, Any]]:
    if len(given) != 1 or len(given[0][0]) != 1:
        raise SettingsError(
            name,
            expected="one part, of one picture",
            got=str([list(embedding.shape) for embedding, _ in given]),
            remedy="Connect that of SVD_img2vid_Conditioning, without Conditioning Combine.",
        )
    embedding, options = given[0]
    if options.keys() - TOLD.keys() != {"concat_latent_image"}:
        raise SettingsError(
            name,
            expected=f"concat_latent_image, and of {', '.join(TOLD)} what the model is told",
            got=", ".join(map(str, options)),
            remedy="Connect that of SVD_img2vid_Conditioning, and no node between that changes it.",
        )
    return embedding, options


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
