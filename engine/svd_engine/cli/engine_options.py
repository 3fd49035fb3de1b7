"""The options of `generate` and `batch` that say which networks run, where and how."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from svd_engine.backends.registry import check_name
from svd_engine.cli.options import (
    BackendOption,
    DTypeOption,
    ImageEncoderPart,
    LoraFiles,
    LoraPartial,
    MemoryOption,
    PresetOption,
    ReuseBranch,
    ReuseOption,
    SwapNetworks,
    UNetPart,
    VaePart,
    Variant,
    lora_of,
    memory_of,
    parts_of,
)

if TYPE_CHECKING:
    from svd_engine.opening import Opening
    from svd_engine.spec.model import Model

OF_A_CHECKPOINT = {
    "dtype": "--dtype", "variant": "--variant", "unet": "--unet", "vae": "--vae",
    "image_encoder": "--image-encoder", "lora": "--lora", "lora_partial": "--lora-partial",
    "without_rewrite": "--without-rewrite",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A bundle or a checkpoint and how to open it, as options of a command."""

    bundle: Annotated[Path | None, typer.Option(help="Bundle to run, exported by svd-export onnx.")] = None
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to run: svd, svd-xt, svd-xt-1-1, demo, a diffusers folder, a single "
            "file such as svd_xt.safetensors or sv3d_u.safetensors, or a hub id."
        ),
    ] = None
    backend: BackendOption = "auto"
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DTypeOption.auto
    variant: Variant = None
    unet: UNetPart = None
    vae: VaePart = None
    image_encoder: ImageEncoderPart = None
    lora: LoraFiles = None
    lora_partial: LoraPartial = False
    swap_networks: SwapNetworks = False
    memory: MemoryOption = "auto"
    jit_cache: Annotated[
        Path | None,
        typer.Option(help="Keep the kernels that tensorrt-rtx compiles here; default your cache folder."),
    ] = None
    no_jit_cache: Annotated[
        bool, typer.Option("--no-jit-cache", help="Keep no kernels that tensorrt-rtx compiles.")
    ] = False
    without_rewrite: Annotated[
        list[str] | None,
        typer.Option(help="Switch off an exact rewrite of a checkpoint's networks. Repeatable."),
    ] = None
    reuse: ReuseOption = None
    reuse_branch: ReuseBranch = None
    reuse_threshold: Annotated[
        float | None,
        typer.Option(
            help="With --reuse: run the whole too when its input has changed by this share since, as 0.2."
        ),
    ] = None
    preset: Annotated[
        PresetOption | None,
        typer.Option(
            help="Take what others recommend, where no option says otherwise: sgm is Stability's own "
            "scripts (SVD 25 steps, guidance 1 to 2.5; SVD-XT 30 steps, 1.5 to 3); animatelcm is for "
            "AnimateLCM-SVD (4 steps, sampler and schedule lcm, no guidance)."
        ),
    ] = None

    def check(self) -> None:
        """Raises typer.BadParameter for options that do not go together, SettingsError for the backend."""
        if (self.bundle is None) == (self.checkpoint is None):
            raise typer.BadParameter("pass either --bundle BUNDLE or --checkpoint CHECKPOINT")
        if self.bundle is not None and any(
            getattr(self, name) != _DEFAULTS[name] for name in OF_A_CHECKPOINT
        ):
            raise typer.BadParameter(
                f"{', '.join(OF_A_CHECKPOINT.values())} belong to --checkpoint; a bundle has its own, from "
                "its export, and takes LoRA by `svd-export lora BUNDLE --lora FILE -o NEW_BUNDLE`"
            )
        if self.reuse is None and (self.reuse_branch is not None or self.reuse_threshold is not None):
            raise typer.BadParameter("--reuse-branch and --reuse-threshold belong to --reuse N")
        if self.jit_cache is not None and self.no_jit_cache:
            raise typer.BadParameter("pass either --jit-cache DIR or --no-jit-cache")
        compiles = self.bundle is not None and self.backend in ("auto", "tensorrt-rtx")
        if (self.jit_cache is not None or self.no_jit_cache) and not compiles:
            raise typer.BadParameter("--jit-cache and --no-jit-cache belong to --backend tensorrt-rtx")
        lora_of(self.lora)
        check_name(self.backend)

    def opening(self, frames: int | None, **others: Any) -> Opening:
        """frames: of the call, for a single file that does not tell its own.  others: of both constructors.

        Raises SettingsError for memory and reuse that cannot be.
        """
        from svd_engine.checkpoint.opening import hides_frames
        from svd_engine.opening import Opening
        from svd_engine.residency.budget import check_memory
        from svd_engine.spec.reuse import Reuse

        reuse = None
        if self.reuse is not None:
            reuse = Reuse(self.reuse, self.reuse_branch, self.reuse_threshold)
        memory = memory_of(self.memory)
        check_memory(memory)
        options = others | {
            "backend": self.backend, "device": self.device, "swap_networks": self.swap_networks,
            "memory": memory, "reuse": reuse,
        }  # fmt: skip
        if self.bundle is not None:
            kept = None if self.no_jit_cache else self.jit_cache or "auto"
            return Opening(self.bundle, None, {**options, "jit_cache": kept})
        assert self.checkpoint is not None
        checkpoint = {
            "source": self.checkpoint, "variant": self.variant,
            "frames": frames if hides_frames(self.checkpoint) else None,
            "parts": parts_of(self.unet, self.vae, self.image_encoder), "lora": lora_of(self.lora),
            "lora_partial": self.lora_partial,
        }  # fmt: skip
        own = {"dtype": self.dtype.value, "without_rewrites": tuple(self.without_rewrite or ())}
        return Opening(None, checkpoint, options | own)

    def with_preset(self, call: dict[str, Any], chosen: set[str], model: Model) -> dict[str, Any]:
        """`call` with what the preset recommends in place of what the user has not chosen.

        Raises SettingsError for a model that it does not know.
        """
        from svd_engine.sampling.presets import PRESETS

        if self.preset is None:
            return call
        recommended = PRESETS[self.preset.value](model)
        return call | {name: value for name, value in recommended.items() if name not in chosen}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EngineOptions)}


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """In place of the command's parameter `opened: EngineOptions`, an option for each of its fields."""
    kinds = get_type_hints(EngineOptions, include_extras=True)

    def run(**given: Any) -> None:
        options = EngineOptions(**{name: given.pop(name) for name in _DEFAULTS})
        command(**given, opened=options)

    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in _DEFAULTS.items()
    ]
    parameters: list[inspect.Parameter] = []
    signature = inspect.signature(command, eval_str=True)
    for parameter in signature.parameters.values():
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += made if parameter.name == "opened" else own
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
