"""Cases of the GSM step: beside torch's fused SGD, which selects nothing, and the eager method."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import fastprune as fp

from . import optimizer_steps
from .case import Case
from .optimizer_steps import HYPER, PLAIN, Inputs, Step, step_cases, stepping

SPARSITY = 0.9
GATED = "gated"  # the kind of a step
# Bytes a parameter needs: two looks at the weight and the gradient, one at the momentum, and what
# is written. A bf16 parameter has a float32 master and a float32 momentum, and is written too.
BYTES = {"fp32": 8 + 12 + 8, "bf16": 6 + 10 + 10}


def ours(inputs: Inputs) -> Step:
    parameters = inputs.parameters()
    optimizer = fp.optim.GSM(parameters, sparsity=SPARSITY, **HYPER)
    return stepping(optimizer.step, GATED, parameters)


def eager(inputs: Inputs) -> Step:
    """The published algorithm: concatenate, topk, a mask per tensor, plain SGD."""
    parameters = inputs.parameters()
    optimizer = torch.optim.SGD(parameters, **HYPER)
    pool = [p for p in parameters if p.dim() > 1]
    total = sum(p.numel() for p in pool)
    kept = fp.num_kept(SPARSITY, total)

    @torch.no_grad()
    def step() -> None:
        scores = torch.cat([(p * p.grad).abs().flatten() for p in pool])
        threshold = scores.topk(kept).values[-1]
        held = [p.grad for p in pool]
        for p in pool:
            p.grad = p.grad * ((p * p.grad).abs() >= threshold).to(p.dtype)
        optimizer.step()
        for p, gradient in zip(pool, held, strict=True):
            p.grad = gradient

    return stepping(step, GATED, parameters)


def first_steps(inputs: Inputs) -> dict[str, list[Tensor]]:
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
    results: dict[str, list[Tensor]] = {GATED: [], PLAIN: []}
    for kind, result in results.items():
        for value, gradient, pooled in zip(inputs.values, inputs.gradients, pool, strict=True):
            w, g = value.double(), gradient.double()
            if kind == GATED and pooled:
                g = g * ((value.float() * gradient.float()).abs() >= threshold)
            result.append(w - HYPER["lr"] * (g + HYPER["weight_decay"] * w))
    return results


def definitions() -> Iterator[Case]:
    return step_cases(
        "gsm_step",
        ours,
        {
            "torch SGD fused, no selection": partial(optimizer_steps.fused_sgd, **HYPER),
            "eager GSM": eager,
        },
        first_steps,
        bytes_each=BYTES,
        flops_each=6,  # a product for the score, three multiply-adds with one rounding each
        # Of those that tie at the threshold the published algorithm lets in all.
        check=partial(optimizer_steps.check, ties=16, bf16_ties=1e-3),
    )
