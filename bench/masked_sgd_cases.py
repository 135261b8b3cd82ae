"""Cases of the masked step: beside torch's fused SGD, which prunes nothing, and SGD with masks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import torch
from torch import Tensor, nn

import fastprune as fp

from . import shapes
from .case import Case, WrongAnswerError
from .gsm_cases import DTYPES, HYPER, Inputs
from .gsm_cases import make_inputs as make_dense
from .shapes import Shape

SPARSITY = 0.9
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


@dataclass(frozen=True)
class Stepped:
    """Parameters after steps of one kind; the first step is what is checked."""

    masked: bool
    parameters: list[nn.Parameter]


def make_inputs(
    shape_list: list[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> Masked:
    dense = make_dense(shape_list, dtype, device, seed)
    random = torch.Generator(device).manual_seed(seed + 1)
    masks = [
        torch.rand(v.shape, generator=random, device=device) >= SPARSITY if v.dim() > 1 else None
        for v in dense.values
    ]
    return Masked(dense.values, dense.gradients, masks)


def ours(inputs: Masked) -> Callable[[], Stepped]:
    parameters = inputs.parameters()
    optimizer = fp.optim.MaskedSGD(parameters, masks=inputs.mask_set(parameters), **HYPER)

    def run() -> Stepped:
        optimizer.step()
        return Stepped(True, parameters)

    return run


def fused_sgd(inputs: Masked) -> Callable[[], Stepped]:
    """What the same update costs without a mask."""
    parameters = inputs.parameters()
    optimizer = torch.optim.SGD(parameters, fused=True, **HYPER)

    def run() -> Stepped:
        optimizer.step()
        return Stepped(False, parameters)

    return run


def multiplied(inputs: Masked) -> Callable[[], Stepped]:
    """The usual way: a step, then weights times masks. Momenta of pruned weights live on."""
    parameters = inputs.parameters()
    optimizer = torch.optim.SGD(parameters, fused=True, **HYPER)
    pruned = [p for p, m in zip(parameters, inputs.masks, strict=True) if m is not None]
    factors = [
        m.to(p.dtype) for p, m in zip(parameters, inputs.masks, strict=True) if m is not None
    ]

    @torch.no_grad()
    def run() -> Stepped:
        optimizer.step()
        torch._foreach_mul_(pruned, factors)
        return Stepped(True, parameters)

    return run


def wrapped(inputs: Masked) -> Callable[[], Stepped]:
    """The same guarantee for any optimizer: zeros written into weights and momenta by a hook."""
    parameters = inputs.parameters()
    sgd = torch.optim.SGD(parameters, fused=True, **HYPER)
    optimizer = fp.optim.masked(sgd, inputs.mask_set(parameters))

    def run() -> Stepped:
        optimizer.step()
        return Stepped(True, parameters)

    return run


def first_steps(inputs: Masked) -> dict[bool, list[Tensor]]:
    """Weights after a masked and after a plain step from zero momentum, in float64."""

    def after(value: Tensor, gradient: Tensor) -> Tensor:
        w, g = value.double(), gradient.double()
        return w - HYPER["lr"] * (g + HYPER["weight_decay"] * w)

    plain = list(starmap(after, zip(inputs.values, inputs.gradients, strict=True)))
    pairs = zip(plain, inputs.masks, strict=True)
    return {False: plain, True: [w if m is None else w * m for w, m in pairs]}


def check(expected: dict[bool, list[Tensor]], answer: Stepped) -> None:
    for i, (wanted, got) in enumerate(zip(expected[answer.masked], answer.parameters, strict=True)):
        tolerance, least = (1e-6, 1e-3) if got.dtype == torch.float32 else (2**-7, 1e-2)
        wrong = (got.detach().double() - wanted).abs() > tolerance * (least + wanted.abs())
        if wrong.any() or (answer.masked and got.detach()[wanted == 0].any()):
            raise WrongAnswerError(f"weights of tensor {i} differ after a step")


def _case(label: str, dtype: str, shape_list: list[Shape]) -> Case:
    elements = shapes.count(shape_list)
    masked = shapes.count([shape for shape in shape_list if len(shape) > 1])
    return Case(
        name=f"masked_sgd_step/{label}/{dtype}",
        make=partial(make_inputs, shape_list, DTYPES[dtype]),
        function=ours,
        rivals={
            "torch SGD fused, no masks": fused_sgd,
            "torch SGD fused, weights times masks": multiplied,
            "masked(torch SGD fused)": wrapped,
        },
        expect=first_steps,
        check=check,
        reads=lambda inputs: [*inputs.values, *inputs.gradients],
        bytes_moved=elements * BYTES[dtype] + masked // 8,
        flops=elements * 7,  # a product and three multiply-adds with one rounding each
    )


def definitions() -> Iterator[Case]:
    for label, shape_list in (
        ("resnet50", shapes.resnet50()),
        ("tiny", shapes.TINY),
        ("elements161", [(1,) * len(s) for s in shapes.resnet50()]),  # the fixed cost
    ):
        for dtype in DTYPES:
            yield _case(label, dtype, shape_list)
