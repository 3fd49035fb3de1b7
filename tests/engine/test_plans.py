"""Which TensorRT plan runs where, what is refused, and that altered plans are never handed out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.flavours import AMPERE_AND_NEWER, Host, Target, capability_target, card_target
from svd_engine.bundle.plans import fitting_plan, plan_file
from svd_engine.bundle.reading import Bundle
from svd_engine.cli.main import main
from svd_engine.errors import BackendUnavailable, BundleError
from svd_engine.request import Settings
from svd_engine.residency.budget import NO_LIMIT
from svd_engine.residency.planner import Planner
from svd_engine.residency.planning import on_devices, planner_of_bundle
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support import damage, tensorrt_double
from tests.support.commands import call
from tests.support.tensorrt_plans import HOST, add_plan, plan_of, specs


@pytest.fixture
def folder(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    return damage.copy(tiny_half_bundle, tmp_path)


def denoiser(folder: Path) -> NetworkSpec:
    return next(spec for spec in specs(folder) if spec.network == "denoiser")


def test_a_bundle_without_plans_says_what_builds_them(folder: Path) -> None:
    """Also one from before there were any, whose manifest has no such field."""
    damage.edit(folder, lambda manifest: manifest.pop("plans"))
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(folder), denoiser(folder), HOST)
    assert str(caught.value) == (
        f"TensorRT plan of {denoiser(folder).key} in bundle {folder}: expected one for "
        f"TensorRT 10.14.1.48 on NVIDIA Any 80GB, sm90, got no plan. "
        f"Run: svd-export tensorrt {folder} --flavour tensorrt"
    )


CARD, ALIKE = card_target(HOST), capability_target((HOST.compute_capability,))
FITS: list[tuple[Target, Host]] = [
    (CARD, HOST),
    (ALIKE, HOST),
    (ALIKE, replace(HOST, gpu="Other")),
    (AMPERE_AND_NEWER, replace(HOST, gpu="Other", compute_capability=(8, 0))),
    (AMPERE_AND_NEWER, replace(HOST, gpu="Other", compute_capability=(12, 0))),
]


@pytest.mark.parametrize(("target", "here"), FITS)
def test_a_plan_that_fits(folder: Path, target: Target, here: Host) -> None:
    plan = add_plan(folder, denoiser(folder), target=target)
    assert fitting_plan(Bundle(folder), denoiser(folder), here) == plan


OTHERS: list[tuple[Target, Host, str]] = [
    (CARD, replace(HOST, version="10.14.1.47"), "built by TensorRT 10.14.1.48, here is 10.14.1.47"),
    (
        AMPERE_AND_NEWER,
        replace(HOST, version="11.4.0.106"),
        "built by TensorRT 10.14.1.48, here is 11.4.0.106",
    ),
    (CARD, replace(HOST, gpu="Other"), "built for NVIDIA Any 80GB, here is Other"),
    (CARD, replace(HOST, compute_capability=(9, 1)), "built for sm90, here is sm91"),
    (ALIKE, replace(HOST, compute_capability=(8, 9)), "built for sm90, here is sm89"),
    (AMPERE_AND_NEWER, replace(HOST, compute_capability=(7, 5)), "built for sm80 or newer, here is sm75"),
]


@pytest.mark.parametrize(("target", "here", "reason"), OTHERS)
def test_a_plan_for_another_machine(folder: Path, target: Target, here: Host, reason: str) -> None:
    plan = add_plan(folder, denoiser(folder), target=target)
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(folder), denoiser(folder), here)
    assert caught.value.got == f"{plan.file} {reason}"
    assert caught.value.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt"


@pytest.mark.parametrize(("field", "file"), [("graph_sha256", "graph"), ("weights_sha256", "weights")])
def test_a_plan_of_another_network(folder: Path, field: str, file: str) -> None:
    """The bundle was exported again, and the plan stayed."""
    add_plan(folder, denoiser(folder), **{field: "0" * 64})
    name = damage.network(folder, "denoiser")["graphs"]["tensorrt"] if file == "graph" else "denoiser.bin"
    with pytest.raises(BackendUnavailable, match=f"built from another {re.escape(name)} than the bundle's"):
        fitting_plan(Bundle(folder), denoiser(folder), HOST)


def test_every_plan_that_does_not_fit_is_named(folder: Path) -> None:
    first = add_plan(folder, denoiser(folder), host=replace(HOST, gpu="One"))
    second = add_plan(folder, denoiser(folder), host=replace(HOST, version="11.0.0.1"))
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(folder), denoiser(folder), HOST)
    assert caught.value.got == (
        f"{first.file} built for One, here is {HOST.gpu}; "
        f"{second.file} built by TensorRT 11.0.0.1, here is {HOST.version}"
    )


def test_the_plan_made_for_this_card_is_preferred(folder: Path) -> None:
    spec = denoiser(folder)
    anywhere = add_plan(folder, spec, target=AMPERE_AND_NEWER)
    alike = add_plan(folder, spec, target=ALIKE)
    exact = add_plan(folder, spec)
    assert fitting_plan(Bundle(folder), spec, HOST) == exact
    assert fitting_plan(Bundle(folder), spec, replace(HOST, gpu="Other")) == alike
    other = replace(HOST, gpu="Other", compute_capability=(8, 6))
    assert fitting_plan(Bundle(folder), spec, other) == anywhere


def test_names_of_plans_tell_machines_apart_and_are_portable() -> None:
    odd = card_target(replace(HOST, gpu="NVIDIA RTX 6000 (Ada)/48GB"))
    names = {
        plan_file("vae_encoder-b1", "tensorrt", "10.14.1.48", odd, "float16"): "nvidia-rtx-6000-ada-48gb",
        plan_file("vae_encoder-b1", "tensorrt", "10.14.1.48", ALIKE, "float16"): "sm90",
        plan_file("vae_encoder-b1", "tensorrt", "10.14.1.48", AMPERE_AND_NEWER, "float16"): "ampere-plus",
    }
    assert list(names) == [f"vae_encoder-b1.trt10.14.1.48-{gpu}-float16.plan" for gpu in names.values()]


def test_an_altered_plan_is_not_handed_out(folder: Path) -> None:
    plan = add_plan(folder, denoiser(folder))
    content = (folder / plan.file).read_bytes()
    assert Bundle(folder).read_plan(plan) == content
    damage.flip(folder / plan.file)
    with pytest.raises(BundleError, match=rf"file {re.escape(plan.file)} .*expected sha256 .* got sha256"):
        Bundle(folder).read_plan(plan)


def test_a_plan_altered_after_it_was_read_once(folder: Path) -> None:
    """A hash that held before says nothing of what is read now."""
    plan = add_plan(folder, denoiser(folder))
    bundle = Bundle(folder)
    bundle.check_hashes()
    damage.flip(folder / plan.file)
    with pytest.raises(BundleError, match="altered or damaged"):
        bundle.read_plan(plan)


RTX = Host("tensorrt-rtx", "1.7.1.116", "NVIDIA Any", (8, 9))


def test_rtx_plans_are_advised_on_its_own_cards(folder: Path) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(folder), denoiser(folder), RTX)
    assert caught.value.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt-rtx"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (10, 0)])
def test_on_other_cards_tensorrt_is_advised(folder: Path, capability: tuple[int, int]) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(folder), denoiser(folder), replace(RTX, compute_capability=capability))
    assert caught.value.remedy == (
        f'Run `svd-export tensorrt {folder} --flavour tensorrt`, then use backend="tensorrt".'
    )


@pytest.mark.parametrize("host", [HOST, RTX, replace(RTX, compute_capability=(9, 0))])
def test_a_bundle_that_can_have_no_plans_is_exported_again(tiny_bundle: Path, host: Host) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        fitting_plan(Bundle(tiny_bundle), denoiser(tiny_bundle), host)
    assert "svd-export onnx" in caught.value.remedy
    assert "--dtype fp16" in caught.value.remedy
    assert "svd-export tensorrt" not in caught.value.remedy


DAMAGES = {
    "file missing": lambda path: path.unlink(),
    "2 bytes instead of": lambda path: path.write_bytes(b"{}"),
}


@pytest.mark.parametrize(("reason", "spoil"), DAMAGES.items())
def test_a_damaged_plan_leaves_the_rest_of_the_bundle(folder: Path, reason: str, spoil: Any) -> None:
    spec = denoiser(folder)
    plan = add_plan(folder, spec)
    whole = Bundle(folder)
    spoil(folder / plan.file)
    bundle = Bundle(folder)
    assert bundle.graph(spec, "onnxruntime").is_file()
    with pytest.raises(BackendUnavailable) as unfit:
        fitting_plan(bundle, spec, HOST)
    assert f"{plan.file} {reason}" in unfit.value.got
    command = f"Run: svd-export tensorrt {folder} --flavour tensorrt"
    assert unfit.value.remedy == command
    for refused in (bundle.check_hashes, lambda: whole.read_plan(plan)):
        with pytest.raises(BundleError, match=f"file {re.escape(plan.file)} of bundle") as caught:
            refused()
        assert command in caught.value.remedy


def test_a_plan_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    plan = add_plan(folder, denoiser(folder))
    (folder / plan.file).rename(tmp_path / "elsewhere")
    (folder / plan.file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="got a link"):
        Bundle(folder)


def test_a_plan_without_a_hash(folder: Path) -> None:
    plan = add_plan(folder, denoiser(folder))
    damage.edit(folder, lambda manifest: manifest["files"].pop(plan.file))
    with pytest.raises(BundleError, match=f"plan {re.escape(plan.file)} .*with their hash, got {plan.file}"):
        Bundle(folder)


def test_a_plan_of_a_network_that_is_not_there(folder: Path) -> None:
    add_plan(folder, denoiser(folder))
    damage.edit(folder, lambda manifest: manifest["plans"][0].update(network="upscaler-b1"))
    with pytest.raises(
        BundleError, match=r"one of the bundle's networks \(image_encoder-b1, .* got upscaler-b1"
    ):
        Bundle(folder)


@pytest.mark.parametrize(
    "change",
    [{"target": {"label": "a", "capabilities": [[9]]}}, {"flavour": "any"}, {"stripped": 1}, {"path": "x"}],
)
def test_a_row_against_the_schema(folder: Path, change: dict[str, Any]) -> None:
    add_plan(folder, denoiser(folder), plan_of(denoiser(folder)))
    damage.edit(folder, lambda manifest: manifest["plans"][0].update(change))
    with pytest.raises(BundleError, match=r"field plans\.0\."):
        Bundle(folder)


# What is planned on a card that is here


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts cards of these compute capabilities here, with the library of `HOST`."""

    def put(*capabilities: tuple[int, int]) -> None:
        tensorrt_double.install(monkeypatch)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index or 0]
        )

    return put


