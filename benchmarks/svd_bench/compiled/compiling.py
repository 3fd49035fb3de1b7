"""One graph compiled in a process of its own: CompileCase in on stdin, CompiledNetwork out as JSON.

The compiler takes gigabytes and minutes of a large network, and no interrupt on the way: a process gives its
memory back and can be ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from svd_bench.compiled.arithmetic import flop_of
from svd_bench.compiled.document import CompiledNetwork, KernelGroup, KernelWork
from svd_bench.documents.strict import StrictModel
from svd_bench.measuring.children import in_utf8
from svd_bench.measuring.memory import PeakSampler
from svd_engine.cli import console
from svd_engine.errors import ExportError
from svd_export.compiled import Kernel, Traffic, compile_graph
from svd_export.graph_check import check_graph

LARGEST = 12  # names of kernels that a document keeps


class CompileCase(StrictModel):
    network: str  # key
    graph: Path
    target: str


def compiled_in_child(case: CompileCase) -> CompiledNetwork:
    """Raises ExportError with the child's last words when it fails."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
    ):
        child = subprocess.Popen(
            [sys.executable, "-m", "svd_bench.compiled.compiling"],
            stdin=subprocess.PIPE, stdout=out, stderr=said, encoding="utf-8", env=in_utf8(),
        )  # fmt: skip
        assert child.stdin is not None
        try:
            with suppress(OSError):  # a broken pipe: its exit code tells more
                child.stdin.write(f"{case.model_dump_json()}\n")
                child.stdin.flush()  # and stays open: the child ends when it closes
            child.wait()
        finally:
            child.kill()
            child.wait()
            with suppress(OSError):
                child.stdin.close()
        out.seek(0)
        said.seek(0)
        made, complaints = out.read(), said.read()
    if child.returncode:
        killed = "killed, as when memory runs out" if child.returncode == -9 else ""
        words = complaints.strip().splitlines() or [f"exit code {child.returncode}"]
        raise ExportError(
            f"network {case.network} for {case.target}",
            expected="a graph that TensorRT compiles",
            got=killed or words[-1],
            remedy="Free memory, or choose a smaller profile or another --target.",
        )
    return CompiledNetwork.model_validate_json(made.strip().splitlines()[-1])


def compile_case(case: CompileCase) -> CompiledNetwork:
    """In this process."""
    process, started = psutil.Process(), time.monotonic()
    with PeakSampler(lambda: int(process.memory_info().rss)) as host:
        compiled = compile_graph(case.graph, case.target)
    seconds = time.monotonic() - started
    return CompiledNetwork(
        network=case.network,
        figures=compiled.figures(),
        flop=flop_of(case.graph),
        attentions=sum(check_graph(case.graph, "11").attentions.values()),
        fused_attentions=compiled.fused_attentions,
        kinds=_groups(compiled.by_kind()),
        names=_groups(dict(list(compiled.by_family().items())[:LARGEST])),
        seconds=seconds,
        peak_host_bytes=host.peak,
        work=_work(compiled.kernels),
    )


def _groups(traffic: Mapping[str, Traffic]) -> dict[str, KernelGroup]:
    return {
        name: KernelGroup(kernels=t.kernels, read_bytes=t.read_bytes, written_bytes=t.written_bytes)
        for name, t in traffic.items()
    }


def _work(kernels: Iterable[Kernel]) -> tuple[KernelWork, ...]:
    alike = Counter((k.kind, k.read_bytes + k.written_bytes, k.flop, k.float32) for k in kernels)
    rows = (
        KernelWork(kind=kind, kernels=count, bytes=moved, flop=flop, float32=float32)
        for (kind, moved, flop, float32), count in alike.items()
    )
    return tuple(sorted(rows, key=lambda row: (-row.kernels * row.bytes, -row.flop, row.kind)))


def main() -> None:
    case = CompileCase.model_validate_json(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    print(compile_case(case).model_dump_json())


def end_with_parent() -> None:
    """The compiler takes no interrupt: end when stdin closes, as it does when the parent is gone."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    os._exit(1)


if __name__ == "__main__":
    console.run(main)
