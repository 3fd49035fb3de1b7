"""Checkpoints in one file, in Stability's own layout: what is loaded, what is left, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import Checkpoint, is_single_file, open_checkpoint
from svd_engine.checkpoint.single_file import SingleFile
from svd_engine.checkpoint.stability_keys import FIRST_STAGE
from svd_engine.checkpoint.weights import build
from svd_engine.cli.main import main
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.planned import planner_of
from svd_engine.spec.weights import COMPONENTS, Component
from tests.support import stability_file
from tests.support.commands import call
from tests.support.messages import complete

UNET, CLIP = "model.diffusion_model.", "conditioner.embedders.0.open_clip.model.visual."
CONDITIONER = "conditioner.embedders.3.encoder."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pipeline(stability_pipeline: Any) -> Any:
    return stability_pipeline


@pytest.fixture(scope="module")
def whole(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, float32.  Only to be read."""
    return stability_file.write(tmp_path_factory.mktemp("single") / "svd_xt.safetensors", pipeline)


@pytest.fixture
def changed(pipeline: Any, tmp_path: Path) -> Callable[[dict[str, torch.Tensor | None]], Path]:
    """Writes the file with some tensors replaced; None takes one out."""

    def write(change: dict[str, torch.Tensor | None]) -> Path:
        tensors = {**stability_file.tensors_of(pipeline), **change}
        file = tmp_path / "svd.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}, file)
        return file

    return write


def shapes(checkpoint: Checkpoint, component: Component) -> dict[str, tuple[int, ...]]:
    module = build(component, checkpoint.configs[component])
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_loads_what_was_written_bit_for_bit(
    pipeline: Any, tmp_path: Path, component: Component, stored: torch.dtype
) -> None:
    file = stability_file.write(tmp_path / "svd.safetensors", pipeline, stored)
    module = open_checkpoint(file).load(component, torch.float32)
    reference = getattr(pipeline, component)
    assert type(module) is type(reference)
    expected = {name: tensor.to(stored).float() for name, tensor in reference.state_dict().items()}
    loaded = module.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in module.parameters())


