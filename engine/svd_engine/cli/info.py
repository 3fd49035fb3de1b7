"""Command `svd-engine info`: a bundle, a checkpoint or this machine, described."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svd_engine.cli.options import (
    ImageEncoderPart,
    LoraFiles,
    LoraPartial,
    UNetPart,
    VaePart,
    Variant,
    lora_of,
    parts_of,
)


def info(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUNDLE|CHECKPOINT]",
            help="Bundle or checkpoint to describe; without one, describe this machine.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint to describe, also one that is on the hub only.")
    ] = None,
    variant: Variant = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames that a single file was trained on, if its name does not tell.")
    ] = None,
    unet: UNetPart = None,
    vae: VaePart = None,
    image_encoder: ImageEncoderPart = None,
    lora: LoraFiles = None,
    lora_partial: LoraPartial = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the hash of every file of the bundle first.")
    ] = False,
) -> None:
    """Describe a bundle, a checkpoint or this machine, and say which backends are ready here."""
    if subject is not None and checkpoint is not None:
        raise typer.BadParameter("pass BUNDLE or --checkpoint, not both")
    from svd_engine.checkpoint.opening import names_checkpoint, open_checkpoint

    bundle = None
    if subject is not None and names_checkpoint(subject):
        checkpoint = subject
    elif subject is not None:
        bundle = Path(subject)
    parts, scales = parts_of(unet, vae, image_encoder), lora_of(lora)
    if (variant or frames is not None or parts or scales or lora_partial) and checkpoint is None:
        raise typer.BadParameter(
            "--variant, --frames, --unet, --vae, --image-encoder and --lora belong to a checkpoint"
        )
    if check and bundle is None:
        raise typer.BadParameter("--check needs a BUNDLE, whose files it hashes")
    opened_checkpoint = None
    if checkpoint is not None:  # without torch, unless there is LoRA
        opened_checkpoint = open_checkpoint(checkpoint, variant, frames, parts, scales, lora_partial)

    from svd_engine import info as facts
    from svd_engine.bundle.reading import Bundle

    if opened_checkpoint:
        _lines(facts.checkpoint_facts(opened_checkpoint))
        _lines(facts.file_facts(opened_checkpoint))
        rows = facts.torch_abilities()
    elif bundle is None:
        _lines(facts.machine_facts())
        rows = facts.abilities()
    else:
        opened = Bundle(bundle)
        if check:
            opened.check_hashes()
            _lines({"checked": f"{len(opened.manifest.files)} files have the manifest's hashes"})
        _lines(facts.bundle_facts(opened) | facts.plan_facts(opened))
        rows = [*facts.bundle_abilities(opened.manifest.precision), *facts.plan_abilities(opened)]
    for row in rows:
        typer.echo(f"{row.backend} on {row.device}: {row.why_not or 'ready'}")


def _lines(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        typer.echo(f"{name:<14}  {value}")
