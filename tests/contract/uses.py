"""What our code uses of TensorRT, read from its syntax trees: nothing to keep up to date by hand."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("engine", "export", "benchmarks", "examples")
TENSORRT = frozenset({"tensorrt"})
BOTH = TENSORRT | {"tensorrt_rtx"}
GONE = "__gone"  # an attribute that nothing has


def sources(modules: frozenset[str] = TENSORRT) -> list[Path]:
    """The files that import one of the modules, anywhere in them."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if prefixes(ast.parse(path.read_text()), modules)]


def prefixes(tree: ast.AST, modules: frozenset[str] = BOTH) -> tuple[str, ...]:
    """What a file calls the modules, each with a dot."""
    aliases = (a for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names)
    return tuple({f"{a.asname or a.name}." for a in aliases if a.name in modules})


def names(path: Path) -> set[str]:
    """Everything reached from the module, as dotted names: "Builder", "BuilderFlag.STRIP_PLAN"."""
    tree = ast.parse(path.read_text())
    whole = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name.partition(".")[2] for name in whole if is_of(prefixes(tree), name)}


def is_of(module: tuple[str, ...], name: str) -> bool:
    """A dotted name below the module, without calls in it."""
    return name.startswith(module) and not set(name) & set("([")


class Probe(ast.NodeTransformer):
    """Beside every use of one of `members` puts the use of a name that is not there.

    `config.set_flag` becomes `(config.set_flag__gone, config.set_flag)[1]`, of the same type, so a type
    checker that knows what `config` is must object, once for each use, and one that takes it for Any cannot.
    """

    def __init__(self, members: set[str], module: tuple[str, ...]) -> None:
        self.members, self.module = members, module
        self.placed: list[str] = []

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if is_of(self.module, ast.unparse(node)):  # `names` has these
            return node
        self.generic_visit(node)
        if node.attr not in self.members or not isinstance(node.ctx, ast.Load):
            return node
        missing = f"{node.attr}{GONE}{len(self.placed)}"
        self.placed.append(missing)
        pair = ast.Tuple([ast.Attribute(node.value, missing, ast.Load()), node], ast.Load())
        return ast.Subscript(pair, ast.Constant(1), ast.Load())


def probed(path: Path, members: set[str]) -> tuple[str, list[str]]:
    """The file with its probes, and their names."""
    tree = ast.parse(path.read_text())
    probe = Probe(members, prefixes(tree))
    tree = ast.fix_missing_locations(probe.visit(tree))
    return ast.unparse(tree), probe.placed
