"""A batch on a Ray cluster: an engine in every worker, one worker a GPU.

Ray Data schedules, gives a worker its next picture when it is done with the last one, and gives a picture
whose worker died to another.  The workers write the videos; what became of each is all that travels back.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from svd_engine.errors import BackendError, BackendUnavailable, SettingsError, SvdEngineError
from svd_engine.install import install_line
from svd_engine.opening import Opening
from svd_engine.serving.batch.items import Item
from svd_engine.serving.batch.making import UNUSABLE, make_item
from svd_engine.serving.batch.records import Record, Results
from svd_engine.serving.one_video import Status

LOCAL = "local"  # an address: start Ray on this machine
RETRIES = 2  # of a picture whose worker died


class BatchWorker:
    """Holds one engine and makes one video at a time.  Ray makes it an actor."""

    def __init__(self, opening: Opening, items: Sequence[Item], results: Results) -> None:
        self.items, self.results = items, results
        self.unusable: SvdEngineError | None = None
        try:
            self.engine = opening.open()
            self.engine.set_progress_bar_config(disable=True)  # a batch has one of its own
        except SvdEngineError as error:  # raised here, Ray would start the worker again and again
            self.unusable = error

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Takes the index of an item.  Gives the JSON of its record, or why this worker can make none."""
        if self.unusable is None:
            try:
                record = make_item(self.engine, self.items[row["index"]], self.results)
                return {"record": record.model_dump_json(), "unusable": ""}
            except UNUSABLE as error:
                self.unusable = error
        return {"record": "", "unusable": self.results.worded(self.unusable)}


def make_on_ray(
    opening: Opening,
    items: Sequence[Item],
    results: Results,
    address: str,
    gpus: int | None = None,
    cpus: int | None = None,
) -> Iterator[Record]:
    """The record of each item, as it ends.

    Pictures, networks and results lie on a disk that all nodes share, under the same path.
    address: "local" starts Ray on this machine, "auto" or HOST:PORT finds a cluster that runs.  gpus: number
    of workers, each with a GPU; None takes all GPUs.  cpus: number of workers with a CPU slot each in their
    place; where there is no GPU, None takes one for each node.
    Raises BackendUnavailable without Ray or its cluster, SettingsError for more workers than the cluster has
    room for, and BackendError if a worker can make no video at all, or the cluster ends.
    """
    ray = _connected(address)
    try:
        on_gpu, workers = _workers(ray, gpus, cpus)
        opening = opening if on_gpu else opening.on("cpu")
        left = {item.name: item for item in items}
        for row in _rows(opening, items, results, on_gpu, workers):
            if row["unusable"]:
                raise BackendError(
                    "worker of the batch",
                    expected="to open its engine",
                    got=row["unusable"],
                    remedy="Correct this on every node, and run the same command again.",
                )
            record = Record.model_validate_json(row["record"])
            left.pop(record.name)
            yield record
        for item in left.values():  # Ray gave them up
            record = results.failed(item, results.made_from(item), Status.FAILED, _died())
            results.note(record)
            yield record
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"Ray cluster {address}",
            expected="to run the batch to its end",
            got=str(error).strip().splitlines()[-1],
            remedy="See Ray's logs; the same command goes on where this one ended.",
        ) from error
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """The module `ray`, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailable(
            "Ray", expected="to be installed", got=str(error), remedy=f"Run: {install_line('ray')}"
        ) from error
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        _check_reachable(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(
            f"Ray cluster {address}",
            expected="one that runs there",
            got=str(error).strip().splitlines()[0],
            remedy="Start its head node with `ray start`, and pass its address; local needs none.",
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Ray tries an address for minutes.  Raises OSError or ValueError."""
    if address not in (LOCAL, "auto"):
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isascii() and port.isdecimal()):
            raise ValueError("no HOST:PORT, auto or local")
        socket.create_connection((host, int(port)), timeout=20).close()


def _workers(ray: Any, gpus: int | None, cpus: int | None) -> tuple[bool, int]:
    """Whether workers have a GPU each, and how many there are."""
    there = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    on_gpu = cpus is None and bool(gpus or there.get("GPU"))
    name, wanted = ("GPU", gpus) if on_gpu else ("CPU", cpus)
    room = int(there.get(name, 0))
    workers = wanted or (room if on_gpu else min(nodes, room))
    if not 1 <= workers <= room:
        raise SettingsError(
            f"{name}s for workers",
            expected=f"at most the {room} of the cluster",
            got=str(workers),
            remedy="Ask for fewer, or add nodes with `ray start`."
            if room
            else "Add nodes that have some with `ray start`"
            + (", or leave it out to run on CPUs." if on_gpu else "."),
        )
    return on_gpu, workers


def _rows(
    opening: Opening, items: Sequence[Item], results: Results, on_gpu: bool, workers: int
) -> Iterator[dict[str, str]]:
    """What `BatchWorker` gave, as it comes; nothing for an item that Ray gave up."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command shows its own
    context.max_errored_blocks = -1  # a picture that ends its worker every time does not end the others
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    indices = ray.data.from_items([{"index": i} for i in range(len(items))], override_num_blocks=len(items))
    made = indices.map(
        BatchWorker,
        fn_constructor_args=(opening, items, results),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_gpus=1 if on_gpu else 0,
        num_cpus=1,
        ray_remote_args_fn=lambda: {
            "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": RETRIES
        },
    )  # fmt: skip
    yield from made.iter_rows()


def _died() -> BackendError:
    return BackendError(
        "worker of the batch",
        expected="to make the video",
        got=f"its process died, {RETRIES + 1} times",
        remedy="Generate this picture alone to see why; memory may have run out.",
    )
