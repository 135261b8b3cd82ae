"""ProsPr: prune before training by what a few steps of training would make of each weight."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..masks import MaskSet
from ..progress import Progress
from .baselines import Scope
from .objective import Forward, LossFn, Objective, Tensors, added, undisturbed
from .ranks import averaged, is_first
from .selection import Granularity, Sparsities, selection

Mode = Literal["exact", "first_order", "finite_difference", "reference_compat"]
# Kinks of ReLU are smoothed over best by about 1, transformers followed best by about 0.1.
REACH = 0.3
MODES = ("exact", "first_order", "finite_difference", "reference_compat")


def prospr(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sparsity: Sparsities,
    *,
    steps: int = 3,
    inner_lr: float = 0.5,
    inner_momentum: float = 0.9,
    mode: Mode = "exact",
    granularity: Granularity = "weight",
    scope: Scope = "global",
    min_kept_per_layer: int = 0,
    exclude: Collection[str] | None = None,
    forward: Forward | None = None,
    reach: float = REACH,
    across_ranks: bool = True,
    progress: bool = True,
) -> MaskSet:
    """Masks by how much each weight matters to the loss after `steps` steps of training.

    The score of a weight is |d loss(w_K) / d mask|, where w_K comes from `steps` steps of SGD with
    momentum that start from the masked weights. With no step it is `fp.snip`. The model is used as
    it is (have it in training mode) and left as it was: parameters, buffers, gradients, mode,
    random state; only trained parameters (`requires_grad`) count.

    Args:
        batches: an iterable of (input, target); the first `steps + 1` are used, one for each step
            and one for the loss, in turn again if there are fewer. A single batch works too.
        loss_fn: loss_fn(output, target), or None with `forward(model, batch)`, which returns the
            loss for anything else.
        sparsity: of the weights (or channels or blocks), or a mapping of name to sparsity.
        mode: "exact" differentiates through the steps (second derivatives, but memory for one copy
            of the weights per step only); "finite_difference" approximates that by first
            derivatives, so it works under autocast and with fused attention; "first_order" takes
            the steps as constant; "reference_compat" ignores, like the published code, how the
            first step depends on the mask if there is momentum.
        granularity, scope, min_kept_per_layer, exclude: see `fp.masks_from_scores`. With "channel"
            the masks also cover the biases of these layers and the norms right behind them.
        reach: how far a finite difference goes to each side, relative to what an inner step moves.
            A long one smooths over the kinks of ReLU, a short one follows smooth networks closely.
        across_ranks: average the scores over the processes of torch.distributed, so that all get
            the same masks.
        progress: show a bar on a terminal.
    """
    with undisturbed(model):
        objective = Objective(model, batches, loss_fn, forward)
        chosen = selection(
            model,
            objective.run,
            sparsity,
            granularity=granularity,
            scope=scope,
            min_kept_per_layer=min_kept_per_layer,
            exclude=exclude,
        )
        scores = prospr_scores(
            objective,
            chosen.names,
            steps=steps,
            inner_lr=inner_lr,
            inner_momentum=inner_momentum,
            mode=mode,
            reach=reach,
            progress=progress,
        )
        return chosen.masks(averaged(scores) if across_ranks else scores)


def prospr_scores(
    objective: Objective,
    names: list[str],
    *,
    steps: int = 3,
    inner_lr: float = 0.5,
    inner_momentum: float = 0.9,
    mode: Mode = "exact",
    reach: float = REACH,
    progress: bool = True,
) -> Tensors:
    """d loss(w_K) / d mask = w_0 * d loss(w_K) / d w_0, signed."""
    _check(steps, inner_lr, inner_momentum, mode, reach)
    keep_points = mode != "first_order"
    total = steps * (1 + keep_points) + 1
    with Progress("ProsPr", total, shown=progress and is_first()) as bar:
        points = [objective.start]
        momentum: Tensors = {}
        for step in range(steps):
            gradient = objective.gradient(points[-1], step)
            momentum = added(gradient, momentum, inner_momentum) if momentum else gradient
            points.append(added(points[-1], momentum, -inner_lr))
            if not keep_points:
                del points[0]
            bar.advance()
        del momentum
        adjoint = objective.gradient(points.pop(), steps)
        bar.advance()
        if keep_points:
            constant_steps = 1 if mode == "reference_compat" and inner_momentum else 0
            product = objective.hessian_product
            if mode == "finite_difference":
                product = partial(objective.difference_product, reach=reach)
            adjoint = _through_steps(
                product, points, adjoint, inner_lr, inner_momentum, constant_steps, bar
            )
    return {name: objective.start[name] * adjoint[name] for name in names}


def _through_steps(
    product: Callable[[Tensors, Tensors, int], Tensors],
    points: list[Tensors],
    adjoint: Tensors,
    lr: float,
    momentum: float,
    constant_steps: int,
    bar: Progress,
) -> Tensors:
    """From d loss / d w_K to d loss / d w_0, by one Hessian product for each step.

    `carried` is d loss / d z of the step, z being the momentum buffer.
    """
    carried = {name: torch.zeros_like(value) for name, value in adjoint.items()}
    for step in reversed(range(constant_steps, len(points))):
        carried = added(carried, adjoint, -lr)
        adjoint = added(adjoint, product(points.pop(), carried, step), 1)
        carried = {name: value.mul_(momentum) for name, value in carried.items()}
        bar.advance()
    return adjoint


def _check(steps: int, inner_lr: float, inner_momentum: float, mode: Mode, reach: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
    for name, value in (("inner_lr", inner_lr), ("inner_momentum", inner_momentum)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if not 0 < reach < float("inf"):
        raise ValueError(f"reach must be a positive number, got {reach}")
