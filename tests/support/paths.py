"""Where things are in a checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPH = ROOT / "engine" / "svd_engine" / "assets" / "coffee.png"
