"""The stages of the GPU check, most valuable first, and what each needs.  Each returns facts and lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from svd_bench.gpu import tensorrt_stages as gpu_tensorrt
from svd_bench.gpu.context import CachedNetwork, Context, Skipped, tiny_checkpoint
from svd_bench.gpu.stage import SMALL, VIDEO_TOLERANCE, Findings, GpuStage, small_video
from svd_bench.measuring.ceiling import measure_ceiling
from svd_bench.measuring.check import check_output, check_outputs
from svd_bench.subjects.cases import Case, profile_of
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs, tolerance
from svd_engine.networks.rewrites import REWRITES
from svd_engine.report import peak_device_bytes, size
from svd_engine.spec.network import named_outputs
from svd_engine.spec.precision import FLOAT32, DType, Precision
from svd_engine.spec.tables import specs_of

TOP = 20  # kernels in a profile


def ceiling(context: Context) -> Findings:
    kinds = ["float16", "bfloat16", "float32"] if context.full else ["float32"]
    scale = 1 if context.full else 16
    context.recorder.ceiling = made = measure_ceiling(context.device, kinds, context.timer, scale)
    facts = {f"{kind} TFLOP/s": f"{made.best_rate(kind) / 1e12:.3g}" for kind in kinds}
    return Findings(facts | {"copy TB/s": f"{made.copy_bytes / 1e12:.3g}"})


def parity(context: Context) -> Findings:
    """Small networks with every rewrite here, against diffusers' own in float32 on the CPU."""
    checkpoint = open_checkpoint("demo")
    plain = Modules(checkpoint, without_rewrites=[rewrite.name for rewrite in REWRITES])
    kinds: list[DType] = ["float32", "float16", "bfloat16"] if context.full else ["float32"]
    facts = {}
    architecture = checkpoint.model.architecture
    for kind in kinds:
        ours = Modules(checkpoint)
        for spec in specs_of(SMALL, architecture, Precision.of(kind)):
            exact = replace(spec, precision=FLOAT32)
            inputs = example_inputs(spec, architecture.conditioning)
            with torch.no_grad(), float32_products():
                expected = named_outputs(exact, plain.network(exact)(**inputs))
                there = {name: tensor.to(context.device) for name, tensor in inputs.items()}
                got = named_outputs(spec, ours.network(spec).to(context.device)(**there))
            name = f"{spec.network} {kind}"
            facts[name] = f"{check_outputs(name, got, expected, tolerance(spec)):.2e}"
    return Findings(facts)


def denoiser(context: Context) -> Findings:
    setting = context.setting()
    chosen = [("diffusers", "eager"), ("svd-engine", "eager"), ("svd-engine", "compiled")]
    context.contest("denoiser_step", setting, [context.subject(*one) for one in chosen], 5)
    return Findings()


def decoder(context: Context) -> Findings:
    setting = context.setting()
    chosen = [("diffusers", "eager"), ("svd-engine", "eager"), ("svd-engine", "compiled")]
    context.contest("vae_decoder", setting, [context.subject(*one) for one in chosen], 3)
    return Findings()


def whole_video(context: Context) -> Findings:
    chosen = [("diffusers", "eager"), ("svd-engine", "compiled")]
    context.contest("whole_video", context.setting(), [context.subject(*one) for one in chosen], 2)
    return Findings()


def kernels_of(stage: str, backend: str) -> Callable[[Context], Findings]:
    return lambda context: _kernels(context, stage, backend)


def _kernels(context: Context, stage: str, backend: str) -> Findings:
    """The kernels that take most of one call."""
    case = Case(subject=context.subject("svd-engine", backend), stage=stage, setting=context.setting())
    running = CachedNetwork(case, context.opened(case.subject))
    running()
    context.timer.synchronize()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.full else [])
    with profile(activities=activities) as profiler:
        running()
        context.timer.synchronize()
    events = profiler.key_averages()
    if context.full:
        kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
        timed = [(e.self_device_time_total, e.count, e.key) for e in kernels]
    else:
        timed = [(e.self_cpu_time_total, e.count, e.key) for e in events]
    whole = sum(us for us, _, _ in timed)
    top = sorted(timed, reverse=True)[:TOP]
    lines = tuple(f"{us / 1e3:9.2f} ms {us / whole:6.1%} {count:6d}x  {key[:100]}" for us, count, key in top)
    return Findings({"all kernels": f"{whole / 1e3:.1f} ms", "kernels": str(len(timed))}, lines)


def encoders(context: Context) -> Findings:
    chosen = [context.subject("diffusers", "eager"), context.subject("svd-engine", "eager")]
    for stage in ("image_encoder", "vae_encoder"):
        context.contest(stage, context.setting(), chosen, 5)
    return Findings()


