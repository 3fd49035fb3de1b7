"""`svd-engine batch --ray` on a real cluster of two nodes on this machine, and its refusals without one."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from svd_engine.cli.main import main
from svd_engine.errors import BackendError, BackendUnavailable, BundleError, SettingsError
from svd_engine.opening import Opening
from svd_engine.serving.batch import on_ray
from svd_engine.serving.batch.items import Item, read_items
from svd_engine.serving.batch.on_ray import BatchWorker, make_on_ray
from svd_engine.serving.batch.records import Results
from tests.engine.test_batch import DEFAULTS, names, picture, statuses, table
from tests.support.commands import call

ray = pytest.importorskip("ray")
PICTURES = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # its 15 starves workers beside other tests
        yield from two_nodes(Cluster)


def two_nodes(cluster: Any) -> Iterator[Any]:
    folder = tempfile.mkdtemp(prefix="ray-")
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # for its address, whatever `temp_dir` is
    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    made = cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder})
    try:
        made.add_node(**node)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def workers() -> list[psutil.Process]:
    """Of Ray, below this process."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "BatchWorker" in " ".join(process.cmdline())]


def test_a_killed_worker_a_bad_picture_and_two_nodes(
    cluster: Any, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for index in range(PICTURES):
        picture(folder / f"{index:02}.png", f"hsl({9 * index}, 80%, 50%)")
    (folder / "17.png").write_bytes(b"no picture")
    raylets: set[int] = set()
    killed: list[int] = []
    ended = threading.Event()

    def kill_one() -> None:
        while not ended.wait(0.2):
            found = workers()
            raylets.update(process.ppid() for process in found)
            if not killed and len(list(out.glob("*.mp4"))) > 5:
                killed.append(found[0].pid)
                found[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    options = (folder, "-o", out, "--bundle", tiny_bundle, "--ray", cluster.address, "--cpus", 2)
    quick = ("--steps", 2)
    code = call(main, "batch", *options, *quick)
    ended.set()
    killer.join()
    assert code == 1
    assert killed
    assert len(raylets) == 2  # a worker on each node
    assert f"{PICTURES - 1} made, 1 failed, 0 kept" in capsys.readouterr().out
    found = statuses(out)
    assert found.pop("17.png") == "refused"
    assert set(found.values()) == {"done"}
    assert len(list(out.glob("*.mp4"))) == PICTURES - 1

    (folder / "17.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert call(main, "batch", *options, *quick) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")} == times
    assert {row["status"] for row in table(out)} == {"kept"}
    assert names(out / ".batch" / "partial") == set()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there(tmp_path: Path, address: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"Ray cluster {address}: expected one that runs there"):
        list(make_on_ray(opening(tmp_path), [], results(tmp_path), address))


def test_without_ray_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match=r"Run: pip install .*ray"):
        list(make_on_ray(opening(tmp_path), [], results(tmp_path), "local"))


def opening(folder: Path) -> Opening:
    return Opening(folder / "bundle", None, {})


def results(folder: Path) -> Results:
    return Results(folder / "out", ".mp4", "networks")


class Connected:
    """A cluster of which nothing but its size is asked."""

    exceptions = ray.exceptions

    def __init__(self, gpus: int, cpus: int, nodes: int = 2) -> None:
        self.there, self.count = {"GPU": gpus, "CPU": cpus}, nodes

    def cluster_resources(self) -> dict[str, int]:
        return {name: count for name, count in self.there.items() if count}

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}] * self.count

    def shutdown(self) -> None: ...


@pytest.mark.parametrize(
    ("there", "asked", "used"),
    [
        ((4, 32), (None, None), (True, 4)),
        ((4, 32), (2, None), (True, 2)),
        ((4, 32), (None, 8), (False, 8)),
        ((0, 32), (None, None), (False, 2)),
    ],
)
def test_a_worker_for_each_gpu(
    there: tuple[int, int], asked: tuple[int | None, int | None], used: tuple[bool, int]
) -> None:
    assert on_ray._workers(Connected(*there), *asked) == used


@pytest.mark.parametrize("asked", [(5, None), (None, 33)])
def test_more_workers_than_there_is_room_for(asked: tuple[int | None, int | None]) -> None:
    with pytest.raises(SettingsError, match=r"for workers: expected at most the \d+ of the cluster"):
        on_ray._workers(Connected(4, 32), *asked)


def test_gpus_of_a_cluster_that_has_none() -> None:
    with pytest.raises(SettingsError, match=r"the 0 of the cluster, got 2\..*leave it out to run on CPUs"):
        on_ray._workers(Connected(0, 32), 2, None)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    picture(tmp_path / "a.png")
    return read_items(tmp_path, DEFAULTS, "mp4")


def rows(monkeypatch: pytest.MonkeyPatch, *given: dict[str, str] | Exception) -> None:
    def made(*_: object) -> Iterator[dict[str, str]]:
        for row in given:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(on_ray, "_connected", lambda address: Connected(1, 4))
    monkeypatch.setattr(on_ray, "_rows", made)


def test_a_picture_that_ends_every_worker_has_failed(
    monkeypatch: pytest.MonkeyPatch, items: list[Item], tmp_path: Path
) -> None:
    rows(monkeypatch)
    with results(tmp_path).opened():
        (record,) = make_on_ray(opening(tmp_path), items, results(tmp_path), "auto")
    assert record.status == "failed"
    assert "its process died, 3 times" in (tmp_path / "out" / "a.error.txt").read_text()


def test_a_worker_that_can_make_none_ends_the_batch(
    monkeypatch: pytest.MonkeyPatch, items: list[Item], tmp_path: Path
) -> None:
    refused = BatchWorker(opening(tmp_path), items, results(tmp_path))({"index": 0})
    with pytest.raises(BundleError) as told:
        opening(tmp_path).open()
    assert refused == {"record": "", "unusable": str(told.value)}
    rows(monkeypatch, refused)
    with pytest.raises(BackendError, match=r"expected to open its engine, got .*bundle"):
        list(make_on_ray(opening(tmp_path), items, results(tmp_path), "auto"))


def test_a_cluster_that_ends(monkeypatch: pytest.MonkeyPatch, items: list[Item], tmp_path: Path) -> None:
    rows(monkeypatch, ray.exceptions.RaySystemError("the head is gone"))
    with pytest.raises(BackendError, match=r"expected to run the batch to its end, got .*the head is gone"):
        list(make_on_ray(opening(tmp_path), items, results(tmp_path), "auto"))
