"""Dirichlet distributions of many layers at once: public functions."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def dirichlet_kl(concentration: Tensor, offsets: Tensor, prior: Tensor) -> Tensor:
    """KL(Dir(phi) || Dir(a, ..., a)) of each layer, in one launch; differentiable once.

    `concentration` (float32 or float64, positive) holds the layers one after the other, layer l
    from `offsets[l]` to `offsets[l + 1]` (int64, the first 0, the last the number of elements);
    `prior` has a number for each layer. All are on one device. Values are not looked at.
    """
    _check(concentration, offsets)
    if prior.dtype not in FLOATS or prior.shape != (offsets.numel() - 1,):
        raise ValueError(
            f"prior: expected float32 or float64 with one number for each of the "
            f"{offsets.numel() - 1} layers, got {prior.dtype} of shape {tuple(prior.shape)}"
        )
    kl: Tensor = torch.ops.fastprune.dirichlet_kl(concentration, offsets, prior)[0]
    return kl


def dirichlet_sample(
    concentration: Tensor, offsets: Tensor, num_samples: int, seed: int, offset: int
) -> Tensor:
    """Draws of every layer's Dirichlet distribution, [num_samples, elements], with gradient.

    Arguments as in `dirichlet_kl`, and the key of the random numbers: draws depend on `seed`,
    `offset` (from 0 to 2^32 - 1) and their position alone, and have the same bits on every device.
    Draws of another offset are independent: the next call takes `offset + 1`.
    """
    _check(concentration, offsets)
    if num_samples < 0:
        raise ValueError(f"num_samples: expected 0 or more, got {num_samples}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if not 0 <= offset < 2**32:
        raise ValueError(f"offset: expected 0 to 2**32 - 1, got {offset}; then take another seed")
    arguments = concentration, offsets, num_samples, seed, offset
    samples: Tensor = torch.ops.fastprune.dirichlet_sample(*arguments)[0]
    return samples


def _check(concentration: Tensor, offsets: Tensor) -> None:
    if concentration.dtype not in FLOATS or concentration.dim() != 1:
        raise ValueError(
            "concentration: expected one dimension of float32 or float64, got "
            f"{concentration.dtype} of shape {tuple(concentration.shape)}"
        )
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not offsets.numel():
        raise ValueError(
            "offsets: expected int64, one more than there are layers, got "
            f"{offsets.dtype} of shape {tuple(offsets.shape)}"
        )
