"""Command `svd-export`: arguments in, progress and exit codes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svd_engine.cli import console
from svd_engine.cli.options import (
    FamilyOption,
    ImageEncoderPart,
    LoraFiles,
    LoraPartial,
    UNetPart,
    VaePart,
    Variant,
    VersionFlag,
    lora_of,
    parts_of,
)
from svd_engine.shell import quoted
from svd_export import tensorrt_cli

if TYPE_CHECKING:
    from svd_engine.bundle.manifest import ParityEntry
    from svd_engine.checkpoint.opening import Checkpoint
    from svd_engine.spec.profile import GuidanceMode, Profile

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
app.command()(tensorrt_cli.check)
app.command()(tensorrt_cli.tensorrt)


class ExportDType(StrEnum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class VerifiedBackend(StrEnum):
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


ExportedVariant = Annotated[
    str | None, typer.Option(help="Variant of the checkpoint's weight files; default the one exported.")
]
ExportedLora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="LoRA file that the bundle was exported with, if it has moved. Repeatable."
    ),
]


class GuidanceOption(StrEnum):
    batched = "batched"
    single = "single"


@app.callback()
def root(version: VersionFlag = False) -> None:
    """Export Stable Video Diffusion checkpoints to bundles of ONNX graphs and TensorRT plans."""


@app.command()
def onnx(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the bundle to make; must not exist.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint to export: svd, svd-xt, svd-xt-1-1, demo, a diffusers folder, a single file "
            "such as svd_xt.safetensors, or a hub id."
        ),
    ] = None,
    random_weights: Annotated[
        FamilyOption | None,
        typer.Option(
            help="Export this architecture with seeded random weights, to measure speed and memory."
        ),
    ] = None,
    variant: Variant = None,
    unet: UNetPart = None,
    vae: VaePart = None,
    image_encoder: ImageEncoderPart = None,
    lora: LoraFiles = None,
    lora_partial: LoraPartial = False,
    frames: Annotated[
        list[int] | None, typer.Option(help="Number of frames; default the checkpoint's own. Repeatable.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels; default the checkpoint's own (SVD: 576).")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels; default the checkpoint's own (SVD: 1024).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size: videos per network call.")] = 1,
    dtype: Annotated[
        ExportDType | None,
        typer.Option(help="Precision of weights and arithmetic; default fp16, for demo fp32."),
    ] = None,
    guidance: Annotated[
        list[GuidanceOption] | None,
        typer.Option(
            help="Classifier-free guidance: both halves in one call (batched) or one half per call (single). "
            "Repeatable."
        ),
    ] = None,
    decode_chunk: Annotated[
        list[int] | None, typer.Option(help="Frames per decoder call; default all. Repeatable.")
    ] = None,
    reuse_branch: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Add what `svd-engine generate --reuse N` runs: a full and a shallow denoiser over the same "
            "weights. B is how much the shallow one runs, DeepCache's branch; 0 is the least.",
        ),
    ] = None,
    stream_decoder: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Add what `svd-engine generate --decoding streamed` runs: the decoder as a chain of "
            "networks that take N frames at a time, over the same weights. The same video in less memory.",
        ),
    ] = None,
    without_rewrite: Annotated[
        list[str] | None, typer.Option(help="Switch off an exact rewrite. Repeatable.")
    ] = None,
) -> None:
    """Export CHECKPOINT to a bundle of ONNX graphs.

    Repeat --frames, --guidance or --decode-chunk for several profiles in one bundle; they share weights.
    """
    if (checkpoint is None) == (random_weights is None):
        raise typer.BadParameter("pass either CHECKPOINT or --random-weights FAMILY")
    parts, scales = parts_of(unet, vae, image_encoder), lora_of(lora)
    if random_weights and (variant or parts or scales or lora_partial):
        raise typer.BadParameter(
            "--variant, --unet, --vae, --image-encoder and --lora belong to CHECKPOINT: random weights "
            "have no files"
        )

    from svd_engine.arguments import DTYPES
    from svd_engine.checkpoint.opening import hides_frames, open_checkpoint, random_checkpoint
    from svd_export.placing import check_free
    from svd_export.to_onnx import export_bundle

    console.show_notices()
    check_free(output.absolute())
    trained_on = frames[0] if frames and checkpoint and hides_frames(checkpoint) else None
    opened = (
        random_checkpoint(random_weights.value)
        if random_weights
        else open_checkpoint(checkpoint or "", variant, trained_on, parts, scales, lora_partial)
    )
    wanted = profiles(
        opened, frames or [opened.model.frames], height, width, batch,
        [g.value for g in guidance or [GuidanceOption.batched]], decode_chunk or [None],
    )  # fmt: skip
    chosen = dtype or (ExportDType.fp32 if checkpoint == "demo" else ExportDType.fp16)
    manifest = export_bundle(
        opened, output, wanted, DTYPES[chosen.value], without_rewrite or (), _progress(), reuse_branch,
        stream_decoder,
    )  # fmt: skip
    size = sum(entry.bytes for entry in manifest.files.values())
    typer.echo(
        f"wrote {output}: {len(manifest.networks)} networks, {size / 2**20:.1f} MiB, {manifest.precision}"
    )
    if manifest.model.random_weights:
        typer.echo("random weights: for shapes, speed and memory; the videos mean nothing")


@app.command()
def verify(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle to compare; the result is written into its manifest.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint that it was exported from, if it has moved.")
    ] = None,
    variant: ExportedVariant = None,
    unet: UNetPart = None,
    vae: VaePart = None,
    image_encoder: ImageEncoderPart = None,
    exported_lora: ExportedLora = None,
    device: Annotated[str, typer.Option(help="Device of --backend: auto, cpu, cuda or cuda:N.")] = "auto",
    no_write: Annotated[
        bool, typer.Option("--no-write", help="Print the result only; needed for a read-only bundle.")
    ] = False,
    backend: Annotated[
        VerifiedBackend,
        typer.Option(
            help="onnxruntime is held against eager torch; tensorrt and tensorrt-rtx, on a GPU, against "
            "ONNX Runtime."
        ),
    ] = VerifiedBackend.onnxruntime,
) -> None:
    """Compare each exported network with its reference on the same inputs; fail beyond tolerance.

    The checkpoint, its parts and its LoRA are those that the bundle's manifest names; options say where
    they have moved.
    """
    from svd_engine.backends.choose import choose_for_bundle
    from svd_engine.bundle.reading import Bundle
    from svd_export.verify import exported_from
    from svd_export.verify import verify as run

    opened = Bundle(bundle)
    parts = parts_of(unet, vae, image_encoder)
    if backend is not VerifiedBackend.onnxruntime:
        if checkpoint is not None or variant is not None or parts or exported_lora or no_write:
            raise typer.BadParameter(
                "--checkpoint, --variant, --unet, --vae, --image-encoder, --exported-lora and --no-write "
                "belong to --backend onnxruntime"
            )
        from svd_engine.backends.choose import resolve
        from svd_engine.bundle.flavours import FLAVOURS
        from svd_export.verify_plans import verify_plans

        _show(verify_plans(opened, FLAVOURS[backend.value], resolve(device), _progress()))
        return
    choice = choose_for_bundle("onnxruntime", device, opened)
    source = exported_from(opened, checkpoint, variant, parts, exported_lora=exported_lora or ())
    _show(run(opened, source, choice.device, _progress(), write=not no_write))


@app.command("lora")
def take(
    bundle: Annotated[Path, typer.Argument(help="Bundle that takes LoRA; it stays as it is.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the bundle to make; must not exist.")
    ],
    lora: LoraFiles = None,
    lora_partial: LoraPartial = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint that the bundle was exported from, if it has moved.")
    ] = None,
    variant: ExportedVariant = None,
    unet: UNetPart = None,
    vae: VaePart = None,
    image_encoder: ImageEncoderPart = None,
    exported_lora: ExportedLora = None,
) -> None:
    """Make a bundle with LoRA of BUNDLE, without another export: only the denoiser's weights change.

    The LoRA given takes the place of what BUNDLE has. Plans of the denoiser are kept where they were built
    with `svd-export tensorrt --refittable`, and named where they have to be built anew. The checkpoint is
    read again, from where the manifest names it.
    """
    scales = lora_of(lora)
    if not scales:
        raise typer.BadParameter("pass --lora FILE[:SCALE]")

    from svd_engine.bundle.reading import Bundle
    from svd_export.bundle_lora import take_lora
    from svd_export.placing import check_free
    from svd_export.verify import exported_from

    console.show_notices()
    check_free(output.absolute())
    opened, parts = Bundle(bundle), parts_of(unet, vae, image_encoder)
    plain = exported_from(opened, checkpoint, variant, parts, exported_lora=exported_lora or ())
    fused = exported_from(opened, checkpoint, variant, parts, scales, lora_partial)
    taken = take_lora(opened, plain, fused, output, _progress())
    typer.echo(f"wrote {output}: {taken.replaced} weights of the denoiser replaced, nothing exported anew")
    for plan in taken.left_out:
        typer.echo(
            f"left out {plan.file}: its weights are fixed. Run: svd-export tensorrt {quoted(output)} "
            f"--flavour {plan.flavour}{'' if plan.flavour == 'tensorrt-rtx' else ' --refittable'}"
        )


@app.command()
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint to convert, such as the single file svd_xt.safetensors.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Diffusers folder to make; must not exist.")],
    frames: Annotated[
        int | None, typer.Option(help="Frames that the file was trained on, if its name does not tell.")
    ] = None,
    variant: Variant = None,
    unet: UNetPart = None,
    vae: VaePart = None,
    image_encoder: ImageEncoderPart = None,
    lora: LoraFiles = None,
    lora_partial: LoraPartial = False,
) -> None:
    """Convert a single file to a folder as diffusers saves it, in the precision that the file has.

    Parts from elsewhere become parts of the folder, and LoRA becomes part of the UNet's weights.
    """
    from svd_engine.checkpoint.opening import open_checkpoint
    from svd_export.convert import write_folder
    from svd_export.placing import check_free

    console.show_notices()
    check_free(output.absolute())
    opened = open_checkpoint(
        checkpoint, variant, frames, parts_of(unet, vae, image_encoder), lora_of(lora), lora_partial
    )
    write_folder(opened, output, _progress())
    typer.echo(f"wrote {output}: {opened.model.name}, {opened.model.frames} frames")


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="Bundle to serve.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the model repository to make; must not exist.")
    ],
    instances: Annotated[int, typer.Option(help="Engines per GPU, or on the CPU without a GPU.")] = 1,
    max_queue: Annotated[
        int, typer.Option(help="Length of the queue; requests beyond it are refused at once.")
    ] = 8,
    timeout: Annotated[
        str, typer.Option(help="Longest wait of a request in the queue, such as 120s, 2m or 500ms.")
    ] = "120s",
) -> None:
    """Write a model repository for Triton Inference Server; docs/triton.md says how to serve it."""
    from svd_engine.bundle.reading import Bundle
    from svd_export.triton import QueueLimits, seconds, write_repository

    limits = QueueLimits(instances, max_queue, seconds(timeout))
    names = write_repository(Bundle(bundle), output, limits, _progress())
    typer.echo(f"wrote {output}: {', '.join(names)}")


def _show(rows: list[ParityEntry]) -> None:
    for row in rows:
        typer.echo(
            f"{row.network:<40} max abs {row.max_abs:.2e}  relative {row.relative:.2e} "
            f"(allowed {row.tolerance:g})  cosine {row.cosine:.8f}"
        )


def profiles(
    checkpoint: Checkpoint,
    frames: list[int],
    height: int | None,
    width: int | None,
    batch: int,
    guidance: Sequence[GuidanceMode],
    decode_chunks: Sequence[int | None],
) -> list[Profile]:
    """Every combination of frames, guidance and decode chunk (None: all frames).  Raises SettingsError."""
    from svd_engine.request import Settings
    from svd_engine.spec.profile import Profile
    from svd_engine.values import at_least

    model = checkpoint.model
    batch = at_least("batch", batch, 1)
    made = []
    height = model.height if height is None else height
    width = model.width if width is None else width
    for count, mode, chunk in product(frames, guidance, decode_chunks):
        asked = Settings(count, height, width, decode_chunk_size=chunk)
        asked.check_size(model.architecture.size_multiple)
        made.append(replace(Profile.of_request(asked, batch), guidance=mode))
    return list(dict.fromkeys(made))


def _progress() -> Callable[[str], None]:
    import time

    started = time.monotonic()
    return lambda line: typer.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True)


def main() -> None:
    console.run(app)
