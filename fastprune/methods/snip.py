"""SNIP prunes once by |weight * gradient|; Iter-SNIP and FORCE do so in rounds."""

from collections.abc import Iterable
from typing import Any, Unpack

from torch import nn

from ..masks import MaskSet
from .objective import Forward, LossFn, Objective, Tensors, added, undisturbed
from .ranks import averaged
from .rounds import in_rounds
from .selection import Options, Selection, Sparsities, selection


def snip(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sparsity: Sparsities,
    *,
    num_batches: int = 1,
    forward: Forward | None = None,
    across_ranks: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """Masks that keep the largest |weight * gradient|, the gradient averaged over `num_batches`.

    The arguments are those of `fp.prospr`, the options those of `fp.masks_from_scores`.
    """
    with undisturbed(model):
        objective = Objective(model, batches, loss_fn, forward)
        chosen = selection(model, objective.run, sparsity, **options)
        scores = snip_scores(objective, chosen.names, num_batches=num_batches)
        return chosen.masks(averaged(scores) if across_ranks else scores)


def snip_scores(objective: Objective, names: list[str], *, num_batches: int = 1) -> Tensors:
    """weight * gradient"""
    gradient = mean_gradient(objective, objective.start, range(num_batches))
    return {name: objective.start[name] * gradient[name] for name in names}


def mean_gradient(objective: Objective, point: Tensors, steps: range) -> Tensors:
    if not steps:
        raise ValueError("num_batches must be an integer of at least 1")
    mean = objective.gradient(point, steps[0])
    for step in steps[1:]:
        mean = added(mean, objective.gradient(point, step), 1)
    return {name: value / len(steps) for name, value in mean.items()}


def iter_snip(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sparsity: Sparsities,
    *,
    rounds: int = 20,
    num_batches: int = 1,
    forward: Forward | None = None,
    across_ranks: bool = True,
    progress: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """SNIP in `rounds`, each of which prunes the network of the one before a little more.

    What is kept falls exponentially. Each round takes the next `num_batches` batches, from the
    first again if there are fewer. Otherwise as `fp.snip`.
    """
    with undisturbed(model):
        objective = Objective(model, batches, loss_fn, forward)
        chosen = selection(model, objective.run, sparsity, **options)

        def scores(point: Tensors, now: int) -> Tensors:
            found = _round_scores(objective, point, point, now, num_batches, chosen)
            return averaged(found) if across_ranks else found

        start = objective.start
        return in_rounds("Iter-SNIP", start, scores, chosen, rounds, progress=progress)


def force(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sparsity: Sparsities,
    *,
    rounds: int = 20,
    num_batches: int = 1,
    forward: Forward | None = None,
    across_ranks: bool = True,
    progress: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """Like `fp.iter_snip`, but pruned weights may return.

    The gradient is that of the pruned network, and it is multiplied by the original weights.
    """
    with undisturbed(model):
        objective = Objective(model, batches, loss_fn, forward)
        chosen = selection(model, objective.run, sparsity, **options)
        start = objective.start

        def scores(point: Tensors, now: int) -> Tensors:
            found = _round_scores(objective, start, point, now, num_batches, chosen)
            return averaged(found) if across_ranks else found

        return in_rounds("FORCE", start, scores, chosen, rounds, nested=False, progress=progress)


def _round_scores(
    objective: Objective,
    weights: Tensors,
    point: Tensors,
    now: int,
    num_batches: int,
    chosen: Selection,
) -> Tensors:
    gradient = mean_gradient(objective, point, range(now * num_batches, (now + 1) * num_batches))
    return {name: weights[name] * gradient[name] for name in chosen.names}
