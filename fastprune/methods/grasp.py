"""GraSP: prune before training what least serves the flow of the gradient."""

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..masks import MaskSet
from .objective import Forward, LossFn, Objective, Tensors, added, undisturbed
from .ranks import averaged
from .selection import Options, Sparsities, selection
from .snip import mean_gradient

TEMPERATURE = 200.0


def grasp(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sparsity: Sparsities,
    *,
    num_batches: int = 1,
    temperature: float = TEMPERATURE,
    forward: Forward | None = None,
    across_ranks: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """Masks that keep the largest weight * (H g): without them the gradient g would shrink most.

    g and the Hessian H come from the same `num_batches` batches. loss_fn sees the output divided
    by `temperature`; a loss that `forward` returns is taken as it is. Otherwise as `fp.snip`.
    """
    with undisturbed(model):
        objective = Objective(model, batches, tempered(loss_fn, temperature), forward)
        chosen = selection(model, objective.run, sparsity, "value", **options)
        scores = grasp_scores(objective, chosen.names, num_batches=num_batches)
        return chosen.masks(averaged(scores) if across_ranks else scores)


def grasp_scores(objective: Objective, names: list[str], *, num_batches: int = 1) -> Tensors:
    """weight * (H g), half the derivative of |g|^2 with respect to the weight's mask"""
    steps, start = range(num_batches), objective.start
    gradient = mean_gradient(objective, start, steps)
    product = objective.hessian_product(start, gradient, 0)
    for step in steps[1:]:
        product = added(product, objective.hessian_product(start, gradient, step), 1)
    return {name: start[name] * product[name] / num_batches for name in names}


def tempered(loss_fn: LossFn | None, temperature: float) -> LossFn | None:
    if not temperature > 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if loss_fn is None:
        return None

    def at_temperature(output: Any, target: Any) -> Tensor:
        return loss_fn(output / temperature, target)

    return at_temperature
