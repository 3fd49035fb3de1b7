"""docs/embedding.md against the code that it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import torch

from svd_engine import VideoEngine
from svd_engine.bundle.manifest import Runtime
from svd_engine.checkpoint.configs import describe
from svd_engine.checkpoint.random_weights import svd_configs
from svd_engine.media.image import cover, load_image, to_clip_pixels, to_vae_pixels
from svd_engine.request import Settings
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import TensorSpec
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support.paths import PHOTOGRAPH, ROOT

PAGE = (ROOT / "docs" / "embedding.md").read_text()


def test_every_tensor_is_on_the_page() -> None:
    """Networks, names, order and shapes, with letters in the place of numbers."""
    profile = Profile(frames=5, height=576, width=1024, batch=2, decode_chunk=3)
    arch = Architecture(clip_size=224, embedding_dim=1024)
    letters = {"B": 2, "F": 5, "C": 4, "H": 576, "W": 1024, "h": 72, "w": 128, "S": 224, "D": 1024, "T": 3}
    rows = re.findall(r"^\| (\w* ?)\| (-> )?(\w+) \| \[(.*?)\] \|", PAGE, re.MULTILINE)
    networks: list[str] = []
    shown: list[tuple[str, bool, TensorSpec]] = []
    for network, arrow, name, shape in rows:
        networks += [network.strip()] if network else []
        sizes = tuple(letters.get(size) or int(size) for size in shape.split(", ") if size)
        shown.append((networks[-1], bool(arrow), TensorSpec(name, sizes)))
    described = [
        (spec.network, tensor in spec.outputs, tensor)
        for spec in specs_of(profile, arch, FLOAT32)[:4]
        for tensor in (*spec.inputs, *spec.outputs)
    ]
    assert shown == described
    keys = re.findall(r"`(\w+(?:-[a-zA-Z]+)+)`", PAGE.split("Its key is")[1].split("##")[0])
    named = {"B": "2", "HxW": "576x1024", "F": "5", "GUIDANCE": "batched", "T": "3"}
    for key, spec in zip(keys, specs_of(profile, arch, FLOAT32), strict=False):
        parts = [re.sub(r"[A-Z]\w*$", lambda m: named[m[0]], part) for part in key.split("-")]
        assert "-".join(parts) == spec.key
    assert len(keys) == 4


def test_fields_are_the_manifests(tiny_bundle: Path) -> None:
    schema = json.loads((tiny_bundle / "manifest.schema.json").read_text())
    known = {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    values = {
        "euler",
        "karras",
        "linear",
        "batched",
        "single",
        "first_latent",
        "embedding",
        *get_args(Runtime),
    }
    functions_and_libraries = {"generate", "libnvinfer", "libtensorrt_rtx"}
    assert named - known == values | functions_and_libraries
    assert f"`format` is {json.loads((tiny_bundle / 'manifest.json').read_text())['format']}." in PAGE


def row(label: str) -> str:
    return re.search(rf"^\| {re.escape(label)}.*?\| (.*) \|$", PAGE, re.MULTILINE)[1]  # type: ignore[index]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_constants_are_svds() -> None:
    svd = describe("svd", "its configs", svd_configs(14))
    assert numbers(row("noise levels")) == [svd.sigma_max, svd.sigma_min, svd.rho]
    assert numbers(row("latents before")) == [svd.latent_scale]
    assert numbers(row("CLIP's mean")) == list(svd.clip_mean)
    assert numbers(row("CLIP's deviation")) == list(svd.clip_std)
    defaults = Settings(frames=1, height=64, width=64)
    assert numbers(row("steps")) == [defaults.steps, 1]
    assert numbers(row("frames per second")) == [defaults.fps, 1]
    assert numbers(row("motion bucket")) == [defaults.motion_bucket_id, 0, 1023]
    assert numbers(row("noise augmentation")) == [defaults.noise_aug_strength, 0]
    ends = [defaults.min_guidance_scale, defaults.max_guidance_scale]
    assert numbers(row("guidance"))[:2] == ends


def test_the_loop_on_the_page_makes_pythons_frames(tiny_bundle: Path) -> None:
    """A third host: the page's loop in NumPy over ONNX Runtime, with nothing of ours but the pixels."""
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    model = manifest["model"]

    def network(key: str, **inputs: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(
            tiny_bundle / f"{key}.onnx", providers=["CPUExecutionProvider"]
        )
        (output,) = session.run(None, {name: value.astype(np.float32) for name, value in inputs.items()})
        return np.asarray(output)

    photo = cover(load_image(PHOTOGRAPH), HEIGHT, WIDTH)
    size, steps = model["architecture"]["clip_size"], 3
    clip = to_clip_pixels(photo, size, model["clip_mean"], model["clip_std"]).numpy()
    generator = torch.Generator("cpu").manual_seed(6)
    noise = torch.randn((1, 3, HEIGHT, WIDTH), generator=generator).numpy()
    frame = f"{HEIGHT}x{WIDTH}"

    embedding = network("image_encoder-b1", pixels=clip)
    latent = network(
        f"vae_encoder-b1-{frame}", pixels=to_vae_pixels(photo, HEIGHT, WIDTH).numpy() + 0.02 * noise
    )
    a, b = (model[name] ** (1 / model["rho"]) for name in ("sigma_max", "sigma_min"))
    sigma = [(a + i / (steps - 1) * (b - a)) ** model["rho"] for i in range(steps)] + [0.0]
    x = torch.randn((1, FRAMES, *latent.shape[1:]), generator=generator).numpy() * np.sqrt(sigma[0] ** 2 + 1)
    for i in range(steps):
        d = network(
            f"denoiser-b1-f{FRAMES}-{frame}-batched", x=x, sigma=np.array(sigma[i]), first_latent=latent,
            embedding=embedding, time_ids=np.array([[7 - 1, 127, 0.02]]),
            guidance=np.linspace([1], [3], FRAMES).T,
        )  # fmt: skip
        x = x + (sigma[i + 1] - sigma[i]) * (x - d) / sigma[i]
    video = [
        np.clip(
            network(f"vae_decoder-t{len(chunk)}-{frame}", latent=chunk / model["latent_scale"]) / 2 + 0.5,
            0,
            1,
        )
        for chunk in (x[0][start : start + CHUNK] for start in range(0, FRAMES, CHUNK))
    ]

    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        generator = torch.Generator("cpu").manual_seed(6)
        wanted = engine(photo, num_inference_steps=steps, generator=generator, output_type="np").frames[0]
    assert np.abs(np.concatenate(video).transpose(0, 2, 3, 1) - wanted).max() <= 1e-4
