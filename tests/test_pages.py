"""What README and the pages tell to run: commands parse, Python compiles, names of ours in it exist.

What needs no weights is run elsewhere: tests/test_install.py, tests/examples, tests/triton.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import typer

from tests.support.paths import ROOT
from tests.test_install import EXTRAS
from tests.test_remedies import COMMANDS, command, faults

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/*/README.md", "engine/svd_engine/assets/**/*.md")
    for path in ROOT.glob(pattern)
)
# Programs that are not this project's.  Their lines are for a reader's machine: not checked here.
OTHERS = {"apt-get", "build/cpp/svd_generate", "cmake", "curl", "docker", "hf", "ln", "pre-commit", "ray"}
SHELL = {"", "console", "bash", "sh"}
USAGE_ERROR: Any = typer.BadParameter.__base__  # of unknown options and missing ones, too


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The language and the text of each fenced block."""
    text = (ROOT / page).read_text()
    for found in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def is_shell(language: str, text: str) -> bool:
    """A block without a language is one when its first word is a program that we know."""
    first = text.split(maxsplit=1)[0] if text.split() else ""
    ours = {*COMMANDS, "make", "pip", "python"} | OTHERS
    return language in SHELL and (bool(language) or first in ours)


def command_lines(page: str) -> Iterator[list[str]]:
    """Every command in the page's blocks, in words, without comments."""
    for language, text in blocks(page):
        if is_shell(language, text):
            for line in text.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&", line):
                    if words := shlex.split(part, comments=True):
                        yield words


ALL_COMMANDS = [(page, words) for page in PAGES for words in command_lines(page)]
ALL_PYTHON = [(page, text) for page in PAGES for language, text in blocks(page) if language == "python"]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check(words: list[str]) -> None:
    """Raises what the command would say of its arguments; runs nothing."""
    program, *rest = words
    if program in COMMANDS:
        sub, *arguments = rest
        assert sub in command(program).commands, words
        command(program).commands[sub].make_context(sub, arguments)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= targets(), words
    elif program == "pip":
        for extras in re.findall(r"[./](?:[\w.-]+\.whl)?\[([\w,-]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= EXTRAS.keys(), words
    elif program == "python":
        script = next(word for word in rest if not word.startswith("-"))
        assert (ROOT / script).is_file(), words
        source = (ROOT / script).read_text()
        for option in (word for word in rest if word.startswith("--")):
            assert f'"{option}"' in source, f"{option} of {words}"
    else:
        assert program in OTHERS, f"{words}: a program that no test knows"


def columns(text: str) -> list[str]:
    """Two programs side by side, with a comment over each, are read one by one."""
    first = text.split("\n", 1)[0]
    if (at := first.find("#", 1)) < 0 or not first.startswith("#"):
        return [text]
    return [
        "\n".join(line[part].rstrip() for line in text.splitlines()) for part in (slice(at), slice(at, None))
    ]


def check_python(text: str) -> None:
    """It compiles, and what it takes from our packages is there."""
    for program in columns(text):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("svd_"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Import):
                assert all(find_spec(alias.name) for alias in node.names), ast.unparse(node)


def test_blocks_are_found() -> None:
    assert {words[0] for _, words in ALL_COMMANDS} >= {*COMMANDS, "make", "pip", "python"}
    assert len(ALL_COMMANDS) > 40
    assert len(ALL_PYTHON) > 4


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS)
def test_a_command_line_is_taken(page: str, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(("page", "text"), ALL_PYTHON)
def test_python_compiles_and_its_names_are_there(page: str, text: str) -> None:
    check_python(text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(svd-\w+ [a-z][^`]*)`", text):
        assert faults(" ".join(code.split())) == []


@pytest.mark.parametrize(
    "line",
    [
        "svd-engine generate photo.jpg -o video.mp4 --checkpoint svd --nothing 3",
        "svd-engine generate photo.jpg -o video.mp4 --checkpoint svd --steps many",
        "svd-engine generate photo.jpg --checkpoint svd",  # without -o
        "svd-engine nothing",
        "make nothing",
        "pip install '.[nothing]'",
        "python examples/python/nothing.py",
        "python examples/python/triton_client.py --nothing",
        "nothing at all",
    ],
)
def test_a_wrong_line_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check(shlex.split(line))


def test_wrong_python_is_noticed() -> None:
    with pytest.raises(AssertionError, match="from svd_engine import nothing"):
        check_python("from svd_engine import nothing")
    with pytest.raises(SyntaxError):
        check_python("engine = (")
