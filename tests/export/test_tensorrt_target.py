"""Which flavour of TensorRT builds, and for which cards: asked for, found, impossible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svd_engine.bundle.flavours import AMPERE_AND_NEWER, TENSORRT, TENSORRT_RTX, Flavour, Host, named_target
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_export import tensorrt_target
from svd_export.tensorrt_target import check_options, choose_flavour, choose_target


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of a compute capability, or none."""

    def see(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        here = Host("tensorrt-rtx", "1.7", "NVIDIA Any", capability or (0, 0))
        monkeypatch.setattr(tensorrt_target, "host", lambda flavour, device: here)

    return see


def have(monkeypatch: pytest.MonkeyPatch, *flavours: Flavour) -> None:
    monkeypatch.setattr(tensorrt_target, "installed", lambda: list(flavours))


@pytest.mark.parametrize(
    ("capability", "target", "flavour", "why"),
    [
        (None, None, TENSORRT_RTX, "it needs no GPU"),
        ((7, 5), None, TENSORRT, "the one for sm75"),
        ((8, 0), None, TENSORRT, "the one for sm80"),
        ((9, 0), None, TENSORRT, "the one for sm90"),
        ((8, 6), None, TENSORRT_RTX, "the one for sm86"),
        ((8, 9), None, TENSORRT_RTX, "the one for sm89"),
        ((12, 1), "here", TENSORRT_RTX, "the one for sm121"),
        ((9, 0), "sm86", TENSORRT_RTX, "cards that are not here"),
    ],
)
def test_with_both_the_one_for_the_card_here(
    card: Any, monkeypatch: pytest.MonkeyPatch, capability: Any, target: Any, flavour: Flavour, why: str
) -> None:
    have(monkeypatch, TENSORRT, TENSORRT_RTX)
    card(capability)
    chosen = choose_flavour(None, target)
    assert chosen.flavour is flavour
    assert why in chosen.reason


@pytest.mark.parametrize("option", TENSORRT_RTX.cannot)
def test_with_both_an_option_chooses_the_one_that_has_it(
    card: Any, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    have(monkeypatch, TENSORRT, TENSORRT_RTX)
    card((8, 9))
    chosen = choose_flavour(None, None, {option: 1})
    assert chosen.flavour is TENSORRT
    assert f"only it has the option {option}" in chosen.reason
    assert choose_flavour(None, None, {option: None}).flavour is TENSORRT_RTX


def test_the_one_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, TENSORRT)
    assert choose_flavour(None, "sm89").flavour is TENSORRT
    assert choose_flavour("tensorrt-rtx", None).flavour is TENSORRT_RTX  # asked for, and refused by `require`


def test_an_unknown_flavour() -> None:
    with pytest.raises(SettingsError, match="flavour: expected tensorrt, tensorrt-rtx"):
        choose_flavour("openvino", None)


def test_named_targets_in_ascending_order() -> None:
    target = named_target(TENSORRT_RTX, "sm120, sm86,sm89,sm86")
    assert target.capabilities == ((8, 6), (8, 9), (12, 0))
    assert target.label == "sm86-sm89-sm120"
    assert named_target(TENSORRT_RTX, "SM120,sm86,Sm89") == target
    portable = named_target(TENSORRT_RTX, "portable")
    assert (portable.label, portable.capabilities) == ("portable", ((8, 6), (8, 9), (12, 0)))


@pytest.mark.parametrize(
    ("text", "got", "remedy"),
    [
        ("sm90", "'sm90'", 'H100, H200, B200 and their like run flavour="tensorrt"'),
        ("sm86,sm87", "'sm87'", "Choose of these."),
        ("", "''", "Choose of these."),
        ("portable,sm86", "'portable'", "Name cards, or portable alone, which is sm86,sm89,sm120."),
        ("here,sm86", "'here'", "Choose of these."),
    ],
)
def test_a_target_that_it_has_not(text: str, got: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as caught:
        named_target(TENSORRT_RTX, text)
    assert caught.value.got == got
    assert "here, portable, or one or more of sm75, sm80, sm86, sm89, sm120, sm121" in caught.value.expected
    assert remedy in caught.value.remedy


def test_here_is_the_card_here(card: Any) -> None:
    card((8, 9))
    assert choose_target(TENSORRT_RTX, "here", "none").capabilities == ((8, 9),)
    assert choose_target(TENSORRT_RTX, None, "none").label == "sm89"
    assert choose_target(TENSORRT, "here", "none").gpu == "NVIDIA Any"
    assert choose_target(TENSORRT, None, "same-cc").gpu == ""
    assert choose_target(TENSORRT, None, "ampere+") == AMPERE_AND_NEWER


def test_without_a_gpu_portable(card: Any) -> None:
    card(None)
    assert choose_target(TENSORRT_RTX, None, "none").label == "portable"


@pytest.mark.parametrize(
    ("flavour", "remedy"),
    [(TENSORRT_RTX, 'target="sm86,sm89,sm120", or target="portable"'), (TENSORRT, "Copy the bundle to a")],
)
def test_here_without_a_gpu(card: Any, flavour: Flavour, remedy: str) -> None:
    card(None)
    with pytest.raises(BackendUnavailable, match=r"target here of .*: expected a CUDA GPU") as caught:
        choose_target(flavour, "here", "none")
    assert remedy in caught.value.remedy


def test_here_on_a_card_that_it_has_no_target_for(card: Any) -> None:
    card((9, 0))
    with pytest.raises(BackendUnavailable, match="no SM90 target") as caught:
        choose_target(TENSORRT_RTX, "here", "none")
    assert 'flavour="tensorrt"' in caught.value.remedy


@pytest.mark.parametrize("option", TENSORRT_RTX.cannot)
def test_options_that_it_cannot_do(option: str) -> None:
    for value in (7, 0):  # a level of 0 is one
        with pytest.raises(SettingsError, match=f"{option} with TensorRT for RTX: expected it to be left"):
            check_options(TENSORRT_RTX, {option: value})
        check_options(TENSORRT, {option: value})
    for left_out in (None, False, ""):
        check_options(TENSORRT_RTX, {option: left_out})
