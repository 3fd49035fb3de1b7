"""LoRA: files in the styles of diffusers, peft and kohya, fused into a UNet's weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from svd_engine import VideoEngine
from svd_engine.checkpoint.lora import Fused, _weight_names
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.checkpoint.stability_keys import unet_key
from svd_engine.checkpoint.weights import build
from svd_engine.cli.main import main
from svd_engine.cli.options import lora_of
from svd_engine.errors import CheckpointError, SettingsError
from svd_export.cli import main as export_main
from tests.support import stability_file
from tests.support.commands import call
from tests.support.messages import complete

RANK = 2
# linear layers and convolutions of one, two and three dimensions, over space and over time
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj"]
TO_Q = "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.temporal_res_block.conv1"
Tensors = dict[str, torch.Tensor]
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]


def adapted(plain: Any) -> tuple[Any, Layers]:
    """A copy of a UNet with peft's adapters, alpha as the rank, and their two matrices by module."""
    unet = copy.deepcopy(plain)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), unet)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:  # peft's own up matrices are 0 before training
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(unet)
    downs = {k.removesuffix(".lora_A.weight"): t for k, t in state.items() if k.endswith("lora_A.weight")}
    return unet.eval(), {name: (down, state[f"{name}.lora_B.weight"]) for name, down in downs.items()}


@pytest.fixture(scope="module")
def trained(stability_pipeline: Any) -> tuple[Any, Layers]:
    return adapted(stability_pipeline.unet)


@pytest.fixture(scope="module")
def base(stability_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stability_file.write(tmp_path_factory.mktemp("lora") / "svd.safetensors", stability_pipeline)


def keyed(layers: Layers, name: Callable[[str], str], down: str, up: str) -> Tensors:
    tensors: Tensors = {}
    for module, (a, b) in layers.items():
        tensors |= {f"{name(module)}.{down}": a.contiguous(), f"{name(module)}.{up}": b.contiguous()}
    return tensors


def underscored(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def of_stability(module: str, unet: Any) -> str:
    return unet_key(f"{module}.weight", unet.config).removesuffix(".weight")


def write(style: str, layers: Layers, folder: Path, unet: Any) -> tuple[Path, float]:
    """A file of a style, and what its alpha makes of the update."""
    file, metadata, factor = folder / "lora.safetensors", None, 1.0
    alphas: Tensors = {}
    if style == "diffusers":
        tensors = keyed(layers, "unet.{}".format, "lora.down.weight", "lora.up.weight")
    elif style == "diffusers, peft's words":
        tensors = keyed(layers, "unet.{}".format, "lora_A.weight", "lora_B.weight")
        metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 5, "unet.r": RANK})}
        factor = 5 / RANK
    elif style == "peft":
        file, factor = folder, 8 / RANK
        tensors = keyed(layers, "base_model.model.{}".format, "lora_A.weight", "lora_B.weight")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
        save_file(tensors, folder / "adapter_model.safetensors")
        return file, factor
    else:
        stability = style != "kohya, diffusers' names"

        def name(module: str) -> str:
            module = of_stability(module, unet) if stability else module
            return f"diffusion_model.{module}" if "dotted" in style else underscored(module)

        tensors = keyed(layers, name, "lora_down.weight", "lora_up.weight")
        alphas = {f"{name(module)}.alpha": torch.tensor(1.0) for module in layers}
        factor = 1 / RANK
    save_file(tensors | alphas, file, metadata)
    return file, factor


@pytest.mark.parametrize(
    "style",
    [
        "diffusers",
        "diffusers, peft's words",
        "peft",
        "kohya, diffusers' names",
        "kohya, Stability's names",
        "ComfyUI, dotted",
    ],
)
def test_every_style_fuses_what_peft_adds(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path, style: str
) -> None:
    unet, layers = trained
    file, factor = write(style, layers, tmp_path, unet)
    checkpoint = open_checkpoint(base, lora={file: 0.5})
    fused = checkpoint.load("unet", torch.float32).state_dict()
    plain = open_checkpoint(base).load("unet", torch.float32).state_dict()
    modules = dict(unet.named_modules())
    assert {len(plain[f"{module}.weight"].shape) for module in layers} == {2, 4, 5}
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        expected = weight
        if module in layers and name.endswith(".weight"):
            expected = weight + 0.5 * factor * modules[module].get_delta_weight("default")
            assert not torch.equal(fused[name], weight)
        assert (fused[name] - expected).abs().max() <= 1e-6
    (record,) = checkpoint.lora
    assert (record.file, record.scale, record.fused, record.left) == (str(file), 0.5, len(layers), 0)


