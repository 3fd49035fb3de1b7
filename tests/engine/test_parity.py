"""The whole pipeline against diffusers' own, on the CPU in float32: 1e-5 eager, 1e-4 ONNX Runtime."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.media.image import load_image
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support.paths import PHOTOGRAPH

TOLERANCE = {"eager": 1e-5, "onnxruntime": 1e-4}
SIZE = {"height": HEIGHT, "width": WIDTH}
REFERENCE: dict[bytes, torch.Tensor] = {}  # of diffusers, by its call


def pixels(*seeds: int) -> torch.Tensor:
    """Images [N,3,32,32] in [0, 1]: the CLIP size of the tiny networks, the only one diffusers takes."""
    return torch.cat([torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds])


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    return generators if len(generators) > 1 else generators[0]


CASES: dict[str, dict[str, Any]] = {
    "one image": {},
    "a batch of two different images": {"image": pixels(1, 2)},
    "two videos per prompt": {"num_videos_per_prompt": 2},
    "five steps, other conditioning": {
        "num_inference_steps": 5,
        "fps": 12,
        "motion_bucket_id": 31,
        "noise_aug_strength": 0.3,
        "min_guidance_scale": 1.7,
        "max_guidance_scale": 4.0,
    },
    "no guidance": {"min_guidance_scale": 0.5, "max_guidance_scale": 1.0},
    "given sigmas": {"sigmas": [80.0, 11.0, 0.7, 0.0]},
    "given latents": {
        "latents": torch.randn(1, FRAMES, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    },
    "a list of generators": {"image": pixels(1, 2), "generator": (5, 6)},
}


def reference_frames(reference: Any, call: dict[str, Any], seeds: tuple[int, ...]) -> torch.Tensor:
    """Made once for the backends that are held against it."""
    of = pickle.dumps((call, seeds))
    if of not in REFERENCE:
        REFERENCE[of] = reference(**call, generator=seeded(*seeds)).frames
    return REFERENCE[of]


def both(reference: Any, engine: VideoEngine, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames [N,F,3,H,W] of diffusers and of ours; generators made twice from the same seeds."""
    seeds = call.pop("generator", (0,))
    call = {"image": pixels(1), "num_frames": FRAMES, "num_inference_steps": 3, **SIZE, **call}
    call = {"decode_chunk_size": CHUNK, "output_type": "pt", **call}
    if call.get("sigmas"):
        del call["num_inference_steps"]
    expected = reference_frames(reference, call, seeds)
    got = engine(**call, generator=seeded(*seeds)).frames
    return expected, got


def tolerance(engine: VideoEngine) -> float:
    return TOLERANCE[engine.backend.name]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_diffusers(diffusers_pipeline: Any, tiny_engine: VideoEngine, case: dict[str, Any]) -> None:
    """Several videos are decoded whole in diffusers: its chunks would mix their frames."""
    several = "image" in case or "num_videos_per_prompt" in case
    if several and tiny_engine.backend.name == "onnxruntime":
        expected, got = per_video(diffusers_pipeline, tiny_engine, case)
    else:
        expected, got = both(
            diffusers_pipeline, tiny_engine, **case, **({"decode_chunk_size": FRAMES} if several else {})
        )
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance(tiny_engine)
    assert float(expected.std()) > 0.01  # a grey reference would prove nothing


