"""LoRA files: low-rank updates of a UNet's weights, fused into these as they are loaded.

W' = W + scale (alpha / rank) up @ down, for linear layers and convolutions (Hu et al. 2021, section 4.1).
Three styles of keys are read: diffusers' and peft's, by the names of diffusers' modules, and kohya's, which
ComfyUI shares, by those or by Stability's names, dots replaced.  What alpha means in each:

* kohya: a tensor `.alpha` beside the two matrices; without one, the rank.
* peft: `lora_alpha` of adapter_config.json beside adapter_model.safetensors; `use_rslora` divides by the root
  of the rank instead.
* diffusers: the same words in the file's metadata; without them, the rank.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svd_engine.checkpoint.configs import read_json
from svd_engine.checkpoint.safetensors_header import Stated, shown
from svd_engine.checkpoint.single_file import read_keys
from svd_engine.checkpoint.stability_keys import unet_key
from svd_engine.checkpoint.weight_files import describe_file, present
from svd_engine.checkpoint.weights import FLOAT_CODES, OpenFiles, Shapes, Weights, finite, reading
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.spec.weights import Component, LoraFile
from svd_engine.values import as_path
from svd_engine.values import finite as finite_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the file's metadata, as JSON, keys under "unet."
Half = Literal["down", "up", "alpha"]
HALVES: Mapping[str, Half] = {  # what the keys of a layer end in
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")  # diffusers before 0.24
DIFFUSERS_PREFIXES = ("", "unet.", "base_model.model.", "base_model.model.unet.")
STABILITY_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")
KOHYA_PREFIX = "lora_unet_"
LONGEST_NAME = 500  # of a layer, with what files put before and behind it


@dataclass(frozen=True)
class Update:
    """Of one weight: keys of its two matrices, and alpha over the rank."""

    down: str  # [rank, in, ...]
    up: str  # [out, rank, 1 ...]
    factor: float


@dataclass(frozen=True)
class Lora:
    """What one file changes."""

    file: Path
    record: LoraFile
    updates: Mapping[str, Update] = field(repr=False)  # by diffusers' name of the weight

    def delta(self, files: OpenFiles, name: str, shape: Sequence[int]) -> Tensor:
        """What is added to the weight `name`, float32.  Raises CheckpointError for NaN and infinity."""
        import torch

        update = self.updates[name]
        down, up = (files.tensor(self.file, key, torch.float32) for key in (update.down, update.up))
        product = up.flatten(1) @ down.flatten(1)  # [out, rank] [rank, in * kernel]
        return (self.record.scale * update.factor * product).reshape(tuple(shape))


@dataclass(frozen=True)
class Fused:
    """The weights of a checkpoint with LoRA in its UNet."""

    base: Weights
    loras: Sequence[Lora]

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Adds in float32 to each weight in `dtype`, and rounds the sum of all once."""
        tensors = self.base.tensors(component, expected, dtype)
        if component == "unet":
            self._check_unchanged()
            with reading() as files:
                for name in dict.fromkeys(name for lora in self.loras for name in lora.updates):
                    changing = [lora for lora in self.loras if name in lora.updates]
                    fused = tensors[name].float()
                    for lora in changing:
                        fused += lora.delta(files, name, expected[name])
                    tensors[name] = finite(changing[-1].file, name, fused.to(dtype))
        return tensors

    def files(self, component: Component) -> list[Path]:
        return self.base.files(component)

    def stated(self, component: Component) -> list[Stated]:
        return self.base.stated(component)

    def identity(self, component: Component) -> Iterator[bytes]:
        yield from self.base.identity(component)
        if component == "unet":
            for lora in self.loras:
                yield f"\0lora {lora.record.sha256} {lora.record.scale!r}".encode()

    def _check_unchanged(self) -> None:
        for lora in self.loras:
            if describe_file("unet", present(lora.file)).sha256 != lora.record.sha256:
                raise CheckpointError(
                    f"LoRA {lora.file}",
                    expected="the file that was there when the checkpoint was opened",
                    got="other content",
                    remedy="Leave it as it is while it is read, and open the checkpoint again.",
                )


