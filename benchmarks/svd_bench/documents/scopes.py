"""What may stand in one table: rows of one document, so of one machine and one run, at one setting.

Two things are the subject of their own tables instead: under an emulated memory cap the settings that fit
differ (decode chunk, guidance, swapping), and on a ladder the rewrites do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from svd_bench.documents.results import Environment, OutOfMemory, Results, Row, Setting

ScopeKind = Literal["run", "ladder", "tiers"]
CAP = "emulated cap "  # notes of rows measured under one begin with it


@dataclass(frozen=True)
class Scope:
    kind: ScopeKind
    setting: Setting  # of the first row; in "tiers" its decode chunk, guidance and swapping vary
    rows: tuple[Row, ...]
    misfits: tuple[OutOfMemory, ...] = ()  # of "tiers"

    @property
    def title(self) -> str:
        s = self.setting
        words = [s.model, f"{s.frames} frames", f"{s.height}x{s.width}", f"{s.steps} steps"]
        if s.batch > 1:
            words.append(f"batch {s.batch}")
        if self.kind == "tiers":
            words.append("emulated memory caps")
        else:
            guidance = "without guidance" if s.guidance == "none" else f"{s.guidance} guidance"
            words += [guidance, f"decode chunk {s.decode_chunk}"]
            words += ["networks swapped"] if s.networks == "swapped" else []
        return ", ".join(words) + (" (random weights)" if s.random_weights else "")


def scopes(document: Results) -> list[Scope]:
    """In the document's order; every row is in exactly one."""
    rows: dict[tuple[ScopeKind, Setting], list[Row]] = {}
    for row in document.rows:
        rows.setdefault(_key(document, row), []).append(row)
    misfits: dict[tuple[ScopeKind, Setting], list[OutOfMemory]] = {}
    for misfit in document.misfits:
        misfits.setdefault(_key(document, misfit), []).append(misfit)
    found = []
    for key in dict.fromkeys((*rows, *misfits)):
        fit, unfit = rows.get(key, []), misfits.get(key, [])
        setting = fit[0].setting if fit else unfit[0].setting
        found.append(Scope(key[0], setting, tuple(fit), tuple(unfit)))
    return found


def _key(document: Results, row: Row | OutOfMemory) -> tuple[ScopeKind, Setting]:
    if row.note.startswith(CAP):
        varied = {"decode_chunk": 0, "guidance": "batched", "networks": "resident"}
        return "tiers", row.setting.model_copy(update=varied)
    return ("ladder" if document.kind == "ladder" or row.note else "run"), row.setting  # a rung has a note


def hardware(environment: Environment) -> dict[str, str]:
    """What must agree before two documents are compared: the device, and the host around it."""
    return {
        "device": environment.device,
        "device memory": str(environment.device_memory),
        "CPU": environment.cpu,
        "cores": str(environment.cores),
        "threads": str(environment.threads),
    }


def by_hardware(documents: Sequence[tuple[str, Results]]) -> list[list[tuple[str, Results]]]:
    """Named documents, those of one machine together, in the order in which machines first appear."""
    groups: dict[tuple[str, ...], list[tuple[str, Results]]] = {}
    for name, document in documents:
        groups.setdefault(tuple(hardware(document.environment).values()), []).append((name, document))
    return list(groups.values())
