"""Processes of our own that are told what to measure in text, and answer in text."""

from __future__ import annotations

import os


def in_utf8() -> dict[str, str]:
    """This process's environment for a child: its streams are UTF-8 then.

    Windows gives pipes an encoding of one alphabet, and the path of a checkpoint may hold another.
    """
    return {**os.environ, "PYTHONIOENCODING": "utf-8:replace"}
