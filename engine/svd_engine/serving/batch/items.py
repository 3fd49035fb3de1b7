"""The pictures of a batch and the settings of each: from a folder, a CSV file or JSON lines.

Columns are the parameters of a call (`request`), under their names in Python or on the command line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svd_engine.errors import SettingsError
from svd_engine.media.image import FORMATS
from svd_engine.media.video import MAX_GIF_FPS, WRITERS
from svd_engine.request import PARAMETERS, Angles, FrameScales, NoiseLevels, OneOf, Parameter, check
from svd_engine.shell import WINDOWS

LISTS = (".csv", ".jsonl")
VIDEO_FORMATS = tuple(suffix.removeprefix(".") for suffix in WRITERS if suffix)
PICTURE, OUTPUT = "image", "output"  # the columns beside the parameters
MAX_NAME_BYTES = 200  # of the 255 that a disk allows with an ending
A_NAME = f"1 to {MAX_NAME_BYTES} bytes in UTF-8 that can be printed, without a folder or a leading dot"
COLUMNS: dict[str, Parameter] = {
    name: parameter
    for parameter in PARAMETERS
    if parameter.option
    for name in (parameter.name, parameter.option.removeprefix("--").replace("-", "_"))
}


@dataclass(frozen=True)
class Item:
    """One picture to animate."""

    name: str  # of its video, without suffix
    picture: Path  # absolute
    arguments: Mapping[str, Any]  # of VideoEngine.__call__, and `seed`

    @property
    def videos(self) -> int:
        return int(self.arguments["num_videos_per_prompt"])

    def files(self, suffix: str) -> list[str]:
        """Names of its videos, numbered as `VideoOutput.save` does."""
        if self.videos == 1:
            return [self.name + suffix]
        return [f"{self.name}-{index}{suffix}" for index in range(self.videos)]


def read_items(source: Path, defaults: Mapping[str, Any], video_format: str) -> list[Item]:
    """The pictures in a folder, in the order of their names, or those that a list names, in its order.

    A list is a .csv file with a header, or .jsonl with an object a line.  Its column `image` holds the path
    of a picture, from the list's folder on; `output` names the video, in place of the picture's name; every
    other column is a parameter.  An empty cell, null or a missing key takes `defaults`, which holds every
    parameter that has an option, by its name in Python.  Whether a picture can be read shows later.
    Raises SettingsError for what cannot be read, a column that is no parameter, a value out of range, two
    videos of one name, and where there is no picture at all.
    """
    source = source.absolute()
    try:
        items = _items(source, defaults, video_format)
    except OSError as error:
        raise SettingsError(
            f"batch {source}",
            expected="a folder or a list that can be read",
            got=error.strerror or str(error),
            remedy="Change its permissions, or copy it.",
        ) from error
    _check_outputs(items, f".{video_format}")
    return items


def _items(source: Path, defaults: Mapping[str, Any], video_format: str) -> list[Item]:
    """As `read_items`; what the system refuses is OSError."""
    if source.is_dir():
        arguments = _checked(defaults)
        items = [Item(path.stem, path, arguments) for path in _pictures(source)]
    elif source.suffix.lower() in LISTS and source.is_file():
        read = _csv_rows if source.suffix.lower() == ".csv" else _json_rows
        items = [
            _item(where, row, source.parent, defaults, f".{video_format}") for where, row in read(source)
        ]
    else:
        raise SettingsError(
            f"batch {source}",
            expected=f"a folder of pictures, or a list ({', '.join(LISTS)})",
            got="another file" if source.exists() else "nothing at that path",
            remedy="Give the path of one of these.",
        )
    if not items:
        raise SettingsError(
            f"batch {source}",
            expected=f"pictures ({', '.join(sorted(picture_suffixes()))})"
            if source.is_dir()
            else "a row for each picture",
            got="none",
            remedy="Folders in it are not searched: list the pictures of several in a .csv file."
            if source.is_dir()
            else "Add a row with a column image.",
        )
    return items


def picture_suffixes() -> set[str]:
    """Those of the formats that `load_image` reads."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def _pictures(folder: Path) -> list[Path]:
    suffixes = picture_suffixes()
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _item(
    where: str, row: Mapping[str, object], folder: Path, defaults: Mapping[str, Any], suffix: str
) -> Item:
    """The picture of one row.  Raises SettingsError that tells the row."""
    given = {name: value for name, value in row.items() if value is not None}
    picture = given.pop(PICTURE, None)
    if not isinstance(picture, str) or not _is_path(picture):
        raise SettingsError(
            f"{where}, {PICTURE}", expected="the path of a picture", got=repr(picture), remedy="Fill it in."
        )
    path = folder / picture
    output = given.pop(OUTPUT, path.stem)
    if not isinstance(output, str) or not _is_name(output):
        raise SettingsError(
            f"{where}, {OUTPUT}",
            expected=A_NAME,
            got=repr(output),
            remedy="Leave it empty to take the picture's name."
            if output != path.stem
            else f"Name the video in a column {OUTPUT}.",
        )
    own = {COLUMNS[name].name: value for name, value in given.items()}
    if {"sigmas", "num_inference_steps"} <= own.keys():
        raise SettingsError(
            f"{where}, sigmas",
            expected="no steps beside them",
            got="both",
            remedy="Leave one of the two empty.",
        )
    try:
        arguments = _checked({**defaults, **own})
    except SettingsError as error:
        raise SettingsError(
            f"{where}, {error.what}", expected=error.expected, got=error.got, remedy=error.remedy
        ) from None
    return Item(output.removesuffix(suffix), path, arguments)


