"""The part of the demonstration that trains: GSM, from the dense network on."""

import copy
from dataclasses import dataclass

from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from ..methods import magnitude
from ..optim import GSM, prunable_groups
from .console import print_table
from .data import Digits
from .loop import accuracy, train

SPARSITIES = (0.9, 0.95, 0.975)
EPOCHS = 60  # with a weight decay this high, passive weights fall below 1% of their start
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.98, 5e-3
BATCH = 64


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
    return [_row(model, digits, sparsity, epochs, seed) for sparsity in SPARSITIES]


def _row(model: nn.Module, digits: Digits, sparsity: float, epochs: int, seed: int) -> GsmRow:
    def right(of: nn.Module) -> float:
        return accuracy(of, digits.test_images, digits.test_labels)

    one_shot, pruned = copy.deepcopy(model), copy.deepcopy(model)
    magnitude(one_shot, sparsity).apply(one_shot)
    groups = prunable_groups(pruned)
    groups[1]["weight_decay"] = 0.0  # biases and norms
    optimizer = GSM(groups, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, sparsity=sparsity)
    steps = epochs * -(-len(digits.train_labels) // BATCH)
    train(
        pruned,
        optimizer,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        scheduler=MultiStepLR(optimizer, [steps * 6 // 10, steps * 8 // 10]),
        title=f"GSM, {sparsity:.1%} zeros",
    )
    before = right(pruned)
    masks = optimizer.finish()
    return GsmRow(sparsity, masks.num_kept, right(model), right(one_shot), before, right(pruned))


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
