"""Cases of the masked step: beside torch's fused SGD, which prunes nothing, and SGD with masks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap

import torch
from torch import Tensor, nn

import fastprune as fp

from . import optimizer_steps, shapes
from .case import Case, WrongAnswerError
from .optimizer_steps import HYPER, PLAIN, SHAPES, Inputs, Step, Stepped, step_cases, stepping
from .shapes import Shape

SPARSITY = 0.9
MASKED = "masked"  # the kind of a step
# What is read (weight, momentum, gradient) and written; a bf16 parameter has a float32 master and
# a float32 momentum, and is written too. The mask adds a bit.
BYTES = {"fp32": 12 + 8, "bf16": 10 + 10}


@dataclass(frozen=True)
class Masked(Inputs):
    masks: list[Tensor | None]  # a bool tensor for every matrix

    def mask_set(self, parameters: list[nn.Parameter]) -> fp.MaskSet:
        pairs = zip(self.masks, parameters, strict=True)
        found = {str(i): (m, p) for i, (m, p) in enumerate(pairs) if m is not None}
        return fp.MaskSet(
            {i: m for i, (m, _) in found.items()}, {i: p for i, (_, p) in found.items()}
        )


def make_inputs(
    shape_list: list[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> Masked:
    dense = optimizer_steps.make_inputs(shape_list, dtype, device, seed)
    random = torch.Generator(device).manual_seed(seed + 1)
    masks = [
        torch.rand(v.shape, generator=random, device=device) >= SPARSITY if v.dim() > 1 else None
        for v in dense.values
    ]
    return Masked(dense.values, dense.gradients, masks)


def ours(inputs: Masked) -> Step:
    parameters = inputs.parameters()
    optimizer = fp.optim.MaskedSGD(parameters, masks=inputs.mask_set(parameters), **HYPER)
    return stepping(optimizer.step, MASKED, parameters)


def multiplied(inputs: Masked) -> Step:
    """The usual way: a step, then weights times masks. Momenta of pruned weights live on."""
    parameters = inputs.parameters()
    optimizer = torch.optim.SGD(parameters, fused=True, **HYPER)
    pairs = [(p, m) for p, m in zip(parameters, inputs.masks, strict=True) if m is not None]
    pruned, factors = [p for p, _ in pairs], [m.to(p.dtype) for p, m in pairs]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_mul_(pruned, factors)

    return stepping(step, MASKED, parameters)


def wrapped(inputs: Masked) -> Step:
    """The same guarantee for any optimizer: zeros written into weights and momenta by a hook."""
    parameters = inputs.parameters()
    sgd = torch.optim.SGD(parameters, fused=True, **HYPER)
    optimizer = fp.optim.masked(sgd, inputs.mask_set(parameters))
    return stepping(optimizer.step, MASKED, parameters)


def first_steps(inputs: Masked) -> dict[str, list[Tensor]]:
    """Weights after a masked and after a plain step from zero momentum, in float64."""

    def after(value: Tensor, gradient: Tensor) -> Tensor:
        w, g = value.double(), gradient.double()
        return w - HYPER["lr"] * (g + HYPER["weight_decay"] * w)

    plain = list(starmap(after, zip(inputs.values, inputs.gradients, strict=True)))
    pairs = zip(plain, inputs.masks, strict=True)
    return {PLAIN: plain, MASKED: [w if m is None else w * m for w, m in pairs]}


def check(expected: dict[str, list[Tensor]], answer: Stepped) -> None:
    optimizer_steps.check(expected, answer)
    pairs = zip(expected[answer.kind], answer.parameters, strict=True)
    if answer.kind == MASKED and any(got.detach()[wanted == 0].any() for wanted, got in pairs):
        raise WrongAnswerError("a pruned weight is not zero after a step")


def definitions() -> Iterator[Case]:
    cases = step_cases(
        "masked_sgd_step",
        ours,
        {
            "torch SGD fused, no masks": partial(optimizer_steps.fused_sgd, **HYPER),
            "torch SGD fused, weights times masks": multiplied,
            "masked(torch SGD fused)": wrapped,
        },
        first_steps,
        bytes_each=BYTES,
        flops_each=7,  # a product and three multiply-adds with one rounding each
        make=make_inputs,
        check=check,
    )
    for case in cases:
        bits = shapes.count([shape for shape in SHAPES[case.label] if len(shape) > 1])
        yield replace(case, bytes_moved=case.bytes_moved + bits // 8)