def _is_path(text: str) -> bool:
    """Whether the system can look it up, be there what may."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_name(text: str) -> bool:
    """Whether every disk takes it, the endings of its videos, records and error file included."""
    return (
        text.isprintable()
        and text == text.strip()
        and not text.startswith(".")
        and not set(text) & set("/\\" + ('<>:"|?*' if WINDOWS else ""))
        and 0 < len(text.encode()) <= MAX_NAME_BYTES
    )


def _checked(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as plain values.  Raises SettingsError for those out of range."""
    check(call)
    return {
        parameter.name: None if value is None else parameter.kind.check(parameter.name, value)
        for parameter in PARAMETERS
        if parameter.option
        for value in [call[parameter.name]]
    }


def _csv_rows(source: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(where it is, values by column) of every row; empty cells are None."""
    reader = csv.reader(io.StringIO(_text(source), newline=""), strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{source}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                _check_columns(source, columns)
                continue
            if len(cells) != len(columns):
                raise SettingsError(
                    where,
                    expected=f"{len(columns)} cells, one for each column",
                    got=str(len(cells)),
                    remedy="Put cells that hold commas in double quotes.",
                )
            yield where, {name: _parsed(name, cell) for name, cell in zip(columns, cells, strict=True)}
    except csv.Error as error:
        raise SettingsError(
            f"{source}, line {reader.line_num}",
            expected="comma-separated values",
            got=str(error),
            remedy="Put cells that hold commas or quotes in double quotes.",
        ) from error


def _parsed(name: str, cell: str) -> object:
    """A cell's text as the value that its parameter takes.  What is no number stays, and is refused later."""
    cell = cell.strip()
    if not cell:
        return None
    kind = COLUMNS[name].kind if name in COLUMNS else None
    if kind is None or isinstance(kind, OneOf):
        return cell
    if isinstance(kind, (NoiseLevels, FrameScales)) or (isinstance(kind, Angles) and "," in cell):
        return [_number(part) for part in cell.split(",")]
    return _number(cell)


def _number(text: str) -> object:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _json_rows(source: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(_text(source).split("\n"), start=1):  # other marks may stand in strings
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            row = str(error)
        if not isinstance(row, dict):
            raise SettingsError(
                where,
                expected="a JSON object",
                got=repr(row),
                remedy='Write {"image": "photo.png", "seed": 7}, say.',
            )
        _check_columns(Path(where), [*row])
        yield where, row


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object.  Raises ValueError for two values of one name, of which Python takes the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name twice in {', '.join(name for name, _ in pairs)}")
    return row


def _text(source: Path) -> str:
    """UTF-8, with or without the mark that spreadsheets put before it."""
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"batch {source}", expected="UTF-8", got=str(error), remedy="Save it as UTF-8."
        ) from error


def _check_columns(where: Path, columns: list[str]) -> None:
    unknown = [name for name in columns if name not in (PICTURE, OUTPUT) and name not in COLUMNS]
    if unknown:
        raise SettingsError(
            f"{where}, columns",
            expected=f"{', '.join((PICTURE, OUTPUT, *COLUMNS))}",
            got=", ".join(map(repr, unknown)),
            remedy="Separate cells with commas."
            if any(mark in unknown[0] for mark in ";\t")
            else "Rename the column, or leave it out.",
        )
    meant = Counter(COLUMNS[name].name if name in COLUMNS else name for name in columns)
    twice = [name for name, count in meant.items() if count > 1]
    if PICTURE not in meant or twice:
        raise SettingsError(
            f"{where}, columns",
            expected=f"a column {PICTURE}, and each parameter once",
            got=f"two columns for {twice[0]}" if twice else ", ".join(columns),
            remedy="Correct the columns.",
        )


def _check_outputs(items: list[Item], suffix: str) -> None:
    """Raises SettingsError for names of no file, two of one name, and a rate that the format cannot hold."""
    made: dict[str, Item] = {}
    for item in items:
        if not _is_name(item.name):
            raise SettingsError(
                f"picture {str(item.picture)!r}",
                expected=f"a name that its video can have: {A_NAME}",
                got=repr(item.name),
                remedy="Rename it, or leave it out.",
            )
        if suffix == ".gif" and item.arguments["fps"] > MAX_GIF_FPS:
            raise SettingsError(
                f"{item.picture}, fps",
                expected=f"at most {MAX_GIF_FPS} for a GIF",
                got=str(item.arguments["fps"]),
                remedy="Lower it, or write another format.",
            )
        for name in {item.name + suffix, *item.files(suffix)}:  # the first names its record, too
            other = made.setdefault(unicodedata.normalize("NFC", name).casefold(), item)
            if other is not item:
                raise SettingsError(
                    f"video {name}",
                    expected="one picture that it is of",
                    got=f"{other.picture} and {item.picture}",
                    remedy=f"Name the videos in a column {OUTPUT} of a list.",
                )
