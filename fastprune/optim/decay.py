"""How fast a weight that gets no loss gradient decays under momentum and weight decay."""

import math
import warnings
from collections.abc import Callable

RESIDUAL = 0.01  # of its start: what may be left of a passive weight without a warning


def passive_residual(
    steps: int, lr: float | Callable[[int], float], momentum: float, weight_decay: float
) -> float:
    """|w| / |w at the start| after `steps` of z <- momentum z + weight_decay w; w <- w - lr z."""
    rate = lr if callable(lr) else (lambda step: lr)
    w, z = 1.0, 0.0
    for step in range(steps):
        z = momentum * z + weight_decay * w
        w -= rate(step) * z
    # Below the critical momentum the weight swings through zero: its velocity counts too.
    return math.hypot(w, rate(steps - 1) * z) if steps else 1.0


def warn_if_weights_stay(
    steps: int, lr: float | Callable[[int], float], momentum: float, weight_decay: float
) -> float:
    """The residual; above RESIDUAL it warns and says which momentum or how many steps would do."""
    residual = passive_residual(steps, lr, momentum, weight_decay)
    if residual <= RESIDUAL:
        return residual
    remedies = []
    for candidate in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        if candidate > momentum and (
            passive_residual(steps, lr, candidate, weight_decay) <= RESIDUAL
        ):
            remedies.append(f"momentum={candidate}")
            break
    if 0 < residual < 1:
        needed = math.ceil(steps * math.log(RESIDUAL) / math.log(residual))
        remedies.append(f"about {needed:,} steps at this learning rate")
    warnings.warn(
        f"after {steps:,} steps a passive weight is still {residual:.3g} of its start, so zeroing "
        f"will hurt; {' or '.join(remedies) or 'weight decay'} would bring it to {RESIDUAL}",
        stacklevel=3,
    )
    return residual
