"""Manifests that exhaust memory or say nonsense: what every reader of a bundle refuses before it runs.

Python and the C++ host both read all of them, so that neither takes what the other refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svd_engine.bundle.manifest import MANIFEST, MANIFEST_BYTES
from tests.support import damage

Spoil = Callable[[Path], object]


def field(*path: str | int, value: Any) -> Spoil:
    """Sets one field of the manifest; NaN and infinities as Python writes them."""

    def change(manifest: Any) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = value

    return lambda bundle: damage.edit(bundle, change)


def text(old: str, new: str) -> Spoil:
    """Replaces one piece of the manifest's text, which `damage.edit` has written first."""

    def spoil(bundle: Path) -> None:
        damage.edit(bundle, lambda manifest: None)
        content = (bundle / MANIFEST).read_text()
        assert old in content
        (bundle / MANIFEST).write_text(content.replace(old, new, 1))

    return spoil


def linked(bundle: Path) -> None:
    (bundle / MANIFEST).rename(bundle / "elsewhere.json")
    (bundle / MANIFEST).symlink_to("elsewhere.json")


def pipe(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)  # opening it would wait for ever


def longer(bundle: Path) -> None:
    with (bundle / MANIFEST).open("a") as file:
        file.write("{}")


def not_utf8(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(content.replace(b'"tiny"', b'"\xff"', 1))


def padded(bundle: Path) -> None:
    """Whitespace is legal, so only the size is wrong."""
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes().ljust(MANIFEST_BYTES + 1))


def marked(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"\xef\xbb\xbf" + (bundle / MANIFEST).read_bytes())


def encoded(bundle: Path) -> None:
    (bundle / MANIFEST).write_text((bundle / MANIFEST).read_text(), encoding="utf-16")


