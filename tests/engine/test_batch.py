"""`svd-engine batch` in one process: what is made, what is kept, and what a bad picture leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pyarrow import parquet

from svd_engine.bundle.reading import sha256_of
from svd_engine.cli.batch import VideoFormatOption
from svd_engine.cli.main import main
from svd_engine.errors import OutputError, SettingsError
from svd_engine.request import PARAMETERS
from svd_engine.serving.batch import items, making
from svd_engine.serving.batch.items import VIDEO_FORMATS, read_items
from svd_engine.serving.batch.records import TABLE, Results
from svd_export.cli import main as export_main
from tests.conftest import HEIGHT, WIDTH
from tests.support import damage
from tests.support.commands import call, start

DEFAULTS: dict[str, Any] = {p.name: p.call_default for p in PARAMETERS if p.option}
Batch = Callable[..., int]


def picture(path: Path, colour: str = "teal") -> Path:
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    picture(folder / "a b.png")
    picture(folder / "sea.v2.jpg", "navy")
    (folder / "damaged.png").write_bytes((folder / "a b.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    picture(folder / ".hidden.png")
    return folder


@pytest.fixture
def batch(tiny_bundle: Path) -> Batch:
    def run(source: Path, out: Path, *options: object) -> int:
        return call(main, "batch", source, "-o", out, "--bundle", tiny_bundle, "--steps", 1, *options)

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that reach the engine."""
    seen: list[str] = []
    make = making.make_video

    def counted(engine: Any, request: Any, *rest: Any) -> Any:
        seen.append(f"seed {request.seed}, {request.arguments['num_inference_steps']} steps")
        return make(engine, request, *rest)

    monkeypatch.setattr(making, "make_video", counted)
    return seen


