"""The part of the demonstration that ranks channels by a posterior, removes them, and tunes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..methods.dirichlet import dirichlet
from ..reporting import plot_feature_maps, plot_posterior
from .console import arrow, change, print_table
from .data import Digits
from .loop import accuracy_on, train_on
from .measures import milliseconds, num_parameters
from .sdprun_demo import TIMED_IMAGES

PARAMETERS = 0.4  # the share that is left
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
    ranks = dirichlet(model, digits.batches(RANKING_BATCH, seed), F.cross_entropy)
    kept = ranks.counts(model, parameters=PARAMETERS)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        plot_posterior(ranks, pictures / "dirichlet_posterior.png", counts=kept)
        path = pictures / "dirichlet_feature_maps.png"
        plot_feature_maps(model, ranks, digits.test_images[:4], path, layer="conv2", module="relu2")
    small = ranks.prune(model, keep=kept)
    pruned = accuracy_on(digits, small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    title = "Dirichlet pruning, fine-tuning"
    train_on(digits, small, optimizer, CosineAnnealingLR, epochs=epochs, seed=seed, title=title)
    return DirichletResult(
        {name: (len(channels), kept[name]) for name, channels in ranks.items()},
        (num_parameters(model), num_parameters(small)),
        accuracy_on(digits, model),
        pruned,
        accuracy_on(digits, small),
        milliseconds(model, small, digits.test_images[:TIMED_IMAGES]),
    )


def print_dirichlet(result: DirichletResult) -> None:
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
