"""Exact counts from learnt ones."""


def settled(kept: list[int], sizes: list[int], total: int) -> list[int]:
    """Counts that sum to `total`: all layers keep less, or prune less, in the same proportion."""
    if total <= sum(kept):
        return _in_proportion(kept, total)
    pruned = [size - count for size, count in zip(sizes, kept, strict=True)]
    fewer = _in_proportion(pruned, sum(sizes) - total)
    return [size - count for size, count in zip(sizes, fewer, strict=True)]


def _in_proportion(counts: list[int], total: int) -> list[int]:
    """Smaller counts of the given sum, exactly: the largest remainders are rounded up."""
    whole = max(1, sum(counts))
    shares = [divmod(count * total, whole) for count in counts]
    result = [share for share, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -shares[i][1])
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result
