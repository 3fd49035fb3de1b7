"""SVD's and SVD-XT's real networks, with random weights, on an ordinary machine.  Run with `make full`,
which CI does too; `make longest` adds what CI has no minutes for."""

from __future__ import annotations

import json
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from svd_bench.compiled.compiling import CompileCase, compiled_in_child
from svd_bench.compiled.document import grown, read_compiled
from svd_bench.memory.plans import COMMITTED, plans_document, read_plans, ways_of_torch
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.checkpoint.weights import build
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import denoiser
from svd_engine.spec.weights import COMPONENTS
from svd_export.graph_check import check_graph
from svd_export.tensorrt_ops import TensorRTRelease
from tests.support.paths import ROOT
from tests.support.stability_file import tensors_of

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]

GIB = 2**30
EXPORT = """
import resource, sys
from svd_export.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("peak", used.ru_maxrss * 1024, "seconds", round(used.ru_utime + used.ru_stime))
"""

LOAD = """
import sys
import torch
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.checkpoint.weights import build

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

checkpoint, component = open_checkpoint(sys.argv[1]), sys.argv[2]
build(component, checkpoint.configs[component])  # loads the libraries
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
module = checkpoint.load(component, torch.float16)
print(sum(t.numel() * t.element_size() for t in module.state_dict().values()), status("VmHWM") - before)
"""


@dataclass(frozen=True)
class Export:
    """A run of `svd-export onnx`: peak in bytes, processor seconds, what it said."""

    peak: int
    seconds: int
    said: str

    def __str__(self) -> str:
        return f"peak {self.peak / GIB:.2f} GiB, {self.seconds} s of processor time\n{self.said}"


def export(*arguments: str) -> Export:
    command = [sys.executable, "-c", EXPORT, "onnx", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = map(int, re.findall(r"peak (\d+) seconds (\d+)", done.stdout)[0])
    return Export(peak, seconds, done.stderr)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Of a bundle of gigabytes, which goes when its test ends: pytest would keep it for three runs."""
    yield tmp_path / "bundle"
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SVD-XT in Stability's layout, fp16, with noise that repeats for weights: 4.5 GB."""
    configs = random_checkpoint("svd-xt").configs
    networks = SimpleNamespace(**{part: build(part, configs[part]) for part in COMPONENTS})
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(networks).items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = tmp_path_factory.mktemp("single") / "svd_xt.safetensors"
    noise = memoryview((0.02 * torch.randn(2**24, generator=torch.manual_seed(0))).half().numpy()).cast("B")
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, end, len(noise)):
            stream.write(noise[: end - begin])
    yield file
    file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_single_file_is_loaded_in_little_more_than_its_size(single_file: Path) -> None:
    total = 0
    for component in COMPONENTS:
        command = [sys.executable, "-c", LOAD, str(single_file), component]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        print(f"\n{component}: {size / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB more than before")
        assert peak <= size + GIB
        total += size
    assert total == pytest.approx(single_file.stat().st_size, rel=0.01)


@pytest.mark.longest
def test_a_single_file_is_exported(single_file: Path, place: Path) -> None:
    made = export(str(single_file), "-o", str(place))
    print(f"\nsingle file: {made}")
    assert made.peak < 8 * GIB
    assert Bundle(place).manifest.model.frames == 25


COMPILED = ROOT / "benchmarks" / "svd_bench" / "results" / "compiled"
# network -> attention: width of a head -> how many, in one kernel and as products
FUSED = {"image_encoder": {80: 32}, "vae_encoder": {}, "denoiser": {64: 32}, "vae_decoder": {}}
APART = {"image_encoder": {}, "vae_encoder": {512: 1}, "denoiser": {}, "vae_decoder": {512: 1}}


@dataclass(frozen=True)
class Half:
    bundle: Bundle
    frames: int
    export: Export


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("svd", 14), marks=pytest.mark.longest, id="svd"),
        pytest.param(("svd-xt", 25), id="svd-xt"),
    ],
)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Half]:
    """576x1024, fp16, as the command exports it; 5 GB."""
    family, frames = request.param
    target = tmp_path_factory.mktemp("half") / family
    made = export("--random-weights", family, "-o", str(target))
    yield Half(Bundle(target), frames, made)
    shutil.rmtree(target)


def test_exports_in_half_precision(half: Half) -> None:
    """Under 8 GiB, every graph checked by onnx as it is written, nothing run; TensorRT's table fits all."""
    manifest = half.bundle.manifest
    print(f"\n{manifest.model.name}: {half.export}")
    assert half.export.peak < 8 * GIB
    assert (str(manifest.precision), manifest.model.random_weights) == ("float16", True)
    assert [(p.frames, p.height, p.width) for p in manifest.profiles] == [(half.frames, 576, 1024)]
    versions: tuple[TensorRTRelease, ...] = ("10.14", "11")
    for entry in manifest.networks:
        graph = onnx.load(half.bundle.graph(entry.spec, "onnxruntime"), load_external_data=False).graph
        shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
        assert shapes == {t.name: t.shape for t in entry.spec.inputs}
        for version in versions:
            report = check_graph(half.bundle.graph(entry.spec, "tensorrt"), version)
            assert report.findings == ()
            assert (report.fused, report.apart) == (FUSED[entry.spec.network], APART[entry.spec.network])
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    print(json.dumps(sizes, indent=1))
    assert 2.5e9 < sizes["denoiser.bin"] < 3.2e9  # 1,525 M parameters less what the rewrites drop, 2 bytes


