"""A bundle takes LoRA without another export; plans stay where they were built for other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from svd_engine.backends.tensorrt.network import TrtBackend, TrtNetwork
from svd_engine.backends.tensorrt.refit import graph_weights
from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint, random_checkpoint, with_lora
from svd_engine.checkpoint.weights import build
from svd_engine.cli.main import main as engine_main
from svd_engine.errors import CheckpointError, ExportError, ParityError, SettingsError
from svd_engine.networks.rewrites import ORT_CPU_REWRITES, REWRITES
from svd_engine.spec.profile import Profile
from svd_export import to_onnx
from svd_export.bundle_lora import Changes, DenoiserGraph, take_lora
from svd_export.cli import main
from svd_export.to_onnx import export_bundle
from svd_export.verify import check_exported_from, exported_from, verify
from tests.support import damage, tensorrt_double
from tests.support.commands import call
from tests.support.messages import complete
from tests.support.tensorrt_plans import add_plan, plan_of, specs, weight_types

CPU = torch.device("cpu")
SCALE = 0.5


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every weight of the UNet that LoRA may change: linear layers and convolutions."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in build("unet", open_checkpoint(tiny_checkpoint).configs["unet"]).state_dict().items():
        if weight.dim() > 1 and name.endswith(".weight"):
            module, ones = name.removesuffix(".weight"), [1] * (weight.dim() - 2)
            down = 0.1 * torch.randn(1, *weight.shape[1:], generator=generator)
            up = 0.1 * torch.randn(len(weight), 1, *ones, generator=generator)
            tensors |= {f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up}
    file = tmp_path_factory.mktemp("lora") / "all.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def taken(tiny_bundle: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with it, by the command.  Only to be read."""
    folder = tmp_path_factory.mktemp("taken") / "bundle"
    assert call(main, "lora", tiny_bundle, "--lora", f"{lora}:{SCALE}", "-o", folder) == 0
    return folder


def test_the_networks_are_those_of_the_checkpoint_with_lora(
    tiny_bundle: Path, tiny_checkpoint: Path, lora: Path, taken: Path
) -> None:
    was, bundle = Bundle(tiny_bundle), Bundle(taken)
    bundle.check_hashes()
    fused = open_checkpoint(str(tiny_checkpoint), lora={str(lora): SCALE})
    rows = [r for r in verify(bundle, fused, CPU, lambda line: None, write=False) if "denoiser" in r.network]
    assert len(rows) == 2
    assert max(row.relative for row in rows) <= 1e-5
    source = bundle.manifest.source
    assert source == was.manifest.source.model_copy(update={"lora": fused.lora, "digest": fused.digest()})
    assert [(one.file, one.scale) for one in source.lora] == [(str(lora), SCALE)]
    changed = {name for name, entry in bundle.manifest.files.items() if entry != was.manifest.files[name]}
    assert changed <= {"denoiser.bin", *(g for e in was.entries(["denoiser"]) for g in e.graphs.values())}
    assert {p.name for p in taken.iterdir()} == {*was.manifest.files, MANIFEST, "manifest.schema.json"}


def test_every_tensor_is_the_one_that_an_export_writes(
    tiny_bundle: Path, taken: Path, tiny_checkpoint: Path, lora: Path
) -> None:
    """Bit for bit, tables of frame positions too: no weight of before is left."""
    from svd_export.bundle_lora import _bytes, _weights, turned

    manifest = Bundle(tiny_bundle).manifest
    fused = open_checkpoint(str(tiny_checkpoint), lora={str(lora): SCALE})
    weights = _weights(fused, manifest)
    sizes = {(p.frames, n) for p in manifest.profiles for n in (1, 2)}
    new = {_bytes(form) for name, w in weights.items() for form in turned(name, w, sizes)}
    for entry in manifest.networks:
        if entry.spec.network == "denoiser":
            before, after = (graph_weights(f / entry.graphs["onnxruntime"]) for f in (tiny_bundle, taken))
            pairs = list(zip(before, after, strict=True))
            same = [name for (name, _, old), (_, _, now) in pairs if old.tobytes() == now.tobytes()]
            replaced = [now.tobytes() for (_, _, old), (_, _, now) in pairs if old.tobytes() != now.tobytes()]
            assert len(replaced) > 100
            assert new.issuperset(replaced)
            assert not [name for name in same if name.endswith("conv1.weight")]