def test_the_networks_are_those_of_the_configs_that_diffusers_has(pipeline: Any, whole: Path) -> None:
    """Group-norm epsilons, heads and block types too, which no tensor's values show."""
    checkpoint = open_checkpoint(whole)
    for component in COMPONENTS:
        module, reference = checkpoint.load(component, torch.float32), getattr(pipeline, component)
        assert repr(module) == repr(reference)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(1, 2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    calls: dict[Component, Callable[[Any], torch.Tensor]] = {
        "image_encoder": lambda net: net(pixels).image_embeds,
        "vae": lambda net: net(pixels, num_frames=1).sample,
        "unet": lambda net: net(latent, torch.tensor(0.3), torch.ones(1, 1, 32), torch.ones(1, 3)).sample,
    }
    for component, run in calls.items():
        with torch.no_grad():
            ours, theirs = run(checkpoint.load(component, torch.float32)), run(getattr(pipeline, component))
        # not bit for bit: CPU kernels choose their path by the weights' alignment in memory
        assert (ours - theirs).abs().max() <= 1e-5


def test_the_encoder_as_diffusers_own_converter_reads_it(whole: Path) -> None:
    """Its converter of image VAEs, which shares no table with ours; it has none for the temporal parts."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    checkpoint = open_checkpoint(whole)
    stored = {
        key.removeprefix(CONDITIONER): tensor
        for key, tensor in load_file(whole).items()
        if key.startswith(CONDITIONER)
    }
    config = {
        **checkpoint.configs["vae"],
        "up_block_types": [],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
    }
    theirs = convert_ldm_vae_checkpoint(stored, config)
    ours = checkpoint.load("vae", torch.float32).state_dict()
    names = [name for name in ours if name.startswith(("encoder.", "quant_conv."))]
    assert len(names) > 30
    assert {name for name in theirs if name.startswith(("encoder.", "quant_conv."))} == set(names)
    assert all(torch.equal(ours[name], theirs[name].view_as(ours[name])) for name in names)


def test_every_tensor_is_read_or_said_to_be_left(changed: Any, notices: pytest.LogCaptureFixture) -> None:
    file = changed(stability_file.extras())
    checkpoint = open_checkpoint(file)
    weights = checkpoint.weights
    assert isinstance(weights, SingleFile)
    used: set[str] = set()
    for component in COMPONENTS:
        used |= {s.key for s in weights.stored(component, shapes(checkpoint, component)).values()}
    left = weights.header.keys() - used
    assert left == stability_file.extras().keys()
    assert weights.not_read() == {
        "the text half of CLIP": 2,
        "the conditioner's own image decoder": 2,
        "the first stage's encoder, which the conditioner's replaces": 1,
        "averaged weights of training": 1,
        "mine": 1,
    }
    (line,) = notices.messages
    assert line.startswith(f"{file}: 7 tensors are not read: ")
    assert "the text half of CLIP (2)" in line


def test_what_a_part_has_too_much_is_said_when_it_is_loaded(
    changed: Any, notices: pytest.LogCaptureFixture
) -> None:
    file = changed({f"{CLIP}position_ids": torch.zeros(3), f"{UNET}mine.weight": torch.zeros(1)})
    checkpoint = open_checkpoint(file)
    checkpoint.load("unet", torch.float32)
    checkpoint.load("image_encoder", torch.float32)
    assert notices.messages == [
        f"{file}: 1 tensors are not read: {UNET}mine.weight (1)",
        f"{file}: 1 tensors are not read: {CLIP}position_ids (1)",
    ]


def test_without_the_conditioners_encoder_the_first_stages_is_read(pipeline: Any, changed: Any) -> None:
    """It has no quant_conv: one that changes nothing takes the place."""
    written = stability_file.tensors_of(pipeline)
    gone: dict[str, Any] = {key: None for key in written if key.startswith(CONDITIONER)}
    moved = {
        key.replace(f"{CONDITIONER}encoder.", f"{FIRST_STAGE}encoder."): 2 * tensor
        for key, tensor in written.items()
        if key.startswith(f"{CONDITIONER}encoder.")
    }
    loaded = open_checkpoint(changed(gone | moved)).load("vae", torch.float32)
    state, before = loaded.state_dict(), pipeline.vae.state_dict()
    assert torch.equal(state["encoder.conv_in.weight"], 2 * before["encoder.conv_in.weight"])
    latent = torch.randn(1, 8, 4, 4)
    assert torch.equal(loaded.quant_conv(latent), latent)
    both = open_checkpoint(changed(moved)).load("vae", torch.float32)
    assert torch.equal(both.state_dict()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("svd", 14),
        ("svd_xt", 25),
        ("svd_xt_1_1", 25),
        ("SVD-XT-1.1-fp16", 25),
        ("svd.fp16", 14),
        ("stable-video-diffusion-img2vid-xt", 25),
        ("stable_video_diffusion_img2vid", 14),
    ],
)
def test_frames_by_name(whole: Path, tmp_path: Path, name: str, frames: int) -> None:
    os.symlink(whole, tmp_path / f"{name}.safetensors")
    checkpoint = open_checkpoint(tmp_path / f"{name}.safetensors")
    assert checkpoint.model.frames == checkpoint.configs["unet"]["num_frames"] == frames
    assert checkpoint.model.name == name
    assert open_checkpoint(tmp_path / f"{name}.safetensors", frames=7).model.frames == 7


@pytest.mark.parametrize("name", ["mine", "svd_finetuned", "animate_xt"])
def test_frames_that_no_name_tells_are_asked_for(whole: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.safetensors"
    os.symlink(whole, file)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(file)
    complete(refused.value, str(file), "frames=14 or frames=25", "its own name back")
    assert open_checkpoint(file, frames=25).model.frames == 25
    with pytest.raises(SettingsError, match="frames: expected a whole number of at least 1, got 0"):
        open_checkpoint(file, frames=0)


def test_a_plan_takes_the_frames_that_no_name_tells(whole: Path, tmp_path: Path) -> None:
    file = str(shutil.copy(whole, tmp_path / "mine.safetensors"))
    options = (file, "8GiB", "auto", "cpu", "auto", False)
    with pytest.raises(CheckpointError, match="Use frames=14 or frames=25"):
        planner_of(*options, {})
    _, settings = planner_of(*options, {"frames": 14})
    assert settings.frames == 14


def test_frames_and_variant_belong_to_their_kind(whole: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"frames of checkpoint .*Leave it out: unet/config\.json"):
        open_checkpoint(tiny_checkpoint, frames=14)
    with pytest.raises(CheckpointError, match=r"variant of checkpoint .*expected None for a single file"):
        open_checkpoint(whole, "fp16")


def test_what_is_taken_for_a_file(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(whole, "svd")
    os.symlink(whole, "svd.safetensors")
    assert not is_single_file("svd")
    assert is_single_file("./svd")
    assert is_single_file("svd.safetensors")
    assert not is_single_file(".")
    checkpoint = open_checkpoint(Path("svd"))
    assert checkpoint.source == "./svd"  # what opens the same file again as a string
    assert open_checkpoint("svd.safetensors").digest() != checkpoint.digest()  # the name counts
    assert open_checkpoint("svd.safetensors").digest() == open_checkpoint("svd.safetensors").digest()


def test_an_engine_runs_it_as_the_folder_and_reports_the_file(
    pipeline: Any, whole: Path, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "folder")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for source in (whole, tmp_path / "folder"):
        with VideoEngine.from_checkpoint(source, backend="eager", device="cpu") as engine:
            assert engine.default.frames == 25
            results.append(
                engine(
                    image, height=64, width=64, num_frames=2, num_inference_steps=2, output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                )
            )  # fmt: skip
    ours, folders = (torch.as_tensor(result.frames) for result in results)
    assert (ours - folders).abs().max() <= 1e-5 * folders.abs().max()
    checkpoint = open_checkpoint(whole)
    report = results[0].report
    assert set(report.weights) == {f for part in COMPONENTS for f in checkpoint.weight_files(part)}
    assert {file.file for file in report.weights} == {"svd_xt.safetensors"}
    with VideoEngine.from_checkpoint(whole, backend="eager", device="cpu", frames=3) as engine:
        assert engine.default.frames == 3
    with pytest.raises(SettingsError, match=r"frames: expected None.*Open it with open_checkpoint"):
        VideoEngine.from_checkpoint(checkpoint, frames=3)


# What is refused


@pytest.mark.parametrize(
    ("change", "component", "says"),
    [
        (
            {f"{UNET}input_blocks.1.0.in_layers.0.weight": None},
            "unet",
            f"no {UNET}input_blocks.1.0.in_layers.0",
        ),
        (
            {f"{UNET}out.0.bias": torch.zeros(5)},
            "unet",
            f"{UNET}out.0.bias [5] instead of [64]",
        ),
        ({f"{UNET}out.0.bias": torch.zeros(64, dtype=torch.int8)}, "unet", f"{UNET}out.0.bias in I8"),
        (
            {f"{FIRST_STAGE}decoder.up.0.block.0.mix_factor": None},
            "vae",
            "decoder.up.0.block.0.mix_factor [1]",
        ),
        (
            {f"{CONDITIONER}encoder.mid.attn_1.q.weight": torch.zeros(64, 64)},
            "vae",
            "attn_1.q.weight [64, 64] instead of [64, 64, 1, 1]",
        ),
        (
            {f"{CLIP}transformer.resblocks.0.attn.in_proj_bias": torch.zeros(160)},
            "image_encoder",
            "in_proj_bias [160] instead of [480]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changed: Any, change: dict[str, Any], component: Component, says: str
) -> None:
    file = changed(change)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(file).load(component, torch.float32)
    complete(refused.value, str(file), says, "tensors of its architecture")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [f"{UNET}out.0.bias", f"{CLIP}transformer.resblocks.0.attn.in_proj_bias"])
def test_weights_that_are_no_numbers(changed: Any, whole: Path, key: str, bad: float) -> None:
    tensor = load_file(whole)[key]
    tensor[3] = bad
    component: Component = "unet" if key.startswith(UNET) else "image_encoder"
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(changed({key: tensor})).load(component, torch.float32)
    complete(refused.value, key, "NaN or infinity")


def test_weights_too_large_for_the_precision(changed: Any) -> None:
    checkpoint = open_checkpoint(changed({f"{UNET}out.0.bias": torch.full((64,), 1e5)}))
    checkpoint.load("unet", torch.float32)
    with pytest.raises(CheckpointError, match=r"finite numbers in float16.*Use dtype=\"fp32\""):
        checkpoint.load("unet", torch.float16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{UNET}input_blocks.1.0.out_layers.3.weight": torch.zeros(96, 64, 3, 3)}, "heads of 64"),
        ({f"{UNET}input_blocks.2.0.op.weight": torch.zeros(1)}, "9 input blocks, 2 to a level"),
        ({f"{UNET}input_blocks.999999999999.0.x": torch.zeros(1)}, "modules numbered from 0"),
        ({f"{UNET}label_emb.0.0.weight": torch.zeros(256, 96)}, "projection_class_embeddings_input_dim"),
        ({f"{UNET}label_emb.0.0.weight": torch.zeros(256)}, "got shape [256]"),
        ({f"{UNET}out.2.weight": torch.zeros(10**12, 0)}, "got shape [1000000000000, 0]"),
        ({f"{CLIP}class_embedding": torch.zeros(81)}, "81 channels, heads of 80"),
        ({f"{CLIP}positional_embedding": torch.zeros(18, 160)}, "18 positions"),
        ({f"{CLIP}proj": None}, "no such tensor"),
    ],
)
def test_shapes_that_are_no_svd(changed: Any, change: dict[str, Any], says: str) -> None:
    file = changed(change)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(file)
    complete(refused.value, file.name, says)


@pytest.mark.parametrize("keys", [("unet.down_blocks.0.to_q.lora.up.weight",), ("conv_in.weight", "x"), ()])
def test_files_of_another_kind(tmp_path: Path, keys: tuple[str, ...]) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "svd.safetensors")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path / "svd.safetensors")
    complete(
        refused.value, "no unet and no vae and no image_encoder", keys[0].split(".")[0] if keys else "nothing"
    )


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {
        "dtype": "F32",
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


ONE = json.dumps(entry(0, 4)).encode()
TWICE = b'{"a":' + ONE + b',"a":' + ONE + b"}"
HOSTILE: dict[str, tuple[bytes, bytes, int | None]] = {
    "a header longer than the file": (b"{}", b"", 10**18),
    "overlapping tensors": (header(a=entry(0, 8), b=entry(4, 12)), bytes(12), None),
    "a tensor beyond the end": (header(a=entry(0, 4000)), bytes(8), None),
    "backwards": (header(a=entry(8, 0, [2])), bytes(8), None),
    "holes": (header(a=entry(0, 4), b=entry(8, 12)), bytes(12), None),
    "a shape that is not its size": (header(a=entry(0, 8, [10**6, 10**6])), bytes(8), None),
    "a shape that overflows": (header(a=entry(0, 8, [2**40, 2**40])), bytes(8), None),
    "a negative side": (header(a=entry(0, 8, [-2])), bytes(8), None),
    "a side of text": (header(a={"dtype": "F32", "shape": "12", "data_offsets": [0, 8]}), bytes(8), None),
    "no shape": (header(a={"dtype": "F32", "data_offsets": [0, 8]}), bytes(8), None),
    "an unknown type": (header(a={"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}), bytes(8), None),
    "a list": (b"[1, 2]", b"", None),
    "a number": (b"1", b"", None),
    "no JSON": (b"not json", b"", None),
    "no text": (b"\xff\xfe\xfd", b"", None),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", None),
    "the same key twice": (TWICE, bytes(4), None),
    "data that no tensor has": (header(a=entry(0, 4)), bytes(400), None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files(tmp_path: Path, case: str) -> None:
    file = raw(tmp_path / "svd.safetensors", *HOSTILE[case])
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(file)
    complete(refused.value, str(file), "a whole safetensors file", f"({file.stat().st_size} bytes)")


@pytest.mark.parametrize("size", [0, 7, 8, 1000, -1])
def test_a_file_cut_short(whole: Path, tmp_path: Path, size: int) -> None:
    file = tmp_path / "svd.safetensors"
    file.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        open_checkpoint(file)


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    """A header of billions of entries, in a file with holes that takes no room on the disk."""
    file = raw(tmp_path / "svd.safetensors", b"{", length=2**36)
    os.truncate(file, 2**36 + 8)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="a header of 68719476736 bytes, more than 16777216"):
            open_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_folders_pipes_and_files_that_are_gone(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "svd.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"svd\.safetensors/model_index\.json: .*no such file"):
        open_checkpoint(tmp_path / "svd.safetensors")
    os.mkfifo(tmp_path / "svd_xt.safetensors")
    with pytest.raises(CheckpointError, match="a file that can be read, got no regular file"):
        open_checkpoint(tmp_path / "svd_xt.safetensors")
    with pytest.raises(CheckpointError, match="no such folder and no such file"):
        open_checkpoint(tmp_path / "absent.safetensors")
    file = tmp_path / "svd_xt_1_1.safetensors"
    file.write_bytes(whole.read_bytes())
    checkpoint = open_checkpoint(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="the file that was there when its header was read"):
        checkpoint.load("vae", torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match="the weight file that was there when the checkpoint was"):
        checkpoint.weight_files("vae")


def test_a_pickle_is_refused_with_a_conversion_that_works(pipeline: Any, tmp_path: Path) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in stability_file.tensors_of(pipeline).items()}
    torch.save({"state_dict": tensors}, tmp_path / "svd.ckpt")
    before = tmp_path / "before.safetensors"
    torch.save({"state_dict": {}}, before, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        open_checkpoint(before)
    for name in ("svd.ckpt", "renamed.safetensors"):
        if name != "svd.ckpt":
            (tmp_path / "svd.ckpt").rename(tmp_path / name)
        with pytest.raises(CheckpointError, match="a pickle, which can run code") as refused:
            open_checkpoint(tmp_path / name)
    (_, code) = refused.value.remedy.removesuffix(".").split("in Python: ")
    code = code.replace("FILE", repr(str(tmp_path / "renamed.safetensors")))
    subprocess.run(
        [sys.executable, "-c", f"import safetensors.torch, torch; {code}"], check=True, cwd=tmp_path
    )
    loaded = open_checkpoint(tmp_path / "svd.safetensors").load("vae", torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_opening_costs_no_torch(whole: Path) -> None:
    code = (
        "import sys; from svd_engine.checkpoint.opening import open_checkpoint; "
        f"open_checkpoint({str(whole)!r}); print({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_info_says_what_a_file_is(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = changed(stability_file.extras())
    assert call(main, "info", file) == 0
    said = capsys.readouterr().out
    assert "model           svd, 14 frames of 576x1024\n" in said
    assert "layout          one file, Stability's names\n" in said
    assert re.search(r"\nimage_encoder   \d+ tensors, \d+\.\d M parameters, F32\n", said)
    assert "not read        " in said
    assert "the text half of CLIP (2)" in said
    assert f"unet/svd.safetensors, {file.stat().st_size} bytes, sha256 " in said
    assert "\neager on cpu: ready\n" in said
    assert call(main, "info", file, "--frames", "25") == 0
    assert "svd, 25 frames of" in capsys.readouterr().out
    assert call(main, "info", "--frames", "25") == 2
    assert "belong to a checkpoint" in " ".join(capsys.readouterr().err.split())
    file.rename(file.with_name("mine.safetensors"))
    assert call(main, "info", file.with_name("mine.safetensors")) == 1
    assert "Use --frames 14 or --frames 25" in capsys.readouterr().err


def test_info_of_a_folder_and_of_the_demo(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (tiny_checkpoint, "demo"):
        assert call(main, "info", source) == 0
        assert "layout          diffusers folder\n" in capsys.readouterr().out


@pytest.mark.parametrize("low_byte", [0x50, 0x80])
def test_a_length_that_begins_as_a_pickle_does_is_a_length(
    pipeline: Any, whole: Path, tmp_path: Path, low_byte: int
) -> None:
    content = whole.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    padding = (low_byte - length) % 256
    file = raw(tmp_path / "svd.safetensors", content[8 : 8 + length] + b" " * padding, content[8 + length :])
    assert file.read_bytes()[0] == low_byte
    state = open_checkpoint(file).load("vae", torch.float32).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_keys_are_shown_as_plain_text(tmp_path: Path) -> None:
    save_file({"\x1b[31mred\n.x": torch.zeros(1)}, tmp_path / "svd.safetensors")
    with pytest.raises(CheckpointError, match=r"keys begin with \\x1b\[31mred\\n\."):
        open_checkpoint(tmp_path / "svd.safetensors")
