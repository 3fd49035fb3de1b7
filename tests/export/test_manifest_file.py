"""The manifest as several processes change it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from svd_engine.bundle.manifest import Manifest, read_manifest
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import BundleError, OutputError
from svd_export import manifest_file
from svd_export.file_lock import locked
from svd_export.manifest_file import LOCK, update_manifest
from svd_export.verify import verify
from tests.support import damage, tensorrt_plans


def named(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"without_rewrites": ("changed",)})


def test_it_waits_for_whoever_changes_it_now(half_bundle: Path, tmp_path: Path) -> None:
    folder = damage.copy(half_bundle, tmp_path)
    waiting = threading.Thread(target=update_manifest, args=(folder, named))
    with locked(folder / LOCK, wait=False):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert read_manifest(folder).without_rewrites == ()
    waiting.join(60)
    assert read_manifest(folder).without_rewrites == ("changed",)
    assert not list(folder.glob(".*"))


def test_verify_keeps_the_plans_that_came_meanwhile(
    half_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = damage.copy(half_bundle, tmp_path)
    opened = Bundle(folder)
    tensorrt_plans.add_plans(folder)
    verify(opened, open_checkpoint(str(tiny_checkpoint)), torch.device("cpu"), lambda line: None)
    manifest = Bundle(folder).manifest
    assert (len(manifest.plans), len(manifest.parity)) == (4, 4)


def test_nothing_to_change(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"a folder with manifest\.json"):
        update_manifest(tmp_path, named)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BundleError, match=r"a folder with manifest\.json, got no such folder"):
        update_manifest(tmp_path / "nowhere", named)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_written(
    half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path, wait: bool) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    folder = damage.copy(half_bundle, tmp_path)
    monkeypatch.setattr(manifest_file, "locked", refused)
    with pytest.raises(OutputError, match=r"a folder that can be written, got \[Errno 13\]") as caught:
        update_manifest(folder, named)
    assert "Make the folder writable" in caught.value.remedy
    assert read_manifest(folder).without_rewrites == ()
