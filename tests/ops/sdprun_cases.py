"""The cases every back end of SDprun's operators must agree on, to the bit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.reference.sdprun import SETTINGS, num_channels
from tests.ops.gsm_cases import LAYOUTS
from tests.ops.machine import print_digest

Shape = tuple[int, ...]
# Tensors of one layer, each with its column groups (0: the channels are its rows).
LayerShapes = tuple[tuple[Shape, int], ...]


def rows(*shapes: Shape) -> tuple[LayerShapes, ...]:
    return tuple(((shape, 0),) for shape in shapes)


def coupled(*shape: int) -> LayerShapes:
    """A weight with its bias and a norm layer's weight and bias."""
    return ((shape, 0), ((shape[0],), 0), ((shape[0],), 0), ((shape[0],), 0))


RAGGED = rows(
    (16, 8, 3, 3), (1, 1), (5,), (3, 127), (2, 128), (2, 129), (7, 4097), (0, 4), (4, 0), (1, 999)
)
COUPLED = (coupled(9, 5, 3, 3), coupled(1, 1), coupled(0, 4), coupled(33, 200))
COLUMNS: tuple[LayerShapes, ...] = (
    (((6, 5, 3, 2), 1),),
    (((6, 4, 3, 3), 3), ((12,), 0)),
    (((8, 1, 3, 3), 8), ((8,), 0), ((8,), 0), ((8,), 0)),
    (((300, 40), 1), ((40,), 0)),
)
# More than one piece of work, and rows beyond a cache.
BIG = (*rows((300, 301), (64, 32, 3, 3), (2, 70_000)), coupled(700, 64), (((128, 130, 2, 2), 1),))
# Groups that leave one warp's or one block's memory, or that of a multiprocessor.
LONG = (*rows((9, 1024), (3, 1025), (3, 6001), (2, 9000)), coupled(3, 2000), coupled(2, 12_000))

PLAIN = {"lr": 0.1, "c": 0.1, "mu": 0.6, "min_groups": 1.0}
VARIANTS: dict[str, dict[str, float]] = {
    "plain": PLAIN,
    "momentum": {**PLAIN, "momentum": 0.9},
    "scale": {**PLAIN, "scale": 1},
    "maximize": {**PLAIN, "momentum": 0.9, "maximize": 1},
    "c 0": {**PLAIN, "c": 0},
    "lr 0": {**PLAIN, "lr": 0},
    "steered": {**PLAIN, "total_steps": 500, "goal": 3.0},
    "min_groups 3": {**PLAIN, "min_groups": 3},
}
THRESHOLD = 8.0  # and about the norm of every group


def settings_of(variants: Sequence[str]) -> Tensor:
    table = [[float(VARIANTS[name].get(column, 0)) for column in SETTINGS] for name in variants]
    return torch.tensor(table, dtype=torch.float64).view(-1, len(SETTINGS))


