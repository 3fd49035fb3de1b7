"""What TensorRT's compiler makes of a graph: kernels, bytes that they read and write, memory.  No GPU needed.

TensorRT for RTX compiles for a named kind of card on any machine, and its detailed log lists every kernel
with the tensors that it takes and makes.  The same graph gives the same figures on every machine, so a test
can hold them, as it cannot hold a timing.

A tensor counts once for each kernel that reads or writes it, weights included, at its full size: caches make
it less, a kernel that goes over its input twice (a group normalisation) makes it more.

TensorRT's own API is called, and not Polygraphy's loaders: those log through one logger of the process that
keeps no lines, and choose the flavour by a flag of the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_engine.backends.tensorrt.library import library, require
from svd_engine.bundle.flavours import TENSORRT_RTX, TURING, sm
from svd_engine.bundle.manifest import CompiledFigures
from svd_engine.errors import BackendUnavailable, ExportError, SettingsError
from svd_export import turing
from svd_export.kernel_arithmetic import FUSED_ATTENTION, kernel_flop

if TYPE_CHECKING:
    import tensorrt_rtx

BYTES = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Int8": 1, "UInt8": 1, "Bool": 1, "FP8": 1
}  # fmt: skip
SYNCHRONISATION = ("signal", "wait")  # of streams: kinds of layers that are no kernels

_LAYER = re.compile(
    r"Name: (?P<name>\S+), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: [^,]*, StreamId: \d+, "
    r"Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: [^,]*, Dimensions: \[(?P<sides>[\d,]*)\],.*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
_NUMBERS = re.compile(r"_myl\d+|_\d+(?=_|\+|$)|(?<=__fc)\d+|(?<=__mye)\d+")  # in a kernel's name


@dataclass(frozen=True)
class Kernel:
    name: str  # the compiler's
    kind: str  # gemm, correlation (a convolution), kgen (generated for what it fuses), ...
    read_bytes: int  # weights included
    written_bytes: int
    nodes: tuple[str, ...]  # of the ONNX graph that it computes, wholly or in part
    flop: int = 0  # of its convolution, products or attention, 2 per multiply-add
    float32: bool = False  # it computes these in float32, TF32 being off

    @property
    def family(self) -> str:
        """Its name without numbers: kernels that do the same have it in common."""
        return _NUMBERS.sub("", self.name)


@dataclass(frozen=True)
class Traffic:
    """Of several kernels."""

    kernels: int
    read_bytes: int
    written_bytes: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Compiled:
    kernels: tuple[Kernel, ...]  # in the order in which they run
    activation_bytes: int
    weights_bytes: int

    @property
    def total(self) -> Traffic:
        return _traffic(self.kernels)

    @property
    def fused_attentions(self) -> int:
        """Layers of attention that are one kernel each, which never writes the scores."""
        return sum(FUSED_ATTENTION in kernel.name for kernel in self.kernels)

    def by_kind(self) -> dict[str, Traffic]:
        """Largest first."""
        return self._by(lambda kernel: kernel.kind)

    def by_family(self) -> dict[str, Traffic]:
        """Largest first."""
        return self._by(lambda kernel: kernel.family)

    def figures(self) -> CompiledFigures:
        """What a manifest keeps of it."""
        total = self.total
        return CompiledFigures(
            kernels=total.kernels,
            read_bytes=total.read_bytes,
            written_bytes=total.written_bytes,
            activation_bytes=self.activation_bytes,
            weights_bytes=self.weights_bytes,
        )

    def _by(self, key: Callable[[Kernel], str]) -> dict[str, Traffic]:
        groups: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            groups.setdefault(key(kernel), []).append(kernel)
        traffic = {name: _traffic(kernels) for name, kernels in groups.items()}
        return dict(sorted(traffic.items(), key=lambda item: -item[1].bytes))


def compile_graph(graph: Path, target: str) -> Compiled:
    """Compiles the ONNX graph at `graph` for `target` ("sm89"); the engine itself is thrown away.

    Raises BackendUnavailable without TensorRT for RTX, SettingsError for a target that it does not know, and
    ExportError with its words when it does not take the graph.
    """
    _, lines = build(graph, target)
    return read_log(lines)


def build(graph: Path, target: str) -> tuple[bytes, list[str]]:
    """The engine for `target`, and what the build logged.  Raises as `compile_graph`."""
    trt = _require()
    wanted = capability(target)
    with _parsing(trt, graph) as (builder, network, log, errors):
        if errors:
            raise _refused(graph, "; ".join(errors))
        if target == sm(TURING):
            turing.prepare(network, trt)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)
        config.max_aux_streams = 0  # as plans are built: kernels side by side would hold the memory of both
        config.num_compute_capabilities = 1
        config.set_compute_capability(wanted, 0)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _refused(graph, "; ".join(log.errors))
        return bytes(memoryview(plan)), log.lines


def parse_errors(graph: Path) -> tuple[str, ...]:
    """What TensorRT's parser does not take of `graph`; nothing when it takes all of it.

    Raises BackendUnavailable without TensorRT for RTX.
    """
    with _parsing(_require(), graph) as (_builder, _network, _log, errors):
        return errors


def read_log(lines: Iterable[str]) -> Compiled:
    """Reads what a build logged: profiling verbosity DETAILED, a logger that keeps VERBOSE messages.

    Raises ExportError when the kernels or the memory are not in it, or of a type that is not known here.
    """
    kernels: list[Kernel] = []
    memory: dict[str, int] = {}
    for line in lines:
        if found := _LAYER.search(line):
            if found["kind"] not in SYNCHRONISATION:
                kernels.append(_kernel(found))
        elif found := _MEMORY.search(line):
            memory[found[1]] = int(found[2])
    if not kernels or len(memory) < 2:
        raise ExportError(
            "log of a TensorRT build",
            expected="every kernel, total activation memory and total weights memory",
            got=f"{len(kernels)} kernels and {', '.join(memory) or 'no'} memory",
            remedy="Build with profiling verbosity DETAILED and keep the VERBOSE messages.",
        )
    return Compiled(tuple(kernels), memory["Activation"], memory["Weights"])


def installed() -> str | None:
    """Version of the TensorRT for RTX that is installed; None without one."""
    try:
        return str(_require().__version__)
    except BackendUnavailable:
        return None


def targets() -> tuple[str, ...]:
    """Cards that the installed TensorRT for RTX compiles for: "sm89", ...  Raises BackendUnavailable."""
    names = _require().ComputeCapability.__members__
    return tuple(name.lower() for name in names if re.fullmatch(r"SM\d+", name))


def capability(target: str) -> tensorrt_rtx.ComputeCapability:
    """Of a name such as "sm89".  Raises SettingsError for one that cannot be compiled for."""
    known = targets()
    if target not in known:
        raise SettingsError(
            "target", expected=f"one of {', '.join(known)}", got=repr(target), remedy="Choose one of these."
        )
    found: tensorrt_rtx.ComputeCapability = getattr(_require().ComputeCapability, target.upper())
    return found


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str  # a key of BYTES

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * prod(self.shape)


def _kernel(found: re.Match[str]) -> Kernel:
    inputs, constants, made = (
        list(_tensors(found["name"], found[part])) for part in ("inputs", "constants", "outputs")
    )
    shapes = ([tensor.shape for tensor in part] for part in (inputs, constants, made))
    flop = kernel_flop(found["name"], found["kind"], *shapes)
    return Kernel(
        name=found["name"],
        kind=found["kind"],
        read_bytes=sum(tensor.bytes for tensor in (*inputs, *constants)),
        written_bytes=sum(tensor.bytes for tensor in made),
        nodes=tuple(dict.fromkeys(_NODE.findall(found["metadata"]))),
        flop=flop,
        float32=flop > 0 and all(tensor.dtype == "Float" for tensor in inputs),
    )


def _tensors(kernel: str, tensors: str) -> Iterator[_Tensor]:
    for tensor in _TENSOR.finditer(tensors):
        if tensor["dtype"] not in BYTES:
            raise ExportError(
                f"kernel {kernel} in the log of a TensorRT build",
                expected=f"tensors of type {', '.join(BYTES)}",
                got=tensor["dtype"],
                remedy="Report this with the version of TensorRT.",
            )
        shape = tuple(int(side) for side in tensor["sides"].split(",") if side)
        yield _Tensor(shape, tensor["dtype"])


def _traffic(kernels: Iterable[Kernel]) -> Traffic:
    held = list(kernels)
    return Traffic(len(held), sum(k.read_bytes for k in held), sum(k.written_bytes for k in held))


def _require() -> Any:
    """The module.  Raises BackendUnavailable."""
    require(TENSORRT_RTX)
    return library(TENSORRT_RTX)


@contextmanager
def _parsing(trt: Any, graph: Path) -> Iterator[tuple[Any, Any, Any, tuple[str, ...]]]:
    """Builder, network, log, and what the parser did not take.

    One frame holds all of them until the end: none keeps what it was made from alive.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    taken = parser.parse_from_file(str(graph))  # from a file, for the weights beside it
    said = [parser.get_error(index) for index in range(0 if taken else parser.num_errors)]
    errors = tuple(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in said)
    try:
        yield builder, network, log, errors
    finally:
        del said, parser, network, builder


def _refused(graph: Path, said: str) -> ExportError:
    return ExportError(
        f"graph {graph.name}",
        expected="a graph that TensorRT compiles",
        got=said,
        remedy="`svd-export check` names what TensorRT does not take.",
    )


def _log(trt: Any) -> Any:
    """A logger of one build; TensorRT for RTX keeps none for the process."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines += message.splitlines()
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