def table(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses(out: Path) -> dict[str, str]:
    return {Path(row["image"]).name: row["status"] for row in table(out)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_bad_picture_leaves_an_error_file_and_the_others_are_made(
    batch: Batch, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "my videos"
    assert batch(pictures, out) == 1
    videos = {"a b.mp4", "sea.v2.mp4"}
    tables = {"summary.csv", "summary.parquet"}
    assert names(out) == videos | tables | {"damaged.error.txt", ".batch"}
    assert "expected a whole picture" in (out / "damaged.error.txt").read_text()
    assert statuses(out) == {"a b.png": "done", "damaged.png": "refused", "sea.v2.jpg": "done"}
    good, bad, _ = table(out)
    assert tuple(good) == TABLE
    assert good["sha256"] == sha256_of(out / good["output"])
    assert (good["seed"], good["num_inference_steps"], good["height"]) == ("0", "1", str(HEIGHT))
    assert float(good["milliseconds"]) > 0
    assert (bad["output"], bad["sha256"]) == ("", "")
    assert "expected a whole picture" in bad["error"]
    rows = parquet.read_table(out / "summary.parquet").to_pylist()
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in table(out)]
    assert rows[0]["motion_bucket_id"] == 127.0
    told = capsys.readouterr()
    assert "2 made, 1 failed, 0 kept\n" in told.out
    assert re.search(r"1 of 3, [\d.]+ a minute, \d+ minutes left: a b\n", told.err)
    assert "damaged: image " in told.err


def test_a_second_run_makes_what_is_missing_or_changed_only(
    batch: Batch, pictures: Path, tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert batch(pictures, out) == 1
    (pictures / "damaged.png").unlink()
    del calls[:]
    assert batch(pictures, out) == 0
    assert calls == []
    assert set(statuses(out).values()) == {"kept"}
    assert "0 made, 0 failed, 2 kept" in capsys.readouterr().out

    picture(pictures / "damaged.png")  # whole by now
    (out / "a b.mp4").unlink()
    damage.flip(out / "sea.v2.mp4")
    assert batch(pictures, out) == 0
    assert len(calls) == 3
    assert "damaged.error.txt" not in names(out)

    picture(pictures / "a b.png", "red")
    assert batch(pictures, out) == 0
    assert len(calls) == 4
    assert statuses(out) == {"a b.png": "done", "damaged.png": "kept", "sea.v2.jpg": "kept"}

    assert batch(pictures, out, "--seed", 9) == 0
    assert calls[4:] == ["seed 9, 1 steps"] * 3


def test_other_networks_make_other_videos(
    batch: Batch, tiny_bundle: Path, pictures: Path, tmp_path: Path, calls: list[str]
) -> None:
    """What a bundle's frames come from counts, not where it lies, nor that it was verified."""
    (pictures / "damaged.png").unlink()
    (pictures / "sea.v2.jpg").unlink()
    options = (pictures, "-o", tmp_path / "out", "--steps", 1, "--bundle")
    assert batch(pictures, tmp_path / "out") == 0
    other = damage.copy(tiny_bundle, tmp_path)
    assert call(export_main, "verify", other) == 0
    assert call(main, "batch", *options, other) == 0
    assert len(calls) == 1
    damage.edit(other, lambda manifest: manifest["model"].update(sigma_max=600.0))
    assert call(main, "batch", *options, other) == 0
    assert len(calls) == 2


def test_reuse_makes_other_videos_and_a_preset_is_less_than_what_is_said(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, calls: list[str]
) -> None:
    rows = "image,output,steps\na b.png,one,\na b.png,two,3\n"
    (pictures / "list.csv").write_text(rows)
    size = ("--frames", 2, "--height", HEIGHT, "--width", WIDTH, "--device", "cpu", "--schedule", "karras")
    batch = ("batch", pictures / "list.csv", "-o", tmp_path / "out", "--checkpoint", tiny_checkpoint, *size)
    preset = ("--preset", "animatelcm")
    for reuse in ((), ("--reuse", 2), ("--reuse", 2)):
        assert call(main, *batch, *preset, *reuse) == 0
    assert calls == ["seed 0, 4 steps", "seed 0, 3 steps"] * 2
    assert {(r["sampler"], r["schedule"], r["status"]) for r in table(tmp_path / "out")} == {
        ("lcm", "karras", "kept")
    }
    assert call(main, *batch, "--reuse", 1) == 2


def test_settings_of_each_picture_from_csv(
    batch: Batch, pictures: Path, tmp_path: Path, calls: list[str]
) -> None:
    """Names of Python and of the command line, empty cells, one picture twice, a spreadsheet's mark."""
    rows = 'image,output,seed,steps,sigmas,fit\na b.png,one,4,2,,pad\n\na b.png,two.mp4,,,"9,3,1,0",\n'
    (pictures / "list.csv").write_text("\ufeff" + rows, encoding="utf-8")
    assert batch(pictures / "list.csv", tmp_path / "out", "--seed", 8) == 0
    assert calls == ["seed 4, 2 steps", "seed 8, 1 steps"]
    one, two = table(tmp_path / "out")
    assert (one["output"], one["num_inference_steps"], one["fit"]) == ("one.mp4", "2", "pad")
    assert (two["output"], two["num_inference_steps"], two["sigmas"]) == ("two.mp4", "3", "9.0,3.0,1.0,0.0")


def test_settings_of_each_picture_from_json_lines(
    batch: Batch, pictures: Path, tmp_path: Path, calls: list[str]
) -> None:
    rows = [
        {"image": "a b.png", "seed": 2**63, "num_videos": 2},
        {"image": str(pictures / "sea.v2.jpg"), "fps": None},
    ]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert batch(pictures / "list.jsonl", tmp_path / "out", "--format", "webp") == 0
    assert calls == [f"seed {2**63}, 1 steps", "seed 0, 1 steps"]
    assert [row["output"] for row in table(tmp_path / "out")] == ["a b-0.webp a b-1.webp", "sea.v2.webp"]
    assert batch(pictures / "list.jsonl", tmp_path / "out", "--format", "webp") == 0
    assert len(calls) == 2


def test_a_list_may_be_wrong_about_its_pictures(batch: Batch, pictures: Path, tmp_path: Path) -> None:
    """What only the model or the disk knows is one picture's failure."""
    (pictures / "list.csv").write_text("image,output,height\nnone.png,,\na b.png,tall,512\na b.png,,\n")
    assert batch(pictures / "list.csv", tmp_path / "out") == 1
    assert [row["status"] for row in table(tmp_path / "out")] == ["refused", "refused", "done"]
    assert "nothing at that path" in (tmp_path / "out" / "none.error.txt").read_text()
    assert "height" in (tmp_path / "out" / "tall.error.txt").read_text()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("l.csv", "image,colour\na.png,red\n", r"columns: expected image, output, seed, .*got 'colour'"),
        ("l.csv", "image,latents\na.png,1\n", "got 'latents'"),
        ("l.csv", "seed\n3\n", "a column image.*got seed"),
        ("l.csv", "image,steps,num_inference_steps\na.png,3,4\n", "two columns for num_inference_steps"),
        ("l.csv", "image,steps\na.png,2\na.png,many\n", "line 3, num_inference_steps: .*got 'many'"),
        ("l.csv", "image,steps\na.png,0\n", "line 2, num_inference_steps: expected a whole number"),
        ("l.csv", "image,steps,sigmas\na.png,2,\"2,0\"\n", "line 2, sigmas: .*got both"),
        ("l.csv", "image,guider,min_guidance_scale\na.png,constant,2\n", "line 2, min_guidance_scale"),
        ("l.csv", "image,steps\na.png\n", "line 2: expected 2 cells, one for each column, got 1"),
        ("l.csv", 'image,steps\n"a.png,2\n', "comma-separated values"),
        ("l.csv", "image,steps\n,2\n", "line 2, image: expected the path of a picture, got None"),
        ("l.csv", "image,output\na.png,../b\n", "line 2, output: expected 1 to 200 bytes.*without a folder"),
        ("l.csv", "image,output\na.png,a\\b\n", "line 2, output: expected 1 to 200 bytes in UTF-8"),
        ("l.csv", 'image,output\na.png,"a\nb"\n', "line 3, output: expected 1 to 200 bytes"),
        ("l.csv", f"image,output\na.png,{'n' * 201}\n", "output: expected 1 to 200 bytes"),
        ("l.csv", f"image\n{'n' * 201}.png\n", "Name the video in a column output"),
        ("l.jsonl", '{"image": "a.png", "output": ""}\n', "output: expected 1 to 200 bytes.*got ''"),
        ("l.jsonl", '{"image": "a.png", "output": "a\\u0000"}\n', "output: expected 1 to 200 bytes"),
        ("l.jsonl", '{"image": "a.png", "seed": 1, "seed": 2}\n', "a JSON object, got.*a name twice"),
        ("l.csv", "image;seed\na.png;1\n", "got 'image;seed'. Separate cells with commas"),
        ("l.csv", "image,output\na.png,\u00fc\na.png,u\u0308\n", "expected one picture that it is of"),
        ("l.csv", "image\na.png\nb/A.jpg\n", "video A.mp4: expected one picture"),
        ("l.csv", "image,num_videos,output\na.png,2,\na.png,,\n", "video a.mp4: expected one picture"),
        ("l.csv", "image,num_videos,output\na.png,2,\na.png,,a-1\n", "video a-1.mp4: expected one picture"),
        ("l.csv", "image\n", "expected a row for each picture, got none"),
        ("l.csv", "", "expected a row for each picture, got none"),
        ("l.jsonl", '{"image": "a.png"}\n[1]\n', "line 2: expected a JSON object, got"),
        ("l.jsonl", '{"image": "a.png"\n', "line 1: expected a JSON object, got"),
        ("l.jsonl", '{"image": "a.png", "steps": "4"}\n', "line 1, num_inference_steps"),
        ("l.jsonl", '{"image": 4}\n', "line 1, image: expected the path of a picture, got 4"),
        ("l.jsonl", '{"image": "a\\u0000", "output": "a"}\n', "image: expected the path of a picture, got"),
        ("l.jsonl", '{"image": "\\ud800", "output": "a"}\n', "image: expected the path of a picture, got"),
        ("l.jsonl", "[" * 99999 + "\n", "line 1: expected a JSON object, got .*recursion"),
        ("l.txt", "a.png\n", r"expected a folder of pictures, or a list \(.csv, .jsonl\), got another file"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_followed_is_refused(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=told):
        read_items(tmp_path / name, DEFAULTS, "mp4")


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("image\nä.png\n".encode("latin-1"))
    with pytest.raises(SettingsError, match="expected UTF-8"):
        read_items(tmp_path / "l.csv", DEFAULTS, "mp4")


@pytest.mark.parametrize("name", [b"\xff", b"two\nlines", b"n" * 201])
def test_a_picture_whose_name_no_video_can_have_is_refused(tmp_path: Path, name: bytes) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b".png")).write_bytes(b"")
    except OSError:
        pytest.skip("this disk refuses it as well")
    with pytest.raises(SettingsError, match="a name that its video can have: 1 to 200 bytes") as refusal:
        read_items(tmp_path, DEFAULTS, "mp4")
    str(refusal.value).encode()


@pytest.mark.parametrize("method", ["iterdir", "read_text"])
def test_what_the_system_does_not_let_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def denied(self: Path, **_: str) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "l.csv").write_text("image\na.png\n")
    monkeypatch.setattr(Path, method, denied)
    source = tmp_path if method == "iterdir" else tmp_path / "l.csv"
    with pytest.raises(
        SettingsError, match="expected a folder or a list that can be read, got Permission denied"
    ):
        read_items(source, DEFAULTS, "mp4")


def test_a_line_ends_where_json_lines_says(tmp_path: Path) -> None:
    """Within a string other marks that end a line elsewhere are characters."""
    text = '{"image": "a\u2028b.png", "output": "a"}\r\n{"image": "b.png"}\n'
    (tmp_path / "l.jsonl").write_bytes(text.encode())
    read = read_items(tmp_path / "l.jsonl", DEFAULTS, "mp4")
    assert [item.picture.name for item in read] == ["a\u2028b.png", "b.png"]


def test_windows_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a colon would write into another file."""
    (tmp_path / "l.csv").write_text("image,output\na.png,12:30\n")
    (item,) = read_items(tmp_path / "l.csv", DEFAULTS, "mp4")
    assert item.name == "12:30"
    monkeypatch.setattr(items, "WINDOWS", True)
    with pytest.raises(SettingsError, match="output: expected 1 to 200 bytes"):
        read_items(tmp_path / "l.csv", DEFAULTS, "mp4")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SettingsError, match=r"expected pictures \(.*\.png.*got none"):
        read_items(tmp_path, DEFAULTS, "mp4")


def test_a_rate_that_a_gif_cannot_hold_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(SettingsError, match="fps: expected at most 50 for a GIF, got 60"):
        read_items(tmp_path, {**DEFAULTS, "fps": 60}, "gif")


def test_the_formats_are_those_of_the_writer() -> None:
    assert set(VIDEO_FORMATS) == set(VideoFormatOption)


def test_a_remedy_names_options(
    batch: Batch, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "list.csv").write_text("image\na b.png\n")
    assert batch(pictures / "list.csv", tmp_path / "out", "--memory", "1MiB") == 1
    for told in (capsys.readouterr().err, (tmp_path / "out" / "a b.error.txt").read_text()):
        assert "Pass --memory " in told
        assert "memory=" not in told


def results(folder: Path, suffix: str = ".mp4") -> Results:
    return Results(folder, suffix, "networks")


def test_a_picture_is_not_written_over(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    items = read_items(tmp_path, DEFAULTS, "png")
    with pytest.raises(OutputError, match="got one of them"):
        results(tmp_path, ".png").check(items)


def test_one_batch_at_a_time_in_a_folder(
    batch: Batch, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with results(tmp_path / "out").opened():
        assert batch(pictures, tmp_path / "out") == 1
    assert "expected one batch at a time, got another that is running" in capsys.readouterr().err
    (pictures / "damaged.png").unlink()
    assert batch(pictures, tmp_path / "out") == 0


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    batch: Batch, pictures: Path, tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert batch(pictures, tmp_path / "file") == 1
    assert batch(pictures, Path("/proc/self/out")) == 1
    assert capsys.readouterr().err.count("expected a folder that can be written") == 2
    assert calls == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".batch" / "partial" / "half"
    left.mkdir(parents=True)
    with results(tmp_path).opened():
        assert not left.exists()


def test_an_unforeseen_failure_is_one_picture_s(
    batch: Batch, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fail = making.make_video, iter([True])

    def once(*arguments: Any) -> Any:
        if next(fail, False):
            raise ZeroDivisionError("of a library")
        return make(*arguments)

    monkeypatch.setattr(making, "make_video", once)
    (pictures / "damaged.png").unlink()
    assert batch(pictures, tmp_path / "out") == 1
    assert statuses(tmp_path / "out") == {"a b.png": "failed", "sea.v2.jpg": "done"}
    told = (tmp_path / "out" / "a b.error.txt").read_text()
    assert told.startswith("ZeroDivisionError: of a library\n\nTraceback")


def test_networks_that_nothing_can_run_end_the_batch(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    weights = max(bundle.rglob("*"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    options = ("-o", tmp_path / "out", "--bundle", bundle, "--steps", 1)
    assert call(main, "batch", pictures, *options) == 1
    assert "sha256" in capsys.readouterr().err
    assert set(statuses(tmp_path / "out").values()) == {"waiting"}
    assert not list((tmp_path / "out").glob("*.error.txt"))


def test_ctrl_c_keeps_what_is_done(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "damaged.png").unlink()
    for index in range(40):
        picture(pictures / f"{index}.png")
    out = tmp_path / "out"
    process = start(
        "svd-engine", "batch", pictures, "-o", out, "--bundle", tiny_bundle, "--steps", 5, "--device", "cpu"
    )
    while process.poll() is None and len(list(out.glob("*.mp4"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "waiting: the same command goes on with them" in said
    found = statuses(out)
    done = {name for name, status in found.items() if status == "done"}
    assert done
    assert {found[name] for name in found.keys() - done} == {"waiting"}
    assert len(list(out.glob("*.mp4"))) - len(done) in (0, 1)  # one may lack its record
    assert not list((out / ".batch" / "partial").iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "pass either --bundle BUNDLE or --checkpoint CHECKPOINT"),
        (("--bundle", "b", "--dtype", "fp16"), "belong to --checkpoint"),
        (("--bundle", "b", "--reuse-branch", 1), "belong to --reuse N"),
        (("--bundle", "b", "--gpus", 2), "--gpus and --cpus belong to --ray ADDRESS"),
        (("--bundle", "b", "--ray", "local", "--gpus", 2, "--cpus", 2), "either --gpus N or --cpus N"),
        (("--bundle", "b", "--ray", "local", "--device", "cpu"), "--device does nothing with --ray"),
        (("--bundle", "b", "--steps", 2, "--sigmas", "2,0"), "pass either --steps or --sigmas"),
        (("--bundle", "b", "--steps", 0), "num_inference_steps"),
        (("--bundle", "b", "--memory", "nonsense"), "memory: expected"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], told: str
) -> None:
    assert call(main, "batch", tmp_path, "-o", tmp_path / "out", *options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
