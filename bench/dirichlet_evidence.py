"""Dirichlet pruning of a VGG and a ResNet on scikit-learn's digits, beside other rankings."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import fastprune as fp
from fastprune.train import load_digits
from fastprune.train.data import Digits
from fastprune.train.loop import accuracy_on
from fastprune.train.measures import num_parameters

from . import experiment
from .experiment import BATCH, Fact, accepted, in_words
from .networks import digits_resnet, digits_vgg

SEEDS = (0, 1, 2)
EPOCHS, TUNING_EPOCHS = 30, 15
RANKING_BATCH = 16  # one epoch of 88 steps
LEFT = 0.5  # of the parameters, with fewer than `MOST_LOST` points lost by fine-tuned networks
MOST_LOST = 1.0  # mean over the seeds
SHARES = (0.75, LEFT, 0.1)  # many left: what a ranking is worth before fine-tuning; few: after


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"VGG": digits_vgg, "ResNet": digits_resnet}


def fit(model: nn.Module, digits: Digits, epochs: int, lr: float, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    experiment.fit(
        model,
        optimizer,
        lambda optimizer, steps: OneCycleLR(optimizer, lr, steps, cycle_momentum=False),
        digits.train_images,
        digits.train_labels,
        steps=epochs * -(-len(digits.train_labels) // BATCH),
        seed=seed,
    )


# ---------------------------------------------------------------- rankings


def by_magnitude(model: nn.Module, ranks: fp.DirichletRanks) -> fp.DirichletRanks:
    """By the norm of all that a channel's layers have of it."""

    def squares(name: str) -> Tensor:
        weight = model.get_parameter(f"{name}.weight").detach()
        return weight.flatten(1).double().square().sum(1)

    norms = {
        n: torch.stack([*map(squares, each)]).sum(0).sqrt() for n, each in ranks.layers.items()
    }
    return fp.DirichletRanks(norms, ranks.layers, ranks.example_input)


def by_chance(ranks: fp.DirichletRanks, seed: int) -> fp.DirichletRanks:
    random = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(len(order), generator=random) + 1e-3 for name, order in ranks.items()
    }
    return fp.DirichletRanks(scores, ranks.layers, ranks.example_input)


# ---------------------------------------------------------------- the experiment


class Run(NamedTuple):
    """Accuracies and shares in percent."""

    network: str
    seed: int
    left: float
    ranking: str
    removed: float
    dense: float
    pruned: float
    tuned: float


def runs_of(network: str, seed: int) -> Iterator[Run]:
    digits = load_digits(seed)

    def percent(of: nn.Module) -> float:
        return 100 * accuracy_on(digits, of)

    torch.manual_seed(seed)
    model = NETWORKS[network]()
    fit(model, digits, EPOCHS, 0.1, seed)
    batches = digits.batches(RANKING_BATCH, seed)
    ranks = fp.dirichlet(model, batches, F.cross_entropy)
    rankings = {
        "Dirichlet": ranks,
        "Dirichlet, kl_weight=0": fp.dirichlet(model, batches, F.cross_entropy, kl_weight=0),
        "magnitude": by_magnitude(model, ranks),
        "random": by_chance(ranks, seed),
    }
    dense, before = percent(model), num_parameters(model)
    for left in SHARES:
        for name, ranking in rankings.items():
            small = ranking.prune(model, parameters=left)
            removed, pruned = 100 * (1 - num_parameters(small) / before), percent(small)
            fit(small, digits, TUNING_EPOCHS, 0.05, seed)
            yield Run(network, seed, left, name, removed, dense, pruned, percent(small))


def facts(runs: list[Run]) -> list[Fact]:
    found: list[Fact] = [
        (f"digits {network}", "accuracy dense, seeds", in_words(dense), "%")
        for network in NETWORKS
        if (dense := list({r.seed: r.dense for r in runs if r.network == network}.values()))
    ]
    for network, left, ranking in dict.fromkeys((r.network, r.left, r.ranking) for r in runs):
        mine = [r for r in runs if (r.network, r.left, r.ranking) == (network, left, ranking)]
        subject = f"digits {network}, {left:.0%} of the parameters left, {ranking}"
        lost = [run.dense - run.tuned for run in mine]
        found += [
            (subject, "parameters removed, least", round(min(r.removed for r in mine), 2), "%"),
            (subject, "accuracy untuned, mean", round(mean(r.pruned for r in mine), 2), "%"),
            (subject, "points lost after tuning, mean", round(mean(lost), 2), "points"),
            (subject, "points lost after tuning, seeds", in_words(lost), "points"),
        ]
    return found


def failures(runs: list[Run]) -> list[str]:
    """What the runs do not show, in words."""
    missed = []
    for network in NETWORKS:
        mine = [r for r in runs if (r.network, r.left, r.ranking) == (network, LEFT, "Dirichlet")]
        lost, removed = mean(r.dense - r.tuned for r in mine), min(r.removed for r in mine)
        if lost >= MOST_LOST or removed < 100 * (1 - LEFT):
            missed.append(
                f"{network}: {lost:.2f} points lost with {removed:.1f}% of the parameters removed; "
                f"accepted are less than {MOST_LOST} with {1 - LEFT:.0%}"
            )
    return missed


def measure() -> list[Fact]:
    runs = [run for network in NETWORKS for seed in SEEDS for run in runs_of(network, seed)]
    return accepted(facts(runs), failures(runs))


# ---------------------------------------------------------------- planted relevance

UNITS, RELEVANT = 32, 8
PLANTED_SEEDS = tuple(range(8))
PLANTED_EXAMPLES, PLANTED_BATCH = 1_920, 32  # 60 steps
# The mean number of relevant units among the first 8 that each setting must reach.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "point": ({}, 7.5),
    "sampled": ({"estimator": "sampled"}, 7.0),
    "point, unscaled": ({"scale": 1.0}, 0.0),
    "sampled, unscaled": ({"estimator": "sampled", "scale": 1.0}, 0.0),
    "sampled, start 0.31": ({"estimator": "sampled", "start": 0.3133, "lr": 0.05}, 0.0),
}


def relevant_first(seed: int, options: dict[str, Any]) -> int:
    """A network whose output reads 8 of 32 units, and data labelled by itself."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, UNITS), nn.ReLU(), nn.Linear(UNITS, 4))
    relevant = torch.randperm(UNITS)[:RELEVANT]
    with torch.no_grad():
        model[2].weight.mul_(torch.zeros(UNITS).index_fill(0, relevant, 4.0))
        x = torch.randn(PLANTED_EXAMPLES, 16)
        y = model(x).argmax(1)
    batches = list(zip(x.split(PLANTED_BATCH), y.split(PLANTED_BATCH), strict=True))
    ranks = fp.dirichlet(model, batches, F.cross_entropy, seed=seed, **options)
    return len(set(relevant.tolist()) & set(ranks["0"][:RELEVANT].tolist()))


def planted() -> list[Fact]:
    found: list[Fact] = []
    for name, (options, least) in SETTINGS.items():
        hits = mean(relevant_first(seed, options) for seed in PLANTED_SEEDS)
        if hits < least:
            raise AssertionError(f"{name}: {hits} of {RELEVANT}, accepted are {least}")
        subject = f"{RELEVANT} relevant of {UNITS} units, {name}"
        found.append((subject, f"among the first {RELEVANT}, mean", round(hits, 3), "units"))
    return found
