"""The decoder of a bundle over slices of frames, as a chain of networks: what decoding all at once gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import psutil
import pytest
import torch
from torch import Tensor

from svd_engine import BundleError, ProfileError, SettingsError, VideoEngine
from svd_engine.backends.onnxruntime import OrtBackend, OrtNetwork
from svd_engine.backends.segmented import SegmentedDecoder
from svd_engine.bundle.costs import GraphCosts
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import vae_levels
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.errors import BackendUnavailable, Cancelled
from svd_engine.networks.decoder import VaeDecoder
from svd_engine.networks.decoder_segments import decoder_segment
from svd_engine.networks.rewrites import (
    TENSORRT_REWRITES,
    Rewrite,
    apply_rewrites,
    rewrites_for,
)
from svd_engine.output import VideoOutput
from svd_engine.request import Settings
from svd_engine.spec.model import Architecture
from svd_engine.spec.network import Network, Placement, named_outputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.streaming import segments_of, streaming_of
from svd_engine.spec.tables import specs_of, streamed_decoder
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec
from svd_export.cli import main as export
from svd_export.to_onnx import export_bundle, trace
from svd_export.triton import QueueLimits, write_repository
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.watching import Stops
from tests.support import damage, tensorrt_plans
from tests.support.commands import call
from tests.support.shared import made_once

CPU = torch.device("cpu")
Vae = Any  # diffusers is untyped


def random_vae(*channels: int) -> Vae:
    """Blends and norms random too: defaults would hide mistakes."""
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(0)
    down = ("DownEncoderBlock2D",) * len(channels)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=channels, down_block_types=down).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return vae


def chain_of(vae: Vae, frames: int, size: int) -> tuple[StreamedSpec, tuple[NetworkSpec, ...]]:
    channels = vae.config.block_out_channels
    profile, scale = Profile(frames, HEIGHT, WIDTH, decode_chunk=frames), 2 ** (len(channels) - 1)
    spec = streamed_decoder(profile, Architecture(vae_scale=scale), FLOAT32, size)
    return spec, segments_of(spec, streaming_of(channels, 1, size))


class Segments:
    """A backend of segments, which notes what is opened."""

    device, movable = CPU, False

    def __init__(self, name: str, make: Callable[[NetworkSpec, Placement], Network]) -> None:
        self.name, self.make = name, make
        self.opened: list[int | None] = []

    def open(self, spec: NetworkSpec) -> Network:
        self.opened.append(spec.segment)
        return self.make(spec, Placement(self.name, "cpu", "float32"))

    def close(self) -> None: ...


class TorchNetwork(Network):
    def __init__(self, vae: Vae, spec: NetworkSpec, placement: Placement) -> None:
        super().__init__(spec, placement)
        self.module = decoder_segment(vae, spec)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return named_outputs(self.spec, self.module(**inputs))


def difference(vae: Vae, whole: Vae, frames: int, size: int, backend: Segments) -> float:
    """Of a chain from the whole decoder, over its range."""
    spec, chain = chain_of(vae, frames, size)
    given = torch.randn(spec.inputs[0].shape, generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        expected = VaeDecoder(whole)(given)
    decoded = SegmentedDecoder(spec, chain, backend)(latent=given)["frames"]
    assert backend.opened == list(range(len(chain)))
    return float((decoded - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("channels", "rewrites"),
    [((32,), ()), ((32, 64), rewrites_for("onnxruntime", "cpu")), ((32, 32, 64), TENSORRT_REWRITES)],
)
def test_the_chain_gives_what_the_whole_decoder_gives(
    channels: tuple[int, ...], rewrites: Sequence[Rewrite]
) -> None:
    whole, vae = random_vae(*channels), random_vae(*channels)
    apply_rewrites(vae, (), rewrites)
    for frames, size in ((2, 1), (5, 2), (14, 8)):
        segments = Segments("eager", partial(TorchNetwork, vae))
        assert difference(vae, whole, frames, size, segments) <= 1e-5, (frames, size)


def test_slices_of_another_size_on_onnx_runtime(tmp_path: Path) -> None:
    """3 frames at a time of 5."""
    vae = random_vae(32)
    graphs: dict[str, Path] = {}
    for spec in chain_of(vae, 5, 3)[1]:
        graphs[spec.key] = tmp_path / f"{spec.key}.onnx"
        ir.save(trace(decoder_segment(vae, spec).eval(), spec), graphs[spec.key])

    def network(spec: NetworkSpec, placement: Placement) -> Network:
        return OrtNetwork(spec, onnxruntime.InferenceSession(graphs[spec.key]), placement)

    assert difference(vae, vae, 5, 3, Segments("onnxruntime", network)) <= 1e-5


# Bundles

PROFILE = Profile(5, HEIGHT, WIDTH, 1, "single", 5)
SLICE = 2  # does not divide 5
IMAGE = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def streaming_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, 5 frames, one half of guidance a call: its decoder whole, and streamed over slices of 2."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/streaming",
        lambda folder: export_bundle(checkpoint, folder, [PROFILE], torch.float32, stream_decoder=SLICE),
    )


@pytest.fixture
def folder(streaming_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return damage.copy(streaming_bundle, tmp_path)


def opened(folder: Path, **options: Any) -> VideoEngine:
    return VideoEngine.from_bundle(folder, **{"backend": "onnxruntime", "device": "cpu", **options})


def made(engine: VideoEngine, steps: int = 2, **other: Any) -> VideoOutput:
    output = engine(
        IMAGE, HEIGHT, WIDTH, num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(0), **other,
    )  # fmt: skip
    assert isinstance(output, VideoOutput)
    return output


def video(engine: VideoEngine, **other: Any) -> VideoOutput:
    with engine:
        return made(engine, **other)


def test_onnx_runtime_streams(streaming_bundle: Path) -> None:
    """Of two videos, and again with the same engine's networks swapped."""
    whole = video(opened(streaming_bundle), num_videos_per_prompt=2, decoding="whole")
    streamed = video(opened(streaming_bundle), num_videos_per_prompt=2, decoding="streamed")
    assert (streamed.frames - whole.frames).abs().max() <= 1e-5
    assert not torch.equal(streamed.frames[0], streamed.frames[1])
    placed = streamed.report.stages["vae_decoder"]
    assert placed.detail.endswith(f", streamed, {SLICE} frames at a time")
    engine = opened(streaming_bundle, swap_networks=True)
    swapped = video(engine, decoding="streamed", decode_chunk_size=SLICE)
    assert torch.equal(swapped.frames[0], video(opened(streaming_bundle), decoding="streamed").frames[0])
    assert swapped.report.stages["vae_decoder"] == placed


