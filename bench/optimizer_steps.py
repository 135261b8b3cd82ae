"""What the cases of one optimizer step share: inputs, a step to time, its check, their list."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import shapes
from .case import Case, Prepare, WrongAnswerError
from .shapes import DTYPES, Shape

HYPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
SHAPES = {
    "resnet50": shapes.resnet50(),
    "tiny": shapes.TINY,
    "elements161": [(1,) * len(s) for s in shapes.resnet50()],  # the fixed cost
}
PLAIN = "plain"  # the kind of a step that prunes nothing


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

    kind: str
    parameters: list[nn.Parameter]


Step = Callable[[], Stepped]
Expected = Mapping[str, Sequence[Tensor]]  # by kind: parameters after one step, in float64


def make_inputs(
    shape_list: list[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    weights = shapes.random_weights(shape_list, dtype, random)
    return Inputs(weights, shapes.random_gradients(shape_list, dtype, random))


def stepping(step: Callable[[], object], kind: str, parameters: list[nn.Parameter]) -> Step:
    def run() -> Stepped:
        step()
        return Stepped(kind, parameters)

    return run


def fused_sgd(inputs: Inputs, **hyper: float) -> Step:
    """What an update without any pruning costs."""
    parameters = inputs.parameters()
    return stepping(torch.optim.SGD(parameters, fused=True, **hyper).step, PLAIN, parameters)


def check(
    expected: Expected,
    answer: Stepped,
    *,
    tolerance: float = 1e-6,
    ties: int = 0,
    bf16_ties: float = 0.0,
) -> None:
    """Rounding may decide about `ties` elements of a tensor, and in bf16 about a share more."""
    for i, (wanted, got) in enumerate(zip(expected[answer.kind], answer.parameters, strict=True)):
        exact = got.dtype == torch.float32
        relative, least = (tolerance, 1e-3) if exact else (2**-7, 1e-2)
        wrong = (got.detach().double() - wanted).abs() > relative * (least + wanted.abs())
        if int(wrong.sum()) > ties + (0 if exact else int(bf16_ties * wrong.numel())):
            raise WrongAnswerError(f"parameters of tensor {i} differ after a step")


def step_cases(
    name: str,
    ours: Prepare,
    rivals: Mapping[str, Prepare],
    expect: Callable[[Any], Expected],
    *,
    bytes_each: Mapping[str, int],  # that an element needs, by data type
    flops_each: int,
    labels: Sequence[str] = tuple(SHAPES),
    make: Callable[..., Inputs] = make_inputs,
    check: Callable[[Any, Any], None] = check,
) -> Iterator[Case]:
    for label in labels:
        for dtype in DTYPES:
            elements = shapes.count(SHAPES[label])
            yield Case(
                name=f"{name}/{label}/{dtype}",
                make=partial(make, SHAPES[label], DTYPES[dtype]),
                function=ours,
                rivals=rivals,
                expect=expect,
                check=check,
                reads=lambda inputs: [*inputs.values, *inputs.gradients],
                bytes_moved=elements * bytes_each[dtype],
                flops=elements * flops_each,
            )
