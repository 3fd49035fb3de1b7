"""Finds a checkpoint, checks that it is SVD, and loads its networks.  Knows no ONNX and no TensorRT.

A checkpoint is a folder as diffusers saves it, a Hugging Face hub repository of the same layout, or
random weights.  Its configs are read when it is opened; weights are read, and from the hub fetched,
when a network is loaded.  Never reads pickles and never runs code from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from svd_engine.checkpoint_configs import FILES, INDEX, OPTIONAL, Configs, describe, read_configs
from svd_engine.errors import CheckpointError
from svd_engine.model import Model
from svd_engine.random_weights import Family, RandomWeights, small_configs, svd_configs
from svd_engine.weights import Component, FolderWeights, Shapes, Weights, build, fill, names, variants

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
DEMO_FOLDER = Path(__file__).parent / "assets" / DEMO  # trained; its README.md is the model card
FAMILIES = get_args(Family)


@dataclass(frozen=True)
class Checkpoint:
    model: Model
    source: str  # as the user named it
    configs: Configs = field(repr=False)
    weights: Weights = field(repr=False)

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """diffusers' or transformers' own module: on the CPU, in `dtype`, eval mode, no gradients.

        float16 prefers the files of the fp16 variant, float32 and bfloat16 the full ones; where there
        is only one kind it serves every dtype.  Each call makes a new module.
        Raises CheckpointError when weights are missing, pickled, damaged or of other shapes.
        """
        module = build(component, self.configs[component])
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return fill(module, self.weights.tensors(component, expected, dtype))

    def digest(self) -> str:
        """sha256 over the configs and what identifies the weights; reads every weight file of a folder.

        For a folder these are the contents of the files, for the hub the repository and its commit,
        for random weights the seed.
        """
        digest = hashlib.sha256(json.dumps(self.configs, sort_keys=True).encode())
        for piece in self.weights.identity():
            digest.update(piece)
        return digest.hexdigest()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens "svd", "svd-xt", "svd-xt-1-1", "demo", a diffusers folder, or a hub id "owner/name".

    Tried in this order: a folder called "demo" is "./demo".  What exists, is absolute, begins with ".",
    "/" or "~", or is a Path, is a folder and never goes to the hub.  The commit found on opening is the one
    that is loaded.
    Raises CheckpointError that says what to do.
    """
    if isinstance(source, Path):
        source = os.path.join(".", source.expanduser())  # an absolute path stays as it is
    if source == DEMO:
        return _from_folder(DEMO, DEMO_FOLDER)
    if source in HUB:
        return _from_hub(source, HUB[source], name=source)
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or source.startswith((".", "/", "~")):
        return _from_folder(source, path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _from_hub(source, source, name=source.rpartition("/")[2])
    raise CheckpointError(
        f"checkpoint {source!r}",
        expected=f"{', '.join(HUB)}, {DEMO}, a folder, or a hub id owner/name",
        got="none of these",
        remedy="Check the spelling; write a folder's path with ./ before it.",
    )


def random_checkpoint(family: Family) -> Checkpoint:
    """The real architecture with seeded random weights: right shapes, sizes and speed, no meaning.

    "small" has SVD's blocks at a fraction of the width, 14 frames of 128x192: seconds on a CPU.

    Raises CheckpointError for another family.
    """
    if family not in FAMILIES:
        raise CheckpointError(
            f"random weights for {family!r}",
            expected=" or ".join(FAMILIES),
            got=repr(family),
            remedy="Ask for one of these; svd-xt-1-1 has the architecture of svd-xt.",
        )
    configs = small_configs() if family == "small" else svd_configs(14 if family == "svd" else 25)
    source = f"random:{family}"
    return Checkpoint(
        describe(family, source, configs, random_weights=True), source, configs, RandomWeights()
    )


def _from_folder(source: str, path: Path) -> Checkpoint:
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {source}",
            expected=f"a folder with {INDEX}, as diffusers saves it",
            got="a single file" if path.exists() else "no such folder",
            remedy="Pass the folder; convert a single file with diffusers: "
            "StableVideoDiffusionPipeline.from_single_file(...).save_pretrained(folder).",
        )
    configs = read_configs(path)
    return Checkpoint(describe(path.resolve().name, source, configs), source, configs, FolderWeights(path))


def _from_hub(source: str, repository: str, name: str) -> Checkpoint:
    folder = _download(repository, [INDEX, *FILES.values(), *OPTIONAL.values()])
    configs = read_configs(folder)
    weights = _HubWeights(repository, commit=folder.name)
    return Checkpoint(describe(name, repository, configs), source, configs, weights)


@dataclass(frozen=True)
class _HubWeights:
    """Fetches one component's files on loading it, of the variant that the dtype prefers, else the other."""

    repository: str
    commit: str  # the name of a snapshot's folder

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        for variant in variants(dtype):
            single, index = names(component, variant)
            shards = single.replace(".safetensors", "-*-of-*.safetensors")
            patterns = [f"{component}/{name}" for name in (single, index, shards)]
            folder = _download(self.repository, patterns, self.commit)
            if any((folder / component / name).is_file() for name in (single, index)):
                break
        return FolderWeights(folder).tensors(component, expected, dtype)

    def identity(self) -> Iterator[bytes]:
        yield f"{self.repository}@{self.commit}".encode()


def _download(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local snapshot that holds the files that match, fetched where they are not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
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
