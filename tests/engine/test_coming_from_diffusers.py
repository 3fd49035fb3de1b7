"""docs/diffusers.md, row by row: a test here or in another file of this folder holds each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import svd_engine
from svd_engine import (
    NotOffered,
    ProfileError,
    SettingsError,
    VideoEngine,
    VideoOutput,
    load_image,
    write_video,
)
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.request import Settings
from svd_engine.spec.profile import Profile
from svd_engine.unsupported import OUR_WAY
from svd_export.to_onnx import export_bundle
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support.paths import PHOTOGRAPH, ROOT

PAGE = (ROOT / "docs/diffusers.md").read_text()
ROWS = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")][1:]
CALL: dict[str, Any] = {
    "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "pt"
}  # fmt: skip

# A row, by a part of its first column -> its test in this folder
HELD_BY = {
    "from_pretrained": "test_names_that_are_errors_say_our_way",
    "from_single_file": "test_an_engine_runs_it_as_the_folder_and_reports_the_file",
    "unet=UNET": "test_a_part_is_read_from_a_file_its_folder_or_another_checkpoint",
    "load_lora_weights": "test_the_frames_are_pefts",
    "torch_dtype": "test_torch_s_dtypes_and_devices",
    '.to("cuda")': "test_to_where_it_is_already",
    "enable_model_cpu_offload": "test_names_that_are_errors_say_our_way",
    "enable_vae_slicing": "test_names_that_are_errors_say_our_way",
    "torch.compile": "test_names_that_are_errors_say_our_way",
    "a PIL image": "test_a_photograph_goes_through_the_clip_resize",
    "in [0, 1]": "test_equals_diffusers",
    "in [-1, 1]": "test_wrong_images_are_refused_on_both_ways",
    "of uint8": "test_a_tensor_of_bytes_is_the_image",
    "aspect ratio": "test_another_aspect_is_squeezed_unless_asked",
    "72": "test_a_size_that_the_networks_cannot_take",
    "7.0": "test_whole_numbers_of_any_kind_are_ints",
    "min_guidance_scale": "test_guidance_that_falls_to_one_acts",
    "decode_chunk_size": "test_several_decode_chunks_in_one_bundle",
    "out of memory": "test_streamed_is_whole",
    "num_videos_per_prompt": "test_equals_diffusers",
    "return_dict": "test_return_dict_and_plain_are_equal",
    "result.frames[0]": "test_the_result_is_read_as_diffusers_outputs_are",
    "export_to_video": "test_every_output_type_is_saved",
    "load_image": "test_the_front_door",
    "callback_on_step_end": "test_the_callback_sees_and_edits_the_latents",
    "_guidance_scale =": "test_a_callback_ends_guidance",
    "_interrupt": "test_an_interrupt_skips_the_steps_that_are_left",
    "num_timesteps": "test_a_callback_reads_what_diffusers_callbacks_read",
    "progress_bar": "test_a_progress_bar_is_shown_and_can_be_hidden",
}


def test_every_row_is_held_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(ROWS) == len(HELD_BY)
    for row, (part, test) in zip(ROWS, HELD_BY.items(), strict=True):
        assert part in row
        assert f"def {test}(" in tests


def test_names_in_the_page_are_real() -> None:
    """What the page calls on an engine, a result or in svd_engine is there; what it calls an error is one."""
    for name in re.findall(r"(?<!svd_)engine\.(\w+)|VideoEngine\.(\w+)", PAGE):
        assert (found := "".join(name)) in OUR_WAY or hasattr(VideoEngine, found), found
    assert {"from_pretrained", "enable_model_cpu_offload", "enable_vae_slicing", "unet"} <= OUR_WAY.keys()


@pytest.mark.parametrize("name", OUR_WAY)
def test_names_that_are_errors_say_our_way(tiny_checkpoint: Path, name: str) -> None:
    engine = VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu")
    with pytest.raises(NotOffered, match=rf"VideoEngine\.{name}: expected .*") as caught:
        getattr(engine, name)(torch.float16)
    assert caught.value.remedy == OUR_WAY[name]
    assert isinstance(caught.value, AttributeError)  # so that hasattr says no
    with pytest.raises(AttributeError, match="'VideoEngine' object has no attribute 'fly'"):
        engine.fly  # noqa: B018


def test_torch_s_dtypes_and_devices(tiny_checkpoint: Path) -> None:
    cpu = torch.device("cpu")
    with VideoEngine.from_checkpoint(tiny_checkpoint, device=cpu, dtype=torch.bfloat16) as engine:
        report = engine(torch.rand(1, 3, 32, 32), **CALL).report
    assert report.stages["denoiser"].dtype == "bfloat16"


def test_to_where_it_is_already(tiny_checkpoint: Path) -> None:
    engine = VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu")
    assert engine.to("cpu") is engine
    assert engine.to(torch.device("cpu")) is engine
    assert engine.to("cpu", torch.float32) is engine.to(device="cpu", dtype=torch.float32) is engine
    assert (engine.device, engine.dtype) == (torch.device("cpu"), torch.float32)
    for places in ({"dtype": torch.float16}, {"device": "cpu", "dtype": torch.bfloat16}):
        with pytest.raises(NotOffered, match=r"16, and the engine was opened on cpu, torch\.float32"):
            engine.to(**places)
    with pytest.raises(NotOffered, match=r"VideoEngine\.to: expected what an engine offers, got 3, and"):
        engine.to(3)  # type: ignore[arg-type]


def test_another_aspect_is_squeezed_unless_asked(tiny_engine: VideoEngine) -> None:
    """A wide picture for a video of 3 : 2; the report says which."""
    wide = load_image(PHOTOGRAPH).resize((120, 40))

    def result(**fit: Any) -> VideoOutput:
        made: VideoOutput = tiny_engine(wide, generator=torch.Generator().manual_seed(0), **CALL, **fit)
        return made

    default, stretch, crop, pad = result(), *(result(fit=fit) for fit in ("stretch", "crop", "pad"))
    assert torch.equal(default.frames, stretch.frames)
    assert [r.report.settings.fit for r in (default, crop, pad)] == ["stretch", "crop", "pad"]
    middle = wide.crop((30, 0, 90, 40))
    again = tiny_engine(middle, generator=torch.Generator().manual_seed(0), **CALL)
    assert torch.equal(crop.frames, again.frames)
    assert not torch.equal(pad.frames, crop.frames)
    assert not torch.equal(pad.frames, stretch.frames)


def test_several_decode_chunks_in_one_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The one asked for, or the largest; another is an error with the command that exports it."""
    folder = tmp_path / "bundle"
    profiles = [Profile(FRAMES, HEIGHT, WIDTH, decode_chunk=chunk) for chunk in (1, FRAMES)]
    manifest = export_bundle(open_checkpoint(str(tiny_checkpoint)), folder, profiles, torch.float32)
    assert len({entry.weights for entry in manifest.networks}) == 4  # the decoders share theirs
    bundle = Bundle(folder)
    chosen = {
        chunk: bundle.profile_for(Settings(FRAMES, HEIGHT, WIDTH, decode_chunk_size=chunk)).decode_chunk
        for chunk in (1, 3, None)
    }
    assert chosen == {1: 1, 3: 3, None: 3}
    with VideoEngine.from_bundle(folder, device="cpu") as engine:
        call = {**CALL, "image": torch.rand(1, 3, 32, 32)}
        shown = [engine(**call, decode_chunk_size=size).report.profile for size in (8, 1, None)]
        assert [profile[-1] for profile in shown] == ["3", "1", "3"]
        with pytest.raises(ProfileError, match="--frames 5"):
            engine(**{**call, "num_frames": 5})