def open_lora(
    source: str | Path, scale: float, shapes: Shapes, config: Mapping[str, Any], partial: bool
) -> Lora:
    """Matches a file, or the folder that peft wrote, with the weights of a UNet of these `shapes`.

    config: of the UNet, as diffusers writes it.  partial: whether keys that fit no weight are left.
    Raises CheckpointError that names the first such keys else, and for what is no LoRA of this UNet;
    SettingsError for a scale that is no finite number.
    """
    scale = finite_number(f"scale of LoRA {source}", scale)
    file = lora_file(source)
    header = read_keys(file, held="", converted="lora.safetensors")
    names = _weight_names(shapes, config)
    matched = {module: keys for module, keys in _layers(header).items() if module in names}
    used = {key for keys in matched.values() for key in keys.values()}
    left = sorted(header.keys() - used)
    if not matched or (left and not partial):
        raise _unmatched(file, left, len(header), nothing_fits=not matched)
    alphas = _alphas(file, header)
    _check_alphas(file, alphas, [names[module] for module in matched])
    updates: dict[str, Update] = {}
    with reading() as files:
        for module, keys in matched.items():
            name = names[module]
            if name in updates:
                raise _misfit(file, f"two updates of {name}", "one update for each weight")
            _check_matrices(file, header, keys, name, shapes[name])
            own = _own_alpha(files, file, header, keys)
            rank = header[keys["down"]].shape[0]
            factor = _factor(alphas, name, rank) if own is None else own / rank
            updates[name] = Update(keys["down"], keys["up"], factor)
    whole = describe_file("unet", file)
    record = LoraFile(
        file=str(source), scale=scale, bytes=whole.bytes, sha256=whole.sha256, fused=len(updates),
        left=len(left),
    )  # fmt: skip
    return Lora(file, record, updates)


def lora_file(source: str | Path) -> Path:
    """The file of a LoRA: `source` itself, or that in a folder which peft wrote.  Raises CheckpointError."""
    path = as_path("lora", source).expanduser()
    file = path / PEFT_FILE if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(
            f"LoRA {path}",
            expected=f"a safetensors file, or a folder with {PEFT_FILE}, as peft saves it",
            got="no such file",
            remedy="Check the path.",
        )
    return file


def _layers(header: Collection[str]) -> dict[str, dict[Half, str]]:
    """The keys of each layer by what they are; a layer that has others too is left out as a whole."""
    layers: dict[str, dict[Half, str]] = defaultdict(dict)
    unknown: set[str] = set()  # beginnings of other keys
    for key in header:
        if found := PROCESSOR.fullmatch(key):
            half: Half = "down" if found[3] == "down" else "up"
            layers[f"{found[1]}.{found[2]}{'.0' if found[2] == 'to_out' else ''}"][half] = key
            continue
        ending = next((end for end in HALVES if key.endswith(end)), None)
        if ending:
            layers[key.removesuffix(ending)][HALVES[ending]] = key
        elif len(key) <= LONGEST_NAME:
            unknown |= {key[: dot.start()] for dot in re.finditer(r"\.", key)}
    # such as lora_mid.weight, dora_scale, lora_magnitude_vector: without them the others mean another thing
    return {module: keys for module, keys in layers.items() if module not in unknown}


