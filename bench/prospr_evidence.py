"""ProsPr on scikit-learn's digits beside its baselines, and its memory on ResNet-20."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.train import load_digits
from fastprune.train.loop import accuracy_on
from fastprune.train.schedules import two_drops

from . import memory, results
from .experiment import BATCH, Fact, accepted, fit, in_processes, in_words
from .networks import digits_mlp, resnet20

SPARSITY = 0.98
SEEDS = tuple(range(12))
STEPS = 1_500
SCORING_BATCHES = 4
# Of the means over the seeds, in percent. Scores come from batches as they are trained on: with
# larger ones SNIP, which sees one batch where ProsPr sees four, comes closer.
LEAST, LEAD, RANDOM_BELOW = 89.0, 3.0, 20.0
Masks = Callable[[nn.Module, Any], fp.MaskSet]


def scored(method: Callable[..., fp.MaskSet], **options: Any) -> Masks:
    return lambda model, batches: method(model, batches, F.cross_entropy, SPARSITY, **options)


METHODS: dict[str, Masks] = {
    "random": lambda model, _: fp.random(model, SPARSITY),
    "random, ERK": lambda model, _: fp.random(model, fp.erk(model, SPARSITY)),
    "magnitude": lambda model, _: fp.magnitude(model, SPARSITY),
    "SNIP": scored(fp.snip),
    "SNIP, as many batches as ProsPr": scored(fp.snip, num_batches=SCORING_BATCHES),
    "Iter-SNIP": scored(fp.iter_snip),
    "FORCE": scored(fp.force),
    "GraSP": scored(fp.grasp, min_kept_per_layer=1),
    "SynFlow": lambda model, batches: fp.synflow(model, batches[0][0], SPARSITY),
    "ProsPr": scored(fp.prospr),
    "ProsPr, finite differences": scored(fp.prospr, mode="finite_difference"),
    "ProsPr, first order": scored(fp.prospr, mode="first_order"),
    "ProsPr, reference_compat": scored(fp.prospr, mode="reference_compat"),
}


class Run(NamedTuple):
    method: str
    seed: int
    accuracy: float
    num_kept: int


def one_run(method: str, seed: int) -> Run:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # of dead pixels: their scores are 0
    digits = load_digits(seed)
    model = digits_mlp(seed)
    masks = METHODS[method](model, digits.batches(BATCH, seed)[:SCORING_BATCHES])
    masks.apply(model)
    fp.mask_gradients(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    data = digits.train_images, digits.train_labels
    fit(model, optimizer, two_drops, *data, steps=STEPS, seed=seed)
    kept = fp.MaskSet.of(model)
    assert not any((kept[name] & ~mask).any() for name, mask in masks.items())
    return Run(method, seed, 100 * accuracy_on(digits, model), masks.num_kept)


def accuracies(runs: list[Run], method: str) -> list[float]:
    return [run.accuracy for run in runs if run.method == method]


def facts(runs: list[Run]) -> list[Fact]:
    found: list[Fact] = []
    for method in dict.fromkeys(run.method for run in runs):
        subject, values = f"digits MLP, {SPARSITY:.0%} pruned, {method}", accuracies(runs, method)
        found += [
            (subject, "mean accuracy", round(mean(values), 2), "%"),
            (subject, "standard deviation", round(stdev(values), 2), "points"),
            (subject, "accuracy, seeds", in_words(values), "%"),
        ]
    return found


def failures(runs: list[Run]) -> list[str]:
    """What the runs do not show, in words."""
    random, snip, prospr = (mean(accuracies(runs, m)) for m in ("random", "SNIP", "ProsPr"))
    missed = []
    if prospr < LEAST or prospr < snip + LEAD:
        missed.append(f"ProsPr {prospr:.2f}%, SNIP {snip:.2f}%; accepted are {LEAST}% and "
                      f"{LEAD} points more than SNIP")  # fmt: skip
    if random >= RANDOM_BELOW:
        missed.append(f"random {random:.2f}%, expected below {RANDOM_BELOW}%")
    return missed


def measure() -> list[Fact]:
    runs = in_processes(one_run, [(method, seed) for method in METHODS for seed in SEEDS])
    return accepted(facts(runs), failures(runs))


# ---------------------------------------------------------------------- memory

INNER_STEPS = (1, 3, 6)
MEMORY_BATCH = 64
MOST = 1.35  # times the memory of one step, with six


def peak_here(steps: int) -> int:
    """Extra resident bytes at the peak of one call; what the child process does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet20()
    data = torch.randn(steps + 1, MEMORY_BATCH, 3, 32, 32)
    targets = torch.randint(10, (steps + 1, MEMORY_BATCH))
    batches = list(zip(data, targets, strict=True))
    call = partial(fp.scores, "prospr", model, loss_fn=F.cross_entropy, inner_lr=0.1)
    call(batches=[(x[:2], y[:2]) for x, y in batches], steps=1)  # loads code, belongs to no call
    return memory.extra_of(partial(call, batches=batches, steps=steps))[0]


def peak(steps: int) -> int:
    command = [sys.executable, "-m", "bench.prospr_evidence", str(steps)]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{steps} inner steps: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory() -> list[Fact]:
    peaks = {steps: peak(steps) for steps in INNER_STEPS}
    subject = f"ProsPr, ResNet-20, batch {MEMORY_BATCH}"
    found: list[Fact] = [
        (subject, f"peak extra resident memory, K={steps}", round(size / memory.MIB, 1), "MiB")
        for steps, size in peaks.items()
    ]
    ratio = peaks[6] / peaks[1]
    found.append((subject, "K=6 over K=1", round(ratio, 3), "x"))
    if ratio > MOST:
        raise AssertionError(f"K=6 needs {ratio:.2f}x the memory of K=1, accepted are {MOST}x")
    return found


if __name__ == "__main__":  # the child of `peak`
    print(json.dumps(peak_here(int(sys.argv[1]))))