# Results


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path) -> Callable[[str, int], VideoOutput]:
    engine = VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu")

    def made(kind: str, videos: int) -> VideoOutput:
        output: VideoOutput = engine(
            load_image(PHOTOGRAPH), fps=5, num_videos_per_prompt=videos,
            generator=torch.Generator().manual_seed(0), **{**CALL, "output_type": kind},
        )  # fmt: skip
        return output

    return made


def test_the_result_is_read_as_diffusers_outputs_are(result: Callable[[str, int], VideoOutput]) -> None:
    output = result("pt", 1)
    assert output[0] is output["frames"] is output.frames
    with pytest.raises(IndexError):
        output[1]
    with pytest.raises(KeyError):
        output["images"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".mp4"])
def test_every_output_type_is_saved(
    result: Callable[[str, int], VideoOutput], tmp_path: Path, suffix: str
) -> None:
    """The same bytes from each, saved or written, one video or the whole of `frames`."""
    files = []
    for kind in ("pt", "np", "pil"):
        output = result(kind, 1)
        (path,) = output.save(tmp_path / f"{kind}{suffix}")
        written = write_video(output.frames[0], tmp_path / f"{kind}-0{suffix}", fps=5.0)  # type: ignore[arg-type]
        whole = write_video(output.frames, tmp_path / f"{kind}-all{suffix}", fps=np.int64(5))  # type: ignore[arg-type]
        files += [path.read_bytes(), written.read_bytes(), whole.read_bytes()]
    assert len(set(files)) == 1
    assert result("np", 1).save(tmp_path / f"slow{suffix}", fps=1)[0].stat().st_size > 0


def test_several_videos_are_numbered(result: Callable[[str, int], VideoOutput], tmp_path: Path) -> None:
    paths = result("pil", 2).save(tmp_path / "out.png")
    assert [path.name for path in paths] == ["out-0.png", "out-1.png"]
    first, second = (np.asarray(Image.open(path)) for path in paths)
    assert (first != second).any()


def test_what_cannot_be_saved_leaves_nothing(
    result: Callable[[str, int], VideoOutput], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"frames to save: expected pictures: .* got latents \[1, 3, 4, "):
        result("latent", 1).save(tmp_path / "out.mp4")
    (tmp_path / "out-1.png").mkdir()
    with pytest.raises(svd_engine.OutputError, match="a folder of that name"):
        result("pt", 2).save(tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out-1.png"]


def test_the_front_door() -> None:
    """Everything that `svd_engine` lists is there, and it lists every error."""
    from svd_engine import errors

    for name in svd_engine.__all__:
        assert getattr(svd_engine, name) is not None
    classes = {name for name, thing in vars(errors).items() if isinstance(thing, type)}
    assert classes <= set(svd_engine.__all__)
    assert load_image(PHOTOGRAPH).mode == "RGB"