def _weight_names(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of every weight, by each name that a file may have for its module."""
    names: dict[str, str] = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith(".weight"):
            continue
        ours = name.removesuffix(".weight")
        stability = unet_key(name, config).removesuffix(".weight")
        for prefixes, module in ((DIFFUSERS_PREFIXES, ours), (STABILITY_PREFIXES, stability)):
            names |= {f"{prefix}{module}": name for prefix in prefixes}
            names[KOHYA_PREFIX + module.replace(".", "_")] = name
    return names


def _check_matrices(
    file: Path, header: Mapping[str, Stated], keys: Mapping[Half, str], name: str, shape: Sequence[int]
) -> None:
    """Raises CheckpointError where a matrix is missing, or does not fit the other or the weight."""
    if "down" not in keys or "up" not in keys:
        raise _misfit(file, f"only {', '.join(map(shown, keys.values()))}", f"both matrices of {name}")
    down, up = header[keys["down"]].shape, header[keys["up"]].shape
    rank = down[0] if down else 0
    fits = (
        rank >= 1
        and min(len(down), len(up)) >= 2
        and up[:2] == (shape[0], rank)
        and prod(up[2:]) == 1
        and _without_ones(down[1:]) == _without_ones(shape[1:])
    )
    if not fits:
        got = f"{shown(keys['down'])} {list(down)} and {shown(keys['up'])} {list(up)}"
        kernel = "".join(f", {side}" for side in shape[1:])
        raise _misfit(file, got, f"[rank{kernel}] and [{shape[0]}, rank] for {name}")
    for key in keys.values():
        if header[key].dtype not in FLOAT_CODES:
            raise _misfit(file, f"{shown(key)} in {header[key].dtype}", "floating-point tensors")


def _without_ones(shape: Sequence[int]) -> list[int]:
    """Of a layer's input channels and kernel: linear layers are also written as 1x1 convolutions."""
    return [shape[0], *(side for side in shape[1:] if side != 1)]


def _own_alpha(
    files: OpenFiles, file: Path, header: Mapping[str, Stated], keys: Mapping[Half, str]
) -> float | None:
    """The tensor beside a layer's matrices, as kohya writes it."""
    import torch

    if "alpha" not in keys:
        return None
    if prod(header[keys["alpha"]].shape) != 1:
        raise _misfit(file, f"{shown(keys['alpha'])} {list(header[keys['alpha']].shape)}", "one number")
    return float(files.tensor(file, keys["alpha"], torch.float32))


def _factor(alphas: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, as peft's config means it; 1 without one."""
    if "lora_alpha" not in alphas:
        return 1.0
    own = [value for pattern, value in _patterns(alphas).items() if _fits(pattern, name)]
    alpha = float(own[0] if own else alphas["lora_alpha"])
    return alpha / (sqrt(rank) if alphas.get("use_rslora") is True else rank)


def _alphas(file: Path, header: Collection[str]) -> Mapping[str, Any]:
    """peft's config of a LoRA, from beside the file or, as diffusers saves it, from the file's metadata."""
    if file.name == PEFT_FILE and any(".lora_A." in key for key in header):
        return read_json(file.with_name(PEFT_CONFIG))
    with reading() as files:
        text = (files.handle(file).metadata() or {}).get(DIFFUSERS_CONFIG, "{}")
    try:
        return {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise _misfit(file, f"{DIFFUSERS_CONFIG} of another form", "a JSON object there") from error


def _check_alphas(file: Path, alphas: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises CheckpointError for values that are no numbers, and for patterns that are no names of layers."""
    patterns = _patterns(alphas)
    for value in (alphas.get("lora_alpha", 1), *patterns.values()):
        try:
            finite_number("lora_alpha", value)
        except SettingsError as error:
            raise _misfit(file, f"lora_alpha {value!r:.100}", "a finite number") from error
    if strange := [one for one in patterns if not any(_fits(one, name) for name in names)]:
        raise _misfit(file, f"alpha_pattern {shown(strange[0])}", "names of its layers there")


def _patterns(alphas: Mapping[str, Any]) -> Mapping[str, Any]:
    patterns = alphas.get("alpha_pattern")
    return patterns if isinstance(patterns, dict) else {}


def _fits(pattern: str, name: str) -> bool:
    """Whether a module's name, or the end of it, is that of the layer whose weight is `name`."""
    return f".{name}".endswith(f".{pattern}.weight")


def _unmatched(file: Path, left: Sequence[str], total: int, nothing_fits: bool) -> CheckpointError:
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    remedy = (
        "Pass a LoRA that was trained on SVD."
        if nothing_fits
        else "Pass a LoRA that was trained on SVD, or use lora_partial=True to leave these keys out."
    )
    return CheckpointError(
        f"LoRA {file}",
        expected="keys of layers of this UNet, as diffusers, peft, kohya or ComfyUI write them",
        got=f"{len(left)} of {total} that fit none: {', '.join(map(shown, left[:5])) or 'no key'}{more}",
        remedy=remedy,
    )


def _misfit(file: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"LoRA {file}",
        expected=expected,
        got=got,
        remedy="Pass a LoRA of this architecture; download it again if it is damaged.",
    )
