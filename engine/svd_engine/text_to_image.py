"""A picture from words, with any text-to-image pipeline of diffusers: the photograph of a video.

Knows diffusers' pipelines as what loads by a name and is called with a prompt, and nothing of ours.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svd_engine.errors import BackendError, CheckpointError, ImageError, SettingsError
from svd_engine.report import PromptReport

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def check(prompt: str, model: str) -> None:
    """What can be known before anything is loaded.  Raises SettingsError, CheckpointError."""
    if not prompt.strip():
        raise SettingsError("prompt", expected="some words", got="none", remedy="Say what to show.")
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise CheckpointError(
            f"text-to-image model {model}",
            expected="a folder with model_index.json, as diffusers saves it, or a hub id",
            got="another folder or file",
            remedy="Pass the folder that a pipeline's save_pretrained wrote.",
        )


def picture_of(
    prompt: str, model: str, *, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Image, PromptReport]:
    """A picture of the model's own size, with the defaults of its pipeline, and how it was made.

    model: a folder that diffusers wrote, or a hub id; its weights are read from safetensors only.
    seed: of a generator on the CPU, so that every device starts from the same noise.
    The pipeline's memory is free again when this returns.  Raises what `check` does, CheckpointError for
    what is no such pipeline, BackendError if it fails, ImageError if its safety checker rejects the picture.
    """
    check(prompt, model)
    try:
        made = _run(model, prompt, seed, device, dtype)
    finally:
        gc.collect()  # a pipeline's parts know each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return made


def _run(
    model: str, prompt: str, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Image, PromptReport]:
    from diffusers import AutoPipelineForText2Image

    started = time.perf_counter()
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # diffusers, transformers and the hub raise many kinds
        raise CheckpointError(
            f"text-to-image model {model}",
            expected="a pipeline of diffusers that makes pictures from words, with weights in safetensors",
            got=f"{type(error).__name__}: {error}",
            remedy="Choose another, or install what is missing.",
        ) from error
    try:
        output = pipeline.to(device)(prompt, generator=torch.Generator("cpu").manual_seed(seed))
    except Exception as error:
        raise BackendError(
            f"text-to-image model {model}",
            expected="to make a picture",
            got=f"{type(error).__name__}: {error}",
            remedy="Choose another model, or another device.",
        ) from error
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise ImageError(
            "picture of the prompt",
            expected="one that the model's safety checker lets pass",
            got="one that it does not",
            remedy="Choose another prompt or seed.",
        )
    picture: Image = output.images[0]
    own = inspect.signature(pipeline.__call__).parameters
    report = PromptReport(
        prompt=prompt, model=model, revision=_revision(model), pipeline=type(pipeline).__name__,
        scheduler=type(pipeline.scheduler).__name__, steps=_default(own, "num_inference_steps"),
        guidance_scale=_default(own, "guidance_scale"), width=picture.width, height=picture.height, seed=seed,
        device=str(device), dtype=str(dtype).removeprefix("torch."),
        milliseconds=(time.perf_counter() - started) * 1e3,
    )  # fmt: skip
    return picture, report


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    return parameters[name].default if name in parameters else None


def _revision(model: str) -> str | None:
    """The commit that a hub id's files are of, as the hub's cache on this machine has them."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).exists():
        return None
    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None
