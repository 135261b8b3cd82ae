"""The part of the demonstration that prunes before training: ProsPr, SNIP and chance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from ..masks import MaskSet
from ..methods.noise import random
from ..methods.prospr import prospr
from ..methods.snip import snip
from ..optim import MaskedSGD
from .console import print_table
from .data import Digits
from .loop import accuracy, train

SPARSITY = 0.98
EPOCHS = 20
BATCH = 64
SCORING_BATCHES = 4  # one for each inner step of ProsPr and one for the outer loss


@dataclass(frozen=True)
class InitialRow:
    """A network that was pruned before it was trained."""

    method: str
    num_kept: int
    accuracy: float


def prune_at_start(
    make: Callable[[], nn.Module], digits: Digits, epochs: int, seed: int
) -> list[InitialRow]:
    """Each method on a new network of the same initial weights."""
    images = digits.train_images.split(BATCH)[:SCORING_BATCHES]
    labels = digits.train_labels.split(BATCH)[:SCORING_BATCHES]
    batches = list(zip(images, labels, strict=True))

    def masks_of(method: str, model: nn.Module) -> MaskSet:
        if method == "random":
            return random(model, SPARSITY, generator=torch.Generator().manual_seed(seed))
        score = prospr if method == "ProsPr" else snip
        return score(model, batches, F.cross_entropy, SPARSITY)

    rows = []
    for method in ("ProsPr", "SNIP", "random"):
        model = make()
        masks = masks_of(method, model)
        optimizer = MaskedSGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, masks=masks)
        steps = epochs * -(-len(digits.train_labels) // BATCH)
        train(
            model,
            optimizer,
            digits.train_images,
            digits.train_labels,
            epochs=epochs,
            batch_size=BATCH,
            seed=seed,
            scheduler=MultiStepLR(optimizer, [steps * 6 // 10, steps * 8 // 10]),
            title=f"{method}, {SPARSITY:.0%} zeros from the start",
        )
        right = accuracy(model, digits.test_images, digits.test_labels)
        rows.append(InitialRow(method, masks.num_kept, right))
    return rows


def print_initial(rows: list[InitialRow]) -> None:
    print_table(
        f"Pruned before training, {SPARSITY:.0%} of the weights zero from the first step on",
        ["method", "kept", "accuracy"],
        [[row.method, f"{row.num_kept:,}", f"{row.accuracy:.1%}"] for row in rows],
    )
