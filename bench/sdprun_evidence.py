"""SDprun against its theory on quadratics, and on a teacher and its student."""

import copy
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fastprune as fp
from fastprune.optim import SDprun
from fastprune.reporting import plot_losses
from fastprune.train import accuracy

Fact = tuple[str, str, Any, str]  # subject, quantity, value, unit

# ---------------------------------------------------------------- the limit on quadratics

GROUPS, SIZE, RANK = 4, 3, 3
LR, MU, THRESHOLD = 0.2, 0.75, 1.2
STEPS = (10_000, 100_000)
MOST_DISTANCE, LEAST_GAIN = 3e-4, 8.0
BOUNDARY = 0.05
COUNT = 20


class Quadratic(NamedTuple):
    """(w - center)' H (w - center) / 2, and where directional pruning should end."""

    hessian: Tensor
    center: Tensor
    start: Tensor
    pruned: Tensor


def draw(random: torch.Generator) -> Quadratic | None:
    """None if a group is so close to being zero, or to not being it, that rounding would decide."""
    n = GROUPS * SIZE
    vectors = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64)).Q
    steep, flat = vectors[:, :RANK], vectors[:, RANK:]
    values = 0.5 + 1.5 * torch.rand(RANK, generator=random, dtype=torch.float64)
    center, start = torch.randn(2, n, generator=random, dtype=torch.float64) / 2
    projector = flat @ flat.T
    reached = center + projector @ (start - center)  # by gradient descent
    pruned, force = constrained_solution(projector, reached)
    zero = pruned.norm(dim=1) < 1e-6
    near = torch.where(
        zero, force.norm(dim=1) > (1 - BOUNDARY) * THRESHOLD,
        pruned.norm(dim=1) < BOUNDARY * THRESHOLD,
    )  # fmt: skip
    if bool(near.any()):
        return None
    return Quadratic(steep @ (values[:, None] * steep.T), center, start, pruned)


def constrained_solution(projector: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """min |w - reached|^2 / 2 + G sum |w_g| over w - reached in the flat space, by its dual.

    The dual variable of a group is a force of at most G; w = reached - P force.
    """
    force = torch.zeros(GROUPS, SIZE, dtype=torch.float64)
    ahead, momentum = force, 1.0
    for _ in range(20_000):
        solution = reached - projector @ ahead.flatten()
        candidate = ahead + solution.view(GROUPS, SIZE)
        candidate = candidate * (THRESHOLD / candidate.norm(dim=1, keepdim=True)).clamp(max=1)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = candidate + (momentum - 1) / following * (candidate - force)
        force, momentum = candidate, following
    return (reached - projector @ force.flatten()).view(GROUPS, SIZE), force


def run_quadratics(quadratics: list[Quadratic], steps: int) -> tuple[Tensor, Tensor]:
    """All of them as one parameter; distances and zero groups after that many steps."""
    hessian = torch.stack([q.hessian for q in quadratics])
    center = torch.stack([q.center for q in quadratics])
    start = torch.stack([q.start for q in quadratics]).view(-1, SIZE)
    weight = nn.Parameter(start.clone())
    c = THRESHOLD / (LR ** (0.5 + MU) * steps**MU)
    optimizer = SDprun([{"params": [weight], "prune": True}], LR, c=c, mu=MU, min_groups=0)
    for _ in range(steps):
        offset = weight.detach().view(len(quadratics), -1) - center
        weight.grad = (hessian @ offset[..., None]).view_as(weight)
        optimizer.step()
    found = weight.detach().view(len(quadratics), GROUPS, SIZE)
    expected = torch.stack([q.pruned for q in quadratics])
    return (found - expected).flatten(1).norm(dim=1), (found == 0).all(2)


def limit() -> list[Fact]:
    random = torch.Generator().manual_seed(0)
    quadratics: list[Quadratic] = []
    drawn = 0
    while len(quadratics) < COUNT:
        drawn += 1
        if (quadratic := draw(random)) is not None:
            quadratics.append(quadratic)
    expected_zero = torch.stack([q.pruned.norm(dim=1) < 1e-6 for q in quadratics])
    distances = []
    for steps in STEPS:
        distance, zero = run_quadratics(quadratics, steps)
        distances.append(distance)
        if not torch.equal(zero, expected_zero):
            raise AssertionError(f"other groups are zero after {steps} steps than in the limit")
    gain = distances[0] / distances[1]
    if float(distances[1].max()) > MOST_DISTANCE or float(gain.min()) < LEAST_GAIN:
        raise AssertionError(f"distances {distances[1].tolist()}, gains {gain.tolist()}")
    subject = f"{COUNT} quadratics of rank {RANK} in {GROUPS * SIZE} dimensions"
    return [
        (subject, "drawn, to have them off the boundary", drawn, ""),
        (subject, f"zero groups, as in the limit, of {expected_zero.numel()}",
         int(expected_zero.sum()), ""),
        (subject, f"largest distance to the limit after {STEPS[1]} steps",
         float(distances[1].max()), ""),
        (subject, "least gain from ten times the steps", float(gain.min()), "x"),
    ]  # fmt: skip


# ---------------------------------------------------------------- teacher and student

INPUTS, TEACHER, STUDENT, CLASSES = 20, 8, 64, 3
SAMPLES, BATCH, TRAINING = 4000, 64, 20_000
SEEDS = (0, 1, 2, 3, 4)
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


class Task(NamedTuple):
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def task(seed: int) -> Task:
    torch.manual_seed(1000 + seed)
    teacher = nn.Sequential(nn.Linear(INPUTS, TEACHER), nn.ReLU(), nn.Linear(TEACHER, CLASSES))
    for layer in (teacher[0], teacher[2]):
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2 * SAMPLES, INPUTS)
    with torch.no_grad():
        scores = teacher(x)
        y = (scores - scores.mean(0)).argmax(1)  # about equally many of each class
    return Task(x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:])


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


