"""A pruned network beside dense engines: `python -m bench.inference --sparsity 0.9 --batch 1`.

Random weights and masks (the first layer dense), batch norms calibrated on random images, a
different input each time, and every output compared with the dense network's. Engines run in
turns; ratios are of medians, against the fastest dense engine in float32. With several sparsities
the speed over the sparsity is drawn, with the point from which it pays.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.progress import Progress
from fastprune.reporting.pictures import plot_speed

from . import results, timing
from .inference_rivals import RIVALS, Engine, MissingError, Setting, timed

OURS = "fastprune"
COLUMNS = (
    *results.ENVIRONMENT, "features", "threads", "model", "sparsity", "batch", "image", "candidate",
    "role", "method", "rounds", "median_ms", "p20_ms", "p80_ms", "speed_over_best_dense",
    "largest_error",
)  # fmt: skip
LAYER_COLUMNS = (
    *results.ENVIRONMENT, "threads", "model", "sparsity", "batch", "image", "layer", "count",
    "kernel", "ms", "dense_ms", "ratio",
)  # fmt: skip
INPUTS = 8
SEED = 0
FEATURES = "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_int8"
Row = dict[str, Any]


def cpu_features() -> str:
    """The instruction sets that decide between the engines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return " ".join(name for name in FEATURES.split() if name in flags)


@torch.no_grad()
def pruned(name: str, sparsity: float, image: int) -> nn.Module:
    """Of torchvision, or of timm if the name starts with "timm/"; outputs depend on the input."""
    torch.manual_seed(SEED)
    if name.startswith("timm/"):
        import timm

        model: nn.Module = timm.create_model(name.removeprefix("timm/"))
    else:
        from torchvision import models

        model = models.get_model(name, weights=None)
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    for layer in layers[1:]:
        layer.weight *= torch.rand_like(layer.weight) >= sparsity
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.3, 0.5)
            norm.momentum = None
            norm.reset_running_stats()
    model.train()
    model(torch.randn(4, 3, image, image))
    return model.eval().requires_grad_(False)


def ours(setting: Setting) -> tuple[Engine, Any]:
    """The converted network and its report; the rivals are timed here, not in the conversion."""
    module = fp.sparsify(setting.model, setting.inputs[0], threads=setting.threads, rivals=())
    return Engine(timed(setting, module, setting.inputs), "ours"), module.report()


