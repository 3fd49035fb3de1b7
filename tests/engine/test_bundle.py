"""What a bundle is refused for, each time with what to do; external data has its own file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from svd_engine.bundle.manifest import MANIFEST, SCHEMA
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BundleError
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import FRAMES
from tests.support import damage

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return damage.copy(tiny_bundle, tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle(folder)
    assert caught.value.exit_code == 1
    assert caught.value.remedy.endswith((".", "BUNDLE"))
    return str(caught.value)


def specs(folder: Path) -> dict[str, NetworkSpec]:
    bundle = Bundle(folder)
    return {s.network: s for s in bundle.specs_of(bundle.manifest.profiles[0])}


def test_a_whole_bundle_opens_and_its_hashes_hold(bundle: Path) -> None:
    opened = Bundle(bundle)
    opened.check_hashes()
    for profile in opened.manifest.profiles:
        for spec in opened.specs_of(profile):
            assert opened.graph(spec, "onnxruntime").parent == bundle


def test_no_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing")
    assert "no such folder" in message
    assert "svd-export onnx CHECKPOINT -o BUNDLE" in message


def test_no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    assert "expected a folder with manifest.json, got no such file" in refusal(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, "{}".encode("utf-32-le")[:7]],
    ids=["empty", "cut", "no text", "deep", "odd"],
)
def test_a_manifest_that_is_not_json(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    message = refusal(bundle)
    assert "expected a JSON document" in message
    assert str(bundle / MANIFEST) in message


@pytest.mark.parametrize("document", [{}, {"format": 2}, {"format": 4}, {"format": "3"}, [], 1, None])
def test_another_format(bundle: Path, document: object) -> None:
    (bundle / MANIFEST).write_text(json.dumps(document))
    message = refusal(bundle)
    assert "expected bundle format 3, got format" in message
    assert "Export it again: svd-export onnx CHECKPOINT -o NEW_BUNDLE" in message


@pytest.mark.parametrize(
    ("checkpoint", "argument"),
    [("my model", "'my model'"), ("random:svd-xt", "--random-weights svd-xt"), (7, "CHECKPOINT")],
)
def test_another_format_names_what_makes_it_anew(bundle: Path, checkpoint: object, argument: str) -> None:
    damage.edit(bundle, lambda m: m.update(format=1, source={"checkpoint": checkpoint}))
    assert f"Export it again: svd-export onnx {argument} -o NEW_BUNDLE" in refusal_of_format(bundle)


def test_another_format_is_exported_again_as_it_was(bundle: Path) -> None:
    """Size, frames, guidance and precision are read where they can be."""
    damage.edit(bundle, lambda m: m.update(format=1, source={"checkpoint": "x", "variant": "fp16"}))
    message = refusal_of_format(bundle)
    assert f"svd-export onnx x --variant fp16 -o NEW_BUNDLE --frames {FRAMES} --height " in message
    assert "--guidance batched --guidance single" in message
    assert message.endswith("--dtype fp32")
    damage.edit(bundle, lambda m: (m.pop("precision"), m.update(dtype="float16", format=2)))
    assert refusal_of_format(bundle).endswith("--dtype fp16")  # formats 1 and 2 called it dtype
    damage.edit(bundle, lambda m: m.update(profiles=[{"frames": "all"}]))
    assert refusal_of_format(bundle).endswith("svd-export onnx x --variant fp16 -o NEW_BUNDLE --dtype fp16")


def refusal_of_format(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle(folder)
    return str(caught.value)


PARITY: dict[str, Any] = {
    "network": "n",
    "output": "o",
    "backend": "b",
    **dict.fromkeys(("max_abs", "relative", "cosine", "tolerance"), 0.0),
}
CHANGES: dict[str, tuple[str, Change]] = {
    "unknown field": ("colour", lambda m: m.update(colour="blue")),
    "unknown field of a profile": ("profiles.0.colour", lambda m: m["profiles"][0].update(colour="blue")),
    "unknown field of a file": ("mtime", lambda m: m["files"]["denoiser.bin"].update(mtime=0)),
    "missing field": ("source", lambda m: m.pop("source")),
    "text for a number": ("profiles.0.frames", lambda m: m["profiles"][0].update(frames="3")),
    "true for a number": ("opset", lambda m: m.update(opset=True)),
    "a fraction": ("profiles.0.height", lambda m: m["profiles"][0].update(height=32.5)),
    "another guidance": ("profiles.0.guidance", lambda m: m["profiles"][0].update(guidance="both")),
    "another dtype": ("precision.weights", lambda m: m["precision"].update(weights="int8")),
    "no profiles": ("profiles", lambda m: m.update(profiles=[])),
    "no frames": ("profiles.0.frames", lambda m: m["profiles"][0].update(frames=0)),
    "an empty chunk": ("profiles.0.decode_chunk", lambda m: m["profiles"][0].update(decode_chunk=0)),
    "no pixels": ("architecture.vae_scale", lambda m: m["model"]["architecture"].update(vae_scale=0)),
    "no tolerance": ("parity.0.tolerance", lambda m: m.update(parity=[PARITY])),
}


@pytest.mark.parametrize(("field", "change"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_against_its_schema(bundle: Path, field: str, change: Change) -> None:
    damage.edit(bundle, change)
    message = refusal(bundle)
    assert "expected a manifest that follows manifest.schema.json" in message
    assert field in message


def test_the_schema_in_the_bundle_holds_for_its_manifest(bundle: Path) -> None:
    """With a validator that we did not write; and it is no schema that takes everything."""
    schema = json.loads((bundle / SCHEMA).read_text())
    manifest = json.loads((bundle / MANIFEST).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    for spoiled in ({**manifest, "opset": "23"}, {**manifest, "colour": 1}, {**manifest, "profiles": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, schema)


def test_the_digest_is_of_what_decides_the_frames(tiny_half_bundle: Path, planned: Path) -> None:
    """Not of plans, of results of verification, or of a name."""
    own = Bundle(tiny_half_bundle).digest()
    damage.edit(planned, lambda m: (m.update(parity=[], versions={}), m["model"].update(name="renamed")))
    assert Bundle(planned).digest() == own
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda m: m["model"].update(sigma_max=600.0),
        lambda m: m["profiles"].reverse(),
        lambda m: m["files"][m["networks"][0]["weights"]].update(sha256="0" * 64),
    ]
    digests = {own}
    for change in changes:
        damage.edit(planned, change)
        digests.add(Bundle(planned).digest())
    assert len(digests) == 1 + len(changes)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "denoiser.bin").unlink()
    message = refusal(bundle)
    assert "file denoiser.bin" in message
    assert "no such file" in message


def test_a_file_of_another_size(bundle: Path) -> None:
    with (bundle / "vae_decoder.bin").open("ab") as file:
        file.write(b"\0")
    message = refusal(bundle)
    size = (bundle / "vae_decoder.bin").stat().st_size
    assert f"of {size - 1} bytes, got {size} bytes" in message


def test_a_link(bundle: Path) -> None:
    outside = (bundle / "denoiser.bin").rename(bundle.parent / "outside.bin")
    (bundle / "denoiser.bin").symlink_to(outside)
    message = refusal(bundle)
    assert "got a link" in message
    assert "links resolved" in message


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/hostname", "sub/weights.bin", "..", ".", "", "a\0b"]
)
def test_a_name_that_leaves_the_bundle(bundle: Path, name: str) -> None:
    """The file exists where the name says, with the right size and hash."""
    (bundle / "sub").mkdir()
    for place in (bundle.parent / "outside.bin", bundle / "sub" / "weights.bin"):
        place.write_bytes(b"")
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    damage.edit(bundle, lambda manifest: manifest["files"].update({name: empty}))
    message = refusal(bundle)
    assert "a path that leaves the bundle" in message or "no such file" in message


@pytest.mark.parametrize("name", ["denoiser.bin", "graph"])
def test_a_flipped_byte_is_found_before_the_network_loads(bundle: Path, name: str) -> None:
    name = damage.network(bundle, "denoiser")["graphs"]["onnxruntime"] if name == "graph" else name
    damage.flip(bundle / name)
    opened = Bundle(bundle)  # sizes agree
    with pytest.raises(BundleError, match=r"file .* expected sha256 .* got sha256 .*copy or export"):
        opened.graph(specs(bundle)["denoiser"], "onnxruntime")
    opened.graph(specs(bundle)["image_encoder"], "onnxruntime")
    with pytest.raises(BundleError, match=name):
        opened.check_hashes()


def test_a_network_that_is_not_there(bundle: Path) -> None:
    damage.edit(
        bundle, lambda m: m.update(networks=[n for n in m["networks"] if "denoiser" not in n["weights"]])
    )
    message = refusal(bundle)
    assert f"network denoiser-b1-f{FRAMES}" in message
    assert "got only image_encoder-b1, " in message


def test_a_network_without_hashes(bundle: Path) -> None:
    damage.edit(bundle, lambda manifest: manifest["files"].pop("vae_encoder.bin"))
    message = refusal(bundle)
    assert "files that the manifest lists with their hash, got vae_encoder.bin without one" in message


def test_another_tensor_table(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["networks"][0]["spec"]["inputs"][0]["name"] = "picture"

    damage.edit(bundle, change)
    message = refusal(bundle)
    assert "expected pixels float32 [1, 3, 32, 32] -> embedding float32 [1, 1, 32]" in message
    assert "got picture float32" in message
    assert "Export the bundle again with this version" in message


def test_a_spec_of_another_shape(tiny_bundle: Path) -> None:
    spec = specs(tiny_bundle)["denoiser"]
    with pytest.raises(BundleError, match="Export the bundle again"):
        Bundle(tiny_bundle).entry(replace(spec, inputs=spec.inputs[:-1]))
