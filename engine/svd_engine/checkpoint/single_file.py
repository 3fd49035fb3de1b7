"""A checkpoint in one safetensors file in Stability's own layout, such as svd.safetensors.

Reads the configs off the shapes of the tensors and hands these over under diffusers' names
(`stability_keys` has the table).  What no shape says, 14 or 25 frames of SVD, is told or is in the file's
name.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_engine.checkpoint.random_weights import (
    SV3D_FRAMES,
    SV3D_SIZE,
    image_decoder,
    sv3d_generation,
    svd_configs,
)
from svd_engine.checkpoint.safetensors_header import Stated, read_header, shown
from svd_engine.checkpoint.stability_keys import (
    CLIP,
    FIRST_STAGE,
    NOT_READ,
    THIRDS,
    UNET,
    Stored,
    prefixes,
    stored,
    vae_decoder_prefix,
    vae_encoder_prefix,
)
from svd_engine.checkpoint.weight_files import PICKLES, identify, present
from svd_engine.checkpoint.weights import FLOAT_CODES, OpenFiles, Shapes, finite, reading
from svd_engine.errors import CheckpointError
from svd_engine.spec.weights import COMPONENTS, Component
from svd_engine.values import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor

notices = logging.getLogger("svd_engine.notices")

HEAD_CHANNELS = 64  # per head of the UNet's attention: num_head_channels in svd.yaml
CLIP_HEAD_CHANNELS = 80  # of open_clip's ViT-H/14
MAX_SIDE, MAX_LEVELS, MAX_LAYERS = 65536, 6, 128  # beyond them a header is damaged, not a network
PICKLED = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's, now and before 1.6; no header is so long
SV3D = (256, 1280)  # channels of the conditioning of SV3D_u and SV3D_p; SVD has 768
FILE_NAMES = re.compile(  # what Stability, and those who halve or rename its files, call them
    r"(?:stable[-_]video[-_]diffusion[-_]img2vid|svd)(?P<xt>[-_]?xt)?(?:[-_.]1[-_.][01])?"
    r"(?:[-_.](?:fp16|fp32|bf16|half|pruned|image[-_]decoder))*",
    re.IGNORECASE,
)


def frames_by_name(file: Path) -> int | None:
    """14 or 25, which a file that is called as Stability calls it was trained on; None for another name."""
    found = FILE_NAMES.fullmatch(file.name.removesuffix(".safetensors"))
    return (25 if found["xt"] else 14) if found else None


def open_single_file(file: Path) -> SingleFile:
    """Reads the header.  Raises CheckpointError for pickles and for what is not a whole safetensors file."""
    return SingleFile(file, read_keys(file, held='["state_dict"]', converted="svd.safetensors"))


def read_keys(file: Path, *, held: str, converted: str) -> Mapping[str, Stated]:
    """What the header of a file from anywhere says of its tensors.

    held, converted: of a pickle, where in it the tensors are, and a name for the file to make of it.
    Raises CheckpointError for pickles and for what is not a whole safetensors file.
    """
    begins = _first_bytes(file)
    if file.suffix in PICKLES or begins in PICKLED:
        raise CheckpointError(
            str(file),
            expected="a safetensors file",
            got="a pickle, which can run code when read",
            remedy="Convert it where you trust it, in Python: safetensors.torch.save_file("
            f'torch.load(open(FILE, "rb"), weights_only=True){held}, "{converted}").',
        )
    return read_header(file)


def _first_bytes(file: Path) -> bytes:
    try:
        if not file.is_file():  # a pipe, which would keep its reader waiting, or a device
            raise OSError("no regular file")
        with file.open("rb") as stream:
            return stream.read(4)
    except OSError as error:
        raise CheckpointError(
            str(file),
            expected="a file that can be read",
            got=str(error),
            remedy="Check the path and the permissions.",
        ) from error


@dataclass(frozen=True)
class SingleFile:
    """The weights of a file, and what its header says of them."""

    file: Path
    header: Mapping[str, Stated] = field(repr=False)

    @property
    def is_sv3d(self) -> bool:
        stated = self.header.get(f"{UNET}label_emb.0.0.weight")
        return stated is not None and stated.shape[1:] in [(width,) for width in SV3D]

    def known_frames(self) -> int | None:
        """How many frames the model was trained on, by its family or the file's name; None if none says."""
        return SV3D_FRAMES if self.is_sv3d else frames_by_name(self.file)

    def frames(self, told: int | None) -> int:
        """How many frames the model was trained on: as told, else as known.

        Raises CheckpointError that asks when neither says it, SettingsError for what is no such number.
        """
        if told is not None:
            return at_least("frames", told, 1)
        frames = self.known_frames()
        if frames is None:
            raise CheckpointError(
                f"frames of {self.file}",
                expected="a number, or a file called svd.safetensors (14 frames) or svd_xt.safetensors (25)",
                got=f"the name {self.file.name}, and weights that are the same for both",
                remedy="Use frames=14 or frames=25, as it was trained, or give the file its own name back.",
            )
        return frames

    def configs(self, frames: int) -> dict[str, dict[str, Any]]:
        """Of all parts, as a diffusers folder would have them.

        Raises CheckpointError for another family, and for tensors from whose shapes no network can be made.
        """
        self._check_family()
        configs = svd_configs(frames)
        configs |= {"unet": self._unet(frames), "vae": self._vae(), "image_encoder": self._image_encoder()}
        side = configs["image_encoder"]["image_size"]
        configs["feature_extractor"] |= {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        }
        return configs | ({"generation": sv3d_generation()} if self.is_sv3d else {})

    def config(self, component: Component, frames: int) -> Mapping[str, Any]:
        """Of one part; the file need not hold the others.  Raises what `configs` raises."""
        if component == "unet":
            return self._unet(frames)
        return self._vae() if component == "vae" else self._image_encoder()

    def say_not_read(self) -> None:
        """What is left in the file, as a line for whoever watches."""
        _say_left(self.file, self.not_read())

    def not_read(self) -> dict[str, int]:
        """How many tensors belong to no part that is loaded, by what they are."""
        read = tuple(prefix for part in COMPONENTS for prefix in prefixes(part, self.header))
        left = [key for key in self.header if not key.startswith(read)]
        return dict(Counter(_group(key) for key in left))

    def stored(self, component: Component, names: Collection[str]) -> dict[str, Stored]:
        """Where the tensors that diffusers calls `names` lie."""
        config = self.config(component, 1)
        return {name: stored(component, name, config, self.header) for name in names}

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises CheckpointError for missing or misshapen tensors, and for values that are not finite."""
        places = self.stored(component, expected)
        found = [self._problem(place, expected[name]) for name, place in places.items()]
        problems = list(dict.fromkeys(filter(None, found)))  # query, key and value lie in one tensor
        if problems:
            others = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{component} in {self.file}",
                expected=f"the {len(expected)} floating-point tensors of its architecture",
                got="; ".join(problems[:5]) + others,
                remedy="Pass a whole SVD checkpoint, not quantised; download it again if it is damaged.",
            )
        used = {place.key for place in places.values()}
        own = prefixes(component, self.header)
        more = [key for key in self.header if key.startswith(own) and key not in used]
        _say_left(self.file, Counter(map(shown, more)))
        with reading() as files:
            return {name: self._read(files, places[name], shape, dtype) for name, shape in expected.items()}

    def files(self, _component: Component) -> list[Path]:
        return [present(self.file)]

    def stated(self, component: Component) -> list[Stated]:
        begin = prefixes(component, self.header)
        return [one for key, one in self.header.items() if key.startswith(begin)]

    def identity(self, component: Component) -> Iterator[bytes]:
        return identify(component, self.files(component))

    def _problem(self, place: Stored, expected: tuple[int, ...]) -> str:
        if place.form == "identity":
            return ""
        stated, shape = self.header.get(place.key), list(place.shape(expected))
        if stated is None:
            return f"no {place.key} {shape}"
        if list(stated.shape) != shape:
            return f"{place.key} {list(stated.shape)} instead of {shape}"
        return "" if stated.dtype in FLOAT_CODES else f"{place.key} in {stated.dtype}"

    def _read(self, files: OpenFiles, place: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor in memory of its own, as the module has it."""
        import torch

        if place.form == "identity":  # weight [c, c, 1, 1] of a quant_conv or post_quant_conv, or its bias
            return (
                torch.eye(shape[0], dtype=dtype).view(shape)
                if len(shape) > 1
                else torch.zeros(shape, dtype=dtype)
            )
        if place.form in THIRDS:
            start = THIRDS[place.form] * shape[0]
            read = files.count(files.handle(self.file).get_slice(place.key)[start : start + shape[0]])
        else:
            read = files.count(files.handle(self.file).get_tensor(place.key))
        if place.form == "transposed":
            read = read.t()
        own = read.reshape(shape).to(dtype, copy=True, memory_format=torch.contiguous_format)
        return finite(self.file, place.key, own)

    # The architecture, read off the shapes

    def _check_family(self) -> None:
        decoder = f"{vae_decoder_prefix(self.header)}decoder."
        parts = (("unet", UNET), ("vae", decoder), ("image_encoder", CLIP))
        missing = [part for part, prefix in parts if not self._has(prefix)]
        if missing:
            held = sorted({shown(key.partition(".")[0]) for key in self.header})
            raise CheckpointError(
                str(self.file),
                expected=f"Stability's own layout: keys that begin with {UNET}, {FIRST_STAGE} and {CLIP}",
                got=f"no {' and no '.join(missing)}; keys begin with {', '.join(held[:5]) or 'nothing'}",
                remedy="Pass a whole SVD checkpoint: one file, or a diffusers folder.",
            )

    def _unet(self, frames: int) -> dict[str, Any]:
        blocks = self._count(f"{UNET}input_blocks.", MAX_LEVELS * MAX_LAYERS)
        samplers = [n for n in range(blocks) if f"{UNET}input_blocks.{n}.0.op.weight" in self.header]
        entries = samplers[0] if samplers else blocks
        levels = max(1, blocks // entries)
        if not 2 <= entries <= MAX_LAYERS or levels > MAX_LEVELS or levels * entries != blocks:
            raise self._no_network("unet", f"{blocks} input blocks, {entries} to a level")
        down = [1 + level * entries for level in range(levels)]
        widths = [self._side(f"{UNET}input_blocks.{n}.0.out_layers.3.weight", 0) for n in down]
        if any(width % HEAD_CHANNELS for width in widths):
            raise self._no_network("unet", f"levels of {widths} channels, heads of {HEAD_CHANNELS}")
        up = [level * entries for level in range(levels)]
        middle = f"{UNET}middle_block.1.transformer_blocks."
        size = {"sample_size": SV3D_SIZE} if self.is_sv3d else {}
        return (
            svd_configs(frames)["unet"]
            | size
            | {
                "in_channels": self._side(f"{UNET}input_blocks.0.0.weight", 1),
                "out_channels": self._side(f"{UNET}out.2.weight", 0),
                "block_out_channels": widths,
                "num_attention_heads": [width // HEAD_CHANNELS for width in widths],
                "down_block_types": [self._block("Down", f"input_blocks.{n}") for n in down],
                "up_block_types": [self._block("Up", f"output_blocks.{n}") for n in up],
                "layers_per_block": entries - 1,
                "transformer_layers_per_block": self._count(middle, MAX_LAYERS),
                "cross_attention_dim": self._side(f"{middle}0.attn2.to_k.weight", 1),
                "projection_class_embeddings_input_dim": self._side(f"{UNET}label_emb.0.0.weight", 1),
            }
        )

    def _vae(self) -> dict[str, Any]:
        """Temporal, or with a decoder that takes each frame as an image."""
        encoder = f"{vae_encoder_prefix(self.header)}encoder."
        decoder = f"{vae_decoder_prefix(self.header)}decoder."
        levels = self._count(f"{encoder}down.", MAX_LEVELS)
        widths = [self._side(f"{encoder}down.{n}.block.0.conv2.weight", 0) for n in range(levels)]
        temporal = self._has(f"{decoder}mid.block_1.mix_factor")
        return (
            svd_configs(1)["vae"]
            | ({} if temporal else image_decoder(levels))
            | {
                "latent_channels": self._side(f"{decoder}conv_in.weight", 1),
                "block_out_channels": widths,
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "layers_per_block": self._count(f"{encoder}down.0.block.", MAX_LAYERS),
            }
        )

    def _image_encoder(self) -> dict[str, Any]:
        width, patch = self._side(f"{CLIP}class_embedding", 0), self._side(f"{CLIP}conv1.weight", 2)
        positions = self._side(f"{CLIP}positional_embedding", 0)
        if width % CLIP_HEAD_CHANNELS or isqrt(positions - 1) ** 2 != positions - 1:
            raise self._no_network(
                "image_encoder", f"{width} channels, heads of {CLIP_HEAD_CHANNELS}, {positions} positions"
            )
        return svd_configs(1)["image_encoder"] | {
            "hidden_size": width,
            "num_attention_heads": width // CLIP_HEAD_CHANNELS,
            "intermediate_size": self._side(f"{CLIP}transformer.resblocks.0.mlp.c_fc.weight", 0),
            "num_hidden_layers": self._count(f"{CLIP}transformer.resblocks.", MAX_LAYERS),
            "patch_size": patch,
            "image_size": isqrt(positions - 1) * patch,
            "projection_dim": self._side(f"{CLIP}proj", 1),
        }

    def _block(self, side: str, first: str) -> str:
        """The class of a level, by whether there is attention behind its `first` resnet."""
        attends = self._has(f"{UNET}{first}.1.transformer_blocks.")
        return f"{'CrossAttn' if attends else ''}{side}BlockSpatioTemporal"

    def _has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.header)

    def _count(self, prefix: str, most: int) -> int:
        """Of the modules numbered from 0 whose keys begin with `prefix`."""
        numbers = {
            key.removeprefix(prefix).partition(".")[0] for key in self.header if key.startswith(prefix)
        }
        if not 1 <= len(numbers) <= most or numbers != {str(n) for n in range(len(numbers))}:
            raise CheckpointError(
                f"{prefix}N in {self.file}",
                expected=f"1 to {most} modules numbered from 0",
                got=", ".join(map(shown, sorted(numbers)[:5])) or "none",
                remedy="Pass a whole SVD checkpoint; download it again if it is damaged.",
            )
        return len(numbers)

    def _side(self, key: str, dimension: int) -> int:
        """The length of a tensor along one of its dimensions."""
        stated = self.header.get(key)
        shape = stated.shape if stated else ()
        if len(shape) <= dimension or not 1 <= shape[dimension] <= MAX_SIDE:
            raise CheckpointError(
                f"{key} in {self.file}",
                expected=f"a tensor with 1 to {MAX_SIDE} values along dimension {dimension}",
                got=f"shape {list(shape)}" if stated else "no such tensor",
                remedy="Pass a whole SVD checkpoint; download it again if it is damaged.",
            )
        return shape[dimension]

    def _no_network(self, component: Component, got: str) -> CheckpointError:
        return CheckpointError(
            f"shapes of the {component} in {self.file}",
            expected="those of an SVD network",
            got=got,
            remedy="Pass an unmodified SVD checkpoint.",
        )


def _say_left(file: Path, left: Mapping[str, int]) -> None:
    if left:
        some = ", ".join(f"{what} ({count})" for what, count in list(left.items())[:5])
        notices.info(
            "%s: %d tensors are not read: %s%s", file, sum(left.values()), some, ", ..." * (len(left) > 5)
        )


def _group(key: str) -> str:
    """What a tensor that is not read is, or the first word of its key."""
    known = (what for prefix, what in NOT_READ.items() if key.startswith(prefix))
    return next(known, shown(key.partition(".")[0]))
