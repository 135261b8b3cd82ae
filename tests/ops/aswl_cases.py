"""The cases every back end of ASWL's step must agree on, to the bit, step after step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.reference import aswl
from fastprune.ops.reference.aswl import BOTH, PLAIN, PRUNED, SCALED, SETTINGS
from tests.ops.gsm_cases import LAYOUTS
from tests.ops.machine import print_digest

Shape = tuple[int, ...]
Layer = tuple[tuple[Shape, int], ...]  # shapes and roles; one of role PLAIN is of no layer

NETWORK: tuple[Layer, ...] = (
    (((16, 3, 3, 3), BOTH), ((16,), SCALED)),
    (((16,), PLAIN),),
    (((40, 65), BOTH),),
    (((0,), PLAIN),),
    (((13, 7, 3, 3), BOTH), ((13,), SCALED)),
    (((1,), BOTH),),
    (((5, 129), BOTH), ((5,), SCALED)),
)
POOLED: tuple[Layer, ...] = tuple(
    tuple((shape, BOTH if role == SCALED else role) for shape, role in layer) for layer in NETWORK
)
POST_BN: tuple[Layer, ...] = (
    (((33, 10, 3, 3), PRUNED), ((33,), SCALED), ((33,), SCALED)),
    (((9, 33), BOTH), ((9,), SCALED)),
)
# More than one chunk of work, runs that end within a line, and a tensor of less than a line.
BIG: tuple[Layer, ...] = (
    (((300, 301), BOTH), ((300,), SCALED)),
    (((64, 32, 3, 3), BOTH),),
    (((20_001,), PLAIN),),
    (((7, 3), BOTH),),
)
HYPER = {"lr": 0.1, "momentum": 0.9, "attention_lr": 1e-3, "alpha": 1.0, "target": 0.4,
         "density_weight": 1.0, "gain": 0.3}  # fmt: skip
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHANGED = ("parameters", "dense", "momenta", "attention", "tie_end", "multiplier")
STEPS = 3


@dataclass(frozen=True)
class Case:
    """Data from which `build` makes the operator's arguments, the same ones each time."""

    label: str
    network: tuple[Layer, ...] = NETWORK
    weight: torch.dtype = torch.float32
    parameter: torch.dtype | None = None  # and of the gradient; None: as the weight
    layout: str = "contiguous"
    attention: float = 0.4
    levels: int | None = None  # so many distinct values of each sign, so that there are ties
    keep_ties: bool = False
    options: tuple[tuple[str, float], ...] = ()  # of the settings
    misled: float | None = None  # a threshold that is not that of the weights
    buffers: bool = True
    still: tuple[int, ...] = ()  # tensors without a gradient
    shift: int = 0  # elements between a vector boundary and the first element
    grad_scale: float | None = None
    found_inf: float | None = None
    nan: tuple[str, ...] = ()  # lists that hold NaN, infinities and zeros of both signs
    seed: int = 0

    def build(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(self.seed)
        flat = [pair for layer in self.network for pair in layer]
        numbers = self._layers()
        dense, momenta, gradients = (
            [self._tensor(scale * torch.randn(s, generator=random)) for s, _ in flat]
            for scale in (1.0, 0.01, 0.01)
        )
        if self.levels is not None:
            dense = [(w * self.levels).round() / self.levels for w in dense]
        half = self.parameter or self.weight
        parameters = [self._placed(w.to(half)) for w in dense]
        gradients = [self._placed(g.to(half)) for g in gradients]
        for name, tensors in (("dense", dense), ("momenta", momenta), ("gradients", gradients)):
            if name in self.nan:
                for tensor in tensors:
                    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
                        tensor.view(-1)[i + 1 :: 11] = value
        for i in self.still:
            gradients[i] = gradients[i].new_empty(0)
        for i, number in enumerate(numbers):
            if number < 0 and self.parameter is None:
                dense[i] = dense[i].new_empty(0)
        settings = torch.tensor(
            [(HYPER | {"l2": 0.0} | dict(self.options))[name] for name in SETTINGS],
            dtype=torch.float64,
        )
        attention = torch.zeros(max(numbers) + 1, 3, dtype=torch.float64)
        attention[:, 0] = self.attention
        arguments = {
            "parameters": parameters,
            "dense": dense,
            "momenta": momenta if self.buffers else [],
            "attention": attention,
            "tie_end": torch.zeros(len(attention), dtype=torch.int64),
            "multiplier": torch.zeros((), dtype=torch.float64),
            "gradients": gradients,
            "settings": settings,
            "layers": numbers,
            "roles": [role for _, role in flat],
            "keep_ties": self.keep_ties,
            **{
                name: None if value is None else torch.tensor(value)
                for name, value in (("grad_scale", self.grad_scale), ("found_inf", self.found_inf))
            },
        }
        self._choose(arguments)
        return arguments

    def _choose(self, arguments: dict[str, Any]) -> None:
        """Thresholds of the weights as they are, or others."""
        weights = [
            d if d.numel() else p
            for d, p in zip(arguments["dense"], arguments["parameters"], strict=True)
        ]
        table, end = arguments["attention"], arguments["tie_end"]
        lists = arguments["layers"], arguments["roles"]
        aswl.choose(table, end, weights, arguments["settings"], *lists, self.keep_ties)
        if self.misled is not None:
            table[:, 2], end[:] = self.misled, 5

    def _layers(self) -> list[int]:
        numbers, next_ = [], 0
        for layer in self.network:
            is_plain = layer[0][1] == PLAIN
            numbers += [-1 if is_plain else next_] * len(layer)
            next_ += not is_plain
        return numbers

    def _tensor(self, values: Tensor) -> Tensor:
        return self._placed(LAYOUTS[self.layout](values.to(self.weight)))

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor in memory of its own that begins `shift` elements behind a boundary."""
        memory = tensor.new_empty(tensor.numel() + self.shift)
        return memory.as_strided(tensor.shape, tensor.stride(), self.shift).copy_(tensor)


L2 = (("l2", 1e-2),)
ALL = ("dense", "momenta", "gradients")
CASES = [
    Case("plain"),
    Case("l2", options=L2),
    Case("no buffers", buffers=False, options=L2),
    Case("no momentum", options=(("momentum", 0.0),)),
    Case("pooled biases", POOLED, options=L2),
    Case("post_bn", POST_BN, options=L2),
    Case("post_bn, pooled", POST_BN, attention=0.9, seed=1),
    Case("big", BIG, options=L2),
    Case("fp64", BIG, weight=torch.float64, options=L2),
    Case("fp64, post_bn", POST_BN, weight=torch.float64),
    Case("attention moves fast", BIG, options=(("attention_lr", 0.05), ("density_weight", 100.0))),
    Case("threshold of others", BIG, misled=3.0),
    Case("threshold 0", BIG, misled=0.0, options=L2),
    Case("threshold 0, fp64", POST_BN, misled=0.0, weight=torch.float64),
    Case("all kept", attention=1.0, options=(("attention_lr", 0.0),)),
    Case("all kept, ties", attention=1.0, levels=3, options=(("attention_lr", 0.0),)),
    Case("fewest kept", attention=0.01, options=(("attention_lr", 0.0),)),
    *(
        Case(f"alpha {alpha}", POST_BN, options=(("alpha", alpha),), attention=a, seed=2)
        for alpha, a in ((0.5, 0.3), (2.0, 0.1))
    ),
    *(
        Case(
            f"ties, {'kept' if keep else 'cut'}, {layout}",
            network,
            levels=2,
            keep_ties=keep,
            layout=layout,
            options=(("lr", 0.0), *L2),
        )
        for network, layout in ((BIG, "contiguous"), (POOLED, "channels_last"))
        for keep in (False, True)
    ),
    Case("constant", levels=0, options=(("lr", 0.0),)),
    *(Case(f"{layout}", BIG, layout=layout) for layout in ("channels_last", "transposed")),
    *(Case(f"begins at {shift}", BIG, shift=shift) for shift in (1, 2, 3)),
    Case("begins at 1, fp64", POST_BN, shift=1, weight=torch.float64),
    *(
        Case(f"{name}, {layout}", network, parameter=dtype, layout=layout, shift=shift, options=L2)
        for name, dtype in HALVES.items()
        for layout, network, shift in (
            ("contiguous", BIG, 0),
            ("channels_last", POOLED, 3),
            ("transposed", POST_BN, 1),
        )
    ),
    *(Case(f"{name}, ties", BIG, parameter=dtype, levels=4) for name, dtype in HALVES.items()),
    Case("some stand still", still=(0, 2, 5), options=L2),
    Case("all stand still", still=tuple(range(10)), options=(("attention_lr", 0.0),)),
    Case("stand still, bf16", POST_BN, parameter=torch.bfloat16, still=(0, 1, 4)),
    *(Case(f"scale {scale}", grad_scale=scale) for scale in (65536.0, 3.0)),
    Case("scale, bf16", grad_scale=3.0, parameter=torch.bfloat16, options=L2),
    Case("scale, fp64", grad_scale=3.0, weight=torch.float64),
    Case("found_inf 0", found_inf=0.0, grad_scale=1024.0),
    Case("found_inf 1", BIG, found_inf=1.0, grad_scale=1024.0, parameter=torch.bfloat16),
    Case("NaN", BIG, nan=ALL, options=L2),
    Case("NaN weights", POST_BN, nan=("dense",)),
    Case("NaN gradients", nan=("gradients",), options=L2),
    Case("NaN, fp64", POST_BN, nan=ALL, weight=torch.float64),
    Case("NaN, fp16", POST_BN, nan=ALL, parameter=torch.float16),
    Case("no layers", ((((33, 10), PLAIN),), (((5,), PLAIN),))),
]


def results(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in CHANGED}


def all_results() -> Iterator[dict[str, Any]]:
    for case in CASES:
        arguments = case.build()
        for _ in range(STEPS):
            torch.ops.fastprune.aswl_step_(**arguments)
        yield results(arguments)


if __name__ == "__main__":
    import fastprune  # noqa: F401  # loads the operators

    print_digest(all_results())
