"""Every rewrite alone, all together, and all but one: the function of diffusers' modules, to 1e-12."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import AlphaBlender
from torch import nn

from svd_engine.backends.registry import BACKENDS
from svd_engine.errors import SettingsError, TensorMismatch
from svd_engine.networks.denoiser import GuidedDenoiser
from svd_engine.networks.rewrites import (
    ORT_CPU_REWRITES,
    REWRITES,
    TENSORRT_REWRITES,
    TORCH_CPU_REWRITES,
    Rewrite,
    apply_rewrites,
    feed_forward_convolutions,
    feed_forward_slices,
    frames_in_groups,
    frames_in_place,
    rewrites_for,
    temporal_rows,
    winograd_rows,
)
from svd_engine.networks.rewrites._blend import spatial_share
from svd_engine.networks.rewrites._places import parts, rewrite_each
from svd_engine.networks.rewrites.feed_forward_in_parts import NormedInParts
from svd_engine.networks.rewrites.temporal_conv2d import TemporalConv2d
from tests.engine.rewrite_networks import (
    Call,
    call_unet,
    call_vae,
    random_unet,
    random_vae,
    relative_difference,
    unet_inputs,
)

EVERY = tuple(dict.fromkeys((*REWRITES, *ORT_CPU_REWRITES, *TORCH_CPU_REWRITES)))
FOR_TENSORRT = tuple(rewrite for rewrite in TENSORRT_REWRITES if rewrite not in REWRITES)
# what a rewrite needs to find a place
NEEDS = {
    "attention-layout": ("single-token-cross-attention", "transformer-blend"),
    "feed-forward-convolutions": ("split-geglu",),
}
EXACT = 1e-12  # relative to the output's largest value, float64
PLACES = {  # in the UNet with 6 transformers and 12 resnets, in the decoder with 8 resnets
    "single-token-cross-attention": (12, 0),
    "temporal-conv2d": (24, 17),
    "resnet-blend": (12, 8),
    "transformer-blend": (6, 0),
    "fused-qkv": (12, 1),
    "frames-in-place": (6, 0),
    "split-geglu": (18, 0),
    "timestep-projections": (24, 0),
    "frame-positions": (6, 0),
    "phase-upsample": (1, 1),
    "frames-apart": (0, 1),
    "temporal-rows": (24, 17),
    "winograd-rows": (0, 16),
    "feed-forward-convolutions": (18, 0),
    "feed-forward-slices": (18, 0),
    "linear-as-convolution": (90, 2),
    "channels-last": (55, 39),
    "attention-layout": (6, 0),
    "feed-forward-in-parts": (10, 0),
    "transposed-upsample": (1, 1),
    "frames-in-groups": (0, 1),
}


def named(rewrites: Sequence[Rewrite]) -> list[str]:
    return [rewrite.name for rewrite in rewrites]


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks here have 64 at most, and the videos 3 frames, whose tokens are few."""
    monkeypatch.setattr(feed_forward_convolutions, "MOST_TOKENS", 10)
    monkeypatch.setattr(feed_forward_slices, "NUMBERS", 7 * 128)
    monkeypatch.setattr(feed_forward_slices, "FEWEST", 5)
    monkeypatch.setattr(winograd_rows, "LEAST", 32)
    monkeypatch.setattr(frames_in_groups, "MOST", 2)


