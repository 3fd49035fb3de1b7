"""Parts of a checkpoint from elsewhere: a fine-tuned UNet, another VAE, over the rest of a checkpoint.

A part is a file, in diffusers' names or in Stability's, or a folder: a component's own with its config, or a
whole diffusers checkpoint of which that component is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_engine.checkpoint.configs import INDEX, read_json
from svd_engine.checkpoint.safetensors_header import Stated, read_header
from svd_engine.checkpoint.single_file import open_single_file
from svd_engine.checkpoint.stability_keys import prefixes
from svd_engine.checkpoint.sv3d_port import unet_config
from svd_engine.checkpoint.weight_files import choose, identify, present, shards
from svd_engine.checkpoint.weights import Shapes, Weights, read_tensors
from svd_engine.errors import CheckpointError
from svd_engine.spec.weights import Component
from svd_engine.values import as_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Config = Mapping[str, Any]


def open_part(
    component: Component, source: str | Path, replaced: Config, frames: int
) -> tuple[Config, Weights]:
    """The config and the weights of a part.

    replaced: the config of the component whose place it takes, which holds for a file in diffusers' names.
    frames: of the checkpoint.  Raises CheckpointError for what is no such part.
    """
    path = as_path(component, source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{component} from {source}",
            expected="a safetensors file, or a folder",
            got="no such file",
            remedy="Check the path.",
        )
    if not path.is_dir():
        single = open_single_file(path)
        if any(key.startswith(prefixes(component, single.header)) for key in single.header):
            return single.config(component, frames), single
        return replaced, PartFiles(path, (path,))
    folder = path / component if (path / INDEX).exists() else path
    listing = {f"{component}/{file.name}" for file in folder.iterdir()}
    chosen = folder / Path(choose(listing, component, None, str(folder))).name
    files = shards(chosen) if chosen.suffix == ".json" else [chosen]
    config = unet_config(read_json(folder / "config.json"))
    return config, PartFiles(folder, tuple(files))


@dataclass(frozen=True)
class PartFiles:
    """One component's weights in diffusers' or transformers' names."""

    where: Path
    paths: Sequence[Path]

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises CheckpointError for missing, misshapen or damaged weights."""
        return read_tensors(self.where, self.files(component), expected, dtype)

    def files(self, _component: Component) -> list[Path]:
        return [present(path) for path in self.paths]

    def stated(self, component: Component) -> list[Stated]:
        return [one for path in self.files(component) for one in read_header(path).values()]

    def identity(self, component: Component) -> Iterator[bytes]:
        return identify(component, self.files(component))


@dataclass(frozen=True)
class Assembled:
    """The weights of a checkpoint, some of its components replaced."""

    base: Weights
    parts: Mapping[Component, Weights]

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._of(component).tensors(component, expected, dtype)

    def files(self, component: Component) -> list[Path]:
        return self._of(component).files(component)

    def stated(self, component: Component) -> list[Stated]:
        return self._of(component).stated(component)

    def identity(self, component: Component) -> Iterator[bytes]:
        return self._of(component).identity(component)

    def _of(self, component: Component) -> Weights:
        return self.parts.get(component, self.base)
