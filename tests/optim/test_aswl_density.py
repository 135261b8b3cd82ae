"""ASWL comes to the sparsity that was asked for and stays there, whatever the loss pulls."""

import math
from statistics import mean
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fastprune as fp
from fastprune.optim import ASWL

SEEDS = range(5)
LENGTHS = {"MLP": (1000, 2000), "CNN with batch norm": (400, 800)}
BATCH = 32
DENSITY = 0.2
MEAN, CONSTANT, DECAYING = 0.015, 0.06, 0.03  # how far from it, over the last tenth


class Task(NamedTuple):
    inputs: Tensor
    labels: Tensor


def labelled(teacher: nn.Module, inputs: Tensor) -> Task:
    """About equally many of each class."""
    with torch.no_grad():
        scores = teacher(inputs)
    return Task(inputs, ((scores - scores.mean(0)) / scores.std(0)).argmax(1))


def vectors(seed: int) -> tuple[Task, nn.Module]:
    """The teacher and the student of the method's notes."""
    torch.manual_seed(1000 + seed)
    teacher = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
    for layer in (teacher[0], teacher[2]):
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    task = labelled(teacher, torch.randn(4000, 20))
    torch.manual_seed(seed)
    layers = nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    return task, nn.Sequential(*layers)


def images(seed: int) -> tuple[Task, nn.Module]:
    torch.manual_seed(1000 + seed)
    teacher = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    task = labelled(teacher, torch.randn(2000, 2, 6, 6))
    torch.manual_seed(seed)
    student = nn.Sequential(
        nn.Conv2d(2, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip
    return task, student


NETWORKS = {"MLP": vectors, "CNN with batch norm": images}


def densities(
    model: nn.Module, optimizer: ASWL, task: Task, steps: int, decays: bool
) -> list[float]:
    """Of the last tenth of a training, counted in the weights themselves."""
    schedule = LambdaLR(
        optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)) if decays else 1.0
    )
    weights = [p for p in model.parameters() if p.dim() > 1]
    total = sum(p.numel() for p in weights)
    order = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        batch = torch.randint(len(task.labels), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(task.inputs[batch]), task.labels[batch]).backward()
        optimizer.step()
        schedule.step()
        if step >= steps - steps // 10:
            found.append(sum(int(p.count_nonzero()) for p in weights) / total)
    return found


@pytest.mark.filterwarnings("ignore:a norm right behind")
@pytest.mark.parametrize("decays", [False, True], ids=["constant lr", "decaying lr"])
@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name, lengths in LENGTHS.items() for steps in lengths]
)
def test_the_density_is_met_and_held(name: str, steps: int, decays: bool) -> None:
    for seed in SEEDS:
        task, model = NETWORKS[name](seed)
        optimizer = ASWL(model, 0.05, sparsity=1 - DENSITY)
        found = densities(model, optimizer, task, steps, decays)
        assert abs(mean(found) - DENSITY) <= MEAN
        assert max(abs(d - DENSITY) for d in found) <= (DECAYING if decays else CONSTANT)
        assert len(set(optimizer.sparsities().values())) == 3  # each layer its own
        masks = optimizer.finish()
        assert masks.num_kept == fp.num_kept(1 - DENSITY, masks.total)
        assert fp.MaskSet.of(model) == masks