def test_a_bundle_of_before_feed_forward_convolutions_takes_lora(
    tiny_checkpoint: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest does not name that rewrite, and its graphs have matrices for the 1x1 convolutions."""
    before = [r for r in (*REWRITES, *ORT_CPU_REWRITES) if r.name != "feed-forward-convolutions"]
    monkeypatch.setattr(to_onnx, "rewrites_for", lambda backend, device: before)
    plain = open_checkpoint(str(tiny_checkpoint))
    fused = open_checkpoint(str(tiny_checkpoint), lora={str(lora): SCALE})
    manifest = export_bundle(plain, tmp_path / "was", [Profile(3, 32, 48)], torch.float32)
    assert manifest.without_rewrites == ()
    assert "feed-forward-convolutions" not in {entry.name for entry in manifest.rewrites}
    taken = take_lora(Bundle(tmp_path / "was"), plain, fused, tmp_path / "taken")
    assert taken.replaced > 100
    rows = verify(Bundle(tmp_path / "taken"), fused, CPU, lambda line: None, write=False)
    assert max(row.relative for row in rows if "denoiser" in row.network) <= 1e-5


def test_a_bundle_with_lora_takes_another_and_is_verified_where_its_file_has_moved(
    tiny_bundle: Path, taken: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale of 0 gives the bundle of before."""
    back = tmp_path / "back"
    assert call(main, "lora", taken, "--lora", f"{lora}:0", "-o", back) == 0
    for name in Bundle(back).manifest.files:
        assert (back / name).read_bytes() == (tiny_bundle / name).read_bytes()
    with pytest.raises(SettingsError, match="lora_partial: expected LoRA files"):
        exported_from(Bundle(back), lora_partial=True)
    move_lora(back)
    capsys.readouterr()
    assert call(main, "verify", back, "--device", "cpu") == 1
    said = capsys.readouterr().err
    assert said.endswith("got no such file. Pass --exported-lora FILE, the path where it lies now.\n")
    assert call(main, "verify", back, "--exported-lora", lora, "--device", "cpu") == 0
    assert capsys.readouterr().out.count("max abs") == len(Bundle(back).manifest.networks)


def move_lora(folder: Path) -> None:
    """Gives the manifest's LoRA a path where no file is."""
    damage.edit(folder, lambda m: m["source"]["lora"][0].update(file=str(folder / "gone.safetensors")))


def test_a_bundle_takes_lora_where_the_file_of_its_own_has_moved(
    tiny_bundle: Path, taken: Path, lora: Path, tmp_path: Path
) -> None:
    folder, back = damage.copy(taken, tmp_path), tmp_path / "back"
    move_lora(folder)
    with pytest.raises(CheckpointError) as gone:
        exported_from(Bundle(folder))
    complete(gone.value, "gone.safetensors", f"what {folder} was exported with", "exported_lora=FILE")
    assert call(main, "lora", folder, "--lora", f"{lora}:0", "-o", back, "--exported-lora", lora) == 0
    assert (back / "denoiser.bin").read_bytes() == (tiny_bundle / "denoiser.bin").read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    with pytest.raises(SettingsError) as refused:
        exported_from(Bundle(folder), exported_lora=[other])
    complete(refused.value, f"LoRA {other}", "expected the content of one that", "from where they lie now")


def test_parts_that_have_moved(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, parts = damage.copy(tiny_bundle, tmp_path), {"unet": tiny_checkpoint / "unet"}
    digest = open_checkpoint(str(tiny_checkpoint), parts=parts).digest()  # type: ignore[arg-type]
    gone = {"unet": str(tmp_path / "gone")}
    damage.edit(folder, lambda m: m["source"].update(parts=gone, digest=digest))
    bundle = Bundle(folder)
    with pytest.raises(CheckpointError, match=r"unet from .*gone: .*no such file"):
        exported_from(bundle)
    check_exported_from(bundle, exported_from(bundle, parts=parts))  # type: ignore[arg-type]
    assert f"--unet {tmp_path / 'gone'}" in bundle.manifest.export_source


def test_a_remedy_exports_with_parts_and_lora(taken: Path, lora: Path) -> None:
    assert Bundle(taken).manifest.export_source.endswith(f" --lora {lora}:{SCALE}")
    damage_free = Bundle(taken).manifest
    left = damage_free.source.lora[0].model_copy(update={"left": 1})
    source = damage_free.source.model_copy(update={"lora": (left,)})
    assert damage_free.model_copy(update={"source": source}).export_source.endswith(" --lora-partial")


def test_random_weights_take_lora(tiny_bundle: Path, tmp_path: Path) -> None:
    small = random_checkpoint("small")
    down, up = torch.ones(1, 8, 3, 3), torch.ones(small.configs["unet"]["block_out_channels"][0], 1, 1, 1)
    file = tmp_path / "lora.safetensors"
    save_file({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}, file)
    folder = damage.copy(tiny_bundle, tmp_path)
    damage.edit(folder, lambda m: m["source"].update(checkpoint="random:small"))
    fused = exported_from(Bundle(folder), lora={file: 1.0})
    assert fused.lora == with_lora(small, {file: 1.0}).lora
    assert exported_from(Bundle(folder)).digest() == small.digest()
    for options in ({"variant": "fp16"}, {"parts": {"unet": file}}):
        with pytest.raises(SettingsError, match="no variant and no parts beside random weights") as refused:
            exported_from(Bundle(folder), **options)  # type: ignore[arg-type]
        complete(refused.value, "checkpoint random:small", "Leave them out")


# Plans


def test_plans_are_refitted_or_left_out(
    tiny_half_bundle: Path,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One was built for other weights, one holds its own, and one is of another network."""
    trt = tensorrt_double.install(monkeypatch)
    folder, target = damage.copy(tiny_half_bundle, tmp_path), tmp_path / "with LoRA"
    batched, single = (spec for spec in specs(folder) if spec.network == "denoiser")
    decoder = next(spec for spec in specs(folder) if spec.network == "vae_decoder")
    types = weight_types(Bundle(folder).graph(batched, "tensorrt"))
    kept = add_plan(
        folder, batched, plan_of(batched, weights=types) | {"stripped": False}, refittable=True,
        other_weights=True,
    )  # fmt: skip
    fixed, other = add_plan(folder, single), add_plan(folder, decoder)
    assert call(main, "lora", folder, "--lora", lora, "-o", target) == 0
    said = capsys.readouterr().out
    assert f"left out {fixed.file}: its weights are fixed. Run: svd-export tensorrt " in said
    assert said.endswith(f"'{target}' --flavour tensorrt --refittable\n")
    bundle = Bundle(target)
    assert {plan.file: plan.stripped for plan in bundle.manifest.plans} == {
        kept.file: True,
        other.file: False,
    }
    assert not (target / fixed.file).exists()
    network = TrtBackend(bundle, CPU).open(batched)
    assert isinstance(network, TrtNetwork)
    assert trt.called("Refitter.refit_cuda_engine") == [()]
    model = onnx.load(str(bundle.graph(batched, "tensorrt")))
    now = {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    assert {name: network.engine.weights[name] for name in now} == now  # of the double
    old = {name: content.tobytes() for name, _, content in graph_weights(folder / _graph(folder, batched))}
    assert sum(old[name] != now[name] for name in now) > 100


def _graph(folder: Path, spec: Any) -> str:
    return Bundle(folder).graph_name(spec, "tensorrt")


# What is refused


def test_another_checkpoint(tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="checkpoint demo: expected the one that"):
        take_lora(Bundle(tiny_bundle), open_checkpoint("demo"), open_checkpoint("demo"), tmp_path / "new")
    assert call(main, "lora", tiny_bundle, "--lora", lora, "-o", tmp_path) == 1  # it is there
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_has_moved(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody typed its old path now: the remedy is not to spell it in another way."""
    folder = damage.copy(tiny_bundle, tmp_path)
    damage.edit(folder, lambda m: m["source"].update(checkpoint="moved"))
    assert call(main, "verify", folder) == 1
    said = capsys.readouterr().err
    assert f"error: checkpoint 'moved': expected what {folder} was exported from" in said
    assert said.endswith("got none of these. Pass --checkpoint ORIGINAL, the path where it lies now.\n")
    bundle = Bundle(folder)
    check_exported_from(bundle, exported_from(bundle, str(tiny_checkpoint)))


def test_a_damaged_bundle(
    tiny_half_bundle: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it would copy is not passed on, and the remedy is the file's own."""
    folder, into = damage.copy(tiny_half_bundle, tmp_path), tmp_path / "into"
    into.mkdir()
    plan = add_plan(folder, next(spec for spec in specs(folder) if spec.network == "vae_decoder"))
    (folder / plan.file).unlink()
    assert call(main, "lora", folder, "--lora", lora, "-o", into / "new") == 1
    said = capsys.readouterr().err
    assert "got no such file. The plan was altered or damaged. Run: svd-export tensorrt" in said
    damage.edit(folder, lambda m: (m.pop("plans"), m["files"].pop(plan.file)))
    damage.flip(folder / "vae_decoder.bin")
    assert call(main, "lora", folder, "--lora", lora, "-o", into / "new") == 1
    assert "The file was altered or damaged: copy or export the bundle again" in capsys.readouterr().err
    assert list(into.iterdir()) == []


def test_what_the_commands_are_told(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, "lora", tiny_bundle, "-o", tmp_path / "new") == 2
    assert "pass --lora FILE[:SCALE]" in capsys.readouterr().err
    assert call(main, "verify", tiny_bundle, "--backend", "tensorrt", "--unet", "x") == 2
    assert "belong to" in capsys.readouterr().err
    assert call(engine_main, "generate", "x.jpg", "-o", "x.mp4", "--bundle", tiny_bundle, "--lora", "x") == 2
    assert "svd-export lora BUNDLE" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": [1.0, 2.0]}, "got none of it"),
        ({"a": [3.0, 4.0], "b": [3.0, 4.0]}, "got a tensor that is another weight too"),
        ({"a": [5.0, 5.0]}, "got a tensor like many"),
    ],
)
def test_a_weight_that_cannot_be_told(
    tiny_bundle: Path, tmp_path: Path, weights: dict[str, list[float]], says: str
) -> None:
    inside = [np.array(values, np.float32) for values in ([3.0, 4.0], [5.0, 5.0])]
    tensors = [numpy_helper.from_array(tensor, f"t{number}") for number, tensor in enumerate(inside)]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))
    (tmp_path / "weights.bin").write_bytes(b"")
    graph = DenoiserGraph(model, tmp_path / "weights.bin", whole=True)
    before = {name: torch.tensor(values) for name, values in weights.items()}
    after = before | {"a": before["a"] + torch.tensor([0.0, 1.0])}
    with pytest.raises(ExportError) as refused:
        Changes(Bundle(tiny_bundle).manifest, before).to(after, {"graph.onnx": graph})
    complete(refused.value, "a in graph.onnx", says, "--lora FILE")
