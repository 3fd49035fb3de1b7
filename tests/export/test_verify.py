"""`verify` holds a bundle against torch, writes what it measured, and fails when it should."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from svd_engine.bundle.manifest import MANIFEST, ParityEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint, open_checkpoint
from svd_engine.errors import NonFiniteOutput, OutputError, ParityError
from svd_engine.networks.parity import TOLERANCES, example_inputs
from svd_export.cli import main
from svd_export.verify import difference, verify
from tests.support import damage
from tests.support.commands import call

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return damage.copy(tiny_bundle, tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


def perturb(bundle: Path) -> None:
    """Doubles a hundred of the denoiser's weights; size and hash in the manifest follow."""
    weights = np.fromfile(bundle / "denoiser.bin", np.float32)
    weights[:100] *= 2
    weights.tofile(bundle / "denoiser.bin")
    damage.trust(bundle, "denoiser.bin")


def test_a_good_bundle_passes_and_receives_its_report(bundle: Path, checkpoint: Checkpoint) -> None:
    seen: list[str] = []
    rows = verify(Bundle(bundle), checkpoint, CPU, seen.append)
    opened = Bundle(bundle)  # the manifest is still one
    assert list(opened.manifest.parity) == rows
    keys = [entry.spec.key for entry in opened.manifest.networks]
    assert seen == keys == [row.network for row in rows]
    for row in rows:
        assert row.tolerance == TOLERANCES["float32"] == 1e-4
        assert 0 < row.relative <= row.tolerance
        assert row.cosine == pytest.approx(1, abs=1e-6)
        assert row.backend.endswith("CPUExecutionProvider cpu")
    assert not list(bundle.glob(".*"))


def test_a_half_precision_bundle_passes_with_its_own_tolerance(
    half_bundle: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    rows = verify(Bundle(damage.copy(half_bundle, tmp_path)), checkpoint, CPU, lambda line: None)
    assert {row.network.split("-")[0]: row.tolerance for row in rows} == {
        "image_encoder": 2e-2, "vae_encoder": 1e-4, "denoiser": 2e-2, "vae_decoder": 2e-2
    }  # fmt: skip
    assert max(row.relative for row in rows) > 1e-4  # it really computes in half precision


def test_perturbed_weights_fail_and_the_report_says_so(bundle: Path, checkpoint: Checkpoint) -> None:
    perturb(bundle)
    with pytest.raises(ParityError) as caught:
        verify(Bundle(bundle), checkpoint, CPU, lambda line: None)
    key = damage.network(bundle, "denoiser")["spec"]["key"]
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert f"network {key} on onnxruntime" in message
    assert "expected a difference of at most 0.0001 of the reference's largest value, got " in message
    assert "--without-rewrite NAME" in message
    rows = {row.network: row for row in Bundle(bundle).manifest.parity}
    assert rows[key].relative > rows[key].tolerance
    assert rows["image_encoder-b1"].relative <= rows["image_encoder-b1"].tolerance


def test_the_command_fails_on_perturbed_weights(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perturb(bundle)
    assert call(main, "verify", bundle, "--checkpoint", tiny_checkpoint, "--device", "cpu") == 1
    assert "error: denoised of network denoiser-b1" in capsys.readouterr().err
    assert len(Bundle(bundle).manifest.parity) == 6


def test_another_checkpoint(bundle: Path) -> None:
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(ParityError) as caught:
        verify(Bundle(bundle), open_checkpoint("demo"), CPU, lambda line: None)
    message = str(caught.value)
    assert f"checkpoint demo: expected the one that {bundle} was made from, digest " in message
    assert "Use checkpoint=ORIGINAL" in message
    assert (bundle / MANIFEST).read_bytes() == before


def test_the_disk_is_full(bundle: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / MANIFEST).read_bytes()
    damage.edit(bundle, lambda manifest: manifest.update(parity=[]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        verify(Bundle(bundle), checkpoint, CPU, lambda line: None)
    assert json.loads((bundle / MANIFEST).read_bytes()) == json.loads(before)
    assert not list(bundle.glob(".*"))


@pytest.mark.parametrize(
    ("got", "reference", "blamed", "remedy"),
    [
        (math.nan, 1.0, "from onnxruntime cpu", "in bf16 or fp32"),
        (math.inf, 1.0, "from onnxruntime cpu", "in bf16 or fp32"),
        (1.0, math.nan, "from torch", "The checkpoint is damaged."),
        (math.nan, math.nan, "from torch and onnxruntime cpu", "The checkpoint is damaged."),
    ],
)
def test_nan_is_an_error_that_names_the_network(
    tiny_bundle: Path, got: float, reference: float, blamed: str, remedy: str
) -> None:
    """It could not be written as JSON either."""
    entry = Bundle(tiny_bundle).manifest.networks[0]
    with pytest.raises(NonFiniteOutput) as caught:
        difference(
            entry, "embedding", "onnxruntime cpu", torch.tensor([1.0, got]), torch.tensor([1.0, reference])
        )
    assert "network image_encoder-b1: expected finite numbers, got NaN or infinity" in str(caught.value)
    assert caught.value.got.endswith(blamed)
    assert remedy in caught.value.remedy


def row(tiny_bundle: Path, got: list[float], reference: list[float]) -> ParityEntry:
    entry = Bundle(tiny_bundle).manifest.networks[0]
    return difference(entry, "embedding", "any", torch.tensor(got), torch.tensor(reference))


def test_what_the_numbers_are(tiny_bundle: Path) -> None:
    found = row(tiny_bundle, [3.0, -4.5], [3.0, -4.0])
    assert (found.max_abs, found.relative) == (0.5, 0.125)
    angle = np.dot([3, -4.5], [3, -4]) / np.linalg.norm([3, -4.5]) / 5
    assert found.cosine == pytest.approx(angle, abs=1e-12)


def test_a_reference_of_zeros(tiny_bundle: Path) -> None:
    assert row(tiny_bundle, [0.0, 0.0], [0.0, 0.0]).relative == 0
    assert row(tiny_bundle, [1e-6, 0.0], [0.0, 0.0]).relative > 1


def test_inputs_are_the_same_every_time_and_in_a_real_run_s_ranges(tiny_bundle: Path) -> None:
    for entry in Bundle(tiny_bundle).manifest.networks:
        inputs, again = example_inputs(entry.spec), example_inputs(entry.spec)
        assert {t.name: (t.shape, "float32") for t in entry.spec.inputs} == {
            name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in inputs.items()
        }
        assert all(torch.equal(inputs[name], again[name]) for name in inputs)
        if entry.spec.network == "vae_encoder":
            assert inputs["pixels"].abs().max() <= 1
        if entry.spec.network == "denoiser":
            assert inputs["time_ids"][0].tolist() == pytest.approx([6, 127, 0.02])
            assert (inputs["sigma"] > 0).all()
