"""The part of the demonstration that removes channels: SDprun, then compaction."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..deploy import compact
from ..optim import SDprun, channel_groups
from .console import arrow, print_table
from .data import Digits
from .loop import accuracy, train

EPOCHS = 40
LR, C = 0.1, 0.05
BATCH = 64
TIMED_IMAGES = 256


@dataclass(frozen=True)
class SdprunResult:
    """A network trained with SDprun, before and after its zero channels were removed."""

    channels: dict[str, tuple[int, int]]  # by layer: before, after
    parameters: tuple[int, int]
    dense_accuracy: float  # of the network that the demonstration has trained without pruning
    accuracy: float
    compacted_accuracy: float
    bytes: tuple[int, int]
    milliseconds: tuple[float, float]  # medians of turns


def prune_by_sdprun(
    model: nn.Module, dense_accuracy: float, digits: Digits, epochs: int, seed: int
) -> SdprunResult:
    """Trains `model`, which is new, and removes what became zero; nothing is trained after that."""
    steps = epochs * -(-len(digits.train_labels) // BATCH)
    example = digits.test_images[:2]
    # Large filters get a larger threshold: this network's first layers have few, small ones.
    optimizer = SDprun(channel_groups(model, example), LR, c=C, scale="sqrt")
    train(
        model,
        optimizer,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        scheduler=LambdaLR(optimizer, lambda step: _rate(step / steps)),
        title="SDprun, from scratch",
    )
    optimizer.finish()
    small, report = compact(model, example, return_report=True)
    return SdprunResult(
        {layer.name: (layer.before, layer.after) for layer in report.layers},
        (report.parameters_before, report.parameters_after),
        dense_accuracy,
        accuracy(model, digits.test_images, digits.test_labels),
        accuracy(small, digits.test_images, digits.test_labels),
        (_file_size(model), _file_size(small)),
        milliseconds(model, small, digits.test_images[:TIMED_IMAGES]),
    )


def _rate(done: float) -> float:
    """Constant for half of the steps, then linear to 1% at nine tenths of them."""
    return 1.0 if done < 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def _file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


@torch.no_grad()
def milliseconds(
    model: nn.Module, small: nn.Module, images: Tensor, repeats: int = 21
) -> tuple[float, float]:
    times = [[_seconds(lambda m=m: m(images)) for m in (model, small)] for _ in range(repeats)]  # type: ignore[misc]
    large, little = (1e3 * median(column) for column in zip(*times[1:], strict=True))
    return large, little


def _seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def print_sdprun(result: SdprunResult) -> None:
    def change(pair: tuple[float, float], form: str) -> str:
        return f"{pair[0]:{form}} {arrow()} {pair[1]:{form}}"

    rows = [[name, change(pair, "d")] for name, pair in result.channels.items()]
    rows += [
        ["parameters", change(result.parameters, ",")],
        ["file, bytes", change(result.bytes, ",")],
        [f"ms for {TIMED_IMAGES} images", change(result.milliseconds, ".2f")],
        ["accuracy", change((result.accuracy, result.compacted_accuracy), ".1%")],
    ]
    print_table(
        f"SDprun in place of SGD ({result.dense_accuracy:.1%}), then channels removed",
        ["no retraining", f"with zeros {arrow()} without"],
        rows,
    )
