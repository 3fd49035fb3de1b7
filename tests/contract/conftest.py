"""NVIDIA's own bindings, each pinned version in turn."""

from __future__ import annotations

import pytest

from tests.contract.bindings import PINNED, RTX, Bindings, NotHere, bindings


@pytest.fixture(scope="session", params=[*PINNED, RTX])
def real(request: pytest.FixtureRequest) -> Bindings:
    try:
        return bindings(request.param)
    except NotHere as reason:
        pytest.skip(str(reason))
