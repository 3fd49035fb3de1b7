"""What changed between two documents of one machine, beyond noise and beyond a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svd_bench.documents.results import Ratio, Results, Row, Setting
from svd_bench.documents.scopes import CAP, hardware
from svd_bench.documents.table import Table, gibibytes, milliseconds, percent, ratio
from svd_engine.errors import SettingsError

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One thing that both documents measured."""

    old: Row
    new: Row
    threshold: float

    @property
    def latency(self) -> float:
        """New over old median, less one."""
        return self.new.latency_ms.median / self.old.latency_ms.median - 1

    @property
    def of_old(self) -> Ratio:
        """New over old, below 1 is faster; from new's p10 over old's p90 to the reverse.

        Not paired: the two were not measured in turns.
        """
        old, new = self.old.latency_ms, self.new.latency_ms
        return Ratio(
            median=new.median / old.median,
            low=new.p10 / old.p90,
            high=new.p90 / old.p10,
            rounds=max(old.runs, new.runs),
        )

    @property
    def beyond_noise(self) -> bool:
        """The intervals from p10 to p90 do not touch; of a single run each, any change is beyond."""
        return self.of_old.differs is not False

    @property
    def peaks(self) -> tuple[int, int] | None:
        """Old and new peak memory: the driver's, else torch's, else the host's, whichever both have."""
        for name in ("peak_driver_bytes", "peak_torch_bytes", "peak_host_bytes"):
            old, new = getattr(self.old, name), getattr(self.new, name)
            if old and new:
                return old, new
        return None

    @property
    def memory(self) -> float | None:
        return self.peaks[1] / self.peaks[0] - 1 if self.peaks else None

    @property
    def verdicts(self) -> list[str]:
        found = []
        if self.beyond_noise and abs(self.latency) > self.threshold:
            found.append("slower" if self.latency > 0 else "faster")
        if self.memory is not None and abs(self.memory) > self.threshold:
            found.append("more memory" if self.memory > 0 else "less memory")
        return found

    @property
    def regressed(self) -> bool:
        return bool({"slower", "more memory"} & set(self.verdicts))


@dataclass(frozen=True)
class Comparison:
    changes: Sequence[Change]
    only_old: Sequence[Row]
    only_new: Sequence[Row]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regressed]


def compare(old: Results, new: Results, threshold: float) -> Comparison:
    """Raises SettingsError unless machine, kind and, row by row, the settings agree.

    A row's rewrites are what changes between versions, so they do not have to agree, except on a ladder.
    """
    if not 0 <= threshold < float("inf"):
        raise SettingsError(
            "--threshold",
            expected="0 or more, as a share (0.05 is 5 %)",
            got=str(threshold),
            remedy="Pass a value in this range.",
        )
    machines = hardware(old.environment) | {"kind": old.kind}, hardware(new.environment) | {"kind": new.kind}
    _refuse_difference("the machine or kind of the two documents", *machines)
    ours, theirs = _keyed(old), _keyed(new)
    for key, row in ours.items():
        other = next((r for k, r in theirs.items() if k not in ours and k[1:] == key[1:]), None)
        if key not in theirs and other is not None and not row.note.startswith(CAP):
            what = f"the setting of {_name(row)}"  # the same thing at another setting is no comparison
            _refuse_difference(what, _words(row.setting), _words(other.setting))
    changes = [Change(row, theirs[key], threshold) for key, row in ours.items() if key in theirs]
    if not changes:
        raise SettingsError(
            "the two documents",
            expected="something that both measured",
            got=f"{len(old.rows)} rows and {len(new.rows)} rows with nothing in common",
            remedy="Measure both with the same command.",
        )
    only_old = [row for key, row in ours.items() if key not in theirs]
    return Comparison(changes, only_old, [row for key, row in theirs.items() if key not in ours])


def comparison_table(comparison: Comparison) -> Table:
    rows = []
    for change in comparison.changes:
        old, new, of_old = change.old, change.new, change.of_old
        peaks = [gibibytes(peak) for peak in change.peaks or (None, None)]
        rows.append(
            [
                old.stage, f"{old.subject} ({old.backend})", old.dtype, ", ".join(change.verdicts) or "-",
                milliseconds(old.latency_ms.median), milliseconds(new.latency_ms.median),
                ratio(of_old.median, of_old.low, of_old.high, of_old.differs), *peaks,
                percent(change.memory, signed=True),
            ]
        )  # fmt: skip
    header = ["stage", "of", "dtype", "", "old", "new", "of old's time", "old peak", "new peak", "change"]
    missing = [f"only in OLD: {_name(row)}" for row in comparison.only_old]
    missing += [f"only in NEW: {_name(row)}" for row in comparison.only_new]
    return Table("Old and new", header, rows, left=4, note="\n".join(missing))


def _keyed(document: Results) -> dict[Key, Row]:
    """By setting first, then by what was measured; what was measured twice is numbered."""
    found: dict[Key, Row] = {}
    for row in document.rows:
        rung = row.rewrites if document.kind == "ladder" else ()
        said = (row.setting, row.subject, row.backend, row.device, row.dtype, row.stage, row.note, rung)
        number = sum(key[:-1] == said for key in found)
        found[(*said, number)] = row
    return found


def _refuse_difference(what: str, old: dict[str, str], new: dict[str, str]) -> None:
    for name, value in old.items():
        if new[name] != value:
            raise SettingsError(
                f"{what}: {name}",
                expected=f"{value}, as in OLD",
                got=f"{new[name]} in NEW",
                remedy="Compare documents of one machine and one setting.",
            )


def _words(setting: Setting) -> dict[str, str]:
    return {name: str(value) for name, value in setting.model_dump().items()}


def _name(row: Row) -> str:
    return f"{row.stage}, {row.subject} ({row.backend}, {row.dtype})"
