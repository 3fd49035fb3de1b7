"""The decoder over slices of frames: what decoding all frames at once gives, while it holds a few."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import AlphaBlender
from torch import Tensor, nn

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import Cancelled, ProfileError, SettingsError
from svd_engine.networks import streamed_decoder
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.rewrites import apply_rewrites, rewrites_for
from svd_engine.networks.streamed_decoder import InHostMemory, InPlace, Moments, StreamedDecoder
from svd_engine.request import Settings
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.watching import Stops

SLICES = (1, 2, 3, 5, 8, 25)
Vae = Any  # diffusers is untyped


@pytest.fixture(scope="module", params=["diffusers' layers", "rewritten"])
def vae(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Vae:
    loaded = open_checkpoint(str(tiny_checkpoint)).load("vae", torch.float32)
    if request.param == "rewritten":
        apply_rewrites(loaded, (), rewrites_for("eager", "cpu"))
    return loaded


@pytest.fixture
def plain_vae(tiny_checkpoint: Path) -> Vae:
    return open_checkpoint(str(tiny_checkpoint)).load("vae", torch.float32)


def latent(frames: int) -> Tensor:
    return torch.randn((frames, 4, 4, 6), generator=torch.Generator().manual_seed(frames))


def whole(vae: Vae, given: Tensor) -> Tensor:
    with torch.no_grad():
        decoded: Tensor = VaeDecoder(vae)(given)
    return decoded


@pytest.mark.parametrize("frames", [1, 2, 14, 25])
def test_streamed_is_whole(vae: Vae, frames: int) -> None:
    given = latent(frames)
    expected = whole(vae, given)
    for size in SLICES:
        streamed = StreamedDecoder(vae, size)(given)
        assert streamed.shape == expected.shape
        assert streamed.dtype == torch.float32
        assert (streamed - expected).abs().max() <= 1e-5, size


def test_every_frame_reads_every_other(vae: Vae) -> None:
    """What chunks do not do: the last latent changes the first frame, through the norms."""
    given = latent(14)
    changed = given.clone()
    changed[-1] += 10
    first, other = (StreamedDecoder(vae, 2)(x)[0] for x in (given, changed))
    assert (first - other).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_as_near_to_float32_as_whole(plain_vae: Vae, dtype: torch.dtype) -> None:
    given = latent(5)
    exact = whole(plain_vae, given)
    rounded = plain_vae.to(dtype)
    errors = [
        (frames - exact).abs().mean()
        for frames in (whole(rounded, given), StreamedDecoder(rounded, 2)(given))
    ]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_are_float32_at_least(dtype: torch.dtype) -> None:
    """Of values far from zero, whose squares half precision could not tell apart."""
    norm = nn.GroupNorm(2, 8, eps=1e-5)
    x = (100 + torch.randn((7, 8, 5, 6), generator=torch.Generator().manual_seed(0))).to(dtype)
    moments = Moments(norm)
    for part in x.split(3):
        moments.add(part)
    groups = x.double().unflatten(1, (2, 4)).transpose(0, 1).flatten(1)
    assert torch.as_tensor(moments.mean) == pytest.approx(groups.mean(1), rel=1e-6)
    assert torch.as_tensor(moments.squares) / moments.count == pytest.approx(
        groups.var(1, correction=0), rel=1e-4
    )


def test_no_layer_sees_more_than_a_slice_and_its_neighbours(
    vae: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def note(x: Tensor) -> None:
        seen.append(len(x))

    valid = streamed_decoder.valid
    monkeypatch.setattr(streamed_decoder, "valid", lambda conv, x: (note(x), valid(conv, x))[1])
    half = streamed_decoder.half
    monkeypatch.setattr(streamed_decoder, "half", lambda net, x, shift: (note(x), half(net, x, shift))[1])
    StreamedDecoder(vae, 2)(latent(14))
    assert max(seen) == 4


class Counted(InPlace):
    def __init__(self) -> None:
        self.waiting = self.most = 0

    def put(self, frame: Tensor) -> Tensor:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return frame

    def get(self, parked: Tensor) -> Tensor:
        self.waiting -= 1
        return parked


def test_one_layer_of_one_video_is_parked(vae: Vae) -> None:
    decoder, parking = StreamedDecoder(vae, 1), Counted()
    decoder.parking = parking
    reads = 2  # of each frame and layer: for the statistics, and to go on
    decoder(latent(9))
    resnets = len(streamed_decoder.layers_of(vae.decoder)[0])
    assert parking.waiting == -(reads - 1) * resnets * 9
    assert parking.most == 9


def test_frames_wait_in_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []
    empty_like = torch.empty_like

    def page_locked(like: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        locked.append(pin_memory)
        return empty_like(like, device=device)

    monkeypatch.setattr(torch, "empty_like", page_locked)
    parking, frame = InHostMemory(torch.device("cpu")), torch.rand(1, 2, 3, 4)
    assert torch.equal(parking.get(parking.put(frame)), frame)
    assert locked == [True]


def test_the_demo_s_weights() -> None:
    demo = open_checkpoint("demo")
    loaded = demo.load("vae", torch.float32)
    given = torch.randn((demo.model.frames, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    assert (StreamedDecoder(loaded, 2)(given) - whole(loaded, given)).abs().max() <= 1e-5


# The engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[VideoEngine]:
    with VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu") as opened:
        yield opened


def video(engine: VideoEngine, **other: Any) -> Any:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    return engine(
        image, HEIGHT, WIDTH, num_inference_steps=1, output_type="pt",
        generator=torch.Generator().manual_seed(0), **other,
    )  # fmt: skip


@pytest.mark.parametrize("size", [None, 2, 99])
def test_two_videos(engine: VideoEngine, size: int | None) -> None:
    both = {"num_frames": 5, "num_videos_per_prompt": 2}
    expected = video(engine, decoding="whole", **both)
    streamed = video(engine, decoding="streamed", decode_chunk_size=size, **both)
    assert streamed.frames.shape == (2, 5, 3, HEIGHT, WIDTH)
    assert (streamed.frames - expected.frames).abs().max() <= 1e-5
    held = min(size or 1, 5)
    assert f"streamed, {held} frames at a time" in streamed.report.stages["vae_decoder"].detail
    assert streamed.report.settings.decoding == "streamed"
    assert "streamed" not in expected.report.stages["vae_decoder"].detail


def test_chunks_are_another_video(engine: VideoEngine) -> None:
    chunks, streamed = (
        video(engine, num_frames=5, decode_chunk_size=2, decoding=d) for d in ("auto", "streamed")
    )
    assert (chunks.frames - streamed.frames).abs().max() > 1e-3


def test_torch_compile_leaves_it_to_eager_torch_and_says_so(tiny_checkpoint: Path) -> None:
    from svd_engine.backends.torch.compiled import CompiledBackend
    from svd_engine.networks.modules import Modules
    from svd_engine.spec.precision import FLOAT32
    from svd_engine.spec.profile import Profile
    from svd_engine.spec.tables import specs_of

    checkpoint = open_checkpoint(str(tiny_checkpoint))
    backend = CompiledBackend(Modules(checkpoint), torch.device("cpu"))
    profile = Profile(FRAMES, HEIGHT, WIDTH, decode_chunk=FRAMES)
    *_, decoder = specs_of(profile, checkpoint.model.architecture, FLOAT32, slice_frames=2)
    placement = backend.open(decoder).placement
    assert placement.backend == "eager"
    assert placement.detail.endswith("streamed, 2 frames at a time")


# Refusals


def test_a_bundle_without_a_whole_decoder_refuses_to_decode_whole(tiny_bundle: Path) -> None:
    with (
        VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine,
        pytest.raises(ProfileError, match=f"got {FRAMES} frames of {HEIGHT}x{WIDTH}, decoded whole"),
    ):
        video(engine, decoding="whole")


def test_a_bundle_that_decodes_whole(tiny_2_25_bundle: Path) -> None:
    from svd_engine.bundle.reading import Bundle

    settings = Settings(25, HEIGHT, WIDTH, decoding="whole")
    assert Bundle(tiny_2_25_bundle).profile_for(settings).decode_chunk == 25


@pytest.mark.parametrize("wrong", ["chunks", "", 1])
def test_a_decoding_that_is_none(engine: VideoEngine, wrong: Any) -> None:
    with pytest.raises(SettingsError, match=r"^decoding: expected auto, whole, streamed, got"):
        video(engine, decoding=wrong)


class OwnForward(nn.Module):
    pass


def other_decoder(vae: Vae) -> None:
    vae.decoder = OwnForward()


def other_block(vae: Vae) -> None:
    vae.decoder.mid_block.__class__ = type("OwnBlock", (type(vae.decoder.mid_block),), {})


def other_blend(vae: Vae) -> None:
    vae.decoder.mid_block.resnets[0].time_mixer = AlphaBlender(0.5, "learned_with_images")


def other_channels(vae: Vae) -> None:
    vae.decoder.mid_block.resnets[0].temporal_res_block.conv_shortcut = nn.Conv3d(64, 64, 1)


def other_resnet(vae: Vae) -> None:
    vae.decoder.mid_block.resnets[0].spatial_res_block.output_scale_factor = 2.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_decoder, "OwnForward, not diffusers' TemporalDecoder"),
        (other_block, "OwnBlock has a forward of its own"),
        (other_blend, "a resnet that blends by the image indicator"),
        (other_channels, "a temporal resnet that changes the number of channels"),
        (other_resnet, "its output is divided by 2.0"),
    ],
)
def test_other_decoders_are_refused(plain_vae: Vae, change: Any, reason: str) -> None:
    changed = deepcopy(plain_vae)
    change(changed)
    with pytest.raises(SettingsError, match=f"to stream, got {reason}. Use decoding="):
        StreamedDecoder(changed, 1)


# How far it is, and a cancel


def test_its_parts_are_frames_of_its_passes(plain_vae: Vae) -> None:
    told: list[tuple[int, int]] = []
    StreamedDecoder(plain_vae, 2)(latent(5), on_part=lambda *part: told.append(part))
    passes = 2 * len(streamed_decoder.layers_of(plain_vae.decoder)[0]) + 1
    counts = [0, *(done for done, _ in told)]
    assert {later - done for done, later in pairwise(counts)} == {1, 2}  # a slice has no more
    assert told[-1] == (5 * passes, 5 * passes)


@pytest.mark.parametrize("swap_networks", [False, True])
def test_a_cancel_is_seen_between_slices_and_frees_what_is_parked(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, swap_networks: bool
) -> None:
    parked: list[weakref.ref[Tensor]] = []
    put = InPlace.put

    def noted(self: InPlace, frame: Tensor) -> Tensor:
        parked.append(weakref.ref(frame))
        return put(self, frame)

    monkeypatch.setattr(InPlace, "put", noted)
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    where: dict[str, Any] = {"backend": "eager", "device": "cpu", "swap_networks": swap_networks}
    with VideoEngine.from_checkpoint(tiny_checkpoint, **where) as engine:

        def made(watching: Stops) -> Any:
            return engine(
                image, HEIGHT, WIDTH, 5, sigmas=[1.0, 0.0], decoding="streamed", output_type="pt",
                generator=torch.Generator().manual_seed(0), cancel=watching, observer=watching,
            ).frames  # fmt: skip

        expected = made(whole := Stops(after=10**6))
        assert whole.told[-1] == (5, 5)
        parked.clear()
        with pytest.raises(Cancelled) as caught:
            made(stopped := Stops(after=7))
        assert stopped.told == whole.told[:7]
        assert parked
        assert not any(frame() is not None for frame in parked)
        assert caught.value.__traceback__ is not None  # held, without the frames of the run
        assert torch.equal(made(Stops(after=10**6)), expected)
