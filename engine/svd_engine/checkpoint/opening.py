"""Finds a checkpoint, checks that it is SVD, and loads its networks.  Knows no ONNX and no TensorRT.

A checkpoint is a folder as diffusers saves it, a Hugging Face hub repository of the same layout, a single
file in Stability's own layout, or random weights.  When it is opened its configs are read and its weight
files are chosen; weights are read, and from the hub fetched, when a network is loaded.  Never reads pickles
and never runs code from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from svd_engine.checkpoint.configs import FILES, INDEX, OPTIONAL, Configs, describe, read_configs
from svd_engine.checkpoint.lora import Fused, open_lora
from svd_engine.checkpoint.parts import Assembled, open_part
from svd_engine.checkpoint.random_weights import (
    RandomWeights,
    small_configs,
    sv3d_configs,
    svd_configs,
)
from svd_engine.checkpoint.safetensors_header import Stated, read_header
from svd_engine.checkpoint.single_file import open_single_file
from svd_engine.checkpoint.weight_files import choose, describe_file, identify, present, shard_names, shards
from svd_engine.checkpoint.weights import Shapes, Weights, build, fill, read_tensors
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.shell import quoted
from svd_engine.spec.model import Model
from svd_engine.spec.weights import COMPONENTS, Component, Family, LoraFile, WeightFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Checkpoint", "Component", "open_checkpoint", "random_checkpoint"]

HUB = {
    "svd": "stabilityai/stable-video-diffusion-img2vid",
    "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
    "svd-xt-1-1": "stabilityai/stable-video-diffusion-img2vid-xt-1-1",
}
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "assets" / DEMO  # trained; its README.md is the model card
FAMILIES = get_args(Family)
CONFIGS: Mapping[Family, Callable[[], Configs]] = {
    "svd": lambda: svd_configs(14),
    "svd-xt": lambda: svd_configs(25),
    "sv3d-u": lambda: sv3d_configs(per_frame=False),
    "sv3d-p": lambda: sv3d_configs(per_frame=True),
    "small": small_configs,
}


@dataclass(frozen=True)
class Checkpoint:
    model: Model
    source: str  # as the user named it
    configs: Configs = field(repr=False)
    weights: Weights = field(repr=False)
    variant: str | None = None  # of the weight files, as the user asked for it
    parts: Mapping[Component, str] = field(default_factory=dict)  # from elsewhere, as the user named them
    lora: tuple[LoraFile, ...] = ()  # fused into the UNet

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """diffusers' or transformers' own module: on the CPU, in `dtype`, eval mode, no gradients.

        The same files serve every dtype: those that diffusers reads for this variant.  Each call makes a
        new module.  Raises CheckpointError when weights are missing, damaged or of other shapes.
        """
        module = build(component, self.configs[component])
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return fill(module, self.weights.tensors(component, expected, dtype))

    def weight_files(self, component: Component) -> tuple[WeightFile, ...]:
        """The files that `load` reads, hashed; from the hub they are fetched.  Empty for random weights."""
        return tuple(describe_file(component, file) for file in self.weights.files(component))

    def digest(self) -> str:
        """sha256 over the configs and the names, sizes and contents of the weight files that are read.

        The same for a hub repository and a copy of it in a folder.  For random weights the seed counts, and
        of LoRA the contents and the scales.
        """
        digest = hashlib.sha256(json.dumps(self.configs, sort_keys=True).encode())
        for component in COMPONENTS:
            for piece in self.weights.identity(component):
                digest.update(piece)
        return digest.hexdigest()


def open_checkpoint(
    source: str | Path,
    variant: str | None = None,
    frames: int | None = None,
    parts: Mapping[Component, str | Path] | None = None,
    lora: Mapping[str | Path, float] | None = None,
    lora_partial: bool = False,
) -> Checkpoint:
    """Open "svd", "svd-xt", "svd-xt-1-1", "demo", a diffusers folder, a single file (SV3D too), or a hub id.

    variant: of the weight files, as in diffusers' `from_pretrained`: "fp16" reads the components that
    have such files from them, and the others from those without a variant.  None reads no variant.
    frames: that a single file's model was trained on, 14 or 25; None takes it from the file's name.
    parts: by "unet", "vae" or "image_encoder", a file or folder from which this component comes instead.
    lora: LoRA files, or folders that peft wrote, with a scale each, fused into the UNet as it is loaded.
    lora_partial: leave out keys of these that fit no weight, instead of refusing them.

    "demo" is the built-in checkpoint; a folder of that name is "./demo".  What exists, is absolute,
    begins with ".", "/" or "~", or is a Path, is a folder or a file, never looked up on the hub.  Of a hub
    id, the commit found on opening is loaded.  Raises CheckpointError, SettingsError.
    """
    if lora_partial and not lora:
        raise SettingsError(
            "lora_partial",
            expected="LoRA files, whose keys it is about",
            got="none",
            remedy="Pass lora too, or leave it out.",
        )
    opened = _open(source, variant, frames)
    if parts:
        opened = _with_parts(opened, parts)
    return with_lora(opened, lora, lora_partial) if lora else opened


def _open(source: str | Path, variant: str | None, frames: int | None) -> Checkpoint:
    if isinstance(source, Path):
        source = os.path.join(".", source.expanduser())  # an absolute path stays as it is
    if is_single_file(source):
        return _from_file(source, Path(source).expanduser(), variant, frames)
    if frames is not None:
        raise CheckpointError(
            f"frames of checkpoint {source}",
            expected="None but for a single file",
            got=repr(frames),
            remedy=f"Leave it out: {FILES['unet']} of the checkpoint says it.",
        )
    if source == DEMO:
        return _from_folder(DEMO, DEMO_FOLDER, variant)
    if source in HUB:
        return _from_hub(source, HUB[source], source, variant)
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or source.startswith((".", "/", "~")):
        return _from_folder(source, path, variant)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _from_hub(source, source, source.rpartition("/")[2], variant)
    raise CheckpointError(
        f"checkpoint {source!r}",
        expected=f"{', '.join(HUB)}, {DEMO}, a folder, a single file, or a hub id owner/name",
        got="none of these",
        remedy="Check the spelling; write a folder's path with ./ before it.",
    )


def is_single_file(source: str | Path) -> bool:
    """Whether `open_checkpoint` takes it for a file.  What is named there by a word or a hub id is none."""
    path = Path(source).expanduser()
    return source not in (DEMO, *HUB) and path.exists() and not path.is_dir()


def hides_frames(source: str | Path) -> bool:
    """Whether it is a single file of SVD whose name does not tell the frames that it was trained on.

    Raises CheckpointError for what is no whole safetensors file.
    """
    return is_single_file(source) and open_single_file(Path(source).expanduser()).known_frames() is None


def check_tells_frames(source: str | Path) -> None:
    """Where no call says it: raises SettingsError for a single file that hides what it was trained on."""
    if hides_frames(source):
        raise SettingsError(
            f"checkpoint {source}",
            expected="a file called svd.safetensors (14 frames) or svd_xt.safetensors (25), or a folder",
            got="a name that does not tell the frames",
            remedy="Rename it, or make a folder of it once, with any parts from elsewhere, and pass that. "
            f"Run: svd-export convert {quoted(source)} -o FOLDER --frames FRAMES",
        )


def names_checkpoint(source: str) -> bool:
    """Whether this is a checkpoint's name, file or folder; not so a hub id, which may be any path."""
    return source in (DEMO, *HUB) or is_single_file(source) or (Path(source).expanduser() / INDEX).exists()


