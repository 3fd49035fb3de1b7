"""What Windows and macOS lack or refuse, by doubles: nothing of ours needs POSIX, or a path that has "/"."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import psutil
import pytest

from svd_bench.gpu.check import OutOfTime, deadline
from svd_bench.measuring.environment import anonymous
from svd_engine import info, report, shell
from svd_engine.bundle.flavours import Host, card_target
from svd_engine.bundle.manifest import read_manifest
from svd_engine.bundle.plans import plan_file
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import BundleError, CheckpointError, SettingsError
from svd_engine.media.video import check_output
from svd_export import placing
from tests.support import damage
from tests.support.paths import PHOTOGRAPH, ROOT
from tests.support.windows import PEAK

# every command that writes, in one process, which is expensive to start
RUN = """
import sys, warnings
sys.path.insert(0, {root!r})
import av, diffusers, onnx, onnx_ir, onnxruntime, onnxscript, torch, transformers, typer.main
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionModelWithProjection
import PIL.GifImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
from tests.support.windows import pretend
pretend()
warnings.filterwarnings("ignore", "only soft file lock")  # what filelock has when neither lock is there
from pathlib import Path
import svd_engine.cli.main as generating, svd_export.cli

def run(main, *arguments):
    sys.argv = ["command", *arguments]
    try:
        main()
    except SystemExit as done:
        assert not done.code, (arguments, done.code)

checkpoint, photograph, out = sys.argv[1:]
size = ("--frames", "1", "--height", "16", "--width", "16", "--guidance", "single", "--dtype", "fp32")
run(svd_export.cli.main, "onnx", checkpoint, "-o", out + "/bundle", *size)
run(svd_export.cli.main, "verify", out + "/bundle")
for name in ("a.mp4", "a.gif", "a.webp", "a.png", "frames"):
    run(generating.main, "generate", photograph, "-o", f"{{out}}/{{name}}", "--bundle", out + "/bundle",
        "--steps", "1", "--max-guidance-scale", "1", "--report", out + "/report.json")
run(svd_export.cli.main, "triton", out + "/bundle", "-o", out + "/models")

from svd_engine.errors import ExportError  # a failure leaves nothing either
from svd_export.placing import move_out, placed, workshop
try:
    with placed(Path(out, "half")) as aside:
        (aside / "file").write_bytes(b"0")
        raise ExportError("a", expected="b", got="c", remedy="d")
except ExportError:
    pass
with workshop(Path(out, "bundle")) as aside:
    (aside / "new").write_bytes(b"1")
    move_out(aside / "new", Path(out, "frames", "new"))

from tests.support.windows import open_files
held = Path(out, "frames", "new").open("rb")  # the double can refuse
try:
    Path(out, "frames", "new").unlink()
    raise AssertionError("removed while it was open")
except PermissionError:
    pass
"""


def test_the_commands_without_posix(smallest_checkpoint: Path, tmp_path: Path) -> None:
    script = RUN.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", script, str(smallest_checkpoint), str(PHOTOGRAPH), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.gif", "a.mp4", "a.png", "a.webp", "bundle", "frames", "models", "report.json",
    ]  # fmt: skip
    assert not [path for path in tmp_path.rglob(".*")]
    assert json.loads((tmp_path / "report.json").read_text())["peak_host_bytes"] == PEAK
    assert len(read_manifest(tmp_path / "bundle").parity) == 4


def test_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=7))
    assert report.peak_host_bytes() == 7


def test_the_peak_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3))
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert report.peak_host_bytes() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own count of a forked process is what is wrong")
def test_the_peak_is_not_that_of_the_parent() -> None:
    parent = (
        "import os, subprocess, sys; held = bytearray(os.urandom(1)) * 400_000_000\n"
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True).stdout)"
    )
    child = "from svd_engine.report import peak_host_bytes; print(peak_host_bytes())"
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < 300_000_000


@pytest.mark.parametrize(("system", "compiler"), [("win32", "cl"), ("darwin", "clang++"), ("linux", "g++")])
def test_the_compiler_that_torch_would_call(
    monkeypatch: pytest.MonkeyPatch, system: str, compiler: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    assert info._no_compiler().startswith(f"no C++ compiler {compiler}: ")
    monkeypatch.setattr(info.shutil, "which", lambda name: name if name == compiler else None)
    assert info._no_compiler() == ""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_flushing_where_folders_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And where only a file that is open for writing can be flushed."""
    real, opened = os.open, []

    def windows(path: Path, flags: int) -> int:
        opened.append(path)
        assert not path.is_dir()
        assert flags & os.O_RDWR
        return real(path, flags)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", windows)
    path = tmp_path / "a"
    path.write_bytes(b"0") if kind == "file" else path.mkdir()
    placing._sync(path)
    assert opened == ([path] if kind == "file" else [])


