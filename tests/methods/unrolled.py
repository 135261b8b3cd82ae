"""ProsPr as it is defined: masks, steps of training, and automatic differentiation through them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastprune.structure import prunable_parameters

Tensors = dict[str, Tensor]


class Training:
    """A few steps of SGD with momentum from masked weights, on their own random numbers."""

    def __init__(
        self, model: nn.Module, batches: Any, loss_fn: Any, steps: int, lr: float, momentum: float
    ) -> None:
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.steps, self.lr, self.momentum = steps, lr, momentum
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.ones = {name: torch.ones_like(p) for name, p in prunable_parameters(model).items()}
        with torch.random.fork_rng([]):  # each step's state, as training would find it
            self.states = []
            for step in range(steps + 1):
                self.states.append(torch.get_rng_state())
                self._loss(self.start, step)

    def _loss(self, point: Tensors, step: int) -> Tensor:
        x, target = self.batches[step % len(self.batches)]
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        loss: Tensor = self.loss_fn(functional_call(self.model, {**buffers, **point}, (x,)), target)
        return loss

    def loss(self, point: Tensors, step: int) -> Tensor:
        with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
            torch.set_rng_state(self.states[step])
            return self._loss(point, step)

    def gradient(self, point: Tensors, step: int, differentiable: bool = True) -> Tensors:
        point = {n: x if x.requires_grad else x.clone().requires_grad_() for n, x in point.items()}
        found = torch.autograd.grad(
            self.loss(point, step), list(point.values()), create_graph=differentiable,
            materialize_grads=True,
        )  # fmt: skip
        return dict(zip(point, found, strict=True))

    def masked(self, masks: Tensors) -> Tensors:
        return {name: x * masks[name] if name in masks else x for name, x in self.start.items()}

    def end(self, masks: Tensors, is_constant: Callable[[int], bool]) -> Tensor:
        """The loss after the steps; constant steps are those of the network that is not masked."""
        point, plain = self.masked(masks), self.masked(self.ones)
        z: Tensors = {}
        z_plain: Tensors = {}
        for step in range(self.steps):
            g_plain = self.gradient(plain, step, differentiable=False)
            g = g_plain if is_constant(step) else self.gradient(point, step)
            z = {n: g[n] + self.momentum * z[n] if z else g[n] for n in g}
            z_plain = {
                n: g_plain[n] + self.momentum * z_plain[n] if z_plain else g_plain[n] for n in g
            }
            point = {n: point[n] - self.lr * z[n] for n in g}
            plain = {n: plain[n] - self.lr * z_plain[n] for n in g}
        return self.loss(point, self.steps)

    def is_constant(self, mode: str) -> Callable[[int], bool]:
        if mode == "first_order":
            return lambda step: True
        return lambda step: mode == "reference_compat" and step == 0 and self.momentum > 0

    def scores(self, mode: str = "exact") -> Tensors:
        masks = {name: one.clone().requires_grad_() for name, one in self.ones.items()}
        loss = self.end(masks, self.is_constant(mode))
        found = torch.autograd.grad(loss, list(masks.values()))
        return dict(zip(masks, found, strict=True))

    def difference(self, name: str, index: int, mode: str, size: float = 1e-5) -> float:
        """d loss / d mask entry, by a finite difference over two trainings."""
        ends = []
        for sign in (1, -1):
            masks = {n: one.clone() for n, one in self.ones.items()}
            masks[name].view(-1)[index] += sign * size
            ends.append(float(self.end(masks, self.is_constant(mode)).detach()))
        return (ends[0] - ends[1]) / (2 * size)
