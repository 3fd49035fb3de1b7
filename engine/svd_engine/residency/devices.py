"""The device of an engine, or the two that share out guidance: what may be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from svd_engine.backends.choose import DeviceName
from svd_engine.errors import SettingsError


def one_or_two(
    device: DeviceName,
    devices: Sequence[DeviceName] | None,
    found: Callable[[DeviceName], torch.device],
    **others: object,
) -> tuple[DeviceName, torch.device | None]:
    """`device`, or two `devices`, each as `found` makes it of its name.

    others: what is made for one device alone.  Raises SettingsError for two that cannot be, and beside these.
    """
    if devices is None:
        return device, None
    if isinstance(devices, str) or not isinstance(devices, Sequence) or len(devices) != 2:
        raise SettingsError(
            "devices",
            expected="two devices, one for each half of guidance",
            got=repr(devices),
            remedy="Name two, such as cuda:0 and cuda:1, or a device alone.",
        )
    if device != "auto":
        raise SettingsError(
            "devices",
            expected="no device beside it",
            got=f"device={device!r}",
            remedy="Leave out one of the two.",
        )
    first, second = map(found, devices)
    if first == second and first.type == "cuda":
        raise SettingsError(
            "devices",
            expected="two different GPUs",
            got=f"{first} twice",
            remedy=f'Pass device="{first}" to run both halves there.',
        )
    if first.type != second.type:
        raise SettingsError(
            "devices",
            expected="two of one kind, which take equal time and compute in the same precision",
            got=f"{first} and {second}",
            remedy="Name two GPUs, such as cuda:0 and cuda:1, or pass device alone.",
        )
    for name, value in others.items():
        if value:
            raise SettingsError(
                "devices",
                expected=f"no {name} beside it: it is made for networks of one device",
                got=f"{name}={value!r}",
                remedy="Leave out one of the two.",
            )
    return first, second
