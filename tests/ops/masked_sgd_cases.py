"""The cases every back end of the masked step must agree on, to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.reference.masked_sgd import packed
from tests.ops.gsm_cases import (
    ALL_VARIANTS,
    BIG,
    HALVES,
    LAYOUTS,
    MATRICES,
    SHAPES,
    VARIANTS,
    Shape,
    settings_of,
)
from tests.ops.machine import print_digest


@dataclass(frozen=True)
class Case:
    """Data from which `build` makes the operator's arguments, the same ones each time."""

    label: str
    shapes: tuple[Shape, ...] = SHAPES
    variants: tuple[str, ...] = ("plain",)  # tensor i takes number i, round and round
    weight: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    copy: torch.dtype | None = None
    layout: str = "contiguous"
    kept: float = 0.3
    dense: tuple[int, ...] = ()  # without a mask
    without_buffer: tuple[int, ...] = ()
    shift: int = 0  # elements between a vector boundary and the first element
    grad_scale: float | None = None
    found_inf: float | None = None
    seed: int = 0
    special: dict[int, float] = field(default_factory=dict)  # tensor -> a value in all its parts

    def build(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(self.seed)
        weights, momenta, gradients = (
            [self._tensor(shape, dtype, random) for shape in self.shapes]
            for dtype in (self.weight, self.weight, self.gradient)
        )
        for i, value in self.special.items():
            for tensor in (weights[i], momenta[i], gradients[i]):
                tensor.view(-1)[::5] = value
        copies = [self._placed(w.to(self.copy)) for w in weights] if self.copy else []
        masks = [
            packed(torch.empty_like(w, dtype=torch.bool).copy_(m))
            for w, m in zip(weights, self.masks(), strict=True)
        ]
        for i in self.dense:
            masks[i] = masks[i].new_empty(0)
        for i in self.without_buffer:
            momenta[i] = momenta[i].new_empty(0)
        scalar = {
            name: None if value is None else torch.tensor(value)
            for name, value in (("grad_scale", self.grad_scale), ("found_inf", self.found_inf))
        }
        return {
            "weights": weights,
            "momenta": momenta,
            "copies": copies,
            "gradients": gradients,
            "masks": masks,
            "settings": settings_of(self.variants),
            "rows": [i % len(self.variants) for i in range(len(weights))],
            **scalar,
        }

    def masks(self) -> list[Tensor]:
        """Row-major, True where kept."""
        random = torch.Generator().manual_seed(self.seed + 1)
        return [torch.rand(shape, generator=random) < self.kept for shape in self.shapes]

    def _tensor(self, shape: Shape, dtype: torch.dtype, random: torch.Generator) -> Tensor:
        return self._placed(LAYOUTS[self.layout](torch.randn(shape, generator=random).to(dtype)))

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor in memory of its own that begins `shift` elements behind a boundary."""
        memory = tensor.new_empty(tensor.numel() + self.shift)
        placed = memory.as_strided(tensor.shape, tensor.stride(), self.shift)
        return placed.copy_(tensor)


CASES = [
    *(Case(name, variants=(name,), seed=i) for i, name in enumerate(VARIANTS)),
    *(
        Case(f"{name}, fp64", variants=(name,), weight=torch.float64, gradient=torch.float64)
        for name in ("plain", "nesterov", "dampening")
    ),
    Case("every variant in one call", variants=ALL_VARIANTS, dense=(0, 5)),
    Case("nothing kept", kept=0.0, variants=ALL_VARIANTS),
    Case("all kept", kept=1.1, variants=ALL_VARIANTS),
    Case("no masks", dense=tuple(range(len(SHAPES))), variants=ALL_VARIANTS),
    Case("no buffers", without_buffer=tuple(range(len(SHAPES))), variants=ALL_VARIANTS),
    Case("some buffers", without_buffer=(2, 3, 5), variants=ALL_VARIANTS),
    Case("no buffers, no masks", without_buffer=(0, 2, 5), dense=(0, 1, 2)),
    *(Case(f"{layout}", MATRICES, layout=layout) for layout in ("channels_last", "transposed")),
    *(Case(f"begins at {shift}", BIG, shift=shift) for shift in (1, 2, 3)),
    Case("begins at 1, fp64", BIG, shift=1, weight=torch.float64, gradient=torch.float64),
    Case("begins at 3, bf16", shift=3, gradient=torch.bfloat16, copy=torch.bfloat16),
    Case("big", BIG, variants=("plain", "nesterov")),
    Case("big, fp64", BIG, weight=torch.float64, gradient=torch.float64),
    *(
        Case(f"{name}, {layout}", MATRICES, gradient=dtype, copy=dtype, layout=layout, seed=3)
        for name, dtype in HALVES.items()
        for layout in LAYOUTS
    ),
    *(
        Case(f"{name}, no buffers", gradient=dtype, copy=dtype, without_buffer=(2, 5), seed=4)
        for name, dtype in HALVES.items()
    ),
    *(Case(f"{name}, big", BIG, gradient=dtype, copy=dtype) for name, dtype in HALVES.items()),
    *(Case(f"{name} gradient, fp32 copy", gradient=dtype) for name, dtype in HALVES.items()),
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
    Case("NaN", special={0: torch.nan, 7: torch.nan}, variants=ALL_VARIANTS),
    Case("infinities", special={0: torch.inf, 2: -torch.inf}),
    Case("NaN, bf16", special={5: torch.nan}, gradient=torch.bfloat16, copy=torch.bfloat16),
]
CHANGED = ("weights", "momenta", "copies")


def results(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    return {name: arguments[name] for name in CHANGED}


def every_result() -> Iterator[dict[str, list[Tensor]]]:
    for case in CASES:
        arguments = case.build()
        torch.ops.fastprune.masked_sgd_(**arguments)
        yield results(arguments)


if __name__ == "__main__":
    import fastprune  # noqa: F401  # loads the operators

    print_digest(every_result())
