"""`svd-bench compiled --ladder`, and the totals of the smallest networks, held."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import onnx
import pytest

from svd_bench.cli import main
from svd_bench.compiled import ladder
from svd_bench.compiled.compile_bundle import compile_bundle
from svd_bench.compiled.compiling import CompileCase
from svd_bench.compiled.document import CompiledNetwork, grown, ladder_table, read_compiled
from svd_bench.compiled.ladder import BARE, compile_ladder, rungs
from tests.bench.test_compiled import document, network
from tests.support import damage
from tests.support.commands import call

TOTALS = Path(__file__).with_name("compiled_tiny_sm89.json")  # svd-bench compiled, of `tiny_half_bundle`


def test_a_rung_adds_a_rewrite() -> None:
    assert rungs(["a", "b"]) == [(BARE, ("a", "b")), ("+ a", ("b",)), ("+ b", ())]
    assert rungs([]) == []


def test_the_rungs_of_the_smallest_decoder(
    half_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is another graph of the decoder; the encoders, which no rewrite changes, have no rungs."""
    operators: list[list[str]] = []

    def compiled(case: CompileCase) -> CompiledNetwork:
        model = onnx.load(case.graph, load_external_data=False)
        operators.append([node.op_type for node in model.graph.node])
        return network(case.network, kernels=20 - len(operators))

    monkeypatch.setattr("svd_bench.compiled.ladder.compiled_in_child", compiled)
    networks = ("--network", "vae_decoder", "--network", "vae_encoder", "--network", "image_encoder")
    assert call(main, "compiled", half_bundle, "--ladder", *networks, "--out", tmp_path) == 0
    made = read_compiled(tmp_path / "ladder.json")
    notes = [rung.network.partition(": ")[2] for rung in made.networks]
    names = ("temporal-conv2d", "resnet-blend", "transposed-upsample", "frames-in-groups")
    assert notes == [BARE, *(f"+ {name}" for name in names)]
    assert {rung.network.partition("-")[0] for rung in made.networks} == {"vae_decoder"}
    assert [nodes.count("ConvTranspose") > 0 for nodes in operators] == [False, False, False, True, True]
    assert [nodes.count("Resize") > 0 for nodes in operators] == [True, True, True, False, False]
    out = capsys.readouterr().out
    assert "+ frames-in-groups" in out
    assert out.splitlines()[-1] == made.model_dump_json()


def test_an_interrupted_ladder_is_resumed(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same code only: not of another commit, nor of a checkout with changes, nor of a damaged file."""
    compiled: list[str] = []

    def interrupted(case: CompileCase) -> CompiledNetwork:
        if len(compiled) == 2:
            raise KeyboardInterrupt
        compiled.append(case.network.partition(": ")[2])
        return network(case.network)

    def climb(commit: str) -> list[str]:
        """The rungs that are compiled."""
        compiled.clear()
        monkeypatch.setattr("svd_bench.measuring.environment.commit", lambda folder: commit)
        with suppress(KeyboardInterrupt):
            compile_ladder(tiny_half_bundle, "sm89", ["vae_decoder"], lambda line: None, path)
        return list(compiled)

    path = tmp_path / "ladder.json"
    monkeypatch.setattr(ladder, "exported", lambda *_: nullcontext(tmp_path))
    monkeypatch.setattr(ladder, "compiled_in_child", interrupted)
    first, second = [BARE, "+ temporal-conv2d"], ["+ resnet-blend", "+ transposed-upsample"]
    assert climb("a") == first
    assert climb("a") == second
    assert [rung.network.partition(": ")[2] for rung in read_compiled(path).networks] == first + second
    assert climb("b") == first
    assert climb("b+dirty") == climb("b+dirty") == first
    path.write_text("{")
    assert climb("b") == first


def test_a_ladder_is_not_compared(tiny_half_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "compiled", tiny_half_bundle, "--ladder", "--against", tiny_half_bundle) == 2
    assert "leave out --ladder" in capsys.readouterr().err


def test_a_checkpoint_that_has_moved(
    tiny_half_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command has no option for its place now."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    damage.edit(folder, lambda m: m["source"].update(checkpoint="moved"))
    assert call(main, "compiled", folder, "--ladder") == 1
    said = capsys.readouterr().err
    assert f"checkpoint 'moved': expected what {folder} was exported from" in said
    assert said.endswith("Bring it back, or measure a bundle that was exported from where it lies now.\n")


def test_the_table_of_rungs() -> None:
    table = ladder_table(document(network("d: no rewrites", gib=7), network("d: + x", gib=3)))
    assert [list(row)[:6] for row in table.rows] == [
        ["d", "no rewrites", "10", "8.0 GiB", "", "0.5 GiB"],
        ["d", "+ x", "10", "4.0 GiB", "-50.0%", "0.5 GiB"],
    ]


def test_what_grew_is_named() -> None:
    small, large = network(gib=3), network(gib=7, kernels=12)
    assert grown(large, small) == grown(small, small) == []
    assert grown(small, large) == [
        "kernels: 10 -> 12",
        "bytes: 4,294,967,296 -> 8,589,934,592",
        "_gemm_mha_v2: 10 of 4.0 GiB -> 12 of 8.0 GiB",
    ]


def test_the_smallest_networks_have_not_grown(tiny_half_bundle: Path) -> None:
    """Kernels, traffic and activations are the same on every machine."""
    held = read_compiled(TOTALS)
    made = compile_bundle(tiny_half_bundle, held.target, ("denoiser", "vae_decoder"), lambda line: None)
    assert [n.network for n in made.networks] == [n.network for n in held.networks]
    for before, after in zip(held.networks, made.networks, strict=True):
        assert grown(before, after) == []
