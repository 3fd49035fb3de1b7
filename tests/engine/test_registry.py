"""The table of backends: whoever lists backends reads it, and every row opens what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svd_bench.subjects import cases as subjects
from svd_engine import info
from svd_engine.backends.registry import BACKENDS, NAMES, PLAN_BACKENDS, check_name, names
from svd_engine.bundle.flavours import FLAVOURS, Flavour
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.errors import SettingsError
from svd_engine.install import install_line
from svd_engine.networks.modules import Modules
from tests.support import tensorrt_double
from tests.support.commands import call

CPU = torch.device("cpu")


def test_the_rows() -> None:
    assert NAMES == ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "compiled", "eager")
    assert [row.flavour for row in PLAN_BACKENDS] == list(FLAVOURS.values())
    assert {row.name for row in BACKENDS.values() if not row.of_bundle} == {"compiled", "eager"}
    assert names(of_bundle=False) == "compiled, eager"
    assert BACKENDS["onnxruntime"].install("cuda") == install_line("cuda")
    assert BACKENDS["eager"].install("cuda") == ""


def test_whoever_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(BACKENDS) == subjects.BACKEND_NAMES
    assert {ability.backend for ability in info.abilities()} == set(BACKENDS)
    assert call(main, "generate", "--help") == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "|".join(NAMES) in shown


def test_a_name_that_is_none() -> None:
    with pytest.raises(SettingsError, match=f"backend: expected {', '.join(NAMES)}, got 'trt'"):
        check_name("trt")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_opens_its_backend(
    name: str, tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = BACKENDS[name]
    flavour: Flavour | None = row.flavour
    if flavour is not None:
        version = ".".join(map(str, (*flavour.oldest, 0, 1)))
        tensorrt_double.install(monkeypatch, version, flavour)
    what = Bundle(tiny_bundle) if row.of_bundle else Modules(open_checkpoint(str(tiny_checkpoint)))
    assert row.open(what, CPU, None).name == name
