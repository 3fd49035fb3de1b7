"""A batch in this process: one video after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from svd_engine.opening import Opening
from svd_engine.serving.batch.items import Item
from svd_engine.serving.batch.making import make_item
from svd_engine.serving.batch.records import Record, Results


def make_here(opening: Opening, items: Iterable[Item], results: Results) -> Iterator[Record]:
    """The record of each item, as it ends.  Raises what `make_item` raises."""
    with opening.open() as engine:
        engine.set_progress_bar_config(disable=True)  # a batch has one of its own
        for item in items:
            yield make_item(engine, item, results)
