"""A network's weights: from safetensors files into diffusers' or transformers' own module, on the CPU.

Knows tensor names and shapes.  Knows nothing of where a file came from (`weight_files` chooses it), of
the hub, or of what the networks compute.  The module is built without memory (torch's meta device) and
takes its tensors one at a time, already in their dtype, so that loading needs little more than the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svd_engine.checkpoint.safetensors_header import Stated, read_header
from svd_engine.errors import CheckpointError
from svd_engine.spec.weights import Component

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

# A buffer that transformers before 4.31 saved with CLIP; the module makes it itself.
HARMLESS = {"vision_model.embeddings.position_ids"}
KEPT_BYTES = 2**28  # of what was read, while a file stays open
FLOAT_CODES = {"F16", "BF16", "F32", "F64"}


class Weights(Protocol):
    """Where the tensors of a checkpoint come from."""

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        """Exactly the tensors that `expected` names, in `dtype`, each in memory of its own."""
        ...

    def files(self, component: Component) -> list[Path]:
        """The files that `tensors` reads; none where the tensors are made."""
        ...

    def stated(self, component: Component) -> list[Stated]:
        """What the files' headers say of the component's tensors."""
        ...

    def identity(self, component: Component) -> Iterator[bytes]:
        """Bytes that differ whenever the component's weights do."""
        ...


def build(component: Component, config: Mapping[str, Any]) -> nn.Module:
    """The component's module on torch's meta device: shapes without memory.

    Raises CheckpointError when the class cannot be made from the config.
    """
    import torch

    try:
        with torch.device("meta"):
            if component == "image_encoder":
                from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

                module = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(config)))
            elif component == "vae":
                from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

                image_decoder = config.get("_class_name") == AutoencoderKL.__name__
                kind = AutoencoderKL if image_decoder else AutoencoderKLTemporalDecoder
                module = kind.from_config(dict(config))
            else:
                from diffusers import UNetSpatioTemporalConditionModel

                module = UNetSpatioTemporalConditionModel.from_config(dict(config))
    except Exception as error:  # whatever third-party constructors raise over a value they cannot take
        raise CheckpointError(
            f"config.json of the {component}",
            expected="values from which its class can be made",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            remedy="Pass an unmodified SVD checkpoint.",
        ) from error
    built: nn.Module = module
    return built


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Puts the tensors into a module from `build`; eval mode, no gradients.

    Raises CheckpointError when something is left without a value, which a library version that this
    project was not tested with can cause.
    """
    import torch

    module.load_state_dict(dict(tensors), strict=True, assign=True)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name.endswith("position_ids"):  # 0 .. n - 1, never saved
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(
            f"{type(module).__name__} from installed libraries",
            expected="a value for every tensor",
            got=f"none for {', '.join(left[:5])}",
            remedy="Install the versions of torch, diffusers and transformers in constraints.txt.",
        )
    return module.eval().requires_grad_(False)


def read_tensors(
    where: Path, files: Sequence[Path], expected: Shapes, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Exactly the tensors that `expected` names, out of a component's `files`; `where` is its folder.

    Raises CheckpointError for truncated or mismatched weights.
    """
    found: dict[str, Path] = {}
    problems = []
    for file in files:
        for name, stated in read_header(file).items():
            shape = list(stated.shape)
            if name in HARMLESS:
                continue
            if name in found:
                problems.append(f"{name} in both {found[name].name} and {file.name}")
            elif name not in expected:
                problems.append(f"unexpected {name} {shape}")
            elif shape != list(expected[name]):
                problems.append(f"{name} {shape} instead of {list(expected[name])}")
            elif stated.dtype not in FLOAT_CODES:
                problems.append(f"{name} in {stated.dtype}")
            found[name] = file
    problems += [f"no {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"weights in {where}",
            expected=f"the {len(expected)} floating-point tensors of its config.json",
            got="; ".join(problems[:5]) + more,
            remedy="Pass weights that belong to this config, not quantised; download the folder again.",
        )
    with reading() as files_read:
        return {name: files_read.tensor(found[name], name, dtype) for name in expected}


class OpenFiles:
    """safetensors files, kept open while tensors are read from them, a tensor at a time.

    What was read of a file stays in memory while it is open, and opening one parses its whole header: each is
    opened again after every KEPT_BYTES.
    """

    def __init__(self) -> None:
        self.last = Path()
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._kept_bytes = 0

    def handle(self, file: Path) -> Any:
        """safetensors' `safe_open` of a file.  What is read with it is to be told to `count`."""
        from safetensors import safe_open

        if self._kept_bytes > KEPT_BYTES:
            self.close()
        self.last = file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
        return self._open[file]

    def count(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        self._kept_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def tensor(self, file: Path, key: str, dtype: torch.dtype) -> Tensor:
        """One tensor in memory of its own.  Raises CheckpointError where it holds NaN or infinity."""
        read = self.count(self.handle(file).get_tensor(key))
        return finite(file, key, read.to(dtype, copy=True))

    def close(self) -> None:
        self._stack.close()
        self._open.clear()
        self._kept_bytes = 0


@contextmanager
def reading() -> Iterator[OpenFiles]:
    """Files that are closed at the end.

    Raises CheckpointError when one has changed since its header was read.
    """
    from safetensors import SafetensorError

    files = OpenFiles()
    try:
        yield files
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(files.last),
            expected="the file that was there when its header was read",
            got=str(error),
            remedy="Leave it as it is while it is read, and open the checkpoint again.",
        ) from error
    finally:
        files.close()


def finite(file: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself.  Raises CheckpointError where it holds NaN or infinity."""
    import torch

    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"tensor {name} in {file}",
            expected=f"finite numbers in {dtype}",
            got="NaN or infinity",
            remedy='Use dtype="fp32" for numbers too large for fp16; download a damaged file again.',
        )
    return tensor