def per_video(reference: Any, engine: VideoEngine, case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of all videos from diffusers at once, decoded by it one video at a time in our chunks."""
    latents, _ = both(reference, engine, **case, output_type="latent")
    with torch.no_grad():
        chunked = [reference.decode_latents(one[None], FRAMES, CHUNK) for one in latents]
    expected = (torch.cat(chunked).permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1)
    _, got = both(reference, engine, **case)
    return expected, got


@pytest.mark.parametrize(("backend", "frames"), [("eager", 14), ("eager", 25), ("onnxruntime", 25)])
def test_equals_diffusers_at_the_real_frame_counts(
    diffusers_pipeline: Any, tiny_checkpoint: Path, request: pytest.FixtureRequest, backend: str, frames: int
) -> None:
    """Decoded whole, as diffusers does by default."""
    with (
        VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu")
        if backend == "eager"
        else VideoEngine.from_bundle(request.getfixturevalue("tiny_2_25_bundle"), device="cpu")
    ) as engine:
        expected, got = both(diffusers_pipeline, engine, num_frames=frames, decode_chunk_size=None)
    assert got.shape[1] == frames
    assert float((got - expected).abs().max()) <= TOLERANCE[backend]


def test_a_photograph_goes_through_the_clip_resize(diffusers_pipeline: Any, tiny_engine: VideoEngine) -> None:
    """PIL images take another way than tensors: Lanczos for the VAE, blur and bicubic for CLIP.

    diffusers resizes for a 224-pixel CLIP only, so the reference's image encoder is given what the
    engine's own size asks for; the resize itself is held against diffusers in test_pixels.  Its pixels
    are laid out in memory as ours, channels first: left as diffusers has them, channels last, torch's
    float32 VAE encoder is 3.8e-5 from its own float64 result on this photograph, and ours 3.7e-6.
    """
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as theirs

    photograph = load_image(PHOTOGRAPH)
    resize, processor = theirs._resize_with_antialiasing, diffusers_pipeline.video_processor
    preprocess = processor.preprocess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "_resize_with_antialiasing", lambda image, size: resize(image, (32, 32)))
        patch.setattr(processor, "preprocess", lambda image, **size: preprocess(image, **size).contiguous())
        expected, got = both(diffusers_pipeline, tiny_engine, image=photograph)
    assert float((got - expected).abs().max()) <= tolerance(tiny_engine)


def test_output_types_hold_the_same_frames(tiny_engine: VideoEngine) -> None:
    def frames(kind: str) -> Any:
        return tiny_engine(
            pixels(1), num_inference_steps=1, generator=seeded(0), output_type=kind, num_frames=FRAMES, **SIZE
        ).frames

    tensor, array, images = frames("pt"), frames("np"), frames("pil")
    assert array.shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert [[i.size for i in video] for video in images] == [[(WIDTH, HEIGHT)] * FRAMES]
    assert isinstance(images[0][0], Image.Image)
    np.testing.assert_array_equal(np.asarray(images[0][0]), (array[0, 0] * 255).round().astype(np.uint8))
    assert frames("latent").shape == (1, FRAMES, 4, HEIGHT // 2, WIDTH // 2)


def test_same_seed_same_frames_and_seed_0_is_a_seed(tiny_engine: VideoEngine) -> None:
    def frames(seed: int) -> torch.Tensor:
        call = {"num_inference_steps": 2, "output_type": "pt", "num_frames": FRAMES, **SIZE}
        return tiny_engine(pixels(1), generator=seeded(seed), **call).frames

    assert torch.equal(frames(0), frames(0))
    assert not torch.equal(frames(0), frames(1))


def test_the_callback_sees_and_edits_the_latents(diffusers_pipeline: Any, tiny_engine: VideoEngine) -> None:
    """As in diffusers: called after each step with the pipeline, the step, c_noise and the latents."""
    seen: dict[str, list[Any]] = {"theirs": [], "ours": []}

    def callback(name: str) -> Any:
        def edit(owner: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[name].append((step, round(float(timestep), 4), list(tensors)))
            return {"latents": tensors["latents"] * 0.9} if step == 0 else {}

        return edit

    call = {
        "image": pixels(1), "num_frames": FRAMES, "num_inference_steps": 3, "output_type": "latent", **SIZE,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }  # fmt: skip
    expected = diffusers_pipeline(**call, generator=seeded(0), callback_on_step_end=callback("theirs")).frames
    got = tiny_engine(**call, generator=seeded(0), callback_on_step_end=callback("ours")).frames
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == 3
    assert float((got - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_return_dict_off_gives_the_frames(tiny_engine: VideoEngine) -> None:
    call = {"num_inference_steps": 1, "output_type": "pt", "num_frames": FRAMES, "return_dict": False, **SIZE}
    assert tiny_engine(pixels(1), generator=seeded(0), **call).shape == (1, FRAMES, 3, HEIGHT, WIDTH)
