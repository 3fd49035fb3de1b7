"""What counts as a change, what as noise, and what is no comparison at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svd_bench import cli
from svd_bench.documents.results import Results, Row, Spread
from svd_bench.report.compare import Change, compare, comparison_table
from svd_engine.errors import SettingsError
from tests.bench.documents import GIB, environment, ladder, results, row, run, setting, spread, tiers
from tests.support.commands import call


def change(old: Row, new: Row, threshold: float = 0.05) -> Change:
    (found,) = compare(results(old), results(new), threshold).changes
    return found


def timed(median: float, p10: float, p90: float) -> Row:
    return row(latency_ms=Spread(median=median, p10=p10, p90=p90, runs=5))


@pytest.mark.parametrize(
    ("old", "new", "verdicts"),
    [
        ((100, 99, 101), (110, 109, 111), ["slower"]),
        ((100, 99, 101), (90, 89, 91), ["faster"]),
        ((100, 99, 101), (104, 103, 105), []),  # beyond noise, under the threshold
        ((100, 90, 112), (110, 109, 130), []),  # over the threshold, within noise
        ((100, 99, 109), (110, 109, 111), []),  # the intervals touch
        ((100, 99, 101), (100, 99, 101), []),
    ],
)
def test_latency(old: tuple[float, ...], new: tuple[float, ...], verdicts: list[str]) -> None:
    found = change(timed(*old), timed(*new))
    assert found.verdicts == verdicts
    assert found.regressed == (verdicts == ["slower"])
    assert found.latency == pytest.approx(new[0] / old[0] - 1)


def test_one_run_against_several_lies_in_their_interval_or_not() -> None:
    once = row(latency_ms=spread(110, share=0, runs=1))
    assert not change(timed(100, 90, 112), once).regressed
    assert change(timed(100, 99, 101), once).regressed
    assert change(row(latency_ms=spread(100, share=0, runs=1)), once).regressed


def test_the_threshold_is_the_callers() -> None:
    assert change(timed(100, 99, 101), timed(104, 103, 105), threshold=0.03).regressed
    assert not change(timed(100, 99, 101), timed(110, 109, 111), threshold=0.2).regressed


@pytest.mark.parametrize(
    ("old", "new", "verdicts"),
    [
        ({"peak_driver_bytes": 10 * GIB}, {"peak_driver_bytes": 11 * GIB}, ["more memory"]),
        ({"peak_driver_bytes": 10 * GIB}, {"peak_driver_bytes": 9 * GIB}, ["less memory"]),
        ({"peak_torch_bytes": 10 * GIB}, {"peak_torch_bytes": 11 * GIB}, ["more memory"]),
        ({"peak_host_bytes": 10 * GIB}, {"peak_host_bytes": 11 * GIB}, ["more memory"]),
        ({"peak_driver_bytes": 10 * GIB}, {"peak_torch_bytes": 20 * GIB}, []),  # not the same thing
        (
            {"peak_driver_bytes": 100, "peak_torch_bytes": 10},
            {"peak_driver_bytes": 101, "peak_torch_bytes": 20},
            [],  # the driver's figure goes first
        ),
        ({}, {"peak_driver_bytes": 11 * GIB}, []),
    ],
)
def test_memory(old: dict[str, Any], new: dict[str, Any], verdicts: list[str]) -> None:
    found = change(row(**old), row(**new))
    assert found.verdicts == verdicts
    assert found.regressed == ("more memory" in verdicts)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"device": "NVIDIA L4"}, "device: expected NVIDIA H200, as in OLD, got NVIDIA L4 in NEW"),
        ({"device_memory": 80 * GIB}, "device memory"),
        ({"cpu": "Other CPU"}, "CPU: expected Test CPU"),
        ({"cores": 2}, "cores: expected 16"),
        ({"threads": 1}, "threads: expected 16"),
    ],
)
def test_another_machine_is_refused(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError, match=field) as refused:
        compare(results(row()), results(row(), environment=environment(**changed)), 0.05)
    assert "Compare documents of one machine and one setting." in str(refused.value)


def test_another_version_or_driver_is_what_one_compares() -> None:
    new = environment(driver="580", commit="f" * 40, versions={"torch": "2.14"}, command="other")
    assert compare(results(row()), results(row(), environment=new), 0.05).changes


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"frames": 14}, "frames: expected 25, as in OLD, got 14 in NEW"),
        ({"height": 320}, "height: expected 576"),
        ({"steps": 4}, "steps"),
        ({"decode_chunk": 5}, "decode_chunk"),
        ({"guidance": "single"}, "guidance"),
        ({"random_weights": False}, "random_weights: expected True"),
        ({"model": "svd"}, "model"),
    ],
)
def test_another_setting_is_refused(changed: dict[str, Any], field: str) -> None:
    """Even when other rows agree."""
    old = results(row("denoiser_step"), row("vae_decoder"))
    new = results(row("denoiser_step"), row("vae_decoder", setting=setting(**changed)))
    with pytest.raises(SettingsError, match=f"the setting of vae_decoder, svd-engine .*{field}"):
        compare(old, new, 0.05)


def test_several_settings_are_compared_each_with_its_own() -> None:
    short = {"setting": setting(frames=14)}
    old = results(row(ms=100.0), row(ms=50.0, **short))
    new = results(row(ms=50.0, **short), row(ms=200.0))
    found = {c.new.setting.frames: c.verdicts for c in compare(old, new, 0.05).changes}
    assert found == {25: ["slower"], 14: []}


def test_another_kind_is_refused() -> None:
    with pytest.raises(SettingsError, match="kind: expected run, as in OLD, got ladder in NEW"):
        compare(run(), ladder(), 0.05)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"expected something that both measured, got 1 rows and 1 rows"):
        compare(results(row("denoiser_step")), results(row("vae_decoder")), 0.05)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(SettingsError, match="--threshold: expected 0 or more"):
        compare(run(), run(), threshold)


def test_rewrites_may_change_between_versions_but_not_between_rungs() -> None:
    assert change(row(rewrites=("a",)), row(rewrites=("a", "b"))).verdicts == []
    rungs = [row("denoiser_step", ms, rewrites=names) for ms, names in ((100, ("a",)), (50, ("a", "b")))]
    found = compare(results(*rungs, kind="ladder"), results(*reversed(rungs), kind="ladder"), 0.05)
    assert [c.latency for c in found.changes] == [0, 0]


def test_what_was_measured_twice_is_compared_in_order() -> None:
    found = compare(results(row(ms=100), row(ms=200)), results(row(ms=100), row(ms=300)), 0.05)
    assert [c.verdicts for c in found.changes] == [[], ["slower"]]


def test_what_only_one_measured_is_said() -> None:
    found = compare(results(row(), row("denoiser_step")), results(row(), row("vae_decoder")), 0.05)
    text = comparison_table(found).text()
    assert "only in OLD: denoiser_step, svd-engine (compiled, float16)" in text
    assert "only in NEW: vae_decoder, svd-engine (compiled, float16)" in text


def test_more_fitting_under_a_cap_is_no_other_setting() -> None:
    """A version that fits a larger decode chunk into a tier is not refused."""
    old, better = tiers(), tiers().rows[0].setting.model_copy(update={"decode_chunk": 2})
    new = old.model_copy(update={"rows": (old.rows[0].model_copy(update={"setting": better}), *old.rows[1:])})
    found = compare(old, new, 0.05)
    assert (len(found.changes), len(found.only_old), len(found.only_new)) == (3, 1, 1)


def write(folder: Path, **documents: Results) -> list[Path]:
    paths = [folder / f"{name}.json" for name in documents]
    for path, document in zip(paths, documents.values(), strict=True):
        path.write_text(document.model_dump_json())
    return paths


def test_the_command_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = results(row(latency_ms=spread(1200)), row("denoiser_step", 310))
    old, new = write(tmp_path, old=results(row(), row("denoiser_step", 310)), new=slower)
    assert call(cli.main, "compare", old, new) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 of 2 got worse by more than 0.05, beyond noise"
    assert any(
        "whole_video" in line and "slower" in line and "1.20x (1.18 to 1.22)" in line for line in lines
    )
    assert any(
        "denoiser_step" in line and "1.00x (0.98 to 1.02): no difference seen" in line for line in lines
    )
    assert call(cli.main, "compare", old, new, "--threshold", "0.3") == 0
    assert call(cli.main, "compare", new, old) == 0  # faster is no regression


def test_the_command_refuses_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = results(row(), environment=environment(device="NVIDIA L4"))
    old, new = write(tmp_path, old=results(row()), new=other)
    assert call(cli.main, "compare", old, new) == 2
    assert "device: expected NVIDIA H200" in capsys.readouterr().err