def offloaded(context: Context) -> Findings:
    """The denoiser block by block from host memory, against itself with all weights on the device."""
    architecture = context.checkpoint.model.architecture
    spec = specs_of(profile_of(context.setting()), architecture, Precision.of(context.dtype))[2]
    inputs = example_inputs(spec, architecture.conditioning)
    there = {name: tensor.to(context.device) for name, tensor in inputs.items()}
    network = context.opened(context.subject("svd-engine", "eager")).backend.open(spec)

    def timed() -> tuple[float, int | None, dict[str, torch.Tensor]]:
        network(**there)  # offloaded, it learns the order of its blocks
        if context.full:
            torch.cuda.reset_peak_memory_stats(context.device)
        lap, outputs = context.timer.lap(lambda: network(**there))
        return lap.ms, peak_device_bytes(context.device), {n: t.cpu() for n, t in outputs.items()}

    network.to_device()
    ms, peak, expected = timed()
    network.to_host()
    network.offload()
    try:
        offloaded_ms, offloaded_peak, got = timed()
    finally:
        network.to_host()
        network.to_device()  # as other stages left it
    facts = {
        "difference": f"{check_outputs('offloaded', got, expected, tolerance(spec)):.2e}",
        "call, weights on the device": f"{ms:.1f} ms",
        "call, offloaded": f"{offloaded_ms:.1f} ms",
    }
    if peak is not None and offloaded_peak is not None:
        facts |= {"peak": size(peak), "peak, offloaded": size(offloaded_peak)}
    return Findings(facts)


def runtimes(_context: Context) -> Findings:
    """What else could run artefacts here."""
    facts = {}
    for name in ("tensorrt", "tensorrt_rtx", "onnxruntime", "onnx", "onnxscript", "onnx_ir", "triton"):
        try:
            facts[name] = str(getattr(__import__(name), "__version__", "imported"))
        except ImportError as error:
            facts[name] = f"not importable: {error}"
    return Findings(facts)


def onnxruntime(context: Context) -> Findings:
    """The smallest networks through ONNX Runtime on this device, end to end, against eager on the CPU."""
    try:
        import onnxruntime as runtime

        from svd_engine.engine import VideoEngine
        from svd_export.to_onnx import export_bundle
    except ImportError as error:
        raise Skipped(f"exporting or running needs what is not installed: {error}") from error
    wanted = "CUDAExecutionProvider" if context.full else "CPUExecutionProvider"
    available = runtime.get_available_providers()
    if wanted not in available:
        raise Skipped(f"onnxruntime {runtime.__version__} has no {wanted}, only {', '.join(available)}")
    import tempfile
    from pathlib import Path

    checkpoint, dtype = tiny_checkpoint(), "float16" if context.full else "float32"
    with tempfile.TemporaryDirectory(prefix="svd-bench-") as folder:
        bundle = Path(folder, "bundle")
        export_bundle(checkpoint, bundle, [SMALL], getattr(torch, dtype))
        got = small_video(VideoEngine.from_bundle(bundle, backend="onnxruntime", device=str(context.device)))
    expected = small_video(
        VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32")
    )
    return Findings({"whole video": f"{check_output('onnxruntime', got, expected, VIDEO_TOLERANCE):.2e}"})


def svd_14(context: Context) -> Findings:
    setting = context.setting(14)
    chosen = [("diffusers", "eager"), ("svd-engine", "eager"), ("svd-engine", "compiled")]
    for stage in ("denoiser_step", "vae_decoder"):
        context.contest(stage, setting, [context.subject(*one) for one in chosen], 3)
    return Findings()


def diffusers_compiled(context: Context) -> Findings:
    chosen = [("diffusers", "eager"), ("diffusers-compile", "torch.compile")]
    for stage in ("denoiser_step", "vae_decoder"):
        context.contest(stage, context.setting(), [context.subject(*one) for one in chosen], 3)
    return Findings()


@contextmanager
def float32_products() -> Iterator[None]:
    """Without TF32, so that float32 means float32."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


GPU_STAGES = (
    GpuStage("environment and ceiling", 0, ceiling),
    GpuStage("small networks against the CPU", 20, parity),
    GpuStage("denoiser step", 180, denoiser),
    GpuStage("VAE decoder", 80, decoder),
    GpuStage("kernels of the compiled denoiser", 15, kernels_of("denoiser_step", "compiled")),
    GpuStage("kernels of the compiled VAE decoder", 15, kernels_of("vae_decoder", "compiled")),
    GpuStage("whole video", 130, whole_video),
    GpuStage("denoiser offloaded to host memory", 20, offloaded),
    GpuStage("other runtimes", 5, runtimes),
    GpuStage("encoders", 15, encoders),
    GpuStage("kernels of the eager denoiser", 15, kernels_of("denoiser_step", "eager")),
    GpuStage("ONNX Runtime", 30, onnxruntime),
    GpuStage("TensorRT on small networks", 90, gpu_tensorrt.small),
    GpuStage("TensorRT for RTX on small networks", 90, gpu_tensorrt.small_rtx),
    GpuStage("SVD with 14 frames", 150, svd_14),
    GpuStage("diffusers with torch.compile", 150, diffusers_compiled),
    GpuStage("TensorRT at full size", 480, gpu_tensorrt.full_size),  # alone: --only, with a longer --limit-s
)
