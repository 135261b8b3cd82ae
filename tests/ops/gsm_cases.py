"""The cases every back end of GSM's update must agree on, to the bit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.reference.gsm import SETTINGS
from tests.ops.machine import print_digest

Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = ((127,), (0,), (16, 8, 3, 3), (1,), (5, 0, 2), (4097,), (3,), (40, 65))
MATRICES: tuple[Shape, ...] = ((13, 7, 3, 3), (1, 1), (33, 10), (2, 0), (16, 16, 5))
# More than one chunk of work, and a tie end within one.
BIG: tuple[Shape, ...] = ((300, 301), (64, 32, 3, 3), (20_000,))

PLAIN = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
VARIANTS: dict[str, dict[str, float]] = {
    "plain": PLAIN,
    "gsm": {"lr": 0.01, "momentum": 0.98, "weight_decay": 1e-3},
    "no momentum": {**PLAIN, "momentum": 0},
    "no decay": {**PLAIN, "weight_decay": 0},
    "dampening": {**PLAIN, "dampening": 0.3},
    "nesterov": {**PLAIN, "nesterov": 1},
    "nesterov, no decay": {**PLAIN, "nesterov": 1, "weight_decay": 0},
    "maximize": {**PLAIN, "maximize": 1},
    "lr 0": {**PLAIN, "lr": 0},
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
}


def settings_of(variants: Sequence[str]) -> Tensor:
    rows = [[float(VARIANTS[name].get(column, 0)) for column in SETTINGS] for name in variants]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Data from which `build` makes the operator's arguments, the same ones each time."""

    label: str
    shapes: tuple[Shape, ...] = SHAPES
    variants: tuple[str, ...] = ("gsm",)  # tensor i takes number i, round and round
    weight: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    copy: torch.dtype | None = None
    layout: str = "contiguous"
    ties: bool = False  # few distinct values, so that a threshold cuts ties
    kept: float = 0.3
    tie_share: float | None = None  # the tie end, as a share of the pool; None: as selected
    outside: tuple[int, ...] = ()
    block: tuple[int, int] = (1, 1)
    grad_scale: float | None = None
    found_inf: float | None = None
    seed: int = 0
    special: dict[int, float] = field(default_factory=dict)  # tensor -> a value in its gradient

    def build(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(self.seed)
        layout = LAYOUTS[self.layout]
        weights, momenta, gradients = (
            [layout(self._values(shape, random).to(dtype)) for shape in self.shapes]
            for dtype in (self.weight, self.weight, self.gradient)
        )
        for i, value in self.special.items():
            gradients[i].view(-1)[::5] = value
        copies = [w.to(self.copy) for w in weights] if self.copy else []
        positions, pool, size = [], [], 0
        for i, weight in enumerate(weights):
            outside = i in self.outside
            positions.append(-1 if outside else size)
            if not outside:
                pool.append(i)
                size += weight.numel()
        threshold, tie_end, gates = self._choice(
            [weights[i] for i in pool], [gradients[i] for i in pool]
        )
        everywhere = [torch.empty(0, dtype=torch.bool)] * len(weights) if gates else []
        for i, gate in zip(pool, gates, strict=bool(gates)):
            everywhere[i] = gate
        if self.tie_share is not None:
            tie_end = torch.tensor(int(self.tie_share * size))
        scalar = {
            name: None if value is None else torch.tensor(value)
            for name, value in (("grad_scale", self.grad_scale), ("found_inf", self.found_inf))
        }
        return {
            "weights": weights,
            "momenta": momenta,
            "copies": copies,
            "gradients": gradients,
            "gates": everywhere,
            "threshold": threshold,
            "tie_end": tie_end,
            "positions": positions,
            "settings": settings_of(self.variants),
            "rows": [i % len(self.variants) for i in range(len(weights))],
            "block": list(self.block),
            **scalar,
        }

    def build_step(self) -> dict[str, Any]:
        """For `gsm_step_`, which finds the threshold by itself."""
        arguments = self.build()
        pool = sum(
            weight.numel()
            for weight, position in zip(arguments["weights"], arguments["positions"], strict=True)
            if position >= 0
        )
        for name in ("gates", "threshold", "tie_end", "block"):
            del arguments[name]
        return {**arguments, "num_kept": torch.tensor(round(self.kept * pool))}

    def _values(self, shape: Shape, random: torch.Generator) -> Tensor:
        if self.ties:
            return torch.randint(-2, 3, shape, generator=random).float() / 4
        return torch.randn(shape, generator=random)

    def _choice(
        self, weights: list[Tensor], gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """By a plain sort: the case does not depend on the operators that select."""
        dtype = torch.float64 if self.weight == torch.float64 else torch.float32
        if self.block != (1, 1):
            random = torch.Generator().manual_seed(self.seed)
            gates = [
                torch.rand(_grid(w.shape, self.block), generator=random) < 0.4 for w in weights
            ]
            return torch.zeros((), dtype=dtype), torch.tensor(0), gates
        pairs = zip(weights, gradients, strict=True)
        flat = [(w.to(dtype) * g.to(dtype)).abs().reshape(-1) for w, g in pairs]
        scores = torch.cat([torch.empty(0, dtype=dtype), *flat])
        count = round(self.kept * len(scores))
        if count == 0:
            return torch.tensor(torch.nan, dtype=dtype), torch.tensor(0), []
        threshold = scores.sort(descending=True).values[count - 1]
        ties = (scores == threshold).nonzero().flatten()
        first_dropped = count - int((scores > threshold).sum())
        end = ties[first_dropped] if first_dropped < len(ties) else torch.tensor(len(scores))
        return threshold.clone(), end.clone(), []


def _grid(shape: torch.Size, block: tuple[int, int]) -> Shape:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:]


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALL_VARIANTS = tuple(VARIANTS)
CASES = [
    *(Case(name, variants=(name,), seed=i) for i, name in enumerate(VARIANTS)),
    *(
        Case(f"{name}, fp64", variants=(name,), weight=torch.float64, gradient=torch.float64)
        for name in ("gsm", "nesterov", "dampening")
    ),
    Case("every variant in one call", variants=ALL_VARIANTS, outside=(0, 5)),
    Case("nothing kept", kept=0.0),
    Case("all kept", kept=1.0, variants=ALL_VARIANTS),
    Case("outside the pool only", outside=tuple(range(len(SHAPES)))),
    *(
        Case(f"{layout}, {share}", layout=layout, shapes=MATRICES, ties=True, tie_share=share)
        for layout in ("channels_last", "transposed")
        for share in (0.0, 0.4, 1.0)
    ),
    *(Case(f"ties cut at {share}", BIG, ties=True, tie_share=share) for share in (0.2, 0.5, 0.97)),
    *(Case(f"ties as selected, {kept}", ties=True, kept=kept) for kept in (0.2, 0.5, 0.9)),
    Case("big, fp32", BIG, variants=("gsm", "nesterov")),
    *(
        Case(f"{name}, {layout}", MATRICES, gradient=dtype, copy=dtype, layout=layout, seed=3)
        for name, dtype in HALVES.items()
        for layout in LAYOUTS
    ),
    *(
        Case(f"{name}, ties cut", BIG, gradient=dtype, copy=dtype, ties=True, tie_share=0.3)
        for name, dtype in HALVES.items()
    ),
    *(Case(f"{name} gradient, fp32 copy", gradient=dtype) for name, dtype in HALVES.items()),
    *(
        Case(f"blocks of {block}, {layout}", MATRICES, block=block, layout=layout)
        for block in ((2, 3), (16, 1), (1, 4), (64, 64))
        for layout in LAYOUTS
    ),
    Case("blocks, fp64", MATRICES, block=(4, 2), weight=torch.float64, gradient=torch.float64),
    Case("blocks, bf16", MATRICES, block=(4, 2), gradient=torch.bfloat16, copy=torch.bfloat16),
    Case("blocks, one tensor outside", MATRICES, block=(4, 2), outside=(2,)),
    *(
        Case(f"scale {scale}", grad_scale=scale, variants=ALL_VARIANTS)
        for scale in (65536.0, 3.0, 0.1)
    ),
    Case("scale, fp64", grad_scale=3.0, weight=torch.float64, gradient=torch.float64),
    Case("scale, bf16", grad_scale=3.0, gradient=torch.bfloat16, copy=torch.bfloat16),
    Case("found_inf 0", found_inf=0.0, grad_scale=1024.0),
    Case(
        "found_inf 1",
        found_inf=1.0,
        grad_scale=1024.0,
        copy=torch.bfloat16,
        gradient=torch.bfloat16,
    ),
    Case("NaN in gradients", special={0: torch.nan, 7: torch.nan}, kept=0.01),
    Case("infinite gradients", special={0: torch.inf, 2: -torch.inf}, kept=0.2),
]
# Those of which a step, not only an update, can be made.
STEP_CASES = [c for c in CASES if c.block == (1, 1) and c.tie_share is None]
CHANGED = ("weights", "momenta", "copies")


def results(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    return {name: arguments[name] for name in CHANGED}


def every_result() -> Iterator[dict[str, list[Tensor]]]:
    update, step = torch.ops.fastprune.gsm_update_, torch.ops.fastprune.gsm_step_
    runs = [(update, c.build()) for c in CASES] + [(step, c.build_step()) for c in STEP_CASES]
    for run, arguments in runs:
        run(**arguments)
        yield results(arguments)


if __name__ == "__main__":
    import fastprune  # noqa: F401  # loads the operators

    print_digest(every_result())
