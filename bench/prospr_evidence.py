"""ProsPr on scikit-learn's digits beside its baselines, and its memory on ResNet-20."""

import json
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.train import accuracy, load_digits
from fastprune.train.data import Digits

from . import memory, results
from .gsm_evidence import BATCH, Fact, fit, network

SPARSITY = 0.98
SEEDS = tuple(range(12))
STEPS = 1_500
# Of the means over the seeds, in percent. Scores come from batches as they are trained on: with
# larger ones SNIP, which sees one batch where ProsPr sees four, comes closer.
LEAST, LEAD, RANDOM_BELOW = 89.0, 3.0, 20.0
Masks = Callable[[nn.Module, Any], fp.MaskSet]


def scored(method: Callable[..., fp.MaskSet], **options: Any) -> Masks:
    return lambda model, batches: method(model, batches, F.cross_entropy, SPARSITY, **options)


METHODS: dict[str, Masks] = {
    "random": lambda model, _: fp.random(model, SPARSITY),
    "random, ERK": lambda model, _: fp.random(model, fp.erk(model, SPARSITY)),
    "magnitude": lambda model, _: fp.magnitude(model, SPARSITY),
    "SNIP": scored(fp.snip),
    "SNIP, as many batches as ProsPr": scored(fp.snip, num_batches=4),
    "Iter-SNIP": scored(fp.iter_snip),
    "FORCE": scored(fp.force),
    "GraSP": scored(fp.grasp, min_kept_per_layer=1),
    "SynFlow": lambda model, batches: fp.synflow(model, batches[0][0], SPARSITY),
    "ProsPr": scored(fp.prospr),
    "ProsPr, finite differences": scored(fp.prospr, mode="finite_difference"),
    "ProsPr, first order": scored(fp.prospr, mode="first_order"),
    "ProsPr, reference_compat": scored(fp.prospr, mode="reference_compat"),
}


class Run(NamedTuple):
    method: str
    seed: int
    accuracy: float
    num_kept: int


def scoring_batches(digits: Digits, seed: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split(BATCH)[:count]
    return [(digits.train_images[part], digits.train_labels[part]) for part in parts]


def one_run(method: str, seed: int) -> Run:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # of dead pixels: their scores are 0
    digits = load_digits(seed)
    model = network(seed)
    masks = METHODS[method](model, scoring_batches(digits, seed))
    masks.apply(model)
    fp.mask_gradients(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    fit(model, optimizer, digits, STEPS, seed)
    kept = fp.MaskSet.of(model)
    assert not any((kept[name] & ~mask).any() for name, mask in masks.items())
    right = 100 * accuracy(model, digits.test_images, digits.test_labels)
    return Run(method, seed, right, masks.num_kept)


def all_runs(processes: int = 2) -> list[Run]:
    jobs = [(method, seed) for method in METHODS for seed in SEEDS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(one_run, *zip(*jobs, strict=True)))


def accuracies(runs: list[Run], method: str) -> list[float]:
    return [run.accuracy for run in runs if run.method == method]


def facts(runs: list[Run]) -> list[Fact]:
    found: list[Fact] = []
    for method in dict.fromkeys(run.method for run in runs):
        subject, values = f"digits MLP, {SPARSITY:.0%} pruned, {method}", accuracies(runs, method)
        found += [
            (subject, "mean accuracy", round(mean(values), 2), "%"),
            (subject, "standard deviation", round(stdev(values), 2), "points"),
            (subject, "accuracy, seeds", " ".join(f"{v:.2f}" for v in values), "%"),
        ]
    return found


def failures(runs: list[Run]) -> list[str]:
    """What the runs do not show, in words."""
    random, snip, prospr = (mean(accuracies(runs, m)) for m in ("random", "SNIP", "ProsPr"))
    missed = []
    if prospr < LEAST or prospr < snip + LEAD:
        missed.append(f"ProsPr {prospr:.2f}%, SNIP {snip:.2f}%; accepted are {LEAST}% and "
                      f"{LEAD} points more than SNIP")  # fmt: skip
    if random >= RANDOM_BELOW:
        missed.append(f"random {random:.2f}%, expected below {RANDOM_BELOW}%")
    return missed


def measure() -> list[Fact]:
    runs = all_runs()
    if missed := failures(runs):
        raise AssertionError("\n".join([*missed, *map(str, facts(runs))]))
    return facts(runs)


# ---------------------------------------------------------------------- memory

INNER_STEPS = (1, 3, 6)
MEMORY_BATCH = 64
MOST = 1.35  # times the memory of one step, with six


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[..., :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, y.shape[1] - shortcut.shape[1])))


def resnet20() -> nn.Sequential:
    """For 32x32 images and ten classes: 268,336 weights in convolutions, 640 in the last layer."""

    def blocks() -> Iterator[nn.Module]:
        before = 16
        for width in (16, 32, 64):
            for i in range(3):
                yield Block(before, width, 2 if i == 0 and width > 16 else 1)
                before = width

    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def peak_here(steps: int) -> int:
    """Extra resident bytes at the peak of one call; what the child process does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet20()
    data = torch.randn(steps + 1, MEMORY_BATCH, 3, 32, 32)
    targets = torch.randint(10, (steps + 1, MEMORY_BATCH))
    batches = list(zip(data, targets, strict=True))
    call = partial(fp.scores, "prospr", model, loss_fn=F.cross_entropy, inner_lr=0.1)
    call(batches=[(x[:2], y[:2]) for x, y in batches], steps=1)  # loads code, belongs to no call
    memory.return_free_heap()
    exact = memory.reset_peak()
    before = memory.status_bytes("VmRSS" if exact else "VmHWM")
    call(batches=batches, steps=steps)
    return memory.status_bytes("VmHWM") - before


def peak(steps: int) -> int:
    command = [sys.executable, "-m", "bench.prospr_evidence", "--child", str(steps)]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{steps} inner steps: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory() -> list[Fact]:
    peaks = {steps: peak(steps) for steps in INNER_STEPS}
    subject = f"ProsPr, ResNet-20, batch {MEMORY_BATCH}"
    found: list[Fact] = [
        (subject, f"peak extra resident memory, K={steps}", round(size / memory.MIB, 1), "MiB")
        for steps, size in peaks.items()
    ]
    ratio = peaks[6] / peaks[1]
    found.append((subject, "K=6 over K=1", round(ratio, 3), "x"))
    if ratio > MOST:
        raise AssertionError(f"K=6 needs {ratio:.2f}x the memory of K=1, accepted are {MOST}x")
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(peak_here(int(sys.argv[2]))))
    else:
        for line in (*measure_memory(), *measure()):
            print(*line, flush=True)