def test_a_cancel_is_seen_between_the_runs_of_segments(
    streaming_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is parked is free then, and the engine is usable."""
    parked: list[weakref.ref[Tensor]] = []
    park = SegmentedDecoder._parked

    def noted(self: SegmentedDecoder, *of: Any) -> Tensor:
        parked.append(weakref.ref(room := park(self, *of)))
        return room

    monkeypatch.setattr(SegmentedDecoder, "_parked", noted)
    with opened(streaming_bundle) as engine:
        frames = []
        for after in (99, 11, 99):
            watching = Stops(after)
            with nullcontext() if after == 99 else pytest.raises(Cancelled) as caught:
                frames.append(made(engine, decoding="streamed", cancel=watching, observer=watching).frames)
            if after == 99:
                slices = 3 * (1 + 2 * 4)  # of the front, and of the segments of four resnets
                assert watching.told == [(5 * n / (2 + slices), 5) for n in range(1, 3 + slices)]
                continue
            assert len(watching.told) == 11
            assert caught.value.remedy.startswith("Call again")
            assert not any(room() is not None for room in parked)
    assert torch.equal(*frames)


def test_cancelled_chains_give_their_memory_back(streaming_bundle: Path) -> None:
    """Memory after 40 videos, of which every other one is cancelled within the chain, is as after 10."""
    process, after = psutil.Process(), []
    noise = torch.zeros(1, 5, 4, HEIGHT // 2, WIDTH // 2)
    with opened(streaming_bundle) as engine:
        for number in range(40):
            watching = Stops(12 if number % 2 else 99)
            with pytest.raises(Cancelled) if number % 2 else nullcontext():
                made(engine, 1, decoding="streamed", latents=noise, cancel=watching, observer=watching)
            after.append(process.memory_info().rss)
    assert max(after[-10:]) - max(after[:10]) < 8 * 2**20


def test_an_altered_segment_is_said_before_anything_runs(folder: Path) -> None:
    last = [e for e in Bundle(folder).manifest.networks if e.spec.segment is not None][-1]
    damage.flip(folder / last.graphs["onnxruntime"])
    bundle = Bundle(folder)
    decoder = streamed_decoder(PROFILE, bundle.manifest.model.architecture, FLOAT32, SLICE)
    with pytest.raises(BundleError, match=f"file {last.spec.key}.onnx of bundle .* expected sha256"):
        OrtBackend(bundle, CPU).open(decoder)


def test_the_segments_share_the_decoder_s_weights(streaming_bundle: Path) -> None:
    bundle = Bundle(streaming_bundle)
    segments = [e for e in bundle.manifest.networks if e.spec.network == "decoder_segment"]
    assert [e.spec.segment for e in segments] == list(range(11))
    assert {e.weights for e in segments} == {"vae_decoder.bin"}
    size = sum(p.numel() * 4 for p in open_decoder(bundle).parameters())
    assert bundle.manifest.files["vae_decoder.bin"].bytes < 2 * size  # rewritten weights differ in places


def open_decoder(bundle: Bundle) -> Any:
    return open_checkpoint(bundle.manifest.source.checkpoint).load("vae", torch.float32).decoder


def test_info_and_the_manifest_say_so(streaming_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "info", streaming_bundle) == 0
    assert "2 frames at a time" in capsys.readouterr().out


def test_verify_compares_each_segment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(export, "verify", folder) == 0
    rows = {(row.network, row.output) for row in Bundle(folder).manifest.parity}
    segments = {row for row in rows if row[0].startswith("decoder_segment")}
    assert {output for _, output in segments} == {"y", "mean", "variance", "images", "frames"}
    assert len({key for key, _ in segments}) == 11


def test_tensorrt_streams(streaming_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its double computes with ONNX Runtime; windows are written into the engines' own buffers."""
    expected = video(opened(streaming_bundle), decoding="streamed")
    tensorrt_plans.with_onnxruntime(folder, monkeypatch)
    got = video(opened(folder, backend="tensorrt"), decoding="streamed")
    assert torch.equal(got.frames, expected.frames)


def test_a_missing_plan_of_a_segment_is_said_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = tensorrt_plans.with_onnxruntime(folder, monkeypatch)
    damage.edit(folder, lambda m: m["plans"].pop())
    with pytest.raises(BackendUnavailable, match=r"plan of decoder_segment-t5-32x48-streamed2-10 in bundle"):
        video(opened(folder, backend="tensorrt"), decoding="streamed")
    assert "execute" not in " ".join(double.order())


# The planner


def test_a_plan_says_what_a_streamed_decoder_takes(
    streaming_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--memory", "8GiB", "--device", "cpu", "--all")
    assert call(main, "plan", streaming_bundle, *arguments) == 0
    said = capsys.readouterr().out
    assert "streamed, 2 frames at a time" in said
    assert "whole" in said


def test_what_is_parked_and_moved(streaming_bundle: Path) -> None:
    bundle = Bundle(streaming_bundle)
    of = bundle.manifest.profiles[0], bundle.manifest.model.architecture, FLOAT32
    (*_, whole), (*_, streamed) = specs_of(*of), specs_of(*of, SLICE)
    costs = GraphCosts(bundle, "cuda")
    level = 4 * 5 * HEIGHT * WIDTH // 4 * 64  # of 5 frames
    pixels = 4 * 5 * HEIGHT * WIDTH
    assert costs(streamed).parked_bytes == level + pixels * 32
    assert costs(streamed).moved_bytes == 2 * level + 3 * (2 * level + 2 * pixels * 32) + 2 * pixels * 3
    assert costs(whole).parked_bytes == 0
    on_host = GraphCosts(bundle, "cpu")(streamed)
    assert on_host.activation_bytes == costs(streamed).activation_bytes + costs(streamed).parked_bytes


# What is refused


def test_a_bundle_without_one(tiny_bundle: Path) -> None:
    with pytest.raises(ProfileError, match="expected a bundle with one, got decoders of whole") as caught:
        video(opened(tiny_bundle), num_frames=FRAMES, decoding="streamed")
    assert "--decode-chunk 2 --stream-decoder 2 --dtype fp32" in caught.value.remedy


def test_a_bundle_whose_frames_are_decoded_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = damage.copy(tiny_bundle, tmp_path)
    damage.edit(copy, lambda m: m["model"].update(orbits=True))
    with pytest.raises(ProfileError, match="Leave it out: each frame of this model is decoded alone"):
        Bundle(copy).slice_frames(Settings(FRAMES, HEIGHT, WIDTH, decoding="streamed"))


def test_another_slice_than_the_bundle_s(streaming_bundle: Path) -> None:
    with pytest.raises(
        ProfileError, match=r"expected decode_chunk_size=2, which .* got decode_chunk_size=3"
    ) as c:
        video(opened(streaming_bundle), decoding="streamed", decode_chunk_size=3)
    assert "--guidance single --stream-decoder 3 --dtype fp32" in c.value.remedy


def test_a_remedy_streams_fewer_frames_than_a_video_has(tiny_bundle: Path) -> None:
    """As the export demands."""
    plain, streaming = Bundle(tiny_bundle), Bundle(tiny_bundle)
    told = {"streaming": streaming_of((32, 64), 1, SLICE), "profiles": (PROFILE,)}
    streaming.manifest = streaming.manifest.model_copy(update=told)

    def remedy(bundle: Bundle, **other: Any) -> str:
        with pytest.raises(ProfileError) as caught:
            bundle.profile_for(Settings(**{"frames": FRAMES, "height": HEIGHT, "width": WIDTH, **other}))
        return caught.value.remedy

    assert "--stream-decoder 2 " in remedy(plain, decoding="streamed", decode_chunk_size=FRAMES)
    assert remedy(streaming, decoding="streamed", decode_chunk_size=5) == "Leave out decode_chunk_size."
    assert "--stream-decoder 4 " in remedy(streaming, decoding="streamed", decode_chunk_size=4)
    assert "--frames 2 --height 32 --width 48 --stream-decoder 1 --dtype" in remedy(streaming, frames=2)
    assert "--frames 1 --height 32 --width 48 --dtype" in remedy(streaming, frames=1)
    one = replace(PROFILE, frames=1, decode_chunk=1)
    plain.manifest = plain.manifest.model_copy(update={"profiles": (one,)})
    assert "one frame has nothing to stream" in remedy(plain, decoding="streamed")


def test_a_remedy_for_two_devices_keeps_the_streamed_decoder(tiny_bundle: Path) -> None:
    bundle, profile = Bundle(tiny_bundle), replace(PROFILE, guidance="batched")
    told = {"streaming": streaming_of((32, 64), 1, SLICE), "profiles": (profile,)}
    bundle.manifest = bundle.manifest.model_copy(update=told)
    with pytest.raises(ProfileError, match="a profile of single guidance") as caught:
        bundle.single_profile_for(Settings(5, HEIGHT, WIDTH, decoding="streamed"))
    assert "--guidance single --stream-decoder 2 --dtype" in caught.value.remedy


def test_exports_of_the_bundle_anew_keep_it(streaming_bundle: Path) -> None:
    assert "--stream-decoder 2 --dtype fp16" in Bundle(streaming_bundle).plans_command()


@pytest.mark.parametrize(
    ("slice_frames", "message"),
    [
        (0, "stream decoder: expected a whole number of at least 1"),
        (3, "stream decoder: expected fewer frames at a time than a video's 3, got 3"),
    ],
)
def test_a_slice_that_is_none(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slice_frames: int,
    message: str,
) -> None:
    arguments = ("-o", tmp_path / "b", "--frames", 3, "--stream-decoder", slice_frames)
    assert call(export, "onnx", tiny_checkpoint, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_of_single_images_has_nothing_to_stream() -> None:
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [32, 64],
           "scaling_factor": 0.18215}  # fmt: skip
    with pytest.raises(SettingsError, match="got AutoencoderKL, which decodes each frame alone"):
        vae_levels({"vae": vae})


def test_a_decoder_of_other_layers(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    vae = checkpoint.load("vae", torch.float32)
    vae.decoder.up_blocks[0].__class__ = type("Own", (type(vae.decoder.up_blocks[0]),), {})
    spec = streamed_decoder(PROFILE, checkpoint.model.architecture, FLOAT32, SLICE)
    with pytest.raises(SettingsError, match=r"Own has a forward of its own. Export the bundle without"):
        decoder_segment(vae, segments_of(spec, streaming_of((32, 64), 1, SLICE))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(streaming=None), "a segment of a decoder, and nothing said of streaming"),
        (lambda m: m["streaming"].update(slice_frames=3), "decoder_segment-t5-32x48-streamed3-00 of bundle"),
        (lambda m: m["streaming"].update(slice_frames=5), "not shorter than every video"),
        (lambda m: m["streaming"]["layers"].pop(), "decoder_segment-t5-32x48-streamed2-07 of bundle"),
        (lambda m: m["streaming"].update(layers=[]), "streaming.layers"),
        (
            lambda m: (m["streaming"]["head"].update(channels=65_536), m["profiles"][0].update(frames=1024)),
            "values in y float32",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself(folder: Path, change: Any, message: str) -> None:
    damage.edit(folder, change)
    with pytest.raises(BundleError) as caught:
        Bundle(folder)
    assert message in str(caught.value)


def test_triton_serves_no_segment(streaming_bundle: Path, tmp_path: Path) -> None:
    names = write_repository(Bundle(streaming_bundle), tmp_path / "models", QueueLimits())
    assert [name.partition("-")[0] for name in names] == [
        "denoiser", "image_encoder", "svd", "svd_stream", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
