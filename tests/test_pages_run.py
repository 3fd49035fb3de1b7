"""What README and the pages tell to run does run: over tiny networks in the place of those that they name.

Lines that need a GPU, the hub, root or minutes are listed with the reason; tests/test_pages.py reads them.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from glob import glob
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from svd_bench.cli import main as bench_main
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.errors import Cancelled
from svd_export.cli import main as export_main
from tests.conftest import HEIGHT, WIDTH
from tests.engine.test_text_to_image import stable_diffusion
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH, ROOT
from tests.support.shared import made_once
from tests.test_pages import ALL_COMMANDS, ALL_PYTHON, columns

RESULTS = ROOT / "benchmarks/svd_bench/results"
MAINS = {"svd-engine": main, "svd-export": export_main, "svd-bench": bench_main}
SIZE = ("--frames", "3", "--height", str(HEIGHT), "--width", str(WIDTH))
QUICK = ("--steps", "1", "--device", "cpu")

# First words of what is not run here, and where it is, or why it is nowhere
NOT_RUN = {
    "make": "CI's own commands, and those of docs/benchmarks.md: minutes",
    "pip": "tests/test_install.py installs a wheel; extras are large",
    "svd-export tensorrt": "a GPU, or minutes with TensorRT for RTX: tests/export/test_to_tensorrt.py",
    "svd-export onnx CHECKPOINT -o BUNDLE": "an export takes ten seconds: one of them is run",
    "svd-export onnx --random-weights": "the same: tests/export/test_cli.py",
    "svd-export onnx svd-xt -o bundles/svd-xt --stream-decoder": "the same: tests/engine has one",
    "svd-export onnx svd-xt -o bundles/svd-xt --reuse-branch": "the same: tests/engine has one",
    "svd-bench run": "minutes: tests/bench/test_cli.py", "svd-bench ladder": "the same",
    "svd-bench compiled": "TensorRT for RTX, minutes: tests/bench/test_compiled.py",
    "svd-bench forms": "the same", "svd-bench quality": "minutes: tests/bench/test_quality.py",
    "svd-bench gpu-check": "minutes: tests/bench/test_gpu_check.py",
    "svd-engine serve": "does not end: tests/web has it",
    "svd-engine generate photo.jpg -o video.mp4 --bundle BUNDLE --backend tensorrt-rtx": "a GPU",
    "svd-engine generate photo.png --checkpoint svd-xt --devices": "two GPUs",
    "svd-engine generate photo.jpg -o video.mp4 --bundle bundles/svd-xt --reuse": "a bundle exported for it",
    "svd-engine generate photo.jpg -o video.mp4 --bundle bundles/svd-xt --decoding": "the same",
    "svd-engine plan bundles/svd-xt --backend tensorrt-rtx": "test_weight_streaming.py has plans for it",
    "svd-engine generate object.png": "tests/engine/test_sv3d.py has SV3D in a single file",
    "svd-engine generate photo.jpg -o video.mp4 --checkpoint svd_xt.safetensors": "test_single_file.py",
    "svd-engine batch photos -o videos --bundle bundles/svd-xt --ray": "test_batch_ray.py has a cluster",
    "python examples/python/triton_client.py": "tests/triton has a server",
    "python examples/training/train.py": "tests/training",
    "build/cpp/svd_generate": "tests/examples/test_cpp_demo.py", "cmake": "tests/examples/test_cpp.py",
    "apt-get": "root",
    "curl": "a server", "docker": "a daemon", "hf": "the hub", "ln": "the reader's folders",
    "pre-commit": "the network", "ray": "machines",
}  # fmt: skip
PYTHON_NOT_RUN = {
    "docs/diffusers.md": "tests/engine/test_coming_from_diffusers.py runs both columns",
    "engine/svd_engine/assets/demo/README.md": "tests/engine/test_demo.py has diffusers on the demo: 30 s",
    "examples/cpp/README.md": "a line within the host's own test, tests/examples/test_cpp.py",
}


def is_run(words: list[str]) -> bool:
    line = " ".join(words)
    return not any(line == start or line.startswith(f"{start} ") for start in NOT_RUN)


RUN = [(page, words) for page, words in ALL_COMMANDS if is_run(words)]
EXPORTED = {tuple(words): (page, words) for page, words in reversed(RUN) if words[0] == "svd-export"}
RUN = [line for line in RUN if line[1][0] != "svd-export"] + [*EXPORTED.values()]  # a line of two pages once


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "text/tiny", stable_diffusion)


@pytest.fixture(scope="module")
def folder(
    tiny_bundle: Path, tiny_half_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A reader's folder, with what the pages' examples name."""
    made = tmp_path_factory.mktemp("reader")
    for name in ("photos", "results", "out"):
        (made / name).mkdir()
    with Image.open(PHOTOGRAPH) as photograph:
        for name in ("photo.jpg", "photo.png", "photos/cat.jpg"):
            photograph.convert("RGB").resize((WIDTH, HEIGHT)).save(made / name)
    (made / "list.csv").write_text(listed())
    shutil.copytree(tiny_bundle, made / "bundles" / "svd-xt")
    shutil.copytree(tiny_half_bundle, made / "bundles" / "fp16")
    save_file(lora_of_one_layer(tiny_checkpoint), made / "style.safetensors")
    for name in ("results/ladder.json", "old.json", "new.json"):
        shutil.copy(RESULTS / "cpu-vae-decoder-fp32.json", made / name)
    shutil.copy(RESULTS / "compiled/svd-xt-sm89.json", made / "out/compiled.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


def lora_of_one_layer(checkpoint: Path) -> dict[str, torch.Tensor]:
    unet = open_checkpoint(str(checkpoint)).load("unet", torch.float32)
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith("to_q"))
    up = torch.full((layer.out_features, 1), 0.1)
    return {
        f"unet.{name}.lora.down.weight": torch.ones(1, layer.in_features),
        f"unet.{name}.lora.up.weight": up,
    }