def random_checkpoint(family: Family) -> Checkpoint:
    """The real architecture with seeded random weights: right shapes, sizes and speed, no meaning.

    "small" has SVD's blocks at a fraction of the width, 14 frames of 128x192: seconds on a CPU.

    Raises CheckpointError for another family.
    """
    if family not in FAMILIES:
        raise CheckpointError(
            f"random weights for {family!r}",
            expected=f"one of {', '.join(FAMILIES)}",
            got=repr(family),
            remedy="Ask for one of these; svd-xt-1-1 has the architecture of svd-xt.",
        )
    configs = CONFIGS[family]()
    source = f"random:{family}"
    return Checkpoint(
        describe(family, source, configs, random_weights=True), source, configs, RandomWeights()
    )


def _from_folder(source: str, path: Path, variant: str | None) -> Checkpoint:
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {source}",
            expected=f"a folder with {INDEX}, as diffusers saves it, or a single safetensors file",
            got="no such folder and no such file",
            remedy="Pass the folder that diffusers' save_pretrained wrote, or such a file.",
        )
    configs = read_configs(path)
    model = describe(path.resolve().name, source, configs)
    listing = _paths(path)
    weights = FileWeights(
        {part: choose(listing, part, variant, source) for part in COMPONENTS}, lambda _: path
    )
    return Checkpoint(model, source, configs, weights, variant)


def _with_parts(checkpoint: Checkpoint, parts: Mapping[Component, str | Path]) -> Checkpoint:
    _check_mapping("parts", parts, '{"unet": "mine.safetensors"}')
    if unknown := set(parts) - set(COMPONENTS):
        raise CheckpointError(
            "parts",
            expected=f"some of {', '.join(COMPONENTS)}",
            got=", ".join(map(repr, sorted(unknown))),
            remedy="Name the parts by these.",
        )
    model = checkpoint.model
    opened: dict[Component, tuple[Mapping[str, Any], Weights]] = {}
    for component in COMPONENTS:
        if component in parts:
            config = checkpoint.configs[component]
            opened[component] = open_part(component, parts[component], config, model.frames)
    configs = dict(checkpoint.configs) | {part: config for part, (config, _) in opened.items()}
    names = " and ".join(f"{part} of {parts[part]}" for part in opened)
    return replace(
        checkpoint,
        model=describe(model.name, f"{checkpoint.source} with {names}", configs),
        configs=configs,
        weights=Assembled(checkpoint.weights, {part: weights for part, (_, weights) in opened.items()}),
        parts={part: str(parts[part]) for part in opened},
    )


