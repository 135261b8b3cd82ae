"""Cases of the SDprun step: beside torch's fused momentum SGD, and the method in eager torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp

from . import shapes
from .case import Case, WrongAnswerError
from .gsm_cases import DTYPES, Inputs, make_inputs
from .shapes import Shape

LR, C, MU = 0.01, 0.1, 0.6
THRESHOLD = C * LR ** (0.5 + MU)  # of the first step
MOMENTUM = {"lr": LR, "momentum": 0.9}
# Bytes a parameter needs: the gradient and v are read, v and w written. The weight of a bf16
# parameter and its gradient have two bytes; v has four.
BYTES = {"fp32": 16, "bf16": 2 + 4 + 4 + 2}


@dataclass(frozen=True)
class Stepped:
    """Parameters after steps of one kind; the first step is what is checked."""

    kind: str
    parameters: list[nn.Parameter]


def row_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Every matrix and convolution by its rows; the rest is not pruned."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "prune": True},
        {"params": [p for p in parameters if p.dim() < 2], "prune": False},
    ]


def coupled_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Each convolution with the vectors that follow it, as many as have its channels."""
    layers: list[list[nn.Parameter]] = []
    for p in parameters:
        if p.dim() > 1 or not layers or len(p) != len(layers[-1][0]):
            layers.append([])
        layers[-1].append(p)
    return [{"params": layer, "prune": True, "coupled": True} for layer in layers]


GROUPINGS = {"rows": row_groups, "coupled": coupled_groups}


def stepping(step: Callable[[], Any], kind: str, parameters: list[nn.Parameter]) -> Any:
    def run() -> Stepped:
        step()
        return Stepped(kind, parameters)

    return run


def ours(grouping: str, inputs: Inputs) -> Callable[[], Stepped]:
    parameters = inputs.parameters()
    optimizer = fp.optim.SDprun(GROUPINGS[grouping](parameters), LR, c=C, mu=MU)
    return stepping(optimizer.step, grouping, parameters)


def fused_sgd(inputs: Inputs) -> Callable[[], Stepped]:
    """Not SDprun: momentum SGD, which moves 20 bytes of a float32 parameter."""
    parameters = inputs.parameters()
    return stepping(torch.optim.SGD(parameters, fused=True, **MOMENTUM).step, "plain", parameters)


def eager(grouping: str, inputs: Inputs) -> Callable[[], Stepped]:
    """The method tensor by tensor, as an optimizer written in torch does it."""
    parameters = inputs.parameters()
    groups = GROUPINGS[grouping](parameters)
    held = {p: p.detach().float().clone() for p in parameters}
    steps = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal steps
        steps += 1
        threshold = THRESHOLD * steps**MU
        for group in groups:
            for p in group["params"]:
                held[p].sub_(p.grad, alpha=LR)
            coupled = [group["params"]] if group.get("coupled") else [[p] for p in group["params"]]
            for members in coupled:
                if not group["prune"]:
                    members[0].copy_(held[members[0]])
                    continue
                squares = sum(
                    held[p].flatten(1 if p.dim() > 1 else 0).square().sum(-1)
                    if p.dim() > 1
                    else held[p].square()
                    for p in members
                )
                factor = (1 - threshold / squares.sqrt()).clamp(min=0)
                for p in members:
                    p.copy_(held[p] * factor.view(-1, *[1] * (p.dim() - 1)))

    return stepping(step, grouping, parameters)


def first_steps(inputs: Inputs) -> dict[str, list[Tensor]]:
    """Weights after one step of each kind, in float64."""
    stepped = [
        w.double() - LR * g.double() for w, g in zip(inputs.values, inputs.gradients, strict=True)
    ]
    results = {"plain": stepped}
    parameters = [nn.Parameter(w) for w in stepped]
    for name, grouping in GROUPINGS.items():
        shrunk: dict[nn.Parameter, Tensor] = {}
        for group in grouping(parameters):
            members = group["params"]
            for run in [members] if group.get("coupled") else [[p] for p in members]:
                rows = torch.cat([p.detach().view(len(p), -1) for p in run], 1)
                factor = (1 - THRESHOLD / rows.norm(dim=1)).clamp(min=0)
                for p in run:
                    each = factor.view(-1, *[1] * (p.dim() - 1)) if group["prune"] else 1.0
                    shrunk[p] = p.detach() * each
        results[name] = [shrunk[p] for p in parameters]
    return results


def check(expected: dict[str, list[Tensor]], answer: Stepped) -> None:
    for i, (wanted, got) in enumerate(zip(expected[answer.kind], answer.parameters, strict=True)):
        tolerance, least = (1e-6, 1e-3) if got.dtype == torch.float32 else (2**-7, 1e-2)
        wrong = (got.detach().double() - wanted).abs() > tolerance * (least + wanted.abs())
        if bool(wrong.any()):
            raise WrongAnswerError(f"weights of tensor {i} differ after a step")


def _case(grouping: str, label: str, dtype: str, shape_list: list[Shape]) -> Case:
    elements = shapes.count(shape_list)
    return Case(
        name=f"sdprun_step.{grouping}/{label}/{dtype}",
        make=partial(make_inputs, shape_list, DTYPES[dtype]),
        function=partial(ours, grouping),
        rivals={"torch SGD momentum fused": fused_sgd, "eager SDprun": partial(eager, grouping)},
        expect=first_steps,
        check=check,
        reads=lambda inputs: [*inputs.values, *inputs.gradients],
        bytes_moved=elements * BYTES[dtype],
        flops=elements * 5,  # a multiply-add for v, one for the norm, a product for w
    )


def definitions() -> Iterator[Case]:
    for label, shape_list in (("resnet50", shapes.resnet50()), ("tiny", shapes.TINY)):
        for grouping in GROUPINGS:
            for dtype in DTYPES:
                yield _case(grouping, label, dtype, shape_list)
