"""`fastprune demo`: a small network is trained, pruned in one shot, and looked at."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..masks import MaskSet
from ..methods import magnitude
from ..methods.baselines import Scope
from ..ops import build_info, global_topk
from .aswl_demo import AswlRow, print_aswl, prune_by_aswl
from .console import arrow, bar, print_table
from .data import Digits, load_digits
from .dirichlet_demo import DirichletResult, print_dirichlet, prune_by_dirichlet
from .gsm_demo import GsmRow, print_gsm, prune_by_gsm
from .loop import accuracy_on, train_on
from .measures import seconds_in_turns
from .prospr_demo import InitialRow, print_initial, prune_at_start
from .sdprun_demo import SdprunResult, print_sdprun, prune_by_sdprun
from .sparse_demo import SparseRow, print_sparse, speed_up

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
METHODS: dict[str, tuple[Scope, tuple[int, int]]] = {
    "magnitude, global": ("global", (1, 1)),
    "magnitude, the same in each layer": ("layer", (1, 1)),
    "magnitude, global, blocks of 4 outputs x 1 input": ("global", (4, 1)),
}
TIMED_SHAPES = [(512, 512)] * 16  # 4.2 million scores


@dataclass(frozen=True)
class Epochs:
    """How long each part trains after the first, dense training."""

    gsm: int = 60  # with a weight decay this high, passive weights fall below 1% of their start
    aswl: int = 20
    sdprun: int = 40
    dirichlet: int = 10
    initial: int = 20


@dataclass(frozen=True)
class PrunedModel:
    """One row of the table."""

    method: str
    asked: float
    masks: MaskSet
    accuracy: float


@dataclass(frozen=True)
class SelectionTime:
    """Seconds to find the exact threshold of the largest tenth."""

    num_scores: int
    fastprune: float
    cat_kthvalue: float

    @property
    def speedup(self) -> float:
        return self.cat_kthvalue / self.fastprune


@dataclass(frozen=True)
class DemoResult:
    dense_accuracy: float
    rows: list[PrunedModel]
    selection: SelectionTime
    gsm: list[GsmRow]
    aswl: list[AswlRow]
    sdprun: SdprunResult
    dirichlet: DirichletResult
    initial: list[InitialRow]
    sparse: list[SparseRow]


def digits_cnn() -> nn.Sequential:
    """Three convolutions and a linear layer for 8x8 images: 25,744 prunable weights."""
    return nn.Sequential(
        OrderedDict(
            [
                *_conv_bn_relu("1", 1, 16),
                *_conv_bn_relu("2", 16, 32),
                ("pool2", nn.MaxPool2d(2)),
                *_conv_bn_relu("3", 32, 64),
                ("pool3", nn.MaxPool2d(2)),
                ("flatten", nn.Flatten()),
                ("linear", nn.Linear(64 * 2 * 2, 10)),
            ]
        )
    )


def _conv_bn_relu(number: str, inputs: int, outputs: int) -> list[tuple[str, nn.Module]]:
    return [
        (f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
        (f"norm{number}", nn.BatchNorm2d(outputs)),
        (f"relu{number}", nn.ReLU()),
    ]


def run_demo(
    *,
    epochs: int = 10,
    of_parts: Epochs = Epochs(),
    seed: int = 0,
    shapes: list[tuple[int, int]] = TIMED_SHAPES,
    pictures: Path | None = None,
) -> DemoResult:
    """Trains, prunes, prints; the same seed gives the same masks and accuracies on a machine.

    Pictures are written only into a folder that is given.
    """
    digits = load_digits(seed)
    model = train_dense(digits, epochs, seed)
    dense_accuracy = accuracy_on(digits, model)
    rows = prune_all(model, digits)
    gsm = prune_by_gsm(model, digits, of_parts.gsm, seed)
    aswl = prune_by_aswl(lambda: new_network(seed), digits, of_parts.aswl, seed, pictures)
    sdprun = prune_by_sdprun(new_network(seed), dense_accuracy, digits, of_parts.sdprun, seed)
    dirichlet = prune_by_dirichlet(model, digits, of_parts.dirichlet, seed, pictures)
    initial = prune_at_start(lambda: new_network(seed), digits, of_parts.initial, seed)
    selection = time_selection(shapes, seed)
    sparse = speed_up(aswl[0].network, digits)
    result = DemoResult(
        dense_accuracy, rows, selection, gsm, aswl, sdprun, dirichlet, initial, sparse
    )
    print_result(result)
    return result


def new_network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return digits_cnn()


def train_dense(digits: Digits, epochs: int, seed: int) -> nn.Module:
    model = new_network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    title = "training a small CNN on 1,400 digits"
    train_on(digits, model, optimizer, CosineAnnealingLR, epochs=epochs, seed=seed, title=title)
    return model


def prune_all(model: nn.Module, digits: Digits) -> list[PrunedModel]:
    """Every method at every sparsity, each on its own copy of the dense model."""
    rows = []
    for method, (scope, block) in METHODS.items():
        for sparsity in SPARSITIES:
            masks = magnitude(model, sparsity, scope=scope, block=block)
            pruned = copy.deepcopy(model)
            masks.apply(pruned)
            rows.append(PrunedModel(method, sparsity, masks, accuracy_on(digits, pruned)))
    return rows


def time_selection(shapes: list[tuple[int, int]], seed: int) -> SelectionTime:
    """Both find the same threshold, checked; runs take turns, medians are reported."""
    random = torch.Generator().manual_seed(seed)
    scores = [torch.rand(shape, generator=random) for shape in shapes]
    total = sum(s.numel() for s in scores)
    kept = total // 10

    def ours() -> Tensor:
        return global_topk(scores, kept).threshold

    def theirs() -> Tensor:
        return torch.cat([s.flatten() for s in scores]).kthvalue(total - kept + 1).values

    if not torch.equal(ours(), theirs()):
        raise RuntimeError("the thresholds of fastprune and kthvalue differ; please report this")
    return SelectionTime(total, *seconds_in_turns(ours, theirs, repeats=5))


def print_result(result: DemoResult) -> None:
    layers = [name.removesuffix(".weight") for name in result.rows[0].masks]
    total = result.rows[0].masks.total
    print(
        f"\nOne-shot pruning, no retraining. Test accuracy of the dense network: "
        f"{result.dense_accuracy:.1%}.\nBars show how much of each layer is zero."
    )
    columns = ["asked", f"kept of {total:,}", "accuracy", *layers]
    for method in METHODS:
        rows = [_cells(row, result.dense_accuracy) for row in result.rows if row.method == method]
        print_table(method, columns, rows)
    print_gsm(result.gsm)
    print_aswl(result.aswl)
    print_initial(result.initial)
    print(
        "\nThese zeros are written, not removed: the file is as large and, in PyTorch, the\n"
        "network as slow as before. Whole channels of zeros can be removed, and the last\n"
        "table shows what single zeros bring:"
    )
    print_sdprun(result.sdprun)
    print_dirichlet(result.dirichlet)
    _print_selection(result.selection)
    print_sparse(result.sparse, result.aswl[0].masks.sparsity)
    print(f"\n{build_info()}")


def _cells(row: PrunedModel, dense_accuracy: float) -> list[str]:
    masks = row.masks
    return [
        f"{row.asked:.0%}",
        f"{masks.num_kept:,}",
        f"{dense_accuracy:.1%} {arrow()} {row.accuracy:.1%}",
        *(f"{bar(layer.sparsity)} {layer.sparsity:4.0%}" for layer in masks.layers.values()),
    ]


def _print_selection(selection: SelectionTime) -> None:
    served_by = build_info().operators["select_threshold"]["CPU"]
    ours, theirs = selection.fastprune * 1e3, selection.cat_kthvalue * 1e3
    print(
        f"\nExact threshold of the largest tenth of {selection.num_scores / 1e6:.1f} million "
        f"scores ({torch.get_num_threads()} threads):\n"
        f"  fastprune ({served_by}) {ours:.1f} ms, torch.cat + kthvalue {theirs:.1f} ms: "
        f"{selection.speedup:.1f}x as fast"
    )