@pytest.mark.parametrize("network", ["vae_decoder", pytest.param("denoiser", marks=pytest.mark.longest)])
def test_the_compiler_takes_it(half: Half, network: str) -> None:
    """For sm89 in 12 GiB, and makes of it no more than the committed document says."""
    (entry,) = (e for e in half.bundle.manifest.networks if e.spec.network == network)
    graph = half.bundle.graph(entry.spec, "tensorrt")
    compiled = compiled_in_child(CompileCase(network=entry.spec.key, graph=graph, target="sm89"))
    print(compiled.model_dump_json(exclude={"kinds", "names"}))
    assert compiled.fused_attentions == sum(FUSED[network].values())
    assert compiled.peak_host_bytes < 12 * GIB
    for committed in read_compiled(COMPILED / "svd-xt-sm89.json").networks:
        assert committed.network != compiled.network or grown(committed, compiled) == []


@pytest.mark.longest
@pytest.mark.parametrize("family", ["svd", "svd-xt"])
def test_exports_in_full_precision(family: str, place: Path) -> None:
    """576x1024, decoded whole: no network takes more memory, or a longer graph's time, for more frames."""
    made = export("--random-weights", family, "--dtype", "fp32", "-o", str(place))
    print(f"\n{family}, float32: {made}")
    assert made.peak < 8 * GIB
    assert Bundle(place).manifest.profiles[0].decode_chunk == (25 if family == "svd-xt" else 14)


WITHIN = """
import re, torch
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import random_checkpoint

with VideoEngine.from_checkpoint(random_checkpoint("svd"), device="cpu", memory="8GiB") as engine:
    run = engine(torch.rand(1, 3, 64, 128), 64, 128, 14, num_inference_steps=1, output_type="pt").report
status = open("/proc/self/status").read()
print("seen", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), run.plan.peak_bytes, run.plan.residency)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_video_within_a_budget() -> None:
    """SVD's networks in float32, 8.5 GiB with their libraries, in 8 GiB of a process: one at a time.

    The peak is of loading the UNet.
    """
    done = subprocess.run([sys.executable, "-c", WITHIN], capture_output=True, text=True, check=True)
    seen, planned, residency = done.stdout.split("seen ")[1].split()
    print(f"\na video within 8 GiB: planned {int(planned) / GIB:.2f} GiB, seen {int(seen) / GIB:.2f} GiB")
    assert residency == "swapped"
    assert int(seen) <= int(planned) <= 8 * GIB


@pytest.mark.longest
def test_the_committed_plans_are_what_is_counted() -> None:
    """docs/cards.md shows them: every row of torch, whose networks take minutes to count."""
    shown = [row for row in read_plans(COMMITTED).rows if row.source == "counted"]
    ways = [ways_of_torch(random_checkpoint(family)) for family in ("svd", "svd-xt")]
    assert tuple(shown) == plans_document(ways).rows


def test_diffusers_attends_twice_as_often() -> None:
    """64 times a step: half of it to one token, which the rewrites turn into that token's projection."""
    from diffusers import UNetSpatioTemporalConditionModel
    from diffusers.models.attention_processor import Attention

    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(random_checkpoint("svd").configs["unet"])
    assert sum(isinstance(part, Attention) for part in unet.modules()) == 2 * FUSED["denoiser"][64]


@pytest.mark.longest  # tiny ones of the same modules are held in CI, rewrite by rewrite
def test_the_full_unet_equals_diffusers_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    """14 frames of 64x128 through our denoiser, rewrites on, and diffusers' own UNet: 1e-4 relative."""
    checkpoint = random_checkpoint("svd")
    spec = denoiser(Profile(14, 64, 128), checkpoint.model.architecture, FLOAT32)
    inputs = example_inputs(spec)
    with torch.no_grad():
        ours = Modules(checkpoint).network(spec)(**inputs)
        unet = checkpoint.load("unet", torch.float32)
        expected = reference(unet, inputs)
    relative = float((ours - expected).abs().max() / expected.abs().max())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capsys.disabled():
        print(f"\nfull UNet, float32: relative difference {relative:.2e}, peak {peak / GIB:.2f} GiB")
    assert relative <= 1e-4


def reference(unet: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One guided step written out as diffusers' pipeline and EulerDiscreteScheduler have it."""
    x, sigma, guidance = inputs["x"], inputs["sigma"], inputs["guidance"][:, :, None, None, None]
    scaled = torch.cat([x] * 2) / (sigma**2 + 1) ** 0.5
    first = torch.cat([torch.zeros_like(inputs["first_latent"]), inputs["first_latent"]])
    first = first.unsqueeze(1).repeat(1, x.shape[1], 1, 1, 1)
    embedding = torch.cat([torch.zeros_like(inputs["embedding"]), inputs["embedding"]])
    v = unet(
        torch.cat([scaled, first], dim=2),
        0.25 * sigma.log(),
        encoder_hidden_states=embedding,
        added_time_ids=torch.cat([inputs["time_ids"]] * 2),
        return_dict=False,
    )[0]
    unconditional, conditional = v.chunk(2)
    v = unconditional + guidance * (conditional - unconditional)
    return v * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
