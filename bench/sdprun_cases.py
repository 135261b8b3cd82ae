"""Cases of the SDprun step: beside torch's fused momentum SGD, and the method in eager torch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp

from . import optimizer_steps
from .case import Case
from .optimizer_steps import PLAIN, Inputs, Step, step_cases, stepping

LR, C, MU = 0.01, 0.1, 0.6
THRESHOLD = C * LR ** (0.5 + MU)  # of the first step
# Bytes a parameter needs: the gradient and v are read, v and w written. The weight of a bf16
# parameter and its gradient have two bytes; v has four.
BYTES = {"fp32": 16, "bf16": 2 + 4 + 4 + 2}


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


def ours(grouping: str, inputs: Inputs) -> Step:
    parameters = inputs.parameters()
    optimizer = fp.optim.SDprun(GROUPINGS[grouping](parameters), LR, c=C, mu=MU)
    return stepping(optimizer.step, grouping, parameters)


def eager(grouping: str, inputs: Inputs) -> Step:
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
    results = {PLAIN: stepped}
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


def definitions() -> Iterator[Case]:
    # Not SDprun: momentum SGD, which moves 20 bytes of a float32 parameter.
    sgd = partial(optimizer_steps.fused_sgd, lr=LR, momentum=0.9)
    for grouping in GROUPINGS:
        yield from step_cases(
            f"sdprun_step.{grouping}",
            partial(ours, grouping),
            {"torch SGD momentum fused": sgd, "eager SDprun": partial(eager, grouping)},
            first_steps,
            bytes_each=BYTES,
            flops_each=5,  # a multiply-add for v, one for the norm, a product for w
            labels=("resnet50", "tiny"),
        )
