"""The Dirichlet posterior of switches, and what a network loses with its channels switched."""

from collections.abc import Mapping
from math import expm1, log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ..ops import dirichlet_kl, dirichlet_sample
from .objective import Call, LossFn, checked_loss
from .ranks import averaged
from .switches import Switches

LEAST = 1e-3  # the smallest concentration; the operators promise nothing about smaller ones


class Posterior:
    """One Dirichlet distribution for each layer, with all concentrations in one vector.

    They are softplus(theta); switches are multiplied by `scale`, or by their number without it.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        start: float,
        prior: float,
        scale: float | None,
        device: torch.device,
    ) -> None:
        ends = torch.tensor([0, *sizes.values()]).cumsum(0)
        begin = log(expm1(start - LEAST)) if start < 20 else start - LEAST
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.theta = nn.Parameter(torch.full((int(ends[-1]),), begin, **floats))
        self._sizes = dict(sizes)
        self._scales = {name: size if scale is None else scale for name, size in sizes.items()}
        self._offsets = ends.to(device)
        self._prior = torch.full((len(sizes),), prior, **floats)

    def concentration(self) -> Tensor:
        return F.softplus(self.theta) + LEAST

    def by_layer(self, values: Tensor) -> dict[str, Tensor]:
        """Along the last dimension."""
        parts = values.split(list(self._sizes.values()), -1)
        return dict(zip(self._sizes, parts, strict=True))

    def means(self, concentration: Tensor) -> dict[str, Tensor]:
        """The switches' posterior means, scaled."""
        parts = self.by_layer(concentration).items()
        return {name: part / part.sum() * self._scales[name] for name, part in parts}

    def draws(self, concentration: Tensor, count: int, seed: int, offset: int) -> dict[str, Tensor]:
        """`count` draws of each switch, scaled: [count, channels]."""
        drawn = dirichlet_sample(concentration, self._offsets, count, seed, offset)
        return {name: part * self._scales[name] for name, part in self.by_layer(drawn).items()}

    def kl(self, concentration: Tensor) -> Tensor:
        return dirichlet_kl(concentration, self._offsets, self._prior).sum()

    def average_gradient(self) -> None:
        """Over the processes of torch.distributed, so that all find the same posterior."""
        if self.theta.grad is not None:
            self.theta.grad = averaged({"theta": self.theta.grad})["theta"]


class SwitchedLoss:
    """The loss of a batch as a function of the switches alone: weights are constants."""

    def __init__(self, call: Call, switches: Switches) -> None:
        self._call = call
        self._switches = switches
        parameters = {name: p.detach() for name, p in call.named_parameters()}
        self._state = parameters | {name: b.clone() for name, b in call.named_buffers()}

    def __call__(self, scales: Mapping[str, Tensor], batch: Any) -> Tensor:
        folded = {f"model.{name}": t for name, t in self._switches.tensors(scales).items()}
        with self._switches.hooks(scales):
            return checked_loss(functional_call(self._call, self._state | folded, (batch,)))


def of_mean_outputs(loss_fn: LossFn, samples: int) -> LossFn:
    """For outputs that hold each example `samples` times, one after the other."""

    def loss(output: Any, target: Any) -> Tensor:
        return loss_fn(tree_map(lambda x: x.unflatten(0, (-1, samples)).mean(1), output), target)

    return loss if samples > 1 else loss_fn


def repeated(batch: Any, samples: int) -> Any:
    """Every example's input `samples` times, its target once."""
    if samples == 1:
        return batch
    inputs, target = batch
    return tree_map(lambda x: x.repeat_interleave(samples, 0), inputs), target
