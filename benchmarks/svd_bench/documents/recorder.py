"""Keeps what was measured, and writes the document after every change: a cut run keeps what it has."""

from __future__ import annotations

import tempfile
from pathlib import Path

from svd_bench.documents.results import Ceiling, DocumentKind, Environment, Outcome, OutOfMemory, Results, Row
from svd_engine.cli import console
from svd_engine.errors import OutputError


class Recorder:
    """`path` is the document's file, or None for one that is only printed."""

    def __init__(
        self, kind: DocumentKind, environment: Environment, path: Path | None = None, rehearsal: bool = False
    ) -> None:
        self.kind, self.environment, self.path = kind, environment, path
        self.rehearsal = rehearsal
        self.ceiling: Ceiling | None = None
        self._rows: dict[str, Row] = {}
        self._misfits: list[OutOfMemory] = []
        self._warnings: dict[str, None] = {}
        self._outcomes: dict[str, Outcome] = {}

    def put(self, key: str, row: Row) -> None:
        """Adds the row, or replaces the one of the same key in its place."""
        self._rows[key] = row
        self.save()

    def put_out_of_memory(self, misfit: OutOfMemory) -> None:
        self._misfits.append(misfit)
        self.save()

    def warn(self, warning: str | None) -> None:
        if warning:
            self._warnings[warning] = None
            self.save()

    def ended(self, outcome: Outcome) -> None:
        self._outcomes[outcome.stage] = outcome
        self.save()

    def results(self) -> Results:
        return Results(
            kind=self.kind,
            environment=self.environment,
            ceiling=self.ceiling,
            rows=tuple(self._rows.values()),
            misfits=tuple(self._misfits),
            warnings=tuple(self._warnings),
            outcomes=tuple(self._outcomes.values()),
            rehearsal=self.rehearsal,
        )

    def save(self) -> None:
        if self.path is not None:
            console.write_text(self.path, self.results().model_dump_json(indent=1) + "\n")


def out_folder(path: Path) -> Path:
    """Makes the folder of --out before the work starts, and writes there once.  Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # permission bits do not tell of a read-only disk
            pass
    except OSError as error:
        raise OutputError(
            f"folder {path}",
            expected="a folder that can be written, or a place where one can be made",
            got=str(error),
            remedy="Choose another with --out.",
        ) from error
    return path
