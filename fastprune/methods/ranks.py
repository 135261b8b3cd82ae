"""Scores that all processes agree on."""

import torch.distributed as dist

from .objective import Tensors


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def averaged(scores: Tensors) -> Tensors:
    """The mean over the processes of torch.distributed, the same bits in each of them.

    The first process adds up and hands out: an all-reduce need not give equal bits everywhere.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return scores
    means = {}
    for name, score in scores.items():
        mean = score.contiguous()
        dist.reduce(mean, 0)
        mean /= dist.get_world_size()
        dist.broadcast(mean, 0)
        means[name] = mean
    return means
