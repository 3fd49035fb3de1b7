"""One video of a batch: the part that every way to run shares."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict

from svd_engine.engine import VideoEngine
from svd_engine.errors import BackendUnavailable, BundleError, CheckpointError
from svd_engine.media.image import load_image
from svd_engine.output import VideoOutput
from svd_engine.request import SEED, SETTINGS
from svd_engine.serving.batch.items import Item
from svd_engine.serving.batch.records import Record, Results
from svd_engine.serving.one_video import Status, VideoRequest, make_video, must_reopen, status_after, watch

UNUSABLE = (BundleError, CheckpointError, BackendUnavailable)  # no picture's fault: every one would fail


def make_item(engine: VideoEngine, item: Item, results: Results) -> Record:
    """Makes the video of one picture, unless it is whole, and writes it and its record.

    What is wrong with the picture, its settings, or the machine meanwhile, becomes the record of a failure.
    Raises BundleError, CheckpointError or BackendUnavailable for an engine that can make no video at all.
    """
    if (record := results.whole(item)) is not None:
        return record
    made_from, started = results.made_from(item), time.perf_counter()
    try:
        output = _generated(engine, item)
        files = results.keep(item, output.save)
    except UNUSABLE:
        raise
    except Exception as error:  # whatever it was, the others are made
        if must_reopen(error):
            with suppress(Exception):  # the next picture tells if it does not open
                engine.close()
        status = status_after(error)
        told = "" if status is Status.REFUSED else traceback.format_exc()
        record = results.failed(item, made_from, status, error, told)
    else:
        record = Record(
            name=item.name, made_from=made_from, status=Status.DONE, files=files,
            settings=_settings(output, item), milliseconds=(time.perf_counter() - started) * 1e3,
        )  # fmt: skip
    results.note(record)
    return record


def _generated(engine: VideoEngine, item: Item) -> VideoOutput:
    arguments = {**item.arguments, "output_type": "pt"}
    request = VideoRequest(
        load_image(item.picture, transparency=True), arguments.pop(SEED.name), arguments=arguments
    )
    return make_video(engine, request, watch(engine, request), threading.Event())


def _settings(output: VideoOutput, item: Item) -> dict[str, object]:
    """Every parameter as the video was made with it."""
    used = asdict(output.report.settings)
    return {SEED.name: item.arguments[SEED.name]} | {p.name: used[p.field] for p in SETTINGS}
