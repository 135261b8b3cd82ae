"""ASWL on a teacher and its student: as good as dense at a fifth of the weights, and on target."""

import copy
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.optim import ASWL
from fastprune.reporting import plot_sparsities
from fastprune.train import accuracy
from fastprune.train.schedules import flat_then_linear

from .experiment import BATCH, Fact, accepted, with_error
from .teacher import CLASSES, INPUTS, SEEDS, STUDENT, Task, task

STEPS, LR, MOMENTUM = 6000, 0.05, 0.9
SPARSITY = 0.8
EVERY = 20  # steps between two records of the learnt sparsities
SCHEDULES = {"constant lr": False, "decaying lr": True}
MOST_MEAN, MOST_STEP = 0.015, {"constant lr": 0.06, "decaying lr": 0.03}


def student(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, STUDENT), nn.ReLU(),
        nn.Linear(STUDENT, STUDENT), nn.ReLU(),
        nn.Linear(STUDENT, CLASSES),
    )  # fmt: skip


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Task, seed: int, decays: bool
) -> list[float]:
    """The densities of the last tenth."""
    schedule = flat_then_linear(optimizer, STEPS) if decays else None
    order = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS):
        batch = torch.randint(len(data.labels), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step >= STEPS - STEPS // 10:
            found.append(1 - fp.MaskSet.of(model).sparsity)
        if isinstance(optimizer, ASWL) and step % EVERY == 0:
            optimizer.record(step)
    return found


def teacher(picture: Path | None = None) -> list[Fact]:
    """Facts of both schedules; an error where the sparsity or the accuracy is missed."""
    found: list[Fact] = []
    missed = []
    for name, decays in SCHEDULES.items():
        right: dict[str, list[float]] = {}
        gaps, most = [], 0.0
        for seed in SEEDS:
            data = task(seed)
            dense, sparse = student(seed), student(seed)
            sgd = torch.optim.SGD(dense.parameters(), LR, MOMENTUM)
            aswl = ASWL(sparse, LR, sparsity=SPARSITY, momentum=MOMENTUM)
            train(dense, sgd, data, seed, decays)
            densities = train(sparse, aswl, data, seed, decays)
            gaps.append(mean(densities) - (1 - SPARSITY))
            most = max(most, *(abs(d - (1 - SPARSITY)) for d in densities))
            masks = aswl.finish()
            if masks.num_kept != fp.num_kept(SPARSITY, masks.total):
                missed.append(f"{name}: {masks.num_kept} kept after finish()")
            models = {
                "SGD, dense": dense,
                "ASWL": sparse,
                "SGD, then global magnitude": pruned(dense, fp.magnitude(dense, SPARSITY)),
                "SGD, then magnitude, layers alike": pruned(
                    dense, fp.magnitude(dense, SPARSITY, scope="layer")
                ),
            }
            for kind, model in models.items():
                score = 100 * accuracy(model, data.test_inputs, data.test_labels)
                right.setdefault(kind, []).append(score)
            if picture is not None and seed == SEEDS[0] and decays:
                plot_sparsities(aswl.history(), picture, title="learnt by ASWL")
        for kind, scores in right.items():
            found.append((f"{kind}, {name}", "test accuracy", with_error(scores), "%"))
        worst = max(gaps, key=abs)
        found.append((f"ASWL, {name}", "density off its target, last tenth, mean", worst, ""))
        found.append((f"ASWL, {name}", "and at the worst step", most, ""))
        error = stdev(right["SGD, dense"]) / len(SEEDS) ** 0.5
        if mean(right["ASWL"]) < mean(right["SGD, dense"]) - error:
            missed.append(f"{name}: less accurate than dense")
        if abs(worst) > MOST_MEAN or most > MOST_STEP[name]:
            missed.append(f"{name}: the density is off by {worst} in the mean, {most} at most")
    return accepted(found, missed)


def pruned(model: nn.Module, masks: fp.MaskSet) -> nn.Module:
    other = copy.deepcopy(model)
    masks.apply(other)
    return other