@dataclass(frozen=True)
class Case:
    """Data from which `build` makes the operators' arguments, the same ones each time."""

    label: str
    layers: tuple[LayerShapes, ...] = RAGGED
    variants: tuple[str, ...] = ("plain",)  # layer i takes number i, round and round
    weight: torch.dtype = torch.float32
    gradient: torch.dtype | None = None  # None: as the weight
    layout: str = "contiguous"
    threshold: float = THRESHOLD
    outside: tuple[int, ...] = ()  # layers that are not pruned
    own: bool = False  # those are their own accumulators
    still: tuple[int, ...] = ()  # tensors without a gradient
    grad_scale: float | None = None
    found_inf: float | None = None
    special: dict[int, float] = field(default_factory=dict)  # tensor -> a value in its gradient
    seed: int = 0

    def build(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(self.seed)
        layout = LAYOUTS[self.layout]
        wide = torch.float64 if self.weight == torch.float64 else torch.float32
        lists: dict[str, list[Any]] = {name: [] for name in LISTS}
        groups = 0
        for number, layer in enumerate(self.layers):
            outside = number in self.outside
            row = number % len(self.variants)
            size = sum(map(prod, (shape for shape, _ in layer))) / max(1, num_channels(*layer[0]))
            for shape, columns in layer:
                v, z, g = (layout(torch.randn(shape, generator=random)) for _ in range(3))
                v *= THRESHOLD / max(1, size) ** 0.5
                i = len(lists["weights"])
                lists["weights"].append(v.to(self.weight, copy=True))
                absent = outside and self.own
                lists["accumulators"].append(v.new_empty(0) if absent else v.to(wide, copy=True))
                has_momentum = VARIANTS[self.variants[row]].get("momentum", 0) != 0
                lists["momenta"].append(z.to(wide) if has_momentum else z.new_empty(0, dtype=wide))
                if i in self.special:
                    g.view(-1)[::5] = self.special[i]
                g = g.to(self.gradient or self.weight)
                lists["gradients"].append(g.new_empty(0) if i in self.still else g)
                lists["rows"].append(row)
                lists["first_groups"].append(-1 if outside else groups)
                lists["column_groups"].append(columns)
            if not outside:
                groups += num_channels(*layer[0])
        if not any(z.numel() for z in lists["momenta"]):
            lists["momenta"] = []
        settings = settings_of(self.variants)
        progress = torch.tensor([[99.0, self.threshold]], dtype=torch.float64)
        progress = progress.repeat(len(settings), 1)
        progress[settings[:, SETTINGS.index("c")] == 0] = 0
        progress[settings[:, SETTINGS.index("scale")] != 0, 1] /= 10
        return {
            **lists,
            "norms": torch.zeros(groups, dtype=torch.float64),
            "progress": progress,
            "settings": settings,
            "grad_scale": None if self.grad_scale is None else torch.tensor(self.grad_scale),
            "found_inf": None if self.found_inf is None else torch.tensor(self.found_inf),
        }


LISTS = (
    "accumulators",
    "momenta",
    "weights",
    "gradients",
    "rows",
    "first_groups",
    "column_groups",
)
CHANGED = ("accumulators", "momenta", "weights", "norms", "progress")


def guard_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the guard, of layers that are whole."""
    names = ("weights", "accumulators", "norms", "progress", "settings", "rows", "first_groups",
             "column_groups", "found_inf")  # fmt: skip
    sizes = [
        num_channels(w.shape, columns)
        for w, columns in zip(arguments["weights"], arguments["column_groups"], strict=True)
    ]
    return {name: arguments[name] for name in names} | {
        "layer_firsts": arguments["first_groups"],
        "layer_sizes": sizes,
    }


def step(arguments: dict[str, Any]) -> dict[str, Any]:
    """One step by all three operators, in place."""
    ops = torch.ops.fastprune
    ops.sdprun_threshold_(arguments["progress"], arguments["settings"], arguments["found_inf"])
    ops.sdprun_update_(**arguments)
    ops.sdprun_guard_(**guard_arguments(arguments))
    return arguments


def results(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in CHANGED}


ALL = tuple(VARIANTS)
EVERYTHING = (*RAGGED, *COUPLED, *COLUMNS)
CASES = [
    *(Case(name, variants=(name,), seed=i) for i, name in enumerate(VARIANTS)),
    *(Case(f"{name}, fp64", variants=(name,), weight=torch.float64) for name in VARIANTS),
    Case("every variant in one call", EVERYTHING, ALL, outside=(0, 5), seed=7),
    Case("coupled", COUPLED, ("momentum", "scale")),
    Case("columns", COLUMNS, ("momentum", "scale")),
    Case("columns, fp64", COLUMNS, weight=torch.float64),
    Case("columns, bf16", COLUMNS, ("momentum", "scale"), weight=torch.bfloat16),
    *(
        Case(f"{layout}, {kind}", layers, ("plain", "momentum"), layout=layout)
        for layout in ("channels_last", "transposed")
        for kind, layers in (("rows", RAGGED), ("coupled", COUPLED), ("columns", COLUMNS[:1]))
    ),
    *(
        Case(f"{name}, {layout}", EVERYTHING, ("momentum",), weight=dtype, layout=layout)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        for layout in ("contiguous", "channels_last")
    ),
    Case("bf16 gradients", gradient=torch.bfloat16),
    Case("big", BIG, ("plain", "momentum")),
    Case("big, bf16", BIG, ("momentum",), weight=torch.bfloat16),
    Case("nothing pruned yet", EVERYTHING, ("c 0",)),
    Case("all pruned", EVERYTHING, ("plain", "min_groups 3"), threshold=1e4),
    Case("outside only", outside=tuple(range(len(RAGGED)))),
    Case("outside only, without copies", outside=tuple(range(len(RAGGED))), own=True),
    Case("outside and empty, bf16", RAGGED, outside=(7, 8), own=True, weight=torch.bfloat16),
    Case("some have no gradient", COUPLED, ("momentum",), still=(0, 2, 7)),
    Case("scaled", EVERYTHING, ALL, grad_scale=3.0),
    Case("scaled, bf16", EVERYTHING, ALL, weight=torch.bfloat16, grad_scale=1024.0),
    Case("found_inf 0", grad_scale=1024.0, found_inf=0.0),
    Case("found_inf 1", EVERYTHING, ALL, grad_scale=1024.0, found_inf=1.0),
    Case("NaN and infinity", EVERYTHING, special={0: torch.nan, 3: torch.inf, 10: -torch.inf}),
    Case("long rows", LONG, ("momentum", "scale")),
    Case("long rows, fp64", LONG, weight=torch.float64),
    Case("long rows, bf16", LONG, ("momentum",), weight=torch.bfloat16),
]


if __name__ == "__main__":
    import fastprune  # noqa: F401  # loads the operators

    print_digest(results(step(case.build())) for case in CASES)
