"""What a network costs: parameters, bytes, seconds."""

import io
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def seconds_in_turns(*calls: Callable[[], object], repeats: int) -> list[float]:
    """The median of each; the first turn is not counted."""
    times = [[_seconds(call) for call in calls] for _ in range(repeats + 1)]
    return [median(column) for column in zip(*times[1:], strict=True)]


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


@torch.no_grad()
def milliseconds(
    model: nn.Module, small: nn.Module, images: Tensor, repeats: int = 20
) -> tuple[float, float]:
    large, little = seconds_in_turns(lambda: model(images), lambda: small(images), repeats=repeats)
    return 1e3 * large, 1e3 * little
