"""Manifests that would exhaust memory or run nonsense are refused, at once, before anything is built."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import jsonschema
import pytest

from svd_engine.bundle.manifest import MANIFEST, SCHEMA, check_profile, read_manifest
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BundleError, SettingsError
from svd_engine.spec.model import Architecture
from svd_engine.spec.profile import Profile
from tests.support import damage, hostile_manifests
from tests.support.messages import complete

MEMORY = 64 * 2**20  # bytes of Python objects; the largest manifest is 4 MiB of text


@pytest.mark.parametrize("name", hostile_manifests.HOSTILE)
def test_a_hostile_manifest_is_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    hostile_manifests.HOSTILE[name](bundle)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            Bundle(bundle)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MANIFEST in str(caught.value)
    assert peak < MEMORY


def test_the_same_manifest_in_another_spelling_is_taken(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    hostile_manifests.reordered(bundle)
    assert Bundle(bundle).manifest == Bundle(tiny_bundle).manifest


@pytest.mark.parametrize(
    "name", ["10^9 frames", "true frames", "rho near 0", "sigma_min of 0", "clip_std of 0", "a vast shape"]
)
def test_the_bounds_stand_in_the_schema_beside_the_manifest(
    tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    hostile_manifests.HOSTILE[name](bundle)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            json.loads((bundle / MANIFEST).read_text()), json.loads((bundle / SCHEMA).read_text())
        )


def test_two_keys_alike_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    hostile_manifests.HOSTILE["a key twice inside"](bundle)
    with pytest.raises(BundleError, match="the key 'sigma_max' twice in one object"):
        read_manifest(bundle)


ARCHITECTURE = Architecture()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (Profile(1025, 64, 64), "frames of a profile"),
        (Profile(0, 64, 64), "frames of a profile"),
        (Profile(14, 16_448, 64), "height of a profile"),
        (Profile(14, 64, 64, batch=65), "batch of a profile"),
        (Profile(14, 64, 64, decode_chunk=2000), "decode_chunk of a profile"),
        (Profile(1024, 2048, 1024, decode_chunk=1), "2,147,483,648 pixels in one call"),
        (Profile(256, 2048, 2048, decode_chunk=256), "3,221,225,472 values in frames float32"),
    ],
)
def test_a_profile_that_no_bundle_holds_is_refused(profile: Profile, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_profile(profile, ARCHITECTURE)
    complete(caught.value, message)


@pytest.mark.parametrize(
    "profile", [Profile(25, 576, 1024), Profile(1024, 1024, 1024, decode_chunk=14), Profile(1, 64, 64)]
)
def test_a_profile_of_any_use_is_taken(profile: Profile) -> None:
    check_profile(profile, ARCHITECTURE)
