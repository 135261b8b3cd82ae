"""The part of the demonstration in which layers learn their own sparsities: ASWL."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..masks import MaskSet
from ..methods import magnitude
from ..methods.baselines import Scope
from ..optim import ASWL
from ..reporting import plot_sparsities
from .console import bar, print_table
from .data import Digits
from .loop import accuracy_on, train_on

SPARSITY = 0.9
LR = 0.05
DENSITY_WEIGHT = 100.0  # so that the total is reached in some hundred steps
SCOPES: dict[str, Scope] = {"global magnitude": "global", "uniform magnitude": "layer"}


@dataclass(frozen=True)
class AswlRow:
    """One way to share the zeros between the layers."""

    method: str
    masks: MaskSet
    accuracy: float
    network: nn.Module


def prune_by_aswl(
    new_network: Callable[[], nn.Module],
    digits: Digits,
    epochs: int,
    seed: int,
    pictures: Path | None = None,
) -> list[AswlRow]:
    """ASWL, and magnitude after a dense training of the same length, all from the same start."""

    def row(method: str, model: nn.Module, masks: MaskSet) -> AswlRow:
        return AswlRow(method, masks, accuracy_on(digits, model), model)

    learning = new_network()
    with warnings.catch_warnings():  # print_aswl says it
        warnings.simplefilter("ignore")
        optimizer = ASWL(learning, LR, sparsity=SPARSITY, density_weight=DENSITY_WEIGHT)
    title = f"ASWL, {SPARSITY:.0%} zeros"
    train_on(digits, learning, optimizer, _Recorded, epochs=epochs, seed=seed, title=title)
    rows = [row("ASWL", learning, optimizer.finish())]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        plot_sparsities(optimizer.history(), pictures / "aswl_sparsities.png")

    dense = new_network()
    sgd, title = torch.optim.SGD(dense.parameters(), LR, 0.9), "dense, for comparison"
    train_on(digits, dense, sgd, CosineAnnealingLR, epochs=epochs, seed=seed, title=title)
    for method, scope in SCOPES.items():
        pruned = copy.deepcopy(dense)
        masks = magnitude(pruned, SPARSITY, scope=scope)
        masks.apply(pruned)
        rows.append(row(method, pruned, masks))
    return rows


class _Recorded(CosineAnnealingLR):
    """Keeps the layers' sparsities at each step."""

    optimizer: ASWL

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.optimizer.record()


def print_aswl(rows: list[AswlRow]) -> None:
    layers = [name.removesuffix(".weight") for name in rows[0].masks]
    print_table(
        f"{rows[0].masks.sparsity:.0%} zeros, shared between the layers by ASWL and by magnitude",
        ["layers' share by", "kept", "accuracy", *layers],
        [
            [
                row.method,
                f"{row.masks.num_kept:,}",
                f"{row.accuracy:.1%}",
                *(f"{bar(x.sparsity)} {x.sparsity:4.0%}" for x in row.masks.layers.values()),
            ]
            for row in rows
        ],
    )
    print(
        "A norm behind a convolution cancels its attention, so that only the penalty on\n"
        "the total moves it, large layers first; the linear layer learns from the loss."
    )
