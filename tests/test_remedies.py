"""Every remedy can be followed: the commands, options and functions that messages name are there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from svd_engine.cli import console
from svd_engine.errors import BackendUnavailable
from svd_engine.shell import quoted
from tests.support.commands import call
from tests.support.paths import ROOT

SOURCES = [
    path
    for folder in ("engine/svd_engine", "export/svd_export", "benchmarks/svd_bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
COMMANDS = {"svd-engine": "svd_engine.cli.main", "svd-export": "svd_export.cli", "svd-bench": "svd_bench.cli"}
HOLE = "\0"  # stands where a message puts in a value
WORDS = rf"[\w{HOLE}./-]+"
# functions that remedies name, as they are written there, and where they live
FUNCTIONS = {
    "clamp": "torch.Tensor",
    "from_bundle": "svd_engine.engine.VideoEngine",
    "from_checkpoint": "svd_engine.engine.VideoEngine",
    "get_context": "multiprocessing",
    "manual_seed": "torch.Generator",
    "open": "builtins",
    "open_checkpoint": "svd_engine.checkpoint.opening",
    "save_file": "safetensors.torch",
    "save_pretrained": "diffusers.StableVideoDiffusionPipeline",
    "set_progress_bar_config": "svd_engine.engine.VideoEngine",
    "to": "torch.Tensor",
}
NO_COMMANDS = {"rows", "wrote"}  # words after a command's name in plain sentences
# a command to run, in backticks or after "Run:": there an option is what it is in Python, too
TO_RUN = re.compile(r"`(?:svd-|pip |make |docker |xcode-)[^`]*`|(?:[Rr]un: |^)(?:svd-|pip ).*")
IS_COMMAND_LINE = {"cli.py", "tensorrt_cli.py", "request.py"}  # request.py: options as data


def text_of(node: ast.expr) -> str:
    """The literal parts of an expression, with a hole for each value; both sides of a choice."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)}\n{text_of(node.orelse)}"
    return HOLE


def remedies(source: str) -> Iterator[str]:
    """Of `remedy=...` in calls and `remedy = ...` in assignments, and of what returns a command to run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "remedy":
            yield text_of(node.value)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                for name, value in zip(names, values, strict=False):
                    if isinstance(name, ast.Name) and name.id == "remedy":
                        yield text_of(value)
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and re.match(r"svd-\w+ \w", text_of(node)):
            yield text_of(node)  # a command that a function makes for remedies


def sentences(source: str) -> Iterator[str]:
    """Every text that the code may show: all but docstrings, and the parts of larger texts."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node not in docstrings | parts:
            yield text_of(node)


def stray_options(sentence: str) -> list[str]:
    """Options of a command line outside a command to run."""
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", TO_RUN.sub("", sentence))


ALL = sorted({(path.name, remedy) for path in SOURCES for remedy in remedies(path.read_text())})


@cache
def command(name: str) -> Any:
    """As click has it; typer may bring a click of its own."""
    return typer.main.get_command(importlib.import_module(COMMANDS[name]).app)


def options(one: Any) -> set[str]:
    return {name for parameter in one.params for name in (*parameter.opts, *parameter.secondary_opts)}


EVERY_OPTION = {
    option for name in COMMANDS for one in command(name).commands.values() for option in options(one)
}
OTHERS = {"--force-reinstall"}  # of pip


