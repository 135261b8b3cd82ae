"""The part of the demonstration that ranks channels by a posterior, removes them, and tunes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..methods.dirichlet import dirichlet
from ..reporting import plot_feature_maps, plot_posterior
from .console import arrow, print_table
from .data import Digits
from .loop import accuracy, train
from .sdprun_demo import TIMED_IMAGES, milliseconds

PARAMETERS = 0.4  # the share that is left
EPOCHS = 10
BATCH = 64
RANKING_BATCH = 16  # small, for more than a few steps in one epoch


@dataclass(frozen=True)
class DirichletResult:
    """The network that the demonstration has trained, and a small one made of it."""

    channels: dict[str, tuple[int, int]]  # by layer: before, after
    parameters: tuple[int, int]
    dense_accuracy: float
    pruned_accuracy: float  # before fine-tuning
    accuracy: float
    milliseconds: tuple[float, float]  # medians of turns


def prune_by_dirichlet(
    model: nn.Module, digits: Digits, epochs: int, seed: int, pictures: Path | None = None
) -> DirichletResult:
    """Ranks in one epoch, prunes a copy and trains it for some more epochs."""
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed))
    batches = [
        (digits.train_images[part], digits.train_labels[part])
        for part in order.split(RANKING_BATCH)
    ]
    ranks = dirichlet(model, batches, F.cross_entropy)
    kept = ranks.counts(model, parameters=PARAMETERS)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        plot_posterior(ranks, pictures / "dirichlet_posterior.png", counts=kept)
        path = pictures / "dirichlet_feature_maps.png"
        plot_feature_maps(model, ranks, digits.test_images[:4], path, layer="conv2", module="relu2")
    small = ranks.prune(model, keep=kept)
    pruned = accuracy(small, digits.test_images, digits.test_labels)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(
        small,
        optimizer,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        scheduler=CosineAnnealingLR(optimizer, epochs * -(-len(digits.train_labels) // BATCH)),
        title="Dirichlet pruning, fine-tuning",
    )
    return DirichletResult(
        {name: (len(channels), kept[name]) for name, channels in ranks.items()},
        (num_parameters(model), num_parameters(small)),
        accuracy(model, digits.test_images, digits.test_labels),
        pruned,
        accuracy(small, digits.test_images, digits.test_labels),
        milliseconds(model, small, digits.test_images[:TIMED_IMAGES]),
    )


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_dirichlet(result: DirichletResult) -> None:
    def change(form: str, *values: float) -> str:
        return f" {arrow()} ".join(f"{value:{form}}" for value in values)

    accuracies = (result.dense_accuracy, result.pruned_accuracy, result.accuracy)
    rows = [[name, change("d", *pair)] for name, pair in result.channels.items()]
    rows += [
        ["parameters", change(",", *result.parameters)],
        [f"ms for {TIMED_IMAGES} images", change(".2f", *result.milliseconds)],
        ["accuracy", change(".1%", *accuracies)],
    ]
    print_table(
        f"Dirichlet pruning: {PARAMETERS:.0%} of the parameters left, then fine-tuned",
        ["one epoch of ranking", f"before {arrow()} after"],
        rows,
    )