def listed() -> str:
    """The list of docs/scaling.md, with fewer steps."""
    text = re.search(r"```\n(image,.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    assert text is not None
    return text[1].replace(",30\n", ",2\n")


def stood_in(words: list[str], names: Mapping[str, str], new: Path) -> list[str]:
    """The line over tiny networks, its own options kept; what an export makes goes to `new`."""
    program, sub, *rest = words
    if program == "svd-bench":
        return [sub, *(name for word in rest for name in sorted(glob(word)) or [word])]
    rest = [names.get(word, word) for word in rest]
    if program == "svd-export":
        return [sub, *exported(sub, rest, new)]
    if sub == "info":
        return [sub, *rest]
    size = (*SIZE, "--backend", "eager") if "--checkpoint" in rest else ()
    return [sub, *rest, *QUICK, *size]


def exported(sub: str, rest: list[str], new: Path) -> list[str]:
    if "-o" in rest:
        rest[rest.index("-o") + 1] = str(new)
    if sub == "check":  # what TensorRT gets
        return ["bundles/fp16" if word == "bundles/svd-xt" else word for word in rest]
    small = ("--frames", "1", "--height", "32", "--width", "16", "--dtype", "fp32")
    return [*rest, *small] if sub == "onnx" else rest


def test_every_line_is_run_or_has_its_reason() -> None:
    assert len(RUN) >= 8
    assert {words[0] for _, words in RUN} == MAINS.keys()
    lines = [" ".join(words) for _, words in ALL_COMMANDS]
    idle = [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]
    assert set(idle) <= {"curl", "hf", "pre-commit"}, idle  # within sentences, or in a table
    assert set(PYTHON_NOT_RUN) <= {page for page, _ in ALL_PYTHON}


@pytest.mark.parametrize(("page", "words"), RUN, ids=lambda part: part if isinstance(part, str) else None)
def test_a_line_runs(
    folder: Path, page: str, words: list[str], tiny_checkpoint: Path, text_model: Path, tmp_path: Path
) -> None:
    if "--continue-from" in words and not (folder / "video.mp4").exists():
        assert (
            call(main, "generate", "photo.jpg", "-o", "video.mp4", "--bundle", "bundles/svd-xt", *QUICK) == 0
        )
    names = {"svd-xt": str(tiny_checkpoint), "CHECKPOINT": str(tiny_checkpoint), "FOLDER": str(text_model)}
    said = io.StringIO()
    with redirect_stdout(said):
        assert call(MAINS[words[0]], *stood_in(words, names, tmp_path / "new")) == 0
    lines = re.findall(r"^wrote ([^:\n]+)", said.getvalue(), re.MULTILINE)
    for name in (name for line in lines for name in line.split(" and ")):
        assert Path(name).exists()


@pytest.mark.parametrize("page", sorted({page for page, _ in ALL_PYTHON} - set(PYTHON_NOT_RUN)))
def test_python_runs(folder: Path, page: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks one after the other, as its reader would."""
    from_checkpoint = VideoEngine.from_checkpoint
    monkeypatch.setattr(
        VideoEngine, "from_checkpoint",
        lambda name, backend: from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu"),
    )  # fmt: skip
    made = VideoEngine.__call__

    def quick(engine: VideoEngine, image: Any, *, num_frames: int = 3, **given: Any) -> Any:
        return made(
            engine, image, HEIGHT, WIDTH, num_frames=min(num_frames, 3), num_inference_steps=1, **given
        )

    monkeypatch.setattr(VideoEngine, "__call__", quick)
    engine = VideoEngine.from_bundle("bundles/svd-xt", device="cpu")
    names: dict[str, Any] = {"image": Image.open("photo.jpg"), "engine": engine, "torch": torch}
    for text in (text for where, text in ALL_PYTHON if where == page):
        for program in columns(text):
            if "job.cancel()" in program:
                names["engine"] = engine
                with pytest.raises(Cancelled):  # what the block's last line says that it raises
                    exec(compile(program, page, "exec"), names)
            else:
                exec(compile(program, page, "exec"), names)
    engine.close()
    assert len(names["result"].frames[0]) == 3