@pytest.fixture(scope="module", params=["alone", "all but one"])
def some(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def as_diffusers(call: Call) -> torch.Tensor:
    """What `call_unet` or `call_vae` makes without rewrites."""
    return call(random_unet() if call is call_unet else random_vae())


def chosen(rewrite: Rewrite, some: str, among: Sequence[Rewrite]) -> list[Rewrite]:
    """It and what it needs; or all others."""
    if some == "alone":
        needed = NEEDS.get(rewrite.name, ())
        return [*(other for other in among if other.name in needed), rewrite]
    return [other for other in among if other != rewrite]


@pytest.mark.parametrize("rewrite", EVERY, ids=named(EVERY))
def test_unet(rewrite: Rewrite, some: str) -> None:
    """What is left alone is what stands on the rewrite that is missing."""
    unet = random_unet()
    applied = apply_rewrites(unet, rewrites=chosen(rewrite, some, EVERY))
    assert [a.name for a in applied] == named(chosen(rewrite, some, EVERY))
    for each in applied:
        missing = some == "all but one" and rewrite.name in NEEDS.get(each.name, ())
        assert bool(each.left_alone) == missing
    assert relative_difference(call_unet(unet), as_diffusers(call_unet)) <= EXACT


@pytest.mark.parametrize("rewrite", EVERY, ids=named(EVERY))
def test_vae(rewrite: Rewrite, some: str) -> None:
    vae = random_vae()
    applied = apply_rewrites(vae, rewrites=chosen(rewrite, some, EVERY))
    assert {a.left_alone for a in applied} == {()}
    assert relative_difference(call_vae(vae), as_diffusers(call_vae)) <= EXACT


@pytest.mark.parametrize("rewrite", TENSORRT_REWRITES, ids=named(TENSORRT_REWRITES))
def test_for_tensorrt(rewrite: Rewrite, some: str) -> None:
    """What is left alone then is what stands on the rewrite that is missing."""
    for network, call in ((random_unet(), call_unet), (random_vae(), call_vae)):
        for applied in apply_rewrites(network, rewrites=chosen(rewrite, some, TENSORRT_REWRITES)):
            missing = some == "all but one" and rewrite.name in NEEDS.get(applied.name, ())
            assert bool(applied.left_alone) == (missing and call is call_unet)
        assert relative_difference(call(network), as_diffusers(call)) <= EXACT


@pytest.mark.parametrize(
    "rewrites",
    [
        (*REWRITES, *TORCH_CPU_REWRITES),
        (*REWRITES, *ORT_CPU_REWRITES),
        TENSORRT_REWRITES,
        (*REWRITES, *FOR_TENSORRT[::2]),
    ],
    ids=["torch on a CPU", "ONNX Runtime on a CPU", "for TensorRT", "both"],
)
def test_all_together(rewrites: Sequence[Rewrite]) -> None:
    """Frames come from the call: the same rewritten network serves 3, 14 and 1, and other sizes."""
    unet, vae = random_unet(), random_vae()
    shapes = [{"frames": 3}, {"frames": 14, "height": 4, "width": 6}, {"frames": 1}]
    expected = [call_unet(unet, **shape) for shape in shapes]
    decoded = [call_vae(vae, frames=frames) for frames in (3, 14, 1)]
    for index, network in enumerate((unet, vae)):
        applied = apply_rewrites(network, rewrites=rewrites)
        assert {a.name: a.places for a in applied} == {r.name: PLACES[r.name][index] for r in rewrites}
        assert not network.training
        assert not any(part.training for part in network.modules())
    for shape, reference in zip(shapes, expected, strict=True):
        assert relative_difference(call_unet(unet, **shape), reference) <= EXACT
    for frames, reference in zip((3, 14, 1), decoded, strict=True):
        assert relative_difference(call_vae(vae, frames=frames), reference) <= EXACT


def test_the_call_stays_the_same() -> None:
    """A timestep as a number or one per video, a dataclass as result, positional arguments."""
    plain, rewritten = random_unet(), random_unet()
    apply_rewrites(rewritten)
    for timestep in (1, 0.5, torch.tensor([0.3]), torch.tensor([0.3, -1.2])):
        inputs = {**unet_inputs(), "timestep": timestep}
        with torch.no_grad():
            expected, got = plain(**inputs).sample, rewritten(*inputs.values()).sample
        assert relative_difference(got, expected) <= EXACT


def test_two_layers_in_a_transformer() -> None:
    """Only the blend is left alone: it is exact in front of proj_out, and the first of two is not there."""
    unet = random_unet(transformer_layers_per_block=2)
    expected = call_unet(unet)
    report = {a.name: a for a in apply_rewrites(unet, rewrites=EVERY)}
    assert report["transformer-blend"].places == 0
    assert all("2 layers" in reason for reason in report["transformer-blend"].left_alone)
    assert report["single-token-cross-attention"].places == 24
    assert relative_difference(call_unet(unet), expected) <= EXACT


def test_one_video_alone_takes_more_feed_forwards_in_parts() -> None:
    """All of the widest level; two videos only those of two temporal blocks, beside two skips each."""
    unet = random_unet()
    expected = {videos: call_unet(unet, videos=videos) for videos in (1, 2)}
    apply_rewrites(unet, rewrites=TENSORRT_REWRITES)
    wrapped = [part for part in unet.modules() if isinstance(part, NormedInParts)]
    assert len(wrapped) == 15
    calls: list[nn.Module] = []
    for part in wrapped:
        part.norm.register_forward_hook(lambda norm, *_: calls.append(norm))
    for videos, in_parts in ((1, 15), (2, 4)):
        calls.clear()
        assert relative_difference(call_unet(unet, videos=videos), expected[videos]) <= EXACT
        assert len(calls) == 15 + in_parts


@pytest.mark.parametrize("rewrites", [EVERY, TENSORRT_REWRITES], ids=["torch and CPU", "TensorRT"])
def test_the_second_time_changes_nothing(rewrites: Sequence[Rewrite]) -> None:
    unet, vae = random_unet(), random_vae()
    for network in (unet, vae):
        apply_rewrites(network, rewrites=rewrites)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        assert {a.places for a in apply_rewrites(network, rewrites=rewrites)} == {0}
        after = network.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rewrites", [EVERY, TENSORRT_REWRITES], ids=["torch and CPU", "TensorRT"])
def test_weights_survive_a_copy_and_a_state_dict(rewrites: Sequence[Rewrite]) -> None:
    unet = random_unet()
    apply_rewrites(unet, rewrites=rewrites)
    expected = call_unet(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(call_unet(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(unet.state_dict())
    assert torch.equal(call_unet(twin), expected)
    pointers = [p.untyped_storage().data_ptr() for p in unet.state_dict().values()]
    assert len(pointers) == len(set(pointers))  # no two weights share memory: safetensors would refuse them


def test_the_encoder_is_not_touched() -> None:
    vae = random_vae()
    before = [type(part) for part in vae.encoder.modules()]
    apply_rewrites(vae, rewrites=EVERY)
    assert [type(part) for part in vae.encoder.modules()] == before


@pytest.mark.parametrize("rewrites", [EVERY, TENSORRT_REWRITES], ids=["torch and CPU", "TensorRT"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, rewrites: Sequence[Rewrite]) -> None:
    """Every weight keeps its dtype, and folding costs no accuracy: the distance from float64 is as before."""
    truth, plain = call_unet(random_unet()), random_unet(dtype)
    rewritten = random_unet(dtype)
    apply_rewrites(rewritten, rewrites=rewrites)
    assert {tensor.dtype for tensor in rewritten.state_dict().values()} == {dtype}
    before, after = call_unet(plain, dtype=dtype), call_unet(rewritten, dtype=dtype)
    assert after.dtype == dtype
    distance, got = ((prediction.double() - truth).square().mean().sqrt() for prediction in (before, after))
    assert 0 < got <= 1.05 * distance


def test_one_row_of_ids_serves_every_video() -> None:
    """diffusers takes a row for each; the halves of guidance have the same."""
    for rewrites in ((), REWRITES[:1], TENSORRT_REWRITES):
        unet = random_unet()
        apply_rewrites(unet, rewrites=rewrites)
        inputs = unet_inputs()
        row = inputs["added_time_ids"][:1]
        with torch.no_grad():
            expected = unet(**{**inputs, "added_time_ids": row.expand(2, -1)}).sample
            if rewrites:
                got = unet(**{**inputs, "added_time_ids": row}).sample
                assert relative_difference(got, expected) <= EXACT


def test_guidance_of_one_video_asks_for_one_row() -> None:
    class Unet(torch.nn.Module):
        one_row_for_all = True

        def forward(self, sample: torch.Tensor, *_: object, **named: object) -> tuple[torch.Tensor]:
            ids = named["added_time_ids"]
            assert isinstance(ids, torch.Tensor)
            self.rows = len(ids)
            return (sample[:, :, :4],)

    unet = Unet()
    unet.weight = torch.nn.Parameter(torch.zeros(1))
    denoiser = GuidedDenoiser(unet)

    def rows(videos: int) -> int:
        denoiser(
            torch.zeros(videos, 2, 4, 4, 4), torch.tensor(1.0), torch.zeros(videos, 4, 4, 4),
            torch.zeros(videos, 1, 8), torch.zeros(videos, 3), torch.ones(videos, 2),
        )  # fmt: skip
        return unet.rows

    assert (rows(1), rows(2)) == (1, 4)
    unet.one_row_for_all = False
    assert rows(1) == 2


@pytest.mark.parametrize("strategy", ["fixed", "learned", "learned_with_images"])
@pytest.mark.parametrize("switched", [False, True])
@torch.no_grad()
def test_share_of_a_blend(strategy: str, switched: bool) -> None:
    blender = AlphaBlender(0.3, strategy, switched)
    x, y = torch.randn(2, 1, 4, 5, 3, 3)
    share = spatial_share(blender)
    expected = blender(x, y, torch.zeros(1, 5))
    torch.testing.assert_close(share * x + (1 - share) * y, expected, rtol=0, atol=1e-6)


def test_slices_of_a_feed_forward() -> None:
    """As many tokens as value and gate have room for, the last slice shorter; few tokens stay together."""
    whole = random_unet().down_blocks[0].attentions[0].transformer_blocks[0].ff
    sliced = feed_forward_slices.FeedForwardSlices(whole)
    lengths: list[int] = []
    whole.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for tokens, expected in ((9, [9]), (16, [8, 8]), (23, [8, 8, 7])):
        x = torch.randn(1, tokens, 32, dtype=torch.float64)
        lengths.clear()
        with torch.no_grad():
            got = sliced(x)
            assert lengths == expected
            assert relative_difference(got, whole(x)) <= EXACT


@pytest.mark.parametrize(
    ("width", "tokens", "expected"), [(320, 14336, 1792), (640, 3584, 896), (1280, 896, 896)]
)
def test_slices_of_svd(width: int, tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """14 frames of 128x256, both halves of guidance: what the rewrite's text says."""
    monkeypatch.undo()  # few_channels
    with torch.device("meta"):
        whole = FeedForward(width, activation_fn="geglu")
        lengths: list[int] = []
        whole.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        feed_forward_slices.FeedForwardSlices(whole)(torch.empty(1, tokens, width))
    assert lengths == [expected] * (tokens // expected)


def test_many_attentions_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = random_unet()
    expected = call_unet(unet)
    apply_rewrites(unet)
    monkeypatch.setattr(frames_in_place, "MAX_ATTENTIONS", 7)  # divides neither 384 nor 192
    assert relative_difference(call_unet(unet), expected) <= EXACT


def test_an_unknown_name_is_refused() -> None:
    unet = random_unet()
    before = set(unet.state_dict())
    with pytest.raises(SettingsError, match="rewrite fused-kqv, nosuch") as refusal:
        apply_rewrites(unet, ["nosuch", "fused-qkv", "fused-kqv"], EVERY)
    assert all(name in refusal.value.expected for name in named(EVERY))
    assert "a name that no rewrite has" in refusal.value.got
    assert "every rewrite is on by default" in refusal.value.remedy
    assert set(unet.state_dict()) == before


def test_without_leaves_out() -> None:
    names = named(REWRITES)
    assert apply_rewrites(random_unet(), names) == []
    assert named(apply_rewrites(random_vae(), names[1:])) == names[:1]  # type: ignore[arg-type]


def test_names_are_files_and_summaries_are_short() -> None:
    assert len({rewrite.name for rewrite in EVERY}) == len(EVERY)
    assert all(0 < len(rewrite.summary) < 80 for rewrite in EVERY)


def test_the_list_costs_no_torch() -> None:
    script = (
        "import sys; from svd_engine.networks.rewrites import REWRITES;"
        "assert REWRITES; assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_longer_context_is_refused() -> None:
    unet = random_unet()
    call_unet(unet, tokens=2)  # diffusers' own attends to both
    apply_rewrites(unet)
    with pytest.raises(TensorMismatch, match="cross-attention context") as refusal:
        call_unet(unet, tokens=2)
    assert refusal.value.expected == "one token, [2, 1, 32]"
    assert refusal.value.got == "2 tokens, [2, 2, 32]"
    assert "switch single-token-cross-attention off" in refusal.value.remedy
    assert call_unet(unet).isfinite().all()


def test_more_frames_than_the_table_are_refused() -> None:
    unet = random_unet()
    apply_rewrites(unet)
    call_unet(unet, frames=128, height=2, width=2)
    with pytest.raises(TensorMismatch, match="frames of one video") as refusal:
        call_unet(unet, frames=129, height=2, width=2)
    assert refusal.value.expected == "at most 128, the rows of the position table"
    assert refusal.value.got == "129"
    assert "switch frame-positions off" in refusal.value.remedy


@pytest.mark.parametrize("height", [1, 2, 5, 8])
@torch.no_grad()
def test_winograd_of_odd_and_even_heights(height: int) -> None:
    conv, x = torch.nn.Conv2d(32, 5, 3, padding=1).double(), torch.randn(2, 32, height, 6).double()
    assert relative_difference(winograd_rows.WinogradRows(conv)(x), conv(x)) <= EXACT


@pytest.mark.parametrize(("frames", "sizes"), [(1, 1), (13, 13), (14, 7), (25, 13), (27, 9)])
def test_groups_are_much_the_same_size(frames: int, sizes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_in_groups, "MOST", 13)
    assert frames_in_groups.size_of_group(frames) == sizes


@pytest.mark.parametrize("pixels", [1, 127, 128, 192, 251])
@torch.no_grad()
def test_rows_of_any_number_of_pixels(pixels: int) -> None:
    """251 is a prime: its rows are of one pixel."""
    conv = TemporalConv2d(torch.nn.Conv3d(4, 5, (3, 1, 1), padding=(1, 0, 0))).double()
    x = torch.randn(2, 4, 3, pixels).double()
    expected = conv(x)
    temporal_rows.rewrite(conv)
    assert relative_difference(conv(x), expected) <= EXACT


def test_what_is_for_which_backend() -> None:
    assert rewrites_for("eager", "cpu") == (*REWRITES, *TORCH_CPU_REWRITES)
    assert rewrites_for("onnxruntime", "cpu") == (*REWRITES, *ORT_CPU_REWRITES)
    assert {rewrites_for(*where) for where in [("compiled", "cpu"), ("eager", "cuda")]} == {REWRITES}
    graphs = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # one trace serves all of a half-precision bundle
    assert {rewrites_for(backend, "cuda") for backend in graphs} == {TENSORRT_REWRITES}
    assert {*graphs, "eager", "compiled"} == set(BACKENDS)


def test_a_size_that_upsampling_must_be_told_is_refused() -> None:
    """7 rows become 4 and then 7 again in diffusers' UNet, which is not twice 4."""
    unet = random_unet()
    expected = call_unet(unet, height=7)
    apply_rewrites(unet, ["phase-upsample"])
    assert relative_difference(call_unet(unet, height=7), expected) <= EXACT
    apply_rewrites(unet)
    with pytest.raises(TensorMismatch, match="upsampling of a 4x6 latent") as refusal:
        call_unet(unet, height=7)
    assert refusal.value.expected == "8x12, twice the size"
    assert refusal.value.got == "7x12"
    assert "switch phase-upsample off" in refusal.value.remedy
    unet = random_unet()
    apply_rewrites(unet, rewrites=TENSORRT_REWRITES)
    with pytest.raises(TensorMismatch, match="switch transposed-upsample off"):
        call_unet(unet, height=7)


def test_a_part_that_was_replaced_is_forgotten_at_once() -> None:
    """So that weights never stand in memory twice."""
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    there = [weakref.ref(part) for part in network]
    seen = []

    def rewrite(_part: nn.Linear) -> nn.Module:
        seen.append(sum(part() is not None for part in there))
        return nn.Identity()

    places = parts(network, nn.Linear)  # held here too, as a caller may
    rewrite_each(places, lambda _part: None, rewrite, network)
    assert seen == [4, 3, 2, 1]
    assert places == []
