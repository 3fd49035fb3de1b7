"""How a long measurement tells where it is."""

from collections.abc import Callable

Progress = Callable[[str], None]  # takes one line
