"""The part of the demonstration that trains: GSM, from the dense network on."""

import copy
from dataclasses import dataclass

from torch import nn

from ..methods import magnitude
from ..optim import GSM, prunable_groups
from .console import print_table
from .data import Digits
from .loop import accuracy_on, train_on
from .schedules import two_drops

SPARSITIES = (0.9, 0.95, 0.975)
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.98, 5e-3


@dataclass(frozen=True)
class GsmRow:
    """One row of the table: accuracies of one sparsity."""

    asked: float
    num_kept: int
    dense: float
    magnitude: float
    before_zeroing: float
    after_zeroing: float


def prune_by_gsm(model: nn.Module, digits: Digits, epochs: int, seed: int) -> list[GsmRow]:
    """Each sparsity on its own copy of the dense model."""
    dense = accuracy_on(digits, model)
    rows = []
    for sparsity in SPARSITIES:
        one_shot, pruned = copy.deepcopy(model), copy.deepcopy(model)
        magnitude(one_shot, sparsity).apply(one_shot)
        groups = prunable_groups(pruned)
        groups[1]["weight_decay"] = 0.0  # biases and norms
        optimizer = GSM(groups, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, sparsity=sparsity)
        title = f"GSM, {sparsity:.1%} zeros"
        train_on(digits, pruned, optimizer, two_drops, epochs=epochs, seed=seed, title=title)
        before = accuracy_on(digits, pruned)
        kept = optimizer.finish().num_kept
        accuracies = (dense, accuracy_on(digits, one_shot), before, accuracy_on(digits, pruned))
        rows.append(GsmRow(sparsity, kept, *accuracies))
    return rows


def print_gsm(rows: list[GsmRow]) -> None:
    print_table(
        "GSM, trained on from the dense network: test accuracy",
        ["asked", "kept", "dense", "one-shot magnitude", "GSM", "GSM, zeros written"],
        [
            [f"{r.asked:.1%}", f"{r.num_kept:,}"]
            + [f"{a:.1%}" for a in (r.dense, r.magnitude, r.before_zeroing, r.after_zeroing)]
            for r in rows
        ],
    )
