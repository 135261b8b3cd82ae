"""SDprun on a teacher and its student, and the way between its solution and SGD's."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.optim import SDprun
from fastprune.reporting import plot_losses
from fastprune.train import accuracy
from fastprune.train.schedules import flat_then_linear

from .experiment import Fact, accepted, fit, in_processes, with_error
from .teacher import CLASSES, INPUTS, SEEDS, STUDENT, task

TRAINING = 20_000  # steps
MOST_UNITS = 20


@dataclass(frozen=True)
class Setting:
    """How a student is trained. `groups`: what of a hidden unit shares a norm."""

    name: str
    groups: str = "coupled"  # or "rows"
    norm: bool = False  # a batch norm behind the hidden layer
    c: float | None = None
    mu: float = 0.6
    proximal: float | None = None  # strength of a plain group penalty, instead


SETTINGS = (
    Setting("SGD"),
    Setting("SDprun, defaults (c .1, mu .6)", c=0.1),
    Setting("SDprun, c .2, mu .6", c=0.2),
    Setting("SDprun, c .1, mu .7", c=0.1, mu=0.7),
    Setting("SDprun, rows only, c .1, mu .7", "rows", c=0.1, mu=0.7),
    Setting("proximal SGD, .001", proximal=0.001),
    Setting("proximal SGD, .003", proximal=0.003),
    Setting("proximal SGD, .01", proximal=0.01),
    Setting("SGD, batch norm", norm=True),
    Setting("SDprun, batch norm, rows only, c .1, mu .7", "rows", True, 0.1, 0.7),
    Setting("SDprun, batch norm, c .1, mu .7", "coupled", True, 0.1, 0.7),
)
SGD, SHOWN = SETTINGS[0], SETTINGS[3]


class Outcome(NamedTuple):
    seed: int
    setting: Setting
    units: int
    accuracy: float  # in percent
    state: dict[str, Tensor]


def student(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(STUDENT)] if norm else []
    return nn.Sequential(
        nn.Linear(INPUTS, STUDENT), *middle, nn.ReLU(), nn.Linear(STUDENT, CLASSES)
    )


def groups_of(model: nn.Sequential, setting: Setting) -> list[dict[str, Any]]:
    unit = list(model[0].parameters())
    if setting.norm:
        unit += list(model[1].parameters())
    pruned = unit if setting.groups == "coupled" else unit[:1]
    chosen = {id(p) for p in pruned}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": pruned, "prune": True, "coupled": True},
        {"params": rest, "prune": False},
    ]


class ProximalSGD(torch.optim.SGD):
    """w <- prox(w - lr * gradient) of a sum of group norms: the baseline, biased where steep."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, strength: float) -> None:
        super().__init__(groups, lr)
        self.strength = strength

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        group = self.param_groups[0]
        rows = [p.view(len(p), -1) for p in group["params"]]
        norm = torch.cat(rows, 1).norm(dim=1, keepdim=True)
        shrink = (1 - group["lr"] * self.strength / norm).clamp(min=0)
        for row in rows:
            row.mul_(shrink)
        return loss


def optimizer_of(model: nn.Sequential, setting: Setting) -> torch.optim.Optimizer:
    if setting.proximal is not None:
        return ProximalSGD(groups_of(model, setting), 0.1, setting.proximal)
    if setting.c is None:
        return torch.optim.SGD(model.parameters(), 0.1)
    return SDprun(groups_of(model, setting), 0.1, c=setting.c, mu=setting.mu)


def one_run(seed: int, setting: Setting) -> Outcome:
    torch.set_num_threads(1)
    data, model = task(seed), student(seed, setting.norm)
    optimizer = optimizer_of(model, setting)
    fit(model, optimizer, flat_then_linear, data.inputs, data.labels, steps=TRAINING, seed=seed)
    units = int((model[0].weight != 0).any(1).sum())
    right = 100 * accuracy(model, data.test_inputs, data.test_labels)
    return Outcome(seed, setting, units, right, model.state_dict())


def barriers(runs: list[Outcome], picture: Path | None) -> list[Fact]:
    """From SGD's solution to SDprun's, which started alike, and to SGD's from another start."""
    by_run = {(run.setting, run.seed): run.state for run in runs}
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        data = task(seed)
        pairs = [(data.inputs, data.labels)]
        sgd, pruned = by_run[SGD, seed], by_run[SHOWN, seed]
        stranger = other_solution(seed)
        curves = {
            "segment to SDprun": fp.segment(sgd, pruned),
            "curve to SDprun": curve(seed, sgd, pruned),
            "segment to another SGD": fp.segment(sgd, stranger),
            "curve to another SGD": curve(seed, sgd, stranger),
        }
        losses = {
            name: fp.losses_along(student(seed), c, pairs, F.cross_entropy)
            for name, c in curves.items()
        }
        for name, values in losses.items():
            found.setdefault(name, []).append(fp.barrier(values))
        if seed == SEEDS[0] and picture is not None:
            plot_losses(losses, picture, title="from SGD's solution")
    return [
        ("teacher and student", f"loss barrier, {name}", with_error(values), "")
        for name, values in found.items()
    ]


def other_solution(seed: int) -> dict[str, Tensor]:
    """SGD on the same data from another start."""
    data, other = task(seed), seed + 500
    model = student(other)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    fit(model, sgd, flat_then_linear, data.inputs, data.labels, steps=TRAINING, seed=other)
    return model.state_dict()


def curve(seed: int, start: dict[str, Tensor], end: dict[str, Tensor]) -> fp.Curve:
    data = task(seed)
    pieces = list(zip(data.inputs.split(200), data.labels.split(200), strict=True))
    return fp.find_curve(
        student(seed), start, end, pieces, F.cross_entropy, num_steps=2000, lr=0.05
    )


def teacher(picture: Path | None = None) -> list[Fact]:
    runs = in_processes(one_run, [(seed, setting) for setting in SETTINGS for seed in SEEDS])
    found: list[Fact] = []
    means: dict[Setting, tuple[float, float]] = {}
    for setting in SETTINGS:
        chosen = [run for run in runs if run.setting == setting]
        units, right = [float(r.units) for r in chosen], [r.accuracy for r in chosen]
        means[setting] = mean(units), mean(right)
        found.append((setting.name, f"units kept of {STUDENT}", with_error(units), ""))
        found.append((setting.name, "test accuracy", with_error(right), "%"))
    found += barriers(runs, picture)
    units, right = means[SHOWN]
    missed = []
    if units > MOST_UNITS or right < means[SGD][1]:
        missed.append(f"{SHOWN.name}: {units} units at {right}%, SGD {means[SGD][1]}%")
    return accepted(found, missed)
