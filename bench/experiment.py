"""What the longer experiments share: facts and their acceptance, training, several processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

BATCH = 64
Fact = tuple[str, str, Any, str]  # subject, quantity, value, unit
R = TypeVar("R")


class SkippedError(Exception):
    """Why an experiment cannot run here."""


def accepted(facts: list[Fact], missed: Sequence[str]) -> list[Fact]:
    """The facts, if they show what they should; an error that has them too, if they do not."""
    if missed:
        raise AssertionError("\n".join([*missed, *map(str, facts)]))
    return facts


def with_error(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values) / len(values) ** 0.5:.2f}"


def in_words(values: Iterable[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def in_processes(function: Callable[..., R], jobs: Sequence[tuple[Any, ...]]) -> list[R]:
    """Two at a time; each calls `function` with one job's arguments."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Callable[[Optimizer, int], LRScheduler],
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    seed: int,
) -> None:
    """Minimises the cross entropy; the schedule is made from the optimizer and its steps."""
    scheduler = schedule(optimizer, steps)
    model.train()
    for batch in shuffled(len(labels), steps, seed):
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def shuffled(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches, epoch by epoch; the last epoch may be cut short."""
    order = torch.Generator().manual_seed(seed)
    while steps > 0:
        epoch = torch.randperm(count, generator=order).split(BATCH)[:steps]
        yield from epoch
        steps -= len(epoch)
