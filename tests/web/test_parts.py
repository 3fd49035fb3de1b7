"""The page's parts without a browser: controls from the request's list, words, addresses, the command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_engine.cli.main import main
from svd_engine.errors import (
    BackendUnavailable,
    BundleError,
    Cancelled,
    ImageError,
    NonFiniteOutput,
    OutputError,
    SettingsError,
    SvdEngineError,
)
from svd_engine.request import SETTINGS, OneOf, Real, Whole
from svd_engine.serving.jobs import JobService
from svd_engine.serving.one_video import Status
from svd_engine.serving.watch import Progress
from svd_engine.serving.web import controls, server, status
from svd_engine.serving.web.models import open_models
from svd_engine.serving.web.visit import Visit, other_formats, remove_cut_uploads
from tests.engine.watching import FAKE_CALL, fake_engine
from tests.support import stability_file
from tests.support.commands import call, start
from tests.support.messages import complete

ENGINE, _ = fake_engine()


def test_every_parameter_is_on_the_page_with_its_help() -> None:
    assert {p.name for p in SETTINGS} - {p.name for p in controls.SHOWN} == controls.NOT_SHOWN
    assert set(controls.FIRST) < {p.name for p in controls.SHOWN}
    for parameter in controls.SHOWN:
        made = controls.control(parameter, ENGINE)
        assert made.info == parameter.describe()
        assert made.value == controls.own_value(parameter, ENGINE)
        if isinstance(parameter.kind, OneOf):
            assert [value for _, value in made.choices] == list(parameter.kind.choices)


def test_a_slider_spans_part_of_the_range_and_the_model_s_own_value() -> None:
    for parameter in (p for p in SETTINGS if p.usual):
        assert parameter.usual is not None
        for end in parameter.usual:
            parameter.kind.check(parameter.name, end)  # type: ignore[union-attr]
        assert isinstance(parameter.kind, (Whole, Real))
        slider = controls.control(parameter, ENGINE)
        assert slider.minimum <= slider.value <= slider.maximum
    assert controls.slider_step(0, 255) == 1
    assert controls.slider_step(0, 0.5) == pytest.approx(0.01)


def given(**changed: Any) -> list[Any]:
    return [changed.get(p.name, controls.own_value(p, ENGINE)) for p in controls.SHOWN]


def test_what_is_the_model_s_own_is_not_passed_on() -> None:
    assert controls.arguments(ENGINE, given()) == {}
    changed = given(schedule="ays", sigmas="700, 5,0", num_inference_steps=7.0, decode_chunk_size="")
    assert controls.arguments(ENGINE, changed) == {
        "schedule": "ays", "sigmas": (700.0, 5.0, 0.0), "num_inference_steps": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"fps": 0}, {"fps": "fast"}, {"sampler": "magic"}, {"sigmas": "a, b"}, {"churn": [1]}, {"height": True}],
)
def test_values_that_no_browser_sends(changed: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changed))) as refusal:
        controls.arguments(ENGINE, given(**changed))
    complete(refusal.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_inference_steps": 51}, "num_inference_steps: expected 1 to 50"),
        ({"sigmas": ",".join(map(str, range(60, -1, -1)))}, "steps of sigmas: expected 1 to 50"),
        ({"num_frames": 11}, r"frames x height x width: expected at most 2 times .* 5 x 64 x 128"),
    ],
)
def test_no_visitor_keeps_the_machine_from_others(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refusal:
        controls.arguments(ENGINE, given(**changed))
    complete(refusal.value)
    assert controls.arguments(ENGINE, given(num_frames=10)) == {"num_frames": 10}


def test_seeds() -> None:
    assert controls.read_seed(str(2**64 - 1)) == 2**64 - 1
    for text in ("", "-1", "1.5", None):
        with pytest.raises(SettingsError, match="seed"):
            controls.read_seed(text)


def test_time_left() -> None:
    left = status.TimeLeft()
    assert left.seconds(Progress(), now=0) is None
    assert left.seconds(Progress(evaluation=1, evaluations=10), now=100) is None
    assert left.seconds(Progress(evaluation=3, evaluations=10), now=104) == 14
    assert left.seconds(Progress(evaluation=10, evaluations=10), now=118) is None
    assert [status.duration(seconds) for seconds in (0.2, 119, 240)] == ["1 s", "119 s", "4 min"]


def test_how_much_is_decoded() -> None:
    now = Progress("vae_decoder", decoded=3.5, frames=14)
    job: Any = SimpleNamespace(progress=now, preview=None, status=Status.RUNNING)
    assert "Decoding the frames, 25%<" in str(status.JobStatus(job).news())


def test_what_is_told_and_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def error(kind: type[SvdEngineError]) -> SvdEngineError:
        return kind("it <b>", expected="this", got="that", remedy="Do so.")

    assert "It &lt;b&gt;: expected this, got that. Do so." in status.failed(error(NonFiniteOutput))
    assert "Cancelled." in status.failed(error(Cancelled))
    assert not caplog.records
    for hidden in (error(BundleError), ValueError("it")):
        assert status.in_words(hidden) == "The server could not make this video. Its log says why."
        assert caplog.records[-1].exc_info


def test_models_are_named_by_their_last_part_unless_two_are_alike(tiny_checkpoint: Path) -> None:
    assert list(open_models([str(tiny_checkpoint), "demo"], device="cpu")) == ["tiny", "demo"]
    other = str(tiny_checkpoint.parent / "." / "tiny") + "/"
    assert list(open_models([str(tiny_checkpoint), other], device="cpu")) == [str(tiny_checkpoint), other]
    with pytest.raises(SettingsError, match="each once") as refusal:
        open_models(["demo", "demo"])
    complete(refusal.value)


def test_a_file_that_hides_its_frames_is_refused(stability_pipeline: Any, tmp_path: Path) -> None:
    """There is no option for them here."""
    file = stability_file.write(tmp_path / "mine.safetensors", stability_pipeline)
    with pytest.raises(SettingsError, match=r"does not tell the frames\. Rename it, .*svd-export convert"):
        open_models([str(file)], device="cpu")
    file.rename(tmp_path / "svd.safetensors")
    assert list(open_models([str(tmp_path / "svd.safetensors")], device="cpu")) == ["svd.safetensors"]


def test_an_upload_that_is_gone(tmp_path: Path) -> None:
    """The server removes them after a day, and a page may be open for longer."""
    gone = pytest.raises(ImageError, match=r"photograph: .*has no more\. Drop it again")
    with JobService(ENGINE) as service, gone as refusal:
        Visit(tmp_path).submit(service, ENGINE, tmp_path / "gone.png", 0, {})
    complete(refusal.value)


@pytest.mark.parametrize("part", ["mkdir", "make_archive"])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """To the owner, in the log: the page waits for nothing else."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    seeded = torch.Generator().manual_seed(0)
    output = ENGINE(torch.full((1, 3, 64, 128), 0.5), generator=seeded, **FAKE_CALL)
    monkeypatch.setattr(*((Path, part) if part == "mkdir" else (shutil, part)), full)

    def write() -> None:
        other_formats(output, Visit(tmp_path / "visit").keep(output, "video"))

    with pytest.raises(OutputError, match="got No space left on device") as refusal:
        write()
    complete(refusal.value)