def rate(step: int) -> float:
    """Constant for half of the steps, then linear to 1% at 90% of them."""
    done = step / TRAINING
    return 1.0 if done < 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def one_run(seed: int, setting: Setting) -> Outcome:
    torch.set_num_threads(1)
    data, model = task(seed), student(seed, setting.norm)
    optimizer = optimizer_of(model, setting)
    schedule = LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(seed)
    for batch in batches(order):
        loss = F.cross_entropy(model(data.inputs[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    units = int((model[0].weight != 0).any(1).sum())
    right = 100 * accuracy(model, data.test_inputs, data.test_labels)
    return Outcome(seed, setting, units, right, copy.deepcopy(model.state_dict()))


def batches(order: torch.Generator) -> Iterator[Tensor]:
    left = TRAINING
    while left > 0:
        whole = torch.randperm(SAMPLES, generator=order).split(BATCH)[:left]
        yield from whole
        left -= len(whole)


def all_runs(processes: int = 2) -> list[Outcome]:
    jobs = [(seed, setting) for setting in SETTINGS for seed in SEEDS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(one_run, *zip(*jobs, strict=True)))


def with_error(values: list[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values) / len(values) ** 0.5:.2f}"


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
    data, model = task(seed), student(seed + 500)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = LambdaLR(optimizer, rate)
    for batch in batches(torch.Generator().manual_seed(seed + 500)):
        optimizer.zero_grad()
        F.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return copy.deepcopy(model.state_dict())


def curve(seed: int, start: dict[str, Tensor], end: dict[str, Tensor]) -> fp.Curve:
    data = task(seed)
    pieces = list(zip(data.inputs.split(200), data.labels.split(200), strict=True))
    return fp.find_curve(
        student(seed), start, end, pieces, F.cross_entropy, num_steps=2000, lr=0.05
    )


def teacher(picture: Path | None = None) -> list[Fact]:
    runs = all_runs()
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
    if units > MOST_UNITS or right < means[SGD][1]:
        lines = [f"{SHOWN.name}: {units} units at {right}%, SGD {means[SGD][1]}%"]
        raise AssertionError("\n".join([*lines, *map(str, found)]))
    return found
