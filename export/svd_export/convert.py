"""Writes a checkpoint as a folder that diffusers' `from_pretrained` reads, one network after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from svd_engine.checkpoint.configs import INDEX, OPTIONAL, PIPELINE
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.cli import console
from svd_engine.spec.weights import COMPONENTS, Component
from svd_export.placing import placed

if TYPE_CHECKING:
    import torch
    from torch import nn

PIPELINE_PARTS = {  # of model_index.json: library and class
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
}


def write_folder(
    checkpoint: Checkpoint, folder: Path, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Writes `folder`, which must not exist yet, aside and renames it when it is whole.

    Weights keep their precision.  Raises ExportError when the place is taken or cannot be written,
    CheckpointError for the checkpoint's own faults.
    """
    import diffusers
    import transformers

    with placed(folder) as aside:
        for component in COMPONENTS:
            progress(component)
            module = checkpoint.load(component, precision(checkpoint, component))
            _save(module, aside / component)
            del module  # before the next one is loaded
        scheduler = diffusers.EulerDiscreteScheduler.from_config(dict(checkpoint.configs["scheduler"]))
        scheduler.save_pretrained(aside / "scheduler")
        extractor = transformers.CLIPImageProcessor(**checkpoint.configs["feature_extractor"])
        extractor.save_pretrained(aside / "feature_extractor")
        for name, file in OPTIONAL.items():
            if name in checkpoint.configs:
                console.write_text(aside / file, json.dumps(checkpoint.configs[name], indent=2) + "\n")
        parts = PIPELINE_PARTS | {"vae": ["diffusers", checkpoint.configs["vae"]["_class_name"]]}
        index = {"_class_name": PIPELINE, "_diffusers_version": diffusers.__version__, **parts}
        console.write_text(aside / INDEX, json.dumps(index, indent=2) + "\n")


def _save(module: nn.Module, folder: Path) -> None:
    """Raises OSError where safetensors says in a word of its own that the disk is full."""
    from safetensors import SafetensorError

    try:
        module.save_pretrained(folder)  # type: ignore[operator]
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error


def precision(checkpoint: Checkpoint, component: Component) -> torch.dtype:
    """The one of a component's tensors; float32 where there are several, or another."""
    import torch

    kinds = {stated.dtype for stated in checkpoint.weights.stated(component)}
    if kinds == {"F16"}:
        return torch.float16
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32
