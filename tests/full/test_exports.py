"""SVD's and SVD-XT's real networks, with random weights, exported on an ordinary machine, and compiled.

`make full` runs what CI has minutes for, `make longest` all.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from svd_bench.compiled.compiling import CompileCase, compiled_in_child
from svd_bench.compiled.document import grown, read_compiled
from svd_engine.bundle.reading import Bundle
from svd_export.graph_check import check_graph
from svd_export.tensorrt_ops import TensorRTRelease
from tests.support.paths import ROOT

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
