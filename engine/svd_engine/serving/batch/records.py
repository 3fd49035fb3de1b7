"""The folder of a batch's results: what is whole there, the record of every video, and the table of all.

    OUT/cat.mp4           a video
    OUT/dog.error.txt     why there is none
    OUT/summary.csv       a row for each picture; summary.parquet beside it where pyarrow is installed
    OUT/.batch/           records, what is being written, and the lock of the running batch

A video is written aside and renamed when whole, its record after it.  Whole is a video whose record is of
this picture, these settings and these networks, and whose content has the record's hash.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from svd_engine.bundle.reading import sha256_of
from svd_engine.errors import OutputError, SvdEngineError
from svd_engine.media.video import check_output
from svd_engine.request import SEED, SETTINGS
from svd_engine.serving.batch.items import Item
from svd_engine.serving.one_video import Status

PRIVATE = ".batch"
KEPT = "kept"  # in the table: done by an earlier run
TABLE = (
    "image",
    "output",
    "status",
    "milliseconds",
    "sha256",
    SEED.name,
    *(p.name for p in SETTINGS),
    "error",
)


class Record(BaseModel):
    """How one picture of a batch ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    made_from: str  # sha256 of the picture, the settings and the networks
    status: Status
    settings: dict[str, Any]  # as asked; of a video as it was made
    files: dict[str, str] = {}  # sha256 by name
    milliseconds: float = 0
    error: str = ""


@dataclass(frozen=True)
class Results:
    """The results of one batch in a folder.

    networks: digest of what makes the videos.  suffix: of the videos, with its dot.
    worded: the message of an error, as those read it who started the batch.
    """

    folder: Path  # absolute
    suffix: str
    networks: str
    worded: Callable[[SvdEngineError], str] = str

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder, and keeps other batches out of it meanwhile.

        Raises OutputError if it cannot be written, or another batch runs in it.
        """
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # permission bits do not tell of a read-only disk
                pass
            with FileLock(self.folder / PRIVATE / "lock", timeout=0):
                shutil.rmtree(self._partial, ignore_errors=True)  # of a run that was killed
                self._partial.mkdir()
                yield
        except Timeout:
            raise OutputError(
                f"output {self.folder}",
                expected="one batch at a time",
                got="another that is running",
                remedy="Wait for its end, or write elsewhere.",
            ) from None
        except OSError as error:
            raise OutputError(
                f"output {self.folder}",
                expected="a folder that can be written",
                got=f"{error.strerror or error}",
                remedy="Make it writable, make room there, or write elsewhere.",
            ) from error

    def check(self, items: Sequence[Item]) -> None:
        """Raises OutputError if a video cannot be written, or would take the place of a picture."""
        pictures = {item.picture.resolve() for item in items}
        for item in items:
            for name in item.files(self.suffix):
                target = check_output(self.folder / name)
                if target.resolve() in pictures:
                    raise OutputError(
                        f"output {target}",
                        expected="a place beside the pictures",
                        got="one of them",
                        remedy="Write into another folder, or in another format.",
                    )

    def failed(
        self, item: Item, made_from: str, status: Status, error: BaseException, traceback: str = ""
    ) -> Record:
        """The record of a picture of which there is no video."""
        plain = f"{type(error).__name__}: {error}"
        told = self.worded(error) if isinstance(error, SvdEngineError) else plain
        settings = json.loads(json.dumps(dict(item.arguments), default=list))
        return Record(
            name=item.name, made_from=made_from, status=status, settings=settings,
            error=f"{told}\n\n{traceback}" if traceback else told,
        )  # fmt: skip

    def made_from(self, item: Item) -> str:
        """What a video depends on.  A picture that is not there, or not yet, has none of these."""
        with suppress(OSError):
            picture = sha256_of(item.picture)
            settings = {name: value for name, value in item.arguments.items() if value is not None}
            told = json.dumps([picture, self.networks, settings], sort_keys=True, default=list)
            return hashlib.sha256(told.encode()).hexdigest()
        return ""

    def whole(self, item: Item) -> Record | None:
        """The record of a video that need not be made again."""
        try:
            record = Record.model_validate_json(self._record(item.name).read_bytes())
            if record.status is not Status.DONE or record.made_from != self.made_from(item):
                return None
            if list(record.files) != item.files(self.suffix):
                return None
            same = all(sha256_of(self.folder / name) == digest for name, digest in record.files.items())
        except (OSError, ValueError):  # none, cut, or of another version
            return None
        return record if same else None

    def keep(self, item: Item, write: Callable[[Path], list[Path]]) -> dict[str, str]:
        """Writes the videos of one picture, whole or not at all.  Returns their hashes by name.

        write: given a path, writes one or several videos to it, and returns where they are.
        """
        with tempfile.TemporaryDirectory(dir=self._partial) as scratch:
            paths = write(Path(scratch, item.name + self.suffix))
            files = {path.name: sha256_of(path) for path in paths}
            for path in paths:
                path.replace(self.folder / path.name)
        return files

    def note(self, record: Record) -> None:
        """Writes the record, and the error file of one that failed.  Raises OSError."""
        error = self.folder / f"{record.name}.error.txt"
        if record.status is Status.DONE:
            error.unlink(missing_ok=True)
        else:
            self._write(error, record.error + "\n")
        self._write(self._record(record.name), record.model_dump_json(indent=1))

    def write_table(self, items: Sequence[Item], records: Mapping[str, Record], made: set[str]) -> Path:
        """Writes a row for each item; one without a record waits.  `made`: names of what this run did."""
        rows = [self._row(item, records.get(item.name), item.name in made) for item in items]
        table = self.folder / "summary.csv"
        with self._aside(table) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, TABLE, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if find_spec("pyarrow") is not None:
            import pyarrow
            from pyarrow import parquet

            kinds = {SEED.name: pyarrow.uint64()}  # the others' follow from the values
            columns = {name: pyarrow.array([row[name] for row in rows], kinds.get(name)) for name in TABLE}
            with self._aside(table.with_suffix(".parquet")) as path:
                parquet.write_table(pyarrow.table(columns), path)
        return table

    def _row(self, item: Item, record: Record | None, made: bool) -> dict[str, Any]:
        status: str = Status.WAITING if record is None else record.status
        settings = {**item.arguments, **(record.settings if record else {})}
        row = {name: _plain(settings.get(name)) for name in TABLE} | {
            "image": str(item.picture),
            "output": " ".join(record.files) if record else "",
            "status": KEPT if status == Status.DONE and not made else str(status),
            "milliseconds": record.milliseconds if record else None,
            "sha256": " ".join(record.files.values()) if record else "",
            "error": record.error if record else "",
        }
        return {name: row[name] for name in TABLE}

    @property
    def _partial(self) -> Path:
        return self.folder / PRIVATE / "partial"

    def _record(self, name: str) -> Path:
        return self.folder / PRIVATE / f"{name}.json"

    def _write(self, target: Path, text: str) -> None:
        with self._aside(target) as path:
            path.write_text(text, encoding="utf-8", newline="\n")

    @contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """Where to write what becomes `target` at the end."""
        with tempfile.TemporaryDirectory(dir=self._partial) as scratch:
            yield (path := Path(scratch, target.name))
            path.replace(target)


def _plain(value: object) -> object:
    """A list as its numbers with commas between them, as a list of pictures has it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
