"""How one sparsity is spread over the layers: each gets its own, and the total is exact."""

from fractions import Fraction
from math import floor

from torch import Tensor, nn

from ..masks import Sparsity, num_kept
from .selection import pruned_weights


def erk(model: nn.Module, sparsity: Sparsity) -> dict[str, Fraction]:
    """The Erdős-Rényi-Kernel distribution: small layers keep a larger part.

    A layer keeps a part proportional to the sum of its dimensions over their product; one that
    would keep more than there is stays dense. The sparsities are exact fractions: as the
    `sparsity` of a method that prunes single weights they keep `num_kept(sparsity, N)` in total.
    """
    weights = pruned_weights(model)
    parts = {name: Fraction(sum(w.shape), max(w.numel(), 1)) for name, w in weights.items()}
    return _shared_out(weights, parts, sparsity)


def uniform(model: nn.Module, sparsity: Sparsity) -> dict[str, Fraction]:
    """The same sparsity for each layer, but for rounding: the total is exact, see `fp.erk`."""
    weights = pruned_weights(model)
    return _shared_out(weights, dict.fromkeys(weights, Fraction(1)), sparsity)


def _shared_out(
    weights: dict[str, Tensor], parts: dict[str, Fraction], sparsity: Sparsity
) -> dict[str, Fraction]:
    sizes = {name: weight.numel() for name, weight in weights.items() if weight.numel()}
    total = num_kept(sparsity, sum(sizes.values()))
    dense: dict[str, int] = {}
    while True:
        left = total - sum(dense.values())
        sparse = {name: size for name, size in sizes.items() if name not in dense}
        scale = Fraction(left) / (sum(parts[n] * size for n, size in sparse.items()) or 1)
        full = {name: size for name, size in sparse.items() if scale * parts[name] >= 1}
        if not full:
            break
        dense |= full
    shares = {name: scale * parts[name] * size for name, size in sparse.items()}
    kept = {name: floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: kept[name] - shares[name])
    for name in by_remainder[: left - sum(kept.values())]:
        kept[name] += 1
    kept |= dense
    return {
        name: Fraction(size - kept[name], size) if (size := weight.numel()) else Fraction(0)
        for name, weight in weights.items()
    }
