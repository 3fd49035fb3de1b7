"""The profile of a call: exactly what it asks for, or the one of a bundle that does it."""

from __future__ import annotations

from typing import Any

import pytest

from svd_engine.request import Settings
from svd_engine.spec.profile import Profile

BATCHED, SINGLE = (
    Profile(5, 64, 128, guidance="batched", decode_chunk=2),
    Profile(5, 64, 128, guidance="single", decode_chunk=2),
)
WHOLE = Profile(5, 64, 128, decode_chunk=5)


def asked(**other: Any) -> Settings:
    return Settings(**{"frames": 5, "height": 64, "width": 128, **other})


@pytest.mark.parametrize(
    ("settings", "videos", "expected"),
    [
        (asked(), 1, Profile(5, 64, 128, 1, "batched", 5)),
        (asked(decode_chunk_size=2), 3, Profile(5, 64, 128, 3, "batched", 2)),
        (asked(decode_chunk_size=8), 1, Profile(5, 64, 128, 1, "batched", 5)),
        (asked(max_guidance_scale=1), 1, Profile(5, 64, 128, 1, "single", 5)),
    ],
)
def test_of_a_request(settings: Settings, videos: int, expected: Profile) -> None:
    assert Profile.of_request(settings, videos) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (asked(), WHOLE),  # the most frames at once
        (asked(decode_chunk_size=2), BATCHED),
        (asked(max_guidance_scale=1), SINGLE),  # the guidance mode before the chunk
        (asked(max_guidance_scale=1, decode_chunk_size=9), WHOLE),
        (asked(decode_chunk_size=3), None),
        (asked(frames=6), None),
        (asked(height=128), None),
        (asked(width=64), None),
    ],
)
def test_of_a_bundle(settings: Settings, expected: Profile | None) -> None:
    assert Profile.of_bundle([SINGLE, BATCHED, WHOLE], settings) == expected
