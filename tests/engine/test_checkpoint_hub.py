"""Checkpoints from the hub: what is downloaded when, what never is, and what its errors become."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock, create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from svd_engine.checkpoint.opening import HUB, open_checkpoint
from svd_engine.errors import CheckpointError

XT = "stabilityai/stable-video-diffusion-img2vid-xt"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def same(module: torch.nn.Module, reference: torch.nn.Module) -> bool:
    ours, theirs = module.state_dict(), reference.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """`snapshot_download`, signature checked, over a repository that holds the tiny checkpoint.

    Like the real one, it returns the snapshot's folder, and brings only what matches into it.
    """
    snapshot = tmp_path / "snapshots" / COMMIT

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "/" in repo_id
        assert revision in (None, COMMIT)
        for pattern in allow_patterns:
            for file in folder.glob(pattern):
                target = snapshot / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(snapshot)

    fake: MagicMock = create_autospec(huggingface_hub.snapshot_download, side_effect=download)

    def listing(repo_id: str, *, revision: str) -> list[str]:
        assert revision == COMMIT
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]

    fake.snapshot = snapshot
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(
        huggingface_hub,
        "list_repo_files",
        create_autospec(huggingface_hub.list_repo_files, side_effect=listing),
    )
    return fake


def fetched(hub: MagicMock) -> set[str]:
    return {str(file.relative_to(hub.snapshot)) for file in hub.snapshot.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("source", "repository", "name"),
    [(name, repository, name) for name, repository in HUB.items()]
    + [("owner/my-svd", "owner/my-svd", "my-svd")],
)
def test_names_and_hub_ids_are_downloaded(hub: MagicMock, source: str, repository: str, name: str) -> None:
    checkpoint = open_checkpoint(source)
    assert hub.call_args.args == (repository,)
    assert (checkpoint.model.name, checkpoint.source) == (name, source)
    assert not fetched(hub)


def test_an_existing_folder_wins_over_a_hub_id(
    hub: MagicMock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    shutil.copytree(folder, folder.parent / "owner" / "name")
    open_checkpoint("owner/name")
    hub.assert_not_called()


@pytest.mark.parametrize("source", ["./owner/name", "/owner/name", "~/owner", "../name"])
def test_a_path_never_goes_to_the_hub(source: str, hub: MagicMock) -> None:
    with pytest.raises(
        CheckpointError, match=r"a folder with model_index\.json.*got no such folder.*Pass the"
    ):
        open_checkpoint(source)
    hub.assert_not_called()


def test_only_the_files_that_are_read_are_downloaded(hub: MagicMock, folder: Path) -> None:
    half = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", half)
    checkpoint = open_checkpoint("svd-xt", "fp16")
    checkpoint.load("vae", torch.float32)
    assert fetched(hub) == {"vae/diffusion_pytorch_model.fp16.safetensors"}
    assert hub.call_args.kwargs["revision"] == COMMIT
    checkpoint.load("unet", torch.float16)  # of which there is no fp16 variant
    assert "unet/diffusion_pytorch_model.safetensors" in fetched(hub)
    assert "vae/diffusion_pytorch_model.safetensors" not in fetched(hub)
    open_checkpoint("svd-xt").load("vae", torch.float16)
    assert "vae/diffusion_pytorch_model.safetensors" in fetched(hub)


def test_of_a_file_and_shards_only_those_that_are_read_are_downloaded(
    hub: MagicMock, folder: Path, diffusers_pipeline: Any
) -> None:
    single = shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "single")
    diffusers_pipeline.unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    shutil.move(single, folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(open_checkpoint("svd").load("unet", torch.float32), diffusers_pipeline.unet)
    assert len(fetched(hub)) > 1
    assert all("-of-" in file for file in fetched(hub))


def test_a_copy_in_a_folder_has_the_digest_of_the_repository(hub: MagicMock, folder: Path) -> None:
    assert open_checkpoint("svd").digest() == open_checkpoint(folder).digest()


def test_a_repository_without_the_variant_is_refused_before_weights_are_fetched(hub: MagicMock) -> None:
    with pytest.raises(CheckpointError, match=r"expected weight files of the variant fp16.*Leave the"):
        open_checkpoint("svd", "fp16")
    assert not fetched(hub)


@pytest.mark.parametrize(
    ("error", "got", "remedy"),
    [
        (
            errors.GatedRepoError("403", response=Mock()),
            "needs an accepted licence",
            rf"Accept its licence at https://huggingface\.co/{XT}, then run: hf auth login",
        ),
        (errors.RepositoryNotFoundError("404", response=Mock()), "no such repository", "Check the spelling"),
        (
            errors.LocalEntryNotFoundError("no route"),
            "LocalEntryNotFoundError: no route",
            "Check the network",
        ),
        (errors.HfHubHTTPError("500", response=Mock()), "HfHubHTTPError: 500", "Check the network"),
        (TimeoutError("slow"), "TimeoutError: slow", "Check the network"),
    ],
)
def test_hub_errors_say_what_to_do(hub: MagicMock, error: Exception, got: str, remedy: str) -> None:
    hub.side_effect = error
    with pytest.raises(
        CheckpointError, match=rf"{XT} on the .* hub: expected .*{got}.*{remedy}.*local folder"
    ):
        open_checkpoint("svd-xt")


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache layout, and no network."""
    repository = tmp_path / "hub" / f"models--{XT.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.mark.usefixtures("cache")
def test_a_cached_repository_loads_offline(diffusers_pipeline: Any) -> None:
    assert same(open_checkpoint("svd-xt").load("vae", torch.float32), diffusers_pipeline.vae)


@pytest.mark.usefixtures("cache")
def test_a_repository_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(CheckpointError, match=r"owner/name on the.*OFFLINE"):
        open_checkpoint("owner/name")


def test_a_component_that_is_not_cached_is_refused_offline(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"vae: expected diffusion_pytorch_model\.safetensors.*Download"
    ):
        open_checkpoint("svd-xt")


def test_configs_without_weights_are_refused_offline(cache: Path) -> None:
    for file in (cache / "snapshots" / COMMIT).rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"got OfflineModeIsEnabled.*HF_HUB_OFFLINE"):
        open_checkpoint("svd-xt")