def planner_of(folder: Path, device: str = "cuda:0", single: bool = False) -> Planner:
    return planner_of_bundle(Bundle(folder), NO_LIMIT, "tensorrt", torch.device(device), single=single)


SETTINGS = Settings(FRAMES, HEIGHT, WIDTH, steps=1)


def test_plans_for_another_card_are_none(planned: Path, cards: Callable[..., None]) -> None:
    """Where no card is here, nobody knows: every plan counts."""
    assert planner_of(planned).considered(SETTINGS, 1)
    cards((9, 0))
    assert planner_of(planned).considered(SETTINGS, 1)
    cards((8, 9))
    with pytest.raises(
        BackendUnavailable, match=r"expected one for .*, sm89, got .* built for sm90"
    ) as caught:
        planner_of(planned).choose(SETTINGS, 1)
    assert caught.value.remedy == f"Run: svd-export tensorrt {planned} --flavour tensorrt"


def test_what_is_left_out_is_said(
    planned: Path, cards: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the denoiser for both halves of guidance the plan is for another card: the other one runs."""
    batched = denoiser(planned)
    other = {"label": "sm89", "capabilities": [[8, 9]], "gpu": ""}
    damage.edit(
        planned, lambda m: [p["target"].update(other) for p in m["plans"] if p["network"] == batched.key]
    )
    cards((9, 0))
    options = ("--backend", "tensorrt", "--device", "cuda", "--memory", "8GiB", "--all")
    assert call(main, "plan", planned, *options) == 0
    said = capsys.readouterr().out
    assert re.search(
        rf"not considered: TensorRT plan of {batched.key} in .*: expected one for TensorRT .*, sm90, "
        r"got \S+ built for sm89, here is sm90",
        said,
    )
    assert "single guidance" in said.splitlines()[-1]


def test_the_plan_that_runs_counts(planned: Path, cards: Callable[..., None]) -> None:
    """Not the larger one for other cards, which counts where none is here."""
    spec = denoiser(planned)
    larger = plan_of(spec, device_memory=10**9)
    add_plan(planned, spec, larger, target=capability_target(((8, 9),)))
    unknown = planner_of(planned).cost_of(spec).activation_bytes
    cards((9, 0))
    assert unknown - planner_of(planned).cost_of(spec).activation_bytes > 9 * 10**8


def test_each_of_two_cards_has_plans_of_its_own(planned: Path, cards: Callable[..., None]) -> None:
    def over_both() -> Planner:
        return on_devices(
            lambda device: planner_of(planned, str(device), single=True),
            torch.device("cuda:0"),
            torch.device("cuda:1"),
        )

    cards((9, 0), (8, 9))
    with pytest.raises(BackendUnavailable, match=r"sm89, got .* built for sm90, here is sm89"):
        over_both().choose(SETTINGS, 1)
    with pytest.raises(BackendUnavailable, match=r"sm89, got .* built for sm90, here is sm89"):
        over_both().unplanned(SETTINGS, 1)
    single = next(s for s in specs(planned) if "single" in s.key)
    add_plan(planned, single, plan_of(single, 5), target=capability_target(((8, 9),)))
    plan = over_both().choose(SETTINGS, 1)
    assert plan.other_half is not None
    assert plan.other_half.peak_bytes < plan.stages[2].peak_bytes