def test_the_deadline_without_timer_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "setitimer")

    def work() -> None:
        while True:
            time.sleep(0.001)

    with pytest.raises(OutOfTime), deadline(0.05):
        work()
    with deadline(0.05):
        pass
    time.sleep(0.1)  # a block that ended in time is left alone afterwards


WORDS = {
    "bundle": ("bundle", "bundle"),
    "my bundle": ("'my bundle'", '"my bundle"'),
    r"C:\Users\me\my bundle": (r"'C:\Users\me\my bundle'", r'"C:\Users\me\my bundle"'),
}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_a_command(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    posix, windows = WORDS[word]
    assert (shell.quoted(word), shell.make_folder(Path(word))) == (posix, f"mkdir -p {posix}")
    monkeypatch.setattr(shell, "WINDOWS", True)
    assert (shell.quoted(word), shell.make_folder(Path(word))) == (windows, f"mkdir {windows}")


@pytest.mark.parametrize("name", [r"..\other.bin", r"sub\other.bin", "C:other.bin", r"C:\other.bin"])
def test_a_bundle_names_no_file_outside_by_windows_rules(
    tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    """Refused on Linux too, where such a name is a file's: a bundle is the same bundle everywhere."""
    folder = damage.copy(tiny_bundle, tmp_path)
    (folder / name).write_bytes(b"0")
    damage.trust(folder, name)
    with pytest.raises(BundleError, match="a path that leaves the bundle"):
        Bundle(folder).check_hashes()


def test_names_of_files_are_names_on_windows(tiny_bundle: Path) -> None:
    card = card_target(Host("tensorrt", "10.14.1", 'NVIDIA "RTX": 5090/Ti', (12, 0)))
    plan = plan_file("denoiser-3x32x48", "tensorrt", "10.14.1", card, "float16")
    for name in [*read_manifest(tiny_bundle).files, plan]:
        assert re.fullmatch(r"[a-z0-9._-]+[a-z0-9]", name)
        assert not PureWindowsPath(name).is_reserved()


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (r"C:\Users\me\x.json", "x.json"), (r"--out=C:\Users\me\x", "--out=x"), (r"\\host\share\me\x", "x"),
        (r"..\up\x", "x"), (r"~\x", "x"), (r"results\x", r"results\x"), ("C:/Users/me/x", "x"),
    ],
)  # fmt: skip
def test_a_command_names_no_folder_of_a_windows_machine(argument: str, told: str) -> None:
    assert anonymous(argument) == told


def test_an_absolute_path_never_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_absolute", lambda self: str(self) == r"C:\nowhere")
    with pytest.raises(CheckpointError, match="expected a folder"):
        open_checkpoint(r"C:\nowhere")


def test_a_folder_of_frames_ends_in_this_systems_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sep", "\\")
    with pytest.raises(SettingsError, match=r"a folder with the suffix \.mp4"):
        check_output(f"{tmp_path}/video.mp4\\")


@pytest.mark.parametrize("package", ["engine/svd_engine", "export/svd_export", "benchmarks/svd_bench"])
def test_text_files_are_utf_8_everywhere(package: str) -> None:
    """Windows' default is another encoding: a manifest that names "Zürich" would not be read again."""
    found = []
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                ours = ast.unparse(node.func.value) == "console"  # console.write_text writes UTF-8
                if node.func.attr in ("read_text", "write_text") and "encoding" not in named and not ours:
                    found.append(f"{file.name}:{node.lineno}")
    assert found == []