def faults(remedy: str) -> list[str]:
    """What a remedy names and does not exist."""
    found = []
    for name, sub in re.findall(rf"(svd-\w+) ([a-z][\w-]*)(?={HOLE}|\W|$)", remedy):
        if name in COMMANDS and sub not in {*command(name).commands, *NO_COMMANDS}:
            found.append(f"{name} {sub}")
    for name, sub, rest in re.findall(rf"(svd-\w+) ([a-z][\w-]*)((?: {WORDS})*)", remedy):
        if name in COMMANDS and sub in command(name).commands:
            known = options(command(name).commands[sub])
            found += [o for o in re.findall(r"(?<= )--?[a-z][\w-]*", rest) if o not in known]
    found += [o for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", remedy) if o not in EVERY_OPTION | OTHERS]
    for function in re.findall(r"(\w+)\(", remedy):
        if function.islower() and not resolves(function, remedy):
            found.append(f"{function}()")
    return found


def resolves(function: str, remedy: str) -> bool:
    dotted = re.search(rf"([\w.]+)\.{function}\(", remedy)
    where = dotted[1] if dotted else ""
    if where.startswith(("torch", "diffusers", "svd_engine")):
        return has(where, function)
    return function in FUNCTIONS and has(FUNCTIONS[function], function)


def has(where: str, function: str) -> bool:
    """Whether `where`, a module or a class in one, has the function."""
    module, _, kind = where.rpartition(".")
    try:
        return hasattr(importlib.import_module(where), function)
    except ImportError:
        return hasattr(getattr(importlib.import_module(module), kind, None), function)


def test_remedies_are_found() -> None:
    assert len(ALL) > 80
    assert sum("svd-" in remedy for _, remedy in ALL) > 10


@pytest.mark.parametrize(("file", "remedy"), ALL)
def test_a_remedy_names_what_exists(file: str, remedy: str) -> None:
    assert faults(remedy) == [], f"{file}: {remedy!r}"


@pytest.mark.parametrize(
    ("remedy", "fault"),
    [
        ("Run: svd-export optimise BUNDLE.", "svd-export optimise"),
        ("Run: svd-export onnx svd -o B --colour red.", "--colour"),
        ("Run: svd-engine generate photo --form cpu.", "--form"),  # another command has it
        ("Use --precision fp32.", "--precision"),
        ("Convert it: StableVideoDiffusionPipeline.from_single_file(...).", "from_single_file()"),
        ("Pass torch.no_such_function(x).", "no_such_function()"),
    ],
)
def test_a_remedy_that_names_what_does_not_exist_is_told(remedy: str, fault: str) -> None:
    assert fault in faults(remedy)


LIBRARY = [
    path
    for path in SOURCES
    if not {"svd_bench", "cli"} & set(path.parts) and path.name not in IS_COMMAND_LINE
]
PARTS = (
    "batch",
    "decode-chunk",
    "flavour",
    "frames",
    "guidance",
    "lora",
    "reuse-branch",
    "stream-decoder",
    "variant",
)
PARTS_OF_COMMANDS = {
    "--dtype fp16",
    f"--dtype {HOLE}",
    f"--random-weights {HOLE}",
    " --lora-partial",
    " --stream-weights",
    *(f" --{name} {HOLE}" for name in PARTS),
}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_library_names_no_options(path: Path) -> None:
    """Who calls Python is told its arguments; the command line words them (`console.in_options`)."""
    told = {text for text in sentences(path.read_text()) if stray_options(text)}
    assert told - PARTS_OF_COMMANDS == set()


@pytest.mark.parametrize(
    ("sentence", "stray"),
    [
        ("Use --dtype bf16.", ["--dtype"]),
        ("Run `svd-export onnx svd -o B --dtype bf16`, or pass --bundle B.", ["--bundle"]),
        ("Ask for one of these, or run: svd-export onnx svd -o B --dtype bf16", []),
        ("Install it (`pip install --force-reinstall av`).", []),
    ],
)
def test_options_outside_commands_are_seen(sentence: str, stray: list[str]) -> None:
    assert stray_options(sentence) == stray


@pytest.mark.parametrize(
    ("python", "command_line"),
    [
        ('Use dtype="bf16" or dtype="fp32"; export.', "Use --dtype bf16 or --dtype fp32; export."),
        ('the libraries (or use device="cpu").', "the libraries (or use --device cpu)."),
        ("Use checkpoint=ORIGINAL, opened as", "Use --checkpoint ORIGINAL, opened as"),
        ("use VideoEngine.from_bundle(BUNDLE).", "use --bundle BUNDLE."),
        ("or use write=False.", "or use --no-write."),
        (
            'or decoding="streamed", decode_chunk_size=None.',
            "or --decoding streamed, no --decode-chunk-size.",
        ),
        ('Use variant="a b".', f"Use --variant {quoted('a b')}."),
        ("set_progress_bar_config(disable=True) hides", "set_progress_bar_config(disable=True) hides"),
        ("pipeline.save_pretrained(FOLDER)", "pipeline.save_pretrained(FOLDER)"),
    ],
)
def test_the_command_line_words_settings_with_its_options(python: str, command_line: str) -> None:
    assert console.in_options(python) == command_line


LESSER = "num_frames=1, height=64, width=64, decode_chunk_size=1"  # of a call that does not fit into memory


def test_every_setting_that_a_remedy_names_has_an_option() -> None:
    """And every row of the table is used, and names an option that there is."""
    named = {
        setting["name"]
        for _, remedy in [*ALL, ("", "use write=False"), ("", LESSER)]  # these are made out of several texts
        for setting in console.SETTING.finditer(remedy.replace(HOLE, "X"))
    }
    assert set(console.OPTIONS) <= named
    assert set(console.OPTIONS.values()) <= EVERY_OPTION


def test_one_error_is_worded_for_each_reader(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from svd_bench import cli as bench
    from svd_engine.cli import main as cli
    from svd_engine.engine import VideoEngine

    with pytest.raises(BackendUnavailable, match=r'device="cpu"') as caught:
        VideoEngine.from_checkpoint("demo", device="cuda:99")
    assert "--" not in str(caught.value)
    image, out = ROOT / "engine/svd_engine/assets/coffee.png", tmp_path / "out.gif"
    assert call(cli.main, "generate", image, "-o", out, "--checkpoint", "demo", "--device", "cuda:99") == 1
    told = capsys.readouterr().err
    assert "Use --device cpu, or install" in told
    assert "device=" not in told
    assert call(bench.main, "run", "--checkpoint", "demo", "--backends", "tensorrt", "--out", tmp_path) == 1
    assert "VideoEngine" not in capsys.readouterr().err
