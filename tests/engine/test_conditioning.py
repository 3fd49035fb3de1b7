"""What a checkpoint is told beside the image, as data: SVD's, and what other models are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import describe
from svd_engine.checkpoint.random_weights import svd_configs
from svd_engine.errors import BundleError, SettingsError
from svd_engine.networks.parity import example_inputs
from svd_engine.request import SETTINGS, Real, Whole
from svd_engine.spec.conditioning import (
    Conditioning,
    conditioning_of,
    sv3d_p_conditioning,
    sv3d_u_conditioning,
    svd_conditioning,
)
from svd_engine.spec.model import SVD, Architecture
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import denoiser
from svd_engine.spec.tensors import TensorSpec
from tests.support import damage

SV3D_U = sv3d_u_conditioning()
SV3D_P = sv3d_p_conditioning()
PROFILE = Profile(frames=21, height=576, width=576, batch=2, decode_chunk=21)


def time_ids(conditioning: Conditioning) -> TensorSpec:
    spec = denoiser(PROFILE, Architecture(conditioning=conditioning), FLOAT32)
    return next(tensor for tensor in spec.inputs if tensor.name == "time_ids")


@pytest.mark.parametrize(
    ("conditioning", "shape", "width"),
    [(SVD, (2, 3), 768), (SV3D_U, (2, 1), 256), (SV3D_P, (2, 21, 3), 1280)],
    ids=["svd", "sv3d_u", "sv3d_p"],
)
def test_the_table_follows_the_fields(conditioning: Conditioning, shape: tuple[int, ...], width: int) -> None:
    assert time_ids(conditioning).shape == conditioning.shape(2, 21) == shape
    assert conditioning.width == width  # the published checkpoints' adm_in_channels


def test_svd_is_told_the_frame_rate_less_one() -> None:
    told = SVD.time_ids({"fps": 12, "motion_bucket_id": 33.5, "noise_aug_strength": 0.5}, 2, 14)
    assert told.dtype == torch.float32
    assert told.tolist() == [[11.0, 33.5, 0.5]] * 2


def test_numbers_per_frame_stand_beside_those_of_the_video() -> None:
    azimuths = [17.0 * frame for frame in range(21)]
    values = {"noise_aug_strength": 1e-5, "elevation": 30.0, "azimuths": azimuths}
    told = SV3D_P.time_ids(values, 2, 21)
    expected = torch.tensor([[1e-5, math.radians(60), math.radians(azimuth)] for azimuth in azimuths])
    assert torch.allclose(told, expected.expand(2, 21, 3), rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"azimuths": [0.0] * 20},
            "azimuths: expected one number, or one for each of 21 frames, got 20 numbers",
        ),
        ({"noise_aug_strength": [0.0] * 21}, "noise_aug_strength: expected one number, got 21 numbers"),
        ({"elevation": 91.0}, "elevation: expected -90.0 to 90.0, got 91.0"),
        ({"azimuths": [0.0] * 20 + [-0.1]}, "azimuths: expected 0.0 to 360.0, got -0.1"),
    ],
)
def test_what_a_field_does_not_take(change: dict[str, Any], message: str) -> None:
    values = {**SV3D_P.defaults, **change}
    with pytest.raises(SettingsError, match=message):
        SV3D_P.rows(values, 21)


def test_networks_are_compared_on_the_defaults() -> None:
    spec = denoiser(PROFILE, Architecture(conditioning=SV3D_P), FLOAT32)
    told = example_inputs(spec, SV3D_P)["time_ids"]
    assert tuple(told.shape) == (2, 21, 3)
    assert told[1, 20].tolist() == pytest.approx([1e-5, math.radians(80), 0.0])


def test_svd_s_fields_are_parameters_of_a_call() -> None:
    """Same names, ranges and defaults; a parameter that changes here changes there."""
    parameters = {parameter.field: parameter for parameter in SETTINGS}
    for field in SVD.fields:
        parameter = parameters[field.name]
        assert isinstance(parameter.kind, (Whole, Real))
        high = parameter.kind.high if isinstance(parameter.kind, Real) else None
        assert (field.low, field.high, field.default) == (parameter.kind.low, high, parameter.default)
        assert field.per == "video"


def test_a_checkpoint_s_embeddings_have_their_width() -> None:
    configs = svd_configs(14)
    configs["unet"] |= {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96}
    model = describe("small", "here", configs)
    assert model.architecture.conditioning == svd_conditioning(32)
    assert model.architecture.conditioning.width == 96
    assert not model.orbits


def test_a_family_is_known_by_the_width_of_its_embeddings() -> None:
    assert [conditioning_of(32, width) for width in (96, 32, 160, 64)] == [
        svd_conditioning(32), sv3d_u_conditioning(32), sv3d_p_conditioning(32), None
    ]  # fmt: skip


def test_the_manifest_says_it(tiny_bundle: Path) -> None:
    written = json.loads((tiny_bundle / "manifest.json").read_text())
    told = written["model"]["architecture"]["conditioning"]["fields"]
    assert told[0] == {
        "name": "fps", "width": 32, "default": 7.0, "low": 1.0, "high": None, "scale": 1.0,
        "offset": -1.0, "per": "video",
    }  # fmt: skip
    assert [field["name"] for field in told] == ["fps", "motion_bucket_id", "noise_aug_strength"]


@pytest.mark.parametrize("name", ["polar", "fps"])
def test_a_bundle_told_what_no_call_says_is_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    """Another model's field, and one field twice."""
    bundle = damage.copy(tiny_bundle, tmp_path)

    def change(manifest: Any) -> None:
        manifest["model"]["architecture"]["conditioning"]["fields"][1]["name"] = name

    damage.edit(bundle, change)
    with pytest.raises(BundleError, match="expected parameters of a call, each once") as caught:
        Bundle(bundle)
    assert name in caught.value.got
    assert caught.value.remedy.startswith("Export the bundle again")