def error(expected: Tensor, got: Tensor) -> float:
    return float((got.float() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def compare(
    model: nn.Module, batch: int, threads: int, options: argparse.Namespace
) -> tuple[list[Row], Any]:
    """Rows of all engines that are there and right, and the report of the conversion."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(SEED)
    shape = (INPUTS, batch, 3, options.image, options.image)
    inputs = torch.randn(shape, generator=random)
    expected = [model(x) for x in inputs]
    spread = max(error(each, expected[0]) for each in expected[1:])
    if spread < 0.01:
        raise AssertionError(f"outputs of different inputs differ by {spread:.2g} only")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setting = Setting(model, inputs, threads, options.clock, folder, options.deepsparse_python)
        mine, report = ours(setting)
        engines = {OURS: mine}
        for name in options.rivals:
            try:
                engines[name] = stack.enter_context(RIVALS[name](setting))
            except MissingError as why:
                print(f"  {name}: not timed, {why}", flush=True)
        errors = check(engines, expected)
        samples = take_turns(engines, expected, errors, options)
    return rows_of(engines, samples, errors, options.clock), report


def check(engines: dict[str, Engine], expected: Sequence[Tensor]) -> dict[str, float]:
    """The error of every engine on the first input; one that is wrong is taken out."""
    errors = {}
    for name, engine in list(engines.items()):
        errors[name] = error(expected[0], engine.run(0)[0])
        if not errors[name] <= engine.tolerance:
            if name == OURS:
                raise AssertionError(f"{name} is wrong by {errors[name]:.2g} of the largest output")
            print(f"  {name}: REFUSED, wrong by {errors[name]:.2g} of the largest output")
            del engines[name], errors[name]
    return errors


def take_turns(
    engines: Mapping[str, Engine],
    expected: Sequence[Tensor],
    errors: dict[str, float],
    options: argparse.Namespace,
) -> timing.Samples:
    turn = dict.fromkeys(engines, 0)

    def sampler(name: str) -> Callable[[], float]:
        def sample() -> float:
            turn[name] += 1
            i = turn[name] % INPUTS
            output, seconds = engines[name].run(i)
            errors[name] = max(errors[name], error(expected[i], output))
            if not errors[name] <= engines[name].tolerance:
                raise AssertionError(f"{name} is wrong by {errors[name]:.2g} on input {i}")
            return seconds

        return sample

    candidates = {n: timing.Timed(lambda: None, sampler(n), options.clock) for n in engines}
    with Progress("  in turns", options.rounds) as progress:
        return timing.measure(
            candidates, options.rounds, options.budget, lambda done, total: progress.advance()
        )


def rows_of(
    engines: Mapping[str, Engine],
    samples: timing.Samples,
    errors: Mapping[str, float],
    clock: str,
) -> list[Row]:
    stats = {name: timing.summary(seconds) for name, seconds in samples.seconds.items()}
    dense = [s.median for name, s in stats.items() if engines[name].role == "rival"]
    best = min(dense) if dense else float("nan")
    return [
        {
            "candidate": name,
            "role": engines[name].role,
            "method": clock,
            "rounds": samples.rounds,
            "median_ms": f"{1e3 * s.median:.3f}",
            "p20_ms": f"{1e3 * s.p20:.3f}",
            "p80_ms": f"{1e3 * s.p80:.3f}",
            "speed_over_best_dense": f"{best / s.median:.3f}",
            "largest_error": f"{errors[name]:.2g}",
        }
        for name, s in stats.items()
    ]


def layer_rows(report: Any, shapes: Mapping[str, str]) -> list[Row]:
    """Of layers that are alike the sum: times in their place in the network."""
    alike: dict[str, list[Any]] = {}
    for layer in report.layers:
        alike.setdefault(shapes.get(layer.name, layer.name), []).append(layer)
    rows = []
    for shape, layers in alike.items():
        ms, dense = sum(each.ms for each in layers), sum(each.dense_ms for each in layers)
        kernels = "+".join(sorted({each.kernel for each in layers}))
        rows.append({"layer": shape, "count": len(layers), "kernel": kernels, "ms": f"{ms:.4f}",
                     "dense_ms": f"{dense:.4f}", "ratio": f"{dense / ms:.2f}"})  # fmt: skip
    return rows


def layer_shapes(model: nn.Module, image: int) -> dict[str, str]:
    """`256-64 1x1/1 @56` for each layer by its name."""
    shapes: dict[str, str] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                shapes[name] = f"{layer.in_features}-{layer.out_features} linear"
                return
            size = "x".join(map(str, layer.kernel_size))
            group = f" groups {layer.groups}" if layer.groups > 1 else ""
            shapes[name] = (
                f"{layer.in_channels}-{layer.out_channels} {size}/{layer.stride[0]}{group} "
                f"@{output.shape[2]}"
            )

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    with torch.no_grad():
        model(torch.zeros(1, 3, image, image))
    for handle in handles:
        handle.remove()
    return shapes


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in cells
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="of torchvision, or timm/NAME")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of one comparison")
    parser.add_argument("--clock", choices=list(timing.CLOCKS), default="wall",
                        help="process: CPU time, which leaves out other programs")  # fmt: skip
    parser.add_argument("--deepsparse-python", help="an interpreter that has deepsparse 1.8",
                        default=os.environ.get("DEEPSPARSE_PYTHON"))  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="ratios of all distinct layers")
    parser.add_argument("--save", action="store_true", help="append rows to bench/results")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--picture", type=Path, help="speed over sparsity, as PNG")
    options = parser.parse_args(arguments)
    if not all(0 <= sparsity <= 1 for sparsity in options.sparsity):
        parser.error("--sparsity is a fraction of zeros between 0 and 1")
    if options.clock == "process" and options.threads != [1]:
        parser.error("--clock process adds up all threads: use it with --threads 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    environment = results.environment("cpu")
    print(f"{environment['cpu']}; {cpu_features()}; torch {torch.__version__}")
    speeds: dict[str, list[tuple[float, float]]] = {}
    for sparsity in options.sparsity:
        model = pruned(options.model, sparsity, options.image)
        for batch in options.batch:
            for threads in options.threads:
                about = {"model": options.model, "sparsity": sparsity, "batch": batch,
                         "image": options.image, "threads": threads}  # fmt: skip
                print(f"{options.model}, sparsity {sparsity:g}, batch {batch}, threads {threads}")
                try:
                    rows, report = compare(model, batch, threads, options)
                except KeyboardInterrupt:
                    print("interrupted; what was measured is above", file=sys.stderr)
                    return 130
                print(table(rows, COLUMNS[-9:]), flush=True)
                mine = float(rows[0]["speed_over_best_dense"])
                speeds.setdefault(f"batch {batch}, threads {threads}", []).append((sparsity, mine))
                common = {**environment, **about}
                if options.save:
                    stem = options.results / f"{results.slug('cpu')}-inference"
                    features = {"features": cpu_features()}
                    filled = [{**common, **features, **row} for row in rows]
                    results.append(stem.with_suffix(".csv"), COLUMNS, filled)
                if options.layers:
                    each = layer_rows(report, layer_shapes(model, options.image))
                    print(table(each, LAYER_COLUMNS[-6:]), flush=True)
                    if options.save:
                        path = Path(f"{stem}-layers.csv")
                        results.append(path, LAYER_COLUMNS, [{**common, **row} for row in each])
    if options.picture:
        plot_speed(speeds, options.picture, title=f"{options.model} against the best dense engine")
        print(f"speed over sparsity: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
