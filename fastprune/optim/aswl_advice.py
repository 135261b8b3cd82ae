"""What ASWL says where a training will not do what was hoped for."""

import warnings
from collections.abc import Iterable

from ..masks import Sparsity
from ..ops.reference.aswl import FLOOR

FAR = 0.05  # a learnt sparsity from the one that was asked for


def warn_if_cancelled(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"a norm right behind takes the scale of {_listed(names)} out again, so the loss does "
            "not feel their attention: only the penalty moves it, and large layers are pruned "
            "first; attention_position='post_bn' lets the norm carry it",
            stacklevel=3,
        )


def warn_if_out_of_reach(sparsity: Sparsity, alpha: float) -> None:
    most = (1 - FLOOR) ** alpha
    if sparsity > most:
        warnings.warn(
            f"sparsity={sparsity} is out of reach: attention stays at {FLOOR} or above, so with "
            f"alpha={alpha:g} no layer passes a sparsity of {most:.4g}, and finish() will prune "
            "the rest at once; a smaller alpha reaches further",
            stacklevel=3,
        )


def warn_of_collapse(names: Iterable[str], warned: set[str]) -> None:
    """Once per layer."""
    new = [name for name in names if name not in warned]
    if new:
        warned.update(new)
        warnings.warn(
            f"the attention of {_listed(new)} has fallen to its floor of {FLOOR}: almost all of "
            "the layer is pruned and its output almost zero. A smaller attention_lr or "
            "density_weight gives the loss more say, as does attention_position='post_bn' where a "
            "norm follows; or ask for less sparsity",
            stacklevel=5,
        )


def warn_if_far(learnt: float, asked: float) -> None:
    if abs(learnt - asked) > FAR:
        warnings.warn(
            f"the layers have learnt a sparsity of {learnt:.3f} and {asked:.3f} was asked for: "
            "finish() makes up the rest at once, which will hurt; train longer, or with a larger "
            "attention_lr or density_weight",
            stacklevel=4,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
