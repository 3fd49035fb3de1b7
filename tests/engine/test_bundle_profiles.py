"""Which profile of a bundle serves a call, and the command for one that does when none of them can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svd_engine.bundle.reading import Bundle
from svd_engine.errors import ProfileError
from svd_engine.request import Settings
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import damage


def asked(**other: Any) -> Settings:
    return Settings(**{"frames": FRAMES, "height": HEIGHT, "width": WIDTH, **other})


def test_the_profile_that_serves_a_call(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert bundle.profile_for(asked()).guidance == "batched"
    assert bundle.profile_for(asked(max_guidance_scale=1)).guidance == "single"
    assert bundle.profile_for(asked(decode_chunk_size=CHUNK)).decode_chunk == CHUNK


def test_a_batched_profile_serves_a_call_without_guidance_when_there_is_no_single_one(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = damage.copy(tiny_bundle, tmp_path)
    damage.edit(bundle, lambda manifest: manifest["profiles"].pop())
    assert Bundle(bundle).profile_for(asked(max_guidance_scale=1)).guidance == "batched"


@pytest.mark.parametrize(
    ("call", "flags"),
    [
        ({"frames": 14}, f"--frames 14 --height {HEIGHT} --width {WIDTH} --dtype fp32"),
        ({"height": 64}, f"--frames {FRAMES} --height 64 --width {WIDTH} --dtype fp32"),
        ({"decode_chunk_size": 1}, f"--height {HEIGHT} --width {WIDTH} --decode-chunk 1 --dtype fp32"),
    ],
)
def test_a_call_that_no_profile_serves(tiny_bundle: Path, call: dict[str, Any], flags: str) -> None:
    bundle = Bundle(tiny_bundle)
    with pytest.raises(ProfileError) as caught:
        bundle.profile_for(asked(**call))
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"{FRAMES} frames, {HEIGHT}x{WIDTH}, batch 1, single guidance" in message
    assert f"svd-export onnx {bundle.manifest.source.checkpoint} -o NEW_BUNDLE" in message
    assert flags in message


@pytest.mark.parametrize(
    ("checkpoint", "argument", "family"),
    [
        ("random:svd-xt", "--random-weights svd-xt", "svd-xt"),
        ("my models/svd", "'my models/svd'", None),
        ("demo", "demo", None),
    ],
)
def test_how_the_checkpoint_is_found_again(
    tiny_bundle: Path, checkpoint: str, argument: str, family: str | None
) -> None:
    manifest = Bundle(tiny_bundle).manifest
    source = manifest.source.model_copy(update={"checkpoint": checkpoint})
    renamed = manifest.model_copy(update={"source": source})
    assert renamed.export_source == argument
    assert renamed.random_family == family
