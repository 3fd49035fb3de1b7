"""A video of words: with a tiny random Stable Diffusion, made here, in the place of a real one."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine import VideoEngine, text_to_image
from svd_engine.cli.main import main
from svd_engine.errors import BackendError, CheckpointError, ImageError, SettingsError
from tests.support.commands import call
from tests.support.messages import complete
from tests.support.paths import PHOTOGRAPH
from tests.support.shared import made_once

SIZE = ("--frames", 2, "--height", 32, "--width", 32, "--steps", 1)
CPU = torch.device("cpu")


def stable_diffusion(folder: Path) -> None:
    """Pictures of 16 x 16 pixels; every weight is random."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    words = folder.parent / f"{folder.name}-words"
    words.mkdir(parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{a}</w>" for a in "abcdefghijklmnopqrstuvwxyz")]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(tokens),
            max_position_embeddings=16,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made_once(tmp_path_factory, "text/tiny", stable_diffusion))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_picture_is_the_pipeline_s_and_the_video_is_of_it(
    model: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    seed = ("--seed", 5, "--checkpoint", tiny_checkpoint, "--device", "cpu", *SIZE)
    words = ("--prompt", "a cup", "--text-model", model, "--report", tmp_path / "run.json")
    assert call(main, "generate", *words, "-o", tmp_path / "a.png", *seed) == 0
    assert f"wrote {tmp_path / 'a-photograph.png'}" in capsys.readouterr().out
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    (picture,) = pipeline("a cup", generator=torch.Generator().manual_seed(5)).images
    assert np.array_equal(pixels(tmp_path / "a-photograph.png"), np.asarray(picture))
    told = json.loads((tmp_path / "run.json").read_text())["prompt"]
    assert told.pop("milliseconds") > 0
    assert told == {
        "prompt": "a cup", "model": model, "revision": None, "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler", "steps": 50, "guidance_scale": 7.5, "width": 16, "height": 16,
        "seed": 5, "device": "cpu", "dtype": "float32",
    }  # fmt: skip

    assert call(main, "generate", tmp_path / "a-photograph.png", "-o", tmp_path / "b.png", *seed) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_its_memory_is_free_before_a_network_is_loaded(
    model: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoPipelineForText2Image

    made: list[Any] = []
    load = AutoPipelineForText2Image.from_pretrained

    def from_pretrained(*arguments: Any, **named: Any) -> Any:
        pipeline = load(*arguments, **named)
        made.append(weakref.ref(pipeline.unet))
        return pipeline

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", from_pretrained)
    opened: list[bool] = []

    def called(engine: VideoEngine, *_: Any, **named: Any) -> Any:
        opened.append(made[0]() is None)
        raise ImageError("enough", expected="this", got="that", remedy="Stop.")

    monkeypatch.setattr(VideoEngine, "__call__", called)
    words = ("--prompt", "a cup", "--text-model", model, "--checkpoint", tiny_checkpoint)
    assert call(main, "generate", *words, "-o", tmp_path / "a.png", "--device", "cpu", *SIZE) == 1
    assert opened == [True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((PHOTOGRAPH, "--prompt", "a cup"), "pass one of IMAGE"),
        (("--continue-from", "v.mp4", "--prompt", "a cup"), "pass one of IMAGE"),
        ((), "pass one of IMAGE"),
        ((PHOTOGRAPH, "--text-model", "a/b"), "--text-model belongs to --prompt"),
        (("--prompt", " "), "prompt: expected some words"),
        (("--prompt", "a cup", "--text-model", "."), "expected a folder with model_index.json"),
        (("--prompt", "a cup", "-o", "a-photograph.png"), "name that output otherwise"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    arguments: tuple[Any, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(VideoEngine, "from_checkpoint", None)
    monkeypatch.chdir(tmp_path)
    assert call(main, "generate", "-o", "a.mp4", "--checkpoint", "demo", *arguments) in (1, 2)
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_the_commit_of_a_model_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert text_to_image._revision("an/other") is None
    folder = tmp_path / "models--a--model"
    for file, text in {"refs/main": "c0ffee", "snapshots/c0ffee/model_index.json": "{}"}.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    assert text_to_image._revision("a/model") == "c0ffee"


def picture(model: str, prompt: str = "a cup") -> Image.Image:
    return text_to_image.picture_of(prompt, model, seed=0, device=CPU, dtype=torch.float32)[0]


def test_what_is_no_text_to_image_pipeline(tiny_checkpoint: Path) -> None:
    for name in (str(tiny_checkpoint), "no/such-model"):
        with pytest.raises(CheckpointError, match="a pipeline of diffusers that makes pictures") as refusal:
            picture(name)
        complete(refusal.value, name)
    with pytest.raises(SettingsError, match="some words"):
        picture(str(tiny_checkpoint), "")


class Pipeline:
    """In the place of diffusers': it gives what it is told to."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def to(self, device: torch.device) -> Pipeline:
        return self

    def __call__(self, prompt: str, generator: torch.Generator) -> Any:
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


class Rejected:
    nsfw_content_detected = (True,)
    images = (Image.new("RGB", (8, 8)),)


@pytest.mark.parametrize(
    ("output", "error"), [(Rejected(), ImageError), (RuntimeError("out of memory"), BackendError)]
)
def test_a_picture_that_does_not_come(
    output: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoPipelineForText2Image

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: Pipeline(output))
    with pytest.raises(error) as refusal:
        picture("a/model")
    complete(refusal.value)  # type: ignore[arg-type]
