"""GSM on scikit-learn's digits: accuracy after zeroing, beside one-shot magnitude pruning."""

import copy
import warnings
from fractions import Fraction
from statistics import mean
from typing import NamedTuple

import torch

import fastprune as fp
from fastprune.optim import GSM, prunable_groups
from fastprune.train import load_digits
from fastprune.train.loop import accuracy_on
from fastprune.train.schedules import two_drops

from .experiment import Fact, accepted, fit, in_processes, in_words
from .networks import digits_mlp

BASE_STEPS = 3_000
STEPS = 12_000
SEEDS = (0, 1, 2)
# Ratio of weights to kept weights: least accuracy after zeroing, least lead over magnitude (points)
ACCEPTED = {10: (96.0, 3.0), 20: (96.0, 20.0), 40: (95.0, 60.0)}
BLOCK = (16, 1)


class Run(NamedTuple):
    """One network, pruned; accuracies in percent."""

    seed: int
    ratio: int
    block: tuple[int, int]
    dense: float
    magnitude: float
    before: float
    after: float
    blocks_asked: int
    blocks_alive: int


def one_run(seed: int, ratio: int, block: tuple[int, int]) -> Run:
    torch.set_num_threads(1)
    digits = load_digits(seed)
    data = digits.train_images, digits.train_labels
    model = digits_mlp(seed)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    fit(model, sgd, two_drops, *data, steps=BASE_STEPS, seed=seed)
    sparsity = 1 - Fraction(1, ratio)
    one_shot = copy.deepcopy(model)
    fp.magnitude(one_shot, sparsity, block=block).apply(one_shot)
    accuracies = [accuracy_on(digits, model), accuracy_on(digits, one_shot)]

    groups = prunable_groups(model)
    groups[1]["weight_decay"] = 0.0  # biases, as in the published code
    optimizer = GSM(groups, 0.05, momentum=0.98, weight_decay=1e-3, sparsity=sparsity, block=block)
    fit(model, optimizer, two_drops, *data, steps=STEPS, seed=seed + 100)
    accuracies.append(accuracy_on(digits, model))
    optimizer.finish()
    accuracies.append(accuracy_on(digits, model))
    alive = sum(blocks_alive(mask, block) for mask in fp.MaskSet.of(model).values())
    return Run(seed, ratio, block, *(100 * a for a in accuracies), optimizer.num_kept(), alive)


def blocks_alive(mask: torch.Tensor, block: tuple[int, int]) -> int:
    rows = mask.split(block[0], 0)
    return sum(int(tile.any()) for row in rows for tile in row.split(block[1], 1))


def facts(runs: list[Run]) -> list[Fact]:
    found: list[Fact] = []
    for ratio, block in dict.fromkeys((run.ratio, run.block) for run in runs):
        chosen = [run for run in runs if (run.ratio, run.block) == (ratio, block)]
        subject = f"digits MLP, 1/{ratio} kept" + (f", blocks {block}" if block != (1, 1) else "")
        for what, name in [
            ("dense", "accuracy of the dense network"),
            ("magnitude", "accuracy of one-shot magnitude"),
            ("before", "accuracy of GSM before zeroing"),
            ("after", "accuracy of GSM after zeroing"),
        ]:
            values = [float(getattr(run, what)) for run in chosen]
            found.append((subject, f"mean {name}", round(mean(values), 2), "%"))
            found.append((subject, f"{name}, seeds", in_words(values), "%"))
        found.append((subject, "blocks kept" if block != (1, 1) else "weights kept",
                      chosen[0].blocks_alive, f"of {chosen[0].blocks_asked} asked"))  # fmt: skip
    return found


def failures(runs: list[Run]) -> list[str]:
    """What the runs do not show, in words."""
    missed = [f"{run}: not the number that was asked for"
              for run in runs if run.blocks_alive != run.blocks_asked]  # fmt: skip
    for ratio, (least, lead) in ACCEPTED.items():
        chosen = [run for run in runs if run.ratio == ratio and run.block == (1, 1)]
        after, other = (mean(getattr(r, w) for r in chosen) for w in ("after", "magnitude"))
        if after < least or after < other + lead:
            missed.append(f"1/{ratio}: {after:.2f}% after zeroing, magnitude {other:.2f}%; "
                          f"accepted are {least}% and {lead} points more")  # fmt: skip
    return missed


def measure() -> list[Fact]:
    warnings.simplefilter("ignore", UserWarning)  # biases without weight decay are meant
    jobs = [(seed, ratio, (1, 1)) for ratio in ACCEPTED for seed in SEEDS]
    jobs += [(seed, ratio, BLOCK) for ratio in (10, 20) for seed in SEEDS]
    runs = in_processes(one_run, jobs)
    return accepted(facts(runs), failures(runs))
