"""The options of `torch.optim.SGD`, checked, and as a table that lies on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.reference.gsm import SETTINGS

UNDAMPED = {"dampening": 0.0}  # a first step, which torch leaves so
Group = dict[str, Any]


def check_numbers(group: Group, names: Sequence[str]) -> None:
    for name in names:
        value = group[name]
        if isinstance(value, Tensor):
            if name != "lr" or value.numel() != 1:
                raise ValueError(f"{name} must be a number (lr may be a one-element tensor)")
        elif not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_options(group: Group) -> None:
    check_numbers(group, ("lr", "momentum", "weight_decay"))
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")


def row_of(group: int, first_step: bool) -> int:
    return 2 * group + first_step


class SettingsTable:
    """Two rows a group, the second for a first step. Made anew only when a number changes."""

    def __init__(self) -> None:
        self._held: tuple[Any, Tensor] | None = None

    def of(self, groups: Sequence[Group], device: torch.device) -> Tensor:
        rows = [
            [options[name] for name in SETTINGS]
            for group in groups
            for options in (group, {**group, **UNDAMPED})
        ]
        numbers = tuple(
            tuple(0.0 if isinstance(v, Tensor) else float(v) for v in row) for row in rows
        )
        held = self._held
        if held is not None and held[0] == (numbers, device) and not torch.compiler.is_compiling():
            settings = held[1]
        else:
            settings = torch.tensor(numbers, dtype=torch.float64, device=device)
            if not torch.compiler.is_compiling():
                self._held = ((numbers, device), settings)
        for i, row in enumerate(rows):
            for column, value in enumerate(row):
                if isinstance(value, Tensor):
                    settings[i, column].copy_(value.reshape(()))
        return settings
