"""Pruning in rounds: what is kept falls exponentially to the sparsity that was asked for."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ..masks import MaskSet, Sparsity
from ..progress import Progress
from .objective import Tensors
from .ranks import is_first
from .selection import Selection, Sparsities


def in_rounds(
    title: str,
    start: Tensors,
    scores: Callable[[Tensors, int], Tensors],
    chosen: Selection,
    rounds: int,
    *,
    nested: bool = True,
    progress: bool = True,
) -> MaskSet:
    """`scores(point, round)` sees the weights with those pruned so far at zero."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}")
    masks: MaskSet | None = None
    with Progress(title, rounds, shown=progress and is_first()) as bar:
        for now in range(rounds):
            final = now == rounds - 1
            point = start if masks is None else masked(start, masks)
            masks = chosen.masks(
                scores(point, now),
                None if final else _on_the_way(chosen.sparsity, (now + 1) / rounds),
                within=masks if nested else None,
                final=final,
            )
            bar.advance()
    assert masks is not None
    return masks


def masked(point: Tensors, masks: Mapping[str, Tensor]) -> Tensors:
    return {name: x * masks[name] if name in masks else x for name, x in point.items()}


def _on_the_way(sparsity: Sparsities, part: float) -> Sparsities:
    if isinstance(sparsity, Mapping):
        return {name: _part(value, part) for name, value in sparsity.items()}
    return _part(sparsity, part)


def _part(sparsity: Sparsity, part: float) -> float:
    kept: float = (1 - float(sparsity)) ** part
    return 1 - kept
