"""The training scripts, importable as they import each other."""

from __future__ import annotations

import sys

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "examples" / "training"))