def with_lora(checkpoint: Checkpoint, lora: Mapping[str | Path, float], partial: bool = False) -> Checkpoint:
    """`checkpoint` with LoRA in its UNet; `lora` and `partial` as `open_checkpoint` has them.

    Raises CheckpointError, SettingsError.
    """
    _check_mapping("lora", lora, '{"style.safetensors": 0.8}')
    config = checkpoint.configs["unet"]
    shapes = {name: tuple(tensor.shape) for name, tensor in build("unet", config).state_dict().items()}
    opened = [open_lora(source, scale, shapes, config, partial) for source, scale in lora.items()]
    records = tuple(one.record for one in opened)
    return replace(checkpoint, weights=Fused(checkpoint.weights, opened), lora=records)


def _check_mapping(name: str, value: object, example: str) -> None:
    if not isinstance(value, Mapping):
        raise SettingsError(
            name,
            expected=f"a dict such as {example}",
            got=repr(value),
            remedy="Pass a dict, or leave it out.",
        )


def _from_file(source: str, path: Path, variant: str | None, frames: int | None) -> Checkpoint:
    if variant is not None:
        raise CheckpointError(
            f"variant of checkpoint {source}",
            expected="None for a single file",
            got=repr(variant),
            remedy="Leave the variant out, or pass the file that has it.",
        )
    weights = open_single_file(path)
    configs = weights.configs(weights.frames(frames))
    model = describe(path.stem, source, configs)
    weights.say_not_read()
    return Checkpoint(model, source, configs, weights)


def _from_hub(source: str, repository: str, name: str, variant: str | None) -> Checkpoint:
    folder = _download(repository, [INDEX, *FILES.values(), *OPTIONAL.values()])
    configs = read_configs(folder)
    model = describe(name, repository, configs)
    listing = _listing(repository, folder)
    weights = FileWeights(
        {part: choose(listing, part, variant, repository) for part in COMPONENTS},
        lambda files: _download(repository, files, revision=folder.name),  # the snapshot's commit
    )
    return Checkpoint(model, source, configs, weights, variant)


@dataclass(frozen=True)
class FileWeights:
    """safetensors files of a folder or of a hub repository."""

    chosen: Mapping[Component, str]  # path in the checkpoint: of the one file, or of the index of shards
    fetch: Callable[[list[str]], Path]  # makes these paths present and gives the folder that holds them

    def files(self, component: Component) -> list[Path]:
        chosen = self.chosen[component]
        file = present(self.fetch([chosen]) / chosen)  # not so when the hub went away and the cache lacks it
        if file.suffix != ".json":
            return [file]
        self.fetch([f"{component}/{name}" for name in shard_names(file)])
        return shards(file)

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises CheckpointError for missing, truncated or mismatched weights."""
        files = self.files(component)
        return read_tensors(files[0].parent, files, expected, dtype)

    def stated(self, component: Component) -> list[Stated]:
        return [one for file in self.files(component) for one in read_header(file).values()]

    def identity(self, component: Component) -> Iterator[bytes]:
        return identify(component, self.files(component))


def _paths(folder: Path) -> set[str]:
    """The components' files, as paths in the checkpoint."""
    return {f"{part}/{file.name}" for part in COMPONENTS for file in folder.glob(f"{part}/*")}


def _listing(repository: str, folder: Path) -> Collection[str]:
    """Every file of the snapshot's commit; without the hub, the weight files that are in the cache."""
    from huggingface_hub import list_repo_files

    try:
        return set(list_repo_files(repository, revision=folder.name))
    except Exception as error:  # as in `_download`
        cached = {path for path in _paths(folder) if path.endswith(".safetensors")}
        if not cached:
            remedy = "Check the network and HF_HUB_OFFLINE."
            raise _refused(repository, f"{type(error).__name__}: {error}", remedy) from error
        return _paths(folder)


def _download(repository: str, files: list[str], revision: str | None = None) -> Path:
    """The local snapshot that holds these files, fetched where they are not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        remedy = f"Accept its licence at https://huggingface.co/{repository}, then run: hf auth login"
        raise _refused(repository, "a repository that needs an accepted licence", remedy) from error
    except RepositoryNotFoundError as error:
        remedy = "Check the spelling; if it is private, run: hf auth login"
        raise _refused(repository, "no such repository, or a private one", remedy) from error
    except Exception as error:  # offline, no route, hub down: the classes differ between hub versions
        remedy = "Check the network and HF_HUB_OFFLINE."
        raise _refused(repository, f"{type(error).__name__}: {error}", remedy) from error


def _refused(repository: str, got: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {repository} on the Hugging Face hub",
        expected="an SVD repository that can be downloaded",
        got=got,
        remedy=f"{remedy} A local folder works without the hub.",
    )
