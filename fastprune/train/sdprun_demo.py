"""The part of the demonstration that removes channels: SDprun, then compaction."""

from dataclasses import dataclass

from torch import nn

from ..deploy import compact
from ..optim import SDprun, channel_groups
from .console import arrow, change, print_table
from .data import Digits
from .loop import accuracy_on, train_on
from .measures import file_size, milliseconds
from .schedules import flat_then_linear

LR, C = 0.1, 0.05
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
    example = digits.test_images[:2]
    # Large filters get a larger threshold: this network's first layers have few, small ones.
    optimizer = SDprun(channel_groups(model, example), LR, c=C, scale="sqrt")
    title = "SDprun, from scratch"
    train_on(digits, model, optimizer, flat_then_linear, epochs=epochs, seed=seed, title=title)
    optimizer.finish()
    small, report = compact(model, example, return_report=True)
    return SdprunResult(
        {layer.name: (layer.before, layer.after) for layer in report.layers},
        (report.parameters_before, report.parameters_after),
        dense_accuracy,
        accuracy_on(digits, model),
        accuracy_on(digits, small),
        (file_size(model), file_size(small)),
        milliseconds(model, small, digits.test_images[:TIMED_IMAGES]),
    )


def print_sdprun(result: SdprunResult) -> None:
    rows = [[name, change("d", *pair)] for name, pair in result.channels.items()]
    rows += [
        ["parameters", change(",", *result.parameters)],
        ["file, bytes", change(",", *result.bytes)],
        [f"ms for {TIMED_IMAGES} images", change(".2f", *result.milliseconds)],
        ["accuracy", change(".1%", result.accuracy, result.compacted_accuracy)],
    ]
    print_table(
        f"SDprun in place of SGD ({result.dense_accuracy:.1%}), then channels removed",
        ["no retraining", f"with zeros {arrow()} without"],
        rows,
    )
