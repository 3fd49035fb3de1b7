"""The GPU check's stages of TensorRT: plans built there, from graphs exported there, against eager torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from svd_bench.gpu.context import Context, Skipped, tiny_checkpoint
from svd_bench.gpu.stage import SMALL, VIDEO_TOLERANCE, Findings, small_video
from svd_bench.measuring.check import check_output, check_outputs, tolerance
from svd_bench.subjects.cases import profile_of
from svd_engine.bundle.flavours import TENSORRT, TENSORRT_RTX, Flavour, sm
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import BackendUnavailable
from svd_engine.networks import parity
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.networks.rewrites import REWRITES
from svd_engine.spec.network import named_outputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile

STAGE_OF_NETWORK = {  # network -> the stage of the benchmark that is one call of it; the largest last
    "image_encoder": "image_encoder",
    "vae_encoder": "vae_encoder",
    "vae_decoder": "vae_decoder",
    "denoiser": "denoiser_step",
}


def small(context: Context, flavour: Flavour = TENSORRT) -> Findings:
    """Every network and the whole video at the smallest size, against float32 on the CPU without rewrites."""
    check_tensorrt(flavour)
    from svd_engine.backends.tensorrt.network import TrtBackend
    from svd_engine.engine import VideoEngine

    checkpoint = tiny_checkpoint()
    plain = Modules(checkpoint, without_rewrites=[rewrite.name for rewrite in REWRITES])
    facts = {}
    with exported_bundle(context, checkpoint, SMALL) as folder:
        build(folder, flavour, context)
        bundle = Bundle(folder)
        backend = TrtBackend(bundle, context.device, flavour)
        for entry in bundle.manifest.networks:
            spec = entry.spec
            exact = replace(spec, precision=FLOAT32)
            inputs = example_inputs(spec, checkpoint.model.architecture.conditioning)
            with torch.no_grad():
                expected = named_outputs(exact, plain.network(exact)(**inputs))
            network = backend.open(spec)
            outputs = network(**{name: tensor.to(context.device) for name, tensor in inputs.items()})
            got = {name: tensor.cpu() for name, tensor in outputs.items()}
            network.close()
            allowed = parity.tolerance(spec)
            difference = check_outputs(spec.key, got, expected, allowed)
            facts[f"{spec.network} {spec.precision}"] = f"{difference:.2e} (allowed {allowed:g})"
        backend.close()
        video = small_video(VideoEngine.from_bundle(folder, backend=flavour.name, device=str(context.device)))
    eager = small_video(VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32"))
    difference = check_output(flavour.name, video, eager, VIDEO_TOLERANCE)
    return Findings(facts | {"whole video": f"{difference:.2e} (allowed {VIDEO_TOLERANCE:g})"})


def small_rtx(context: Context) -> Findings:
    """As `small`, by TensorRT for RTX, where it has a target for the card."""
    check_tensorrt(TENSORRT_RTX)
    if not torch.cuda.is_available():
        raise Skipped(f"{TENSORRT_RTX.title} runs on a CUDA GPU, and torch finds none")
    capability = torch.cuda.get_device_capability(context.device)
    if capability not in TENSORRT_RTX.targets:
        raise Skipped(f"{TENSORRT_RTX.title} has no {sm(capability).upper()} target, as this card would need")
    return small(context, TENSORRT_RTX)


def build(folder: Path, flavour: Flavour, context: Context) -> None:
    """The plans of a bundle; those for RTX in a process of their own, as a process builds for one flavour."""
    from svd_export.to_tensorrt import build_plans

    if flavour is TENSORRT:
        build_plans(Bundle(folder), progress=context.say, flavour=flavour.name)
        return
    script = "from svd_export.cli import main; main()"
    arguments = ("tensorrt", str(folder), "--flavour", flavour.name, "--target", "here")
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)


def full_size(context: Context) -> Findings:
    """Network by network at full size: built, held against eager on this device, timed, memory recorded."""
    check_tensorrt(TENSORRT)
    from svd_export.to_tensorrt import build_plans

    setting = context.setting()
    facts = {}
    with exported_bundle(context, context.checkpoint, profile_of(setting)) as folder:
        eager = context.subject("svd-engine", "eager")
        ours = context.subject("svd-engine", "tensorrt").model_copy(update={"bundle": str(folder)})
        for network, stage in STAGE_OF_NETWORK.items():
            build = partial(
                build_plans, Bundle(folder), networks=[network], progress=context.say, flavour="tensorrt"
            )
            lap, plans = context.timer.lap(build)
            facts[f"{network}: build"] = f"{lap.ms / 1e3:.0f} s"
            facts[f"{network}: plan"] = "; ".join(_size(folder, plan) for plan in plans)
            dtype = "float32" if network == "vae_encoder" else context.dtype
            facts[f"{network}: allowed"] = f"{tolerance(stage, dtype, context.device):g}"
            try:
                context.contest(stage, setting, [eager, ours], 5)
            finally:
                context.drop(ours)
    return Findings(facts)


def check_tensorrt(flavour: Flavour) -> None:
    """Raises Skipped, with the reason, where there is no TensorRT or nothing to export with."""
    try:
        from svd_engine.backends.tensorrt.library import require

        require(flavour)
        import_module("svd_export.to_onnx")
    except BackendUnavailable as error:
        raise Skipped(f"{flavour.name} cannot be used here: {error.got}. {error.remedy}") from error
    except ImportError as error:
        raise Skipped(f"exporting needs what is not installed: {error}") from error


@contextmanager
def exported_bundle(context: Context, checkpoint: Checkpoint, profile: Profile) -> Iterator[Path]:
    """A bundle in float16 in a temporary folder."""
    from svd_export.to_onnx import export_bundle

    with tempfile.TemporaryDirectory(prefix="svd-bench-") as name:
        folder = Path(name, "bundle")
        export_bundle(checkpoint, folder, [profile], torch.float16, (), context.say)
        yield folder


def _size(folder: Path, plan: PlanEntry) -> str:
    size = (folder / plan.file).stat().st_size
    return f"{size / 2**20:.0f} MiB, activations {plan.device_memory_bytes / 2**20:.0f} MiB"
