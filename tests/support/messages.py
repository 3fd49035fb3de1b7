"""What every error of ours says."""

from svd_engine.errors import SvdEngineError


def complete(error: SvdEngineError, *parts: str) -> None:
    """The message names everything that a user needs, and in particular `parts`."""
    assert error.what
    assert error.expected
    assert error.got
    assert error.remedy.endswith(".")
    for part in (error.what, error.expected, error.got, error.remedy, *parts):
        assert part in str(error)
