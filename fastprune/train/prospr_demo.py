"""The part of the demonstration that prunes before training: ProsPr, SNIP and chance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..masks import MaskSet
from ..methods.noise import random
from ..methods.prospr import prospr
from ..methods.snip import snip
from ..optim import MaskedSGD
from .console import print_table
from .data import Digits
from .loop import BATCH, accuracy_on, train_on
from .schedules import two_drops

SPARSITY = 0.98
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
        title = f"{method}, {SPARSITY:.0%} zeros from the start"
        train_on(digits, model, optimizer, two_drops, epochs=epochs, seed=seed, title=title)
        rows.append(InitialRow(method, masks.num_kept, accuracy_on(digits, model)))
    return rows


def print_initial(rows: list[InitialRow]) -> None:
    print_table(
        f"Pruned before training, {SPARSITY:.0%} of the weights zero from the first step on",
        ["method", "kept", "accuracy"],
        [[row.method, f"{row.num_kept:,}", f"{row.accuracy:.1%}"] for row in rows],
    )
