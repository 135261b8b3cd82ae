"""Cases of the GSM step: beside torch's fused SGD, which selects nothing, and the eager method."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

import fastprune as fp

from . import shapes
from .case import Case, WrongAnswerError
from .shapes import Shape

SPARSITY = 0.9
HYPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes a parameter needs: two looks at the weight and the gradient, one at the momentum, and what
# is written. A bf16 parameter has a float32 master and a float32 momentum, and is written too.
BYTES = {"fp32": 8 + 12 + 8, "bf16": 6 + 10 + 10}


@dataclass(frozen=True)
class Inputs:
    values: list[Tensor]
    gradients: list[Tensor]

    def parameters(self) -> list[nn.Parameter]:
        """Copies of a candidate's own, since a step changes them."""
        copies = [nn.Parameter(v.clone()) for v in self.values]
        for parameter, gradient in zip(copies, self.gradients, strict=True):
            parameter.grad = gradient
        return copies


@dataclass(frozen=True)
class Stepped:
    """Parameters after steps of one kind; the first step is what is checked."""

    gated: bool
    parameters: list[nn.Parameter]


def make_inputs(
    shape_list: list[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, std: float) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor.normal_(0, std, generator=generator)

    values = [normal(shape, max(prod(shape[1:]), 1) ** -0.5) for shape in shape_list]
    return Inputs(values, [normal(shape, 1e-3) for shape in shape_list])


def stepping(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gated: bool
) -> Callable[[], Stepped]:
    def run() -> Stepped:
        optimizer.step()
        return Stepped(gated, parameters)

    return run


def ours(inputs: Inputs) -> Callable[[], Stepped]:
    parameters = inputs.parameters()
    return stepping(fp.optim.GSM(parameters, sparsity=SPARSITY, **HYPER), parameters, True)


def fused_sgd(inputs: Inputs) -> Callable[[], Stepped]:
    """Not GSM: what the same update costs without a selection."""
    parameters = inputs.parameters()
    return stepping(torch.optim.SGD(parameters, fused=True, **HYPER), parameters, False)


def eager(inputs: Inputs) -> Callable[[], Stepped]:
    """The published algorithm: concatenate, topk, a mask per tensor, plain SGD."""
    parameters = inputs.parameters()
    optimizer = torch.optim.SGD(parameters, **HYPER)
    pool = [p for p in parameters if p.dim() > 1]
    total = sum(p.numel() for p in pool)
    kept = fp.num_kept(SPARSITY, total)

    @torch.no_grad()
    def run() -> Stepped:
        scores = torch.cat([(p * p.grad).abs().flatten() for p in pool])
        threshold = scores.topk(kept).values[-1]
        held = [p.grad for p in pool]
        for p in pool:
            p.grad = p.grad * ((p * p.grad).abs() >= threshold).to(p.dtype)
        optimizer.step()
        for p, gradient in zip(pool, held, strict=True):
            p.grad = gradient
        return Stepped(True, parameters)

    return run


def first_steps(inputs: Inputs) -> dict[bool, list[Tensor]]:
    """Weights after a gated and after a plain step from zero momentum, in float64."""
    pool = [v.dim() > 1 for v in inputs.values]
    scores = [
        (v.float() * g.float()).abs()
        for v, g, p in zip(inputs.values, inputs.gradients, pool, strict=True)
        if p
    ]
    total = sum(s.numel() for s in scores)
    flat = torch.cat([s.flatten() for s in scores])
    threshold = flat.kthvalue(total - fp.num_kept(SPARSITY, total) + 1).values
    results: dict[bool, list[Tensor]] = {}
    for gated in (True, False):
        results[gated] = []
        for value, gradient, pooled in zip(inputs.values, inputs.gradients, pool, strict=True):
            w, g = value.double(), gradient.double()
            if gated and pooled:
                g = g * ((value.float() * gradient.float()).abs() >= threshold)
            results[gated].append(w - HYPER["lr"] * (g + HYPER["weight_decay"] * w))
    return results


def check(expected: dict[bool, list[Tensor]], answer: Stepped) -> None:
    for i, (wanted, got) in enumerate(zip(expected[answer.gated], answer.parameters, strict=True)):
        tolerance, least = (1e-6, 1e-3) if got.dtype == torch.float32 else (2**-7, 1e-2)
        wrong = (got.detach().double() - wanted).abs() > tolerance * (least + wanted.abs())
        # Of those that tie at the threshold the published algorithm lets in all.
        ties = 16 if got.dtype == torch.float32 else wrong.numel() // 1000 + 16
        if int(wrong.sum()) > ties:
            raise WrongAnswerError(f"weights of tensor {i} differ after a step")


def _case(label: str, dtype: str, shape_list: list[Shape]) -> Case:
    elements = shapes.count(shape_list)
    return Case(
        name=f"gsm_step/{label}/{dtype}",
        make=partial(make_inputs, shape_list, DTYPES[dtype]),
        function=ours,
        rivals={"torch SGD fused, no selection": fused_sgd, "eager GSM": eager},
        expect=first_steps,
        check=check,
        reads=lambda inputs: [*inputs.values, *inputs.gradients],
        bytes_moved=elements * BYTES[dtype],
        flops=elements * 6,  # a product for the score, three multiply-adds with one rounding each
    )


def definitions() -> Iterator[Case]:
    for label, shape_list in (
        ("resnet50", shapes.resnet50()),
        ("tiny", shapes.TINY),
        ("elements161", [(1,) * len(s) for s in shapes.resnet50()]),  # the fixed cost
    ):
        for dtype in DTYPES:
            yield _case(label, dtype, shape_list)
