"""What our code uses of TensorRT, read from its syntax trees: nothing to keep up to date by hand."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.paths import ROOT

FOLDERS = ("engine", "export", "benchmarks", "examples")
GONE = "__gone"  # an attribute that nothing has


def sources() -> list[Path]:
    """The files that import tensorrt, anywhere in them."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if module_name(ast.parse(path.read_text()))]


def module_name(tree: ast.AST) -> str | None:
    """What a file calls the module."""
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import) else ():
            if alias.name == "tensorrt":
                return alias.asname or alias.name
    return None


def names(path: Path) -> set[str]:
    """Everything reached from the module, as dotted names: "Builder", "BuilderFlag.STRIP_PLAN"."""
    tree = ast.parse(path.read_text())
    module = module_name(tree)
    whole = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name.removeprefix(f"{module}.") for name in whole if name.startswith(f"{module}.")}


class Probe(ast.NodeTransformer):
    """Beside every use of one of `members` puts the use of a name that is not there.

    `config.set_flag` becomes `(config.set_flag__gone, config.set_flag)[1]`, of the same type, so a type
    checker that knows what `config` is must object, once for each use, and one that takes it for Any cannot.
    """

    def __init__(self, members: set[str], module: str) -> None:
        self.members, self.module = members, module
        self.placed: list[str] = []

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node).startswith(f"{self.module}."):  # `names` has these
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
    module = module_name(tree)
    assert module
    probe = Probe(members, module)
    tree = ast.fix_missing_locations(probe.visit(tree))
    return ast.unparse(tree), probe.placed