def test_uploads_that_broke_off_are_removed(tmp_path: Path) -> None:
    """Not those that go on, nor whole ones, which lie in folders."""
    for name in ("tmpcut", "tmpnow", "whole/photo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    for name in ("tmpcut", "whole/photo.png"):
        os.utime(tmp_path / name, (0, 0))
    remove_cut_uploads(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"tmpnow", "whole", "photo.png"}


def test_windows_is_not_told_to_share_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SO_REUSEADDR takes the address of another program."""
    asked: list[object] = []

    class Watched(socket.socket):
        def setsockopt(self, *arguments: Any) -> None:
            asked.append(arguments)

    monkeypatch.setattr(server.socket, "socket", Watched)
    server.free_port("127.0.0.1", 0)
    assert len(asked) == 1
    monkeypatch.setattr(server, "WINDOWS", True)
    server.free_port("127.0.0.1", 0)
    assert len(asked) == 1


def test_addresses() -> None:
    assert not any(map(server.listens_wide, ("127.0.0.1", "127.8.0.1", "localhost", "::1")))
    assert all(map(server.listens_wide, ("0.0.0.0", "192.168.1.2", "::", "studio.example")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="Address already in use") as refusal:
            server.free_port("127.0.0.1", taken.getsockname()[1])
    complete(refusal.value)
    with pytest.raises(SettingsError, match=r"address 192\.0\.2\.1:0: expected one that is free"):
        server.free_port("192.0.2.1", 0)  # of nobody
    with pytest.raises(SettingsError, match="port: expected 0 to 65535"):
        server.free_port("127.0.0.1", 70_000)


@pytest.mark.parametrize("text", ["", "user", ":password", "user:"])
def test_credentials(text: str) -> None:
    assert server.read_credentials("me:a:b") == ("me", "a:b")
    with pytest.raises(SettingsError, match="expected user:password") as refusal:
        server.read_credentials(text)
    complete(refusal.value)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(BackendUnavailable, match=r"web page: expected Gradio, .*Run: pip install .*\[web\]"):
        server.check_installed()


def test_wide_listening_without_auth_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ("serve", tmp_path / "nothing", "--host", "0.0.0.0", "--port", "0")
    assert call(main, *wide) == 1
    assert "warning: whoever reaches this machine" in capsys.readouterr().err
    assert call(main, *wide, "--auth", "me:secret") == 1
    assert "warning" not in capsys.readouterr().err
    assert call(main, *wide, "--auth", "secret") == 2
    assert call(main, "serve", "demo", "--port", "70000") == 2
    assert call(main, "serve", "demo", "--port", "0", "--queue", "0") == 2


def test_the_command_asks_for_the_password_and_cleans_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = start(
        "svd-engine", "serve", tiny_checkpoint, "--port", 0, "--device", "cpu",
        TMPDIR=str(tmp_path), SVD_ENGINE_AUTH="me:secret",
    )  # fmt: skip
    try:
        assert command.stdout is not None
        line = command.stdout.readline()
        url = re.fullmatch(r"tiny at (http://127.0.0.1:\d+/)  \(Ctrl-C stops it\)\n", line)
        assert url, line + command.communicate()[1]
        for page in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url[1] + page)
        login = url[1] + "login"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(login, data=b"username=me&password=wrong")
        assert urllib.request.urlopen(login, data=b"username=me&password=secret").status == 200
        assert any(tmp_path.glob("svd-engine-web-*"))
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(60) == 0
        assert not any(tmp_path.glob("svd-engine-web-*"))
    finally:
        command.kill()
        command.communicate()