def deep(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"format": 3, "model": ' + "[" * 100_000 + "]" * 100_000 + "}")


def target(capabilities: Any = ((9, 0),)) -> dict[str, Any]:
    return {"label": "gpu", "capabilities": capabilities, "gpu": "GPU", "or_newer": False}


def plan(**fields: Any) -> Spoil:
    row = {
        "network": "image_encoder-b1",
        "file": "image_encoder.bin",
        "flavour": "tensorrt",
        "version": "10.13.0.35",
        "target": target(),
        "precision": {"weights": "float32", "activations": "float32"},
        "graph_sha256": "0" * 64,
        "weights_sha256": "0" * 64,
        "stripped": False,
        "refittable": False,
        "optimization_level": 3,
        "workspace_bytes": 0,
        "device_memory_bytes": 0,
        "compiled": None,
    }
    return field("plans", value=[{**row, **fields}])


def parity(**fields: Any) -> Spoil:
    row = {
        "network": "image_encoder-b1",
        "output": "embedding",
        "backend": "b",
        "max_abs": 0.0,
        "relative": 0.0,
        "cosine": 1.0,
    }
    return field("parity", value=[{**row, "tolerance": 1e-4, **fields}])


PROFILE, ARCHITECTURE, SHAPE = (
    ("profiles", 0),
    ("model", "architecture"),
    ("networks", 0, "spec", "outputs", 0, "shape"),
)
SHA = ("files", "image_encoder.bin", "sha256")

HOSTILE: dict[str, Spoil] = {
    "10^9 frames": field(*PROFILE, "frames", value=10**9),
    "10^11 frames": field(*PROFILE, "frames", value=10**11),
    "10^30 frames": field(*PROFILE, "frames", value=10**30),
    "frames beyond the limit": field(*PROFILE, "frames", value=1025),
    "no frames": field(*PROFILE, "frames", value=0),
    "fewer than no frames": field(*PROFILE, "frames", value=-3),
    "true frames": field(*PROFILE, "frames", value=True),
    "whole frames as a fraction": field(*PROFILE, "frames", value=3.0),
    "frames as text": field(*PROFILE, "frames", value="3"),
    "frames as nothing": field(*PROFILE, "frames", value=None),
    "a tall video": field(*PROFILE, "height", value=16_385),
    "a wide video": field(*PROFILE, "width", value=10**9),
    "a large batch": field(*PROFILE, "batch", value=65),
    "a large chunk": field(*PROFILE, "decode_chunk", value=10**9),
    "no chunk": field(*PROFILE, "decode_chunk", value=0),
    "pixels beyond the limit together": field(
        "profiles",
        value=[{"frames": 1024, "height": 2048, "width": 1024, "guidance": "single", "decode_chunk": 1}],
    ),
    "a tensor beyond the limit": field(
        "profiles",
        value=[{"frames": 256, "height": 2048, "width": 2048, "guidance": "single", "decode_chunk": 256}],
    ),
    "no profiles": field("profiles", value=[]),
    "257 profiles": lambda bundle: damage.edit(bundle, lambda m: m.update(profiles=m["profiles"][:1] * 257)),
    "a large picture for CLIP": field(*ARCHITECTURE, "clip_size", value=2049),
    "a wide embedding": field(*ARCHITECTURE, "embedding_dim", value=10**9),
    "many latent channels": field(*ARCHITECTURE, "latent_channels", value=65),
    "latent pixels of no size": field(*ARCHITECTURE, "vae_scale", value=0),
    "a vast size multiple": field(*ARCHITECTURE, "size_multiple", value=10**12),
    "a true architecture": field(*ARCHITECTURE, "vae_scale", value=True),
    "native frames": field("model", "frames", value=10**9),
    "native size": field("model", "height", value=-576),
    "rho near 0": field("model", "rho", value=1e-308),
    "rho 0": field("model", "rho", value=0),
    "rho below 0": field("model", "rho", value=-7.0),
    "rho of NaN": field("model", "rho", value=float("nan")),
    "rho as text": field("model", "rho", value="7"),
    "rho as true": field("model", "rho", value=True),
    "sigma_max of NaN": field("model", "sigma_max", value=float("nan")),
    "sigma_max without end": field("model", "sigma_max", value=float("inf")),
    "sigma_max too large for a double": text('"sigma_max": 700.0', '"sigma_max": 1e999'),
    "sigma_max too large": field("model", "sigma_max", value=1e300),
    "sigma_min of 0": field("model", "sigma_min", value=0.0),
    "sigma_min below 0": field("model", "sigma_min", value=-0.002),
    "sigma_min above sigma_max": field("model", "sigma_min", value=701.0),
    "sigma_min equal to sigma_max": field("model", "sigma_min", value=700.0),
    "latent_scale of 0": field("model", "latent_scale", value=0.0),
    "latent_scale below 0": field("model", "latent_scale", value=-0.18215),
    "latent_scale beyond float32": field("model", "latent_scale", value=1e-300),
    "clip_std of 0": field("model", "clip_std", value=[0.27, 0.0, 0.27]),
    "clip_std of two": field("model", "clip_std", value=[0.27, 0.27]),
    "clip_mean of infinity": field("model", "clip_mean", value=[0.5, float("-inf"), 0.5]),
    "clip_mean of four": field("model", "clip_mean", value=[0.5] * 4),
    "random weights as a number": field("model", "random_weights", value=1),
    "format true": field("format", value=True),
    "format 1.0": field("format", value=3.0),
    "format as text": field("format", value="3"),
    "format of the future": field("format", value=2**40),
    "opset 0": field("opset", value=0),
    "opset true": field("opset", value=True),
    "another dtype": field("precision", "weights", value="int8"),
    "another form": field("form", value="dense"),
    "a file of fewer than no bytes": field("files", "image_encoder.bin", "bytes", value=-1),
    "a file of 2^60 bytes": field("files", "image_encoder.bin", "bytes", value=2**60),
    "a hash cut off": field(*SHA, value="00"),
    "a hash in capitals": field(*SHA, value="A" * 64),
    "a hash with a line end": field(*SHA, value="0" * 64 + "\n"),
    "a shape of nothing": field(*SHAPE, value=[1, 0]),
    "a shape below 0": field(*SHAPE, value=[-1, 1]),
    "a vast shape": field(*SHAPE, value=[2**40, 2**40]),
    "a shape of true": field(*SHAPE, value=[True, 1, 32]),
    "a shape of 1000 axes": field(*SHAPE, value=[1] * 1000),
    "an unknown field": field("colour", value="blue"),
    "an unknown field of the model": field("model", "colour", value="blue"),
    "an unknown field of a profile": field(*PROFILE, "colour", value="blue"),
    "an unknown field of a tensor": field("networks", 0, "spec", "outputs", 0, "colour", value="blue"),
    "versions as a list": field("versions", value=[]),
    "a version as a number": field("versions", value={"torch": 2}),
    "a parity of NaN": parity(cosine=float("nan")),
    "a tolerance of 0": parity(tolerance=0.0),
    "a rewrite in fewer than no places": field(
        "rewrites", value=[{"network": "denoiser", "name": "n", "places": -1}]
    ),
    "a plan of a bare capability": plan(target=target([[9]])),
    "a plan of capability -1": plan(target=target([[9, -1]])),
    "a plan for no card": plan(target=target([])),
    "a plan with a vast workspace": plan(workspace_bytes=2**60),
    "a plan at level 6": plan(optimization_level=6),
    "a plan hashed with nothing": plan(graph_sha256=""),
    "a plan stripped in words": plan(stripped="yes"),
    "a plan of no network": plan(network="none"),
    "a plan of no file": plan(file="none.plan"),
    "a key twice": text('"format": 3', '"format": 3, "format": 3'),
    "a key twice inside": text('"sigma_max": 700.0', '"sigma_max": 700.0, "sigma_max": 7e2'),
    "a key twice by an escape": text('"format": 3', '"format": 3, "f\\u006frmat": 3'),
    "a network twice": lambda bundle: damage.edit(bundle, lambda m: m["networks"].append(m["networks"][0])),
    "guidance beyond any": field("model", "max_guidance_scale", value=1e308),
    "a terminal's commands in a name": field("model", "name", value="svd\x1b[31m"),
    "a name without end": field("model", "name", value="x" * 100_000),
    "a comma too many": text('"format": 3', '"format": 3,'),
    "a comment": text('"format": 3', '/* one */ "format": 3'),
    "more after the end": longer,
    "a byte order mark": marked,
    "UTF-16": encoded,
    "a text that is not UTF-8": not_utf8,
    "100,000 levels": deep,
    "a list": lambda bundle: (bundle / MANIFEST).write_text("[]"),
    "a link": linked,
    "a manifest of 4 MiB and a byte": padded,
    "a pipe": pipe,
}  # fmt: skip


def reordered(bundle: Path) -> None:
    """Nothing is wrong with it: keys in another order, another indent, an exponent for a number."""
    document = json.loads((bundle / MANIFEST).read_text())
    content = json.dumps(dict(reversed(document.items())), indent=3).replace("700.0", "7.0e2")
    (bundle / MANIFEST).write_text(content)
