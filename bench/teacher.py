"""Data that a small random network has labelled, for students larger than it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

INPUTS, TEACHER, STUDENT, CLASSES = 20, 8, 64, 3  # widths
SAMPLES = 4000
SEEDS = (0, 1, 2, 3, 4)


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