def test_the_frames_are_pefts(diffusers_pipeline: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import StableVideoDiffusionPipeline

    unet, layers = adapted(diffusers_pipeline.unet)
    file, _ = write("diffusers", layers, tmp_path, unet)
    pipeline = StableVideoDiffusionPipeline(**{**diffusers_pipeline.components, "unet": unet})
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    call_of: dict[str, Any] = {
        "height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 5, "output_type": "pt",
    }  # fmt: skip
    theirs = torch.as_tensor(pipeline(image, generator=torch.manual_seed(0), **call_of).frames)
    frames = []
    for scales in ({file: 1.0}, {}):
        with VideoEngine.from_checkpoint(
            tiny_checkpoint, backend="eager", device="cpu", lora=scales
        ) as engine:
            result = engine(image, generator=torch.manual_seed(0), **call_of)
            frames.append(torch.as_tensor(result.frames))
            assert [one.file for one in result.report.lora] == [str(one) for one in scales]
    ours, without = frames
    assert (ours - theirs).abs().max() <= 1e-5  # of 0 to 1; so it is without LoRA
    assert (without - theirs).abs().max() > 1e-3


def test_several_files_add_up_whatever_the_precision(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path
) -> None:
    unet, layers = trained
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, _ = write("diffusers", {TO_Q: layers[TO_Q]}, tmp_path / "a", unet)
    second, factor = write("kohya, Stability's names", layers, tmp_path / "b", unet)
    both = open_checkpoint(base, lora={first: -1.0, second: 2.0})
    plain = open_checkpoint(base)
    delta = dict(unet.named_modules())[TO_Q].get_delta_weight("default")
    weight = plain.load("unet", torch.float16).state_dict()[f"{TO_Q}.weight"]
    expected = (weight.float() + (2 * factor - 1) * delta).half()
    fused = both.load("unet", torch.float16).state_dict()[f"{TO_Q}.weight"]
    assert (fused - expected).abs().max() <= 2**-10 * expected.abs().max()
    digests = {
        plain.digest(), both.digest(), open_checkpoint(base, lora={first: 1.0}).digest(),
        open_checkpoint(base, lora={first: -1.0}).digest(),
    }  # fmt: skip
    assert len(digests) == 4
    assert both.weight_files("unet") == plain.weight_files("unet")
    assert torch.equal(
        both.load("vae", torch.float32).quant_conv.weight, plain.load("vae", torch.float32).quant_conv.weight
    )


def test_alpha_of_single_layers_and_of_rank_stabilised_files(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path
) -> None:
    unet, layers = trained
    two = {name: layers[name] for name in (TO_Q, CONV)}
    file, _ = write("peft", two, tmp_path, unet)
    config = {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"temporal_res_block.conv1": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = open_checkpoint(base, lora={file: 1.0}).weights
    assert isinstance(weights, Fused)
    factors = {name: update.factor for name, update in weights.loras[0].updates.items()}
    assert factors == {f"{TO_Q}.weight": 8 / RANK**0.5, f"{CONV}.weight": 3 / RANK**0.5}


def test_the_names_of_older_diffusers(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    _, layers = trained
    processor = TO_Q.removesuffix(".to_q") + ".processor"
    out = TO_Q.replace("to_q", "to_out.0")
    tensors = {
        f"unet.{processor}.to_q_lora.down.weight": layers[TO_Q][0],
        f"unet.{processor}.to_q_lora.up.weight": layers[TO_Q][1],
        f"unet.{processor}.to_out_lora.down.weight": layers[out][0],
        f"unet.{processor}.to_out_lora.up.weight": layers[out][1],
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "old.safetensors")
    weights = open_checkpoint(base, lora={tmp_path / "old.safetensors": 1.0}).weights
    assert isinstance(weights, Fused)
    assert weights.loras[0].updates.keys() == {f"{TO_Q}.weight", f"{out}.weight"}


def test_no_two_weights_share_a_name() -> None:
    """Of SVD-XT's own UNet, dots replaced: every weight is found under eight names of its own."""
    from svd_engine.checkpoint.random_weights import svd_configs

    config = svd_configs(25)["unet"]
    shapes = {name: tuple(t.shape) for name, t in build("unet", config).state_dict().items()}
    names = _weight_names(shapes, config)
    weights = {name for name, shape in shapes.items() if len(shape) > 1 and name.endswith(".weight")}
    same = {name for name in weights if unet_key(name, config) == name}
    assert set(names.values()) == weights
    assert same == set()
    assert len(names) == 9 * len(weights)


# What is refused


def refused(base: Path, file: Path, *says: str, partial: bool = False) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base, lora={file: 1.0}, lora_partial=partial).load("unet", torch.float32)
    complete(caught.value, str(file), *says)


def test_keys_that_fit_no_weight(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    down, up = trained[1][TO_Q]
    tensors = {
        f"unet.{TO_Q}.lora_A.weight": down,
        f"unet.{TO_Q}.lora_B.weight": up,
        "text_encoder.x.lora_A.weight": torch.zeros(1, 1),
        f"unet.{CONV}.lora_A.weight": torch.zeros(1, 1),  # of a layer that has more than is understood
        f"unet.{CONV}.lora_magnitude_vector": torch.zeros(1),
    }
    file = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    refused(base, file, "3 of 5 that fit none", "text_encoder.x.lora_A.weight", "lora_partial=True")
    checkpoint = open_checkpoint(base, lora={file: 1.0}, lora_partial=True)
    assert (checkpoint.lora[0].fused, checkpoint.lora[0].left) == (1, 3)
    save_file({"conv_in.weight": torch.zeros(1)}, file)
    for partial in (False, True):
        refused(base, file, "1 of 1 that fit none: conv_in.weight", partial=partial)
    save_file({"." * 2**18: torch.zeros(1)}, file)  # all of whose beginnings would be 32 GiB
    refused(base, file, "1 of 1 that fit none: ....")
    save_file({}, file)
    refused(base, file, "0 of 0 that fit none: no key", partial=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"up": None}, "only "),
        ({"down": torch.zeros(RANK + 1, 64)}, f"[{RANK + 1}, 64] and "),
        ({"down": torch.zeros(RANK, 63)}, f"[{RANK}, 63]"),
        ({"down": torch.zeros(0, 64), "up": torch.zeros(64, 0)}, "[0, 64]"),
        ({"down": torch.zeros(())}, "lora.down.weight []"),
        ({"down": torch.zeros(RANK)}, f"lora.down.weight [{RANK}]"),
        ({"up": torch.zeros(64 * RANK)}, f"lora.up.weight [{64 * RANK}]"),
        ({"up": torch.zeros(64, RANK, 3, 3)}, f"lora.up.weight [64, {RANK}, 3, 3]"),
        ({"down": torch.zeros(RANK, 64, dtype=torch.int8)}, "lora.down.weight in I8"),
        ({"down": torch.full((RANK, 64), float("nan"))}, "NaN or infinity"),
        ({"up": torch.full((64, RANK), float("inf"))}, "NaN or infinity"),
        ({"alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
        ({"alpha": torch.zeros(2)}, "alpha [2]"),
    ],
)
def test_matrices_that_do_not_fit(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    down, up = trained[1][TO_Q]
    halves = {"down": down, "up": up, "alpha": torch.tensor(1.0)} | change
    keys = {"down": "lora.down.weight", "up": "lora.up.weight", "alpha": "alpha"}
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{TO_Q}.{keys[h]}": t.contiguous() for h, t in halves.items() if t is not None}, file)
    refused(base, file, says)


def test_one_weight_under_two_names(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    layers = {TO_Q: trained[1][TO_Q]}
    tensors = keyed(layers, "unet.{}".format, "lora_A.weight", "lora_B.weight")
    tensors |= keyed(layers, underscored, "lora_down.weight", "lora_up.weight")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    refused(base, tmp_path / "lora.safetensors", f"two updates of {TO_Q}.weight")


def test_a_sum_that_is_too_large(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    file, _ = write("diffusers", {TO_Q: trained[1][TO_Q]}, tmp_path, trained[0])
    with pytest.raises(CheckpointError, match=r"to_q\.weight .*NaN or infinity"):
        open_checkpoint(base, lora={file: 1e8}).load("unet", torch.float16)
    for scale in (float("nan"), "1"):
        with pytest.raises(SettingsError, match=r"scale of LoRA .*: expected a finite number"):
            open_checkpoint(base, lora={file: scale})  # type: ignore[dict-item]


def test_files_that_are_none(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    refused(base, tmp_path / "absent", "no such file")
    refused(base, tmp_path, "a folder with adapter_model.safetensors", "no such file")
    torch.save({}, tmp_path / "lora.bin")
    refused(base, tmp_path / "lora.bin", "a pickle", 'weights_only=True), "lora.safetensors"')
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 12)
    refused(base, tmp_path / "cut.safetensors", "a whole safetensors file")
    unet, layers = trained
    folder, _ = write("peft", {TO_Q: layers[TO_Q]}, tmp_path, unet)
    config = tmp_path / "adapter_config.json"
    for content, says in (
        ({"lora_alpha": "much"}, "lora_alpha 'much'"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"lora_alpha": 1, "alpha_pattern": {".*to_q": 1}}, "alpha_pattern .*to_q"),
    ):
        config.write_text(json.dumps(content))
        refused(base, folder / "adapter_model.safetensors", says)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .*no such file"):
        open_checkpoint(base, lora={folder: 1.0})
    tensors = keyed({TO_Q: layers[TO_Q]}, "unet.{}".format, "lora_A.weight", "lora_B.weight")
    for text in ("[1]", "{", "1"):
        save_file(tensors, tmp_path / "mine.safetensors", {"lora_adapter_metadata": text})
        refused(base, tmp_path / "mine.safetensors", "lora_adapter_metadata of another form")


def test_a_file_that_changes_before_it_is_read(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path
) -> None:
    unet, layers = trained
    file, _ = write("diffusers", {TO_Q: layers[TO_Q]}, tmp_path, unet)
    checkpoint = open_checkpoint(base, lora={file: 1.0})
    write("diffusers", {CONV: layers[CONV]}, tmp_path, unet)
    with pytest.raises(CheckpointError, match=r"LoRA .*: expected the file that was there.*other content"):
        checkpoint.load("unet", torch.float32)
    with pytest.raises(SettingsError, match="lora: expected None with a checkpoint that is open"):
        VideoEngine.from_checkpoint(checkpoint, lora={file: 1.0})


@pytest.mark.parametrize("given", ["style.safetensors", ["style.safetensors"]])
def test_what_is_no_dict(base: Path, given: Any) -> None:
    for name in ("lora", "parts"):
        with pytest.raises(SettingsError, match=f"{name}: expected a dict such as"):
            open_checkpoint(base, **{name: given})
    for name, value in (("lora", {3: 1.0}), ("parts", {"unet": 3})):
        with pytest.raises(SettingsError, match=r"expected a path, .* got an object of type int"):
            open_checkpoint(base, **{name: value})
    with pytest.raises(SettingsError, match=r"lora_partial: expected LoRA files, .* got none"):
        open_checkpoint(base, lora_partial=True)


# Commands


def test_how_a_scale_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    given = lora_of(
        ["a.safetensors:0.5", "b.safetensors", "C:/c.safetensors", "C:/d.safetensors:-1", "odd:2"]
    )
    assert given == {
        "a.safetensors": 0.5,
        "b.safetensors": 1.0,
        "C:/c.safetensors": 1.0,
        "C:/d.safetensors": -1.0,
        "odd:2": 1.0,
    }
    assert lora_of(None) == {}


def test_the_commands_take_lora(
    trained: tuple[Any, Layers], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, layers = trained
    file, _ = write("kohya, Stability's names", layers, tmp_path, unet)
    assert call(main, "info", base, "--lora", f"{file}:0.5") == 0
    line = f"LoRA 1          {file}, scale 0.5, {len(layers)} weights, 0 keys left out\n"
    assert line in capsys.readouterr().out
    assert call(main, "info", base, "--lora", file, "--lora", file) == 2
    assert "is given twice" in capsys.readouterr().err
    assert call(main, "info", "--lora", file) == 2
    assert "belong to a checkpoint" in " ".join(capsys.readouterr().err.split())
    assert call(main, "generate", "x.jpg", "-o", "x.mp4", "--bundle", tmp_path, "--lora", file) == 2
    assert "a bundle has its own, from its export" in " ".join(capsys.readouterr().err.split())
    assert call(export_main, "onnx", "--random-weights", "small", "-o", tmp_path / "x", "--lora", file) == 2
    assert "random weights have no files" in " ".join(capsys.readouterr().err.split())
    save_file({"x.lora_A.weight": torch.zeros(1)}, file)
    assert call(main, "info", base, "--lora", file, "--lora-partial") == 1
    assert call(export_main, "convert", base, "-o", tmp_path / "folder", "--lora", file) == 1
    assert "x.lora_A.weight" in capsys.readouterr().err


def test_a_converted_folder_holds_it(trained: tuple[Any, Layers], base: Path, tmp_path: Path) -> None:
    unet, layers = trained
    file, _ = write("diffusers", layers, tmp_path, unet)
    assert call(export_main, "convert", base, "-o", tmp_path / "folder", "--lora", f"{file}:0.25") == 0
    fused = open_checkpoint(base, lora={file: 0.25}).load("unet", torch.float32).state_dict()
    folder = open_checkpoint(tmp_path / "folder").load("unet", torch.float32).state_dict()
    assert all(torch.equal(tensor, folder[name]) for name, tensor in fused.items())
