"""The signed scores behind the methods, for a look at them or a selection of one's own."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from . import grasp, noise, prospr, snip, synflow
from .objective import Forward, LossFn, Objective, Tensors, undisturbed
from .ranks import averaged
from .selection import pruned_weights

LEARNED: dict[str, Callable[..., Tensors]] = {
    "prospr": prospr.prospr_scores,
    "snip": snip.snip_scores,
    "grasp": grasp.grasp_scores,
}
METHODS = (*LEARNED, "synflow", "magnitude", "random")


def scores(
    method: str,
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    forward: Forward | None = None,
    across_ranks: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Parameter name -> signed score of each weight; `fp.masks_from_scores` makes masks of them.

    "prospr" gives d loss / d mask after the inner steps, "snip" weight * gradient, "magnitude" the
    weight: these rank by magnitude. "grasp" gives weight * (H g), "random" noise and "synflow" the
    first round's flow, with an example input in place of `batches`: these rank by value. `options`
    are those of the method. Methods that prune in rounds have no single score.
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}"
            + ("; it prunes in rounds and has no single score" * (method in ("iter_snip", "force")))
        )
    with undisturbed(model):
        weights = pruned_weights(model)
        found = _scores(method, model, weights, batches, loss_fn, forward, options)
        return averaged(found) if across_ranks else found


def _scores(
    method: str,
    model: nn.Module,
    weights: Tensors,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    forward: Forward | None,
    options: dict[str, Any],
) -> Tensors:
    if method == "magnitude":
        return {name: weight.clone() for name, weight in weights.items()}
    if method == "random":
        return noise.noise(weights, **options)
    if batches is None:
        raise TypeError(f"method {method!r} needs batches")
    if method == "synflow":
        flow = synflow.Flow(model, batches)
        return flow.scores(flow.start, list(weights))
    if method == "grasp":
        loss_fn = grasp.tempered(loss_fn, options.pop("temperature", grasp.TEMPERATURE))
    objective = Objective(model, batches, loss_fn, forward)
    return LEARNED[method](objective, list(weights), **options)
