"""Cases of the ASWL step: beside torch's fused SGD, which prunes nothing, and the eager method."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fastprune as fp

from . import optimizer_steps
from .case import Case
from .optimizer_steps import PLAIN, Inputs, Step, step_cases, stepping

# Layers stand at the target, as they do for most of a training. Where they still move fast, the
# thresholds of the last step do not help to find the new ones.
SPARSITY = 0.8
LR, MOMENTUM, ATTENTION_LR = 0.01, 0.9, 0.001
PRUNED = "pruned"  # the kind of a step
# Gradient, dense weight and momentum read; the latter two and the parameter written.
BYTES = {"fp32": 12 + 12, "bf16": 10 + 10}


def model_of(parameters: list[nn.Parameter]) -> nn.Module:
    """A network of layers with these weights, in this order; vectors are those of norms."""
    model = nn.Module()
    for i, parameter in enumerate(parameters):
        if parameter.dim() == 1:
            model.register_parameter(f"norm{i}", parameter)
            continue
        outputs, inputs, *kernel = parameter.shape
        layer: nn.Module = (
            nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, bias=False)
            if kernel
            else nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
        )
        layer.weight = parameter
        model.add_module(f"layer{i}", layer)
    return model


def ours(inputs: Inputs) -> Step:
    parameters = inputs.parameters()
    options = {"attention_lr": ATTENTION_LR, "attention_init": 1 - SPARSITY}
    optimizer = fp.optim.ASWL(
        model_of(parameters), LR, sparsity=SPARSITY, momentum=MOMENTUM, **options
    )
    return stepping(optimizer.step, PRUNED, parameters)


def eager(inputs: Inputs) -> Step:
    """The published algorithm: restore, SGD, backup, a full sort of each layer, masks, scale."""
    parameters = inputs.parameters()
    layers = [p for p in parameters if p.dim() > 1]
    dense = [p.detach().clone() for p in layers]
    held = [p.grad for p in layers]
    a = torch.full((len(layers),), 1 - SPARSITY, requires_grad=True)
    sizes = torch.tensor([p.numel() for p in layers])
    weights = torch.optim.SGD(parameters, LR, MOMENTUM)
    attention = torch.optim.SGD([a], ATTENTION_LR, MOMENTUM)

    @torch.no_grad()
    def prune() -> None:
        for p, factor in zip(layers, a.tolist(), strict=True):
            magnitude = p.abs()
            k = min(int(p.numel() * (1 - factor)), p.numel() - 1)
            threshold = magnitude.flatten().sort().values[k]
            p.mul_((magnitude >= threshold).to(p.dtype)).mul_(factor)

    def step() -> None:
        factors = a.tolist()
        penalty = 10 * ((a * sizes).sum() / sizes.sum() - (1 - SPARSITY)) ** 2
        (pull,) = torch.autograd.grad(penalty, a)
        with torch.no_grad():
            # p is a * w_hat: the gradient of a is <p, gradient> / a.
            sums = [(p * g).sum() / x for p, g, x in zip(layers, held, factors, strict=True)]
            a.grad = pull + torch.stack(sums)
            for p, d, g, x in zip(layers, dense, held, factors, strict=True):
                p.copy_(d)
                p.grad = x * g
            weights.step()
            attention.step()
            a.clamp_(0.01, 1)
            for p, d, g in zip(layers, dense, held, strict=True):
                d.copy_(p)
                p.grad = g
        prune()

    prune()
    return stepping(step, PRUNED, parameters)


def first_steps(inputs: Inputs) -> dict[str, list[Tensor]]:
    """Parameters after one step from zero momentum, in float64; the density is at its target."""
    a = 1 - SPARSITY
    results: dict[str, list[Tensor]] = {PRUNED: [], PLAIN: []}
    for value, gradient in zip(inputs.values, inputs.gradients, strict=True):
        w, g = value.double(), gradient.double()
        results[PLAIN].append(w - LR * g)
        if w.dim() == 1:
            results[PRUNED].append(w - LR * g)
            continue
        shown = _pruned(w, 1 - a)
        after = min(max(a - ATTENTION_LR * float((g * shown).sum()), 0.01), 1.0)
        results[PRUNED].append(after * _pruned(w - LR * a * g, 1 - after))
    return results


def _pruned(w: Tensor, share: float) -> Tensor:
    k = min(int(w.numel() * share), w.numel() - 1)
    threshold = w.abs().flatten().kthvalue(k + 1).values
    return w * (w.abs() >= threshold)


def definitions() -> Iterator[Case]:
    sgd = partial(optimizer_steps.fused_sgd, lr=LR, momentum=MOMENTUM)
    return step_cases(
        "aswl_step",
        ours,
        {"torch SGD fused, no pruning": sgd, "eager ASWL": eager},
        first_steps,
        bytes_each=BYTES,
        # The gradient's factor, the momentum, the weight, the sum for the attention, the parameter.
        flops_each=8,
        # Rounding decides about those next to the threshold; in bf16 many tie at it.
        check=partial(optimizer_steps.check, tolerance=1e-5, ties=16, bf16_ties=0.02),
    )
