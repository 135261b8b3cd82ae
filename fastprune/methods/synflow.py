"""SynFlow: prune before training and without data, by the flow through all paths."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..masks import MaskSet
from .objective import Tensors, undisturbed
from .rounds import in_rounds
from .selection import Options, Sparsities, selection


def synflow(
    model: nn.Module,
    example_input: Any,
    sparsity: Sparsities,
    *,
    rounds: int = 100,
    progress: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """Masks that keep the weights on the strongest paths from input to output, found in `rounds`.

    With every parameter replaced by its magnitude and an input of ones, R is the sum of the
    outputs and a weight's score weight * dR/dweight. Of `example_input` only the shape, with one
    row, counts; integers (tokens) are taken as they are. The model runs in evaluation mode and in
    float64, and scores are divided by R, so that deep networks don't overflow. The options are
    those of `fp.masks_from_scores`.
    """
    with undisturbed(model):
        flow = Flow(model, example_input)
        chosen = selection(model, lambda: flow.loss(flow.start), sparsity, **options)
        names = chosen.names

        def scores(point: Tensors, now: int) -> Tensors:
            return flow.scores(point, names)

        return in_rounds("SynFlow", flow.start, scores, chosen, rounds, progress=progress)


class Flow:
    """R, the sum of the outputs, as a function of the magnitudes of all parameters."""

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        model.eval()
        self._model = model
        self._input = _ones(example_input, model)
        magnitudes = {name: _magnitude(p.detach()) for name, p in model.named_parameters()}
        self._buffers = {name: _magnitude(b.clone()) for name, b in model.named_buffers()}
        for name, buffer in self._buffers.items():
            if name.rpartition(".")[2] == "running_mean":
                buffer.zero_()  # a norm would subtract it from the flow
        self.start = magnitudes

    def loss(self, point: Mapping[str, Tensor]) -> Tensor:
        output = functional_call(self._model, {**self._buffers, **point}, (self._input,))
        if not isinstance(output, Tensor):
            raise TypeError(f"SynFlow needs one output tensor, got {type(output).__name__}")
        return output.sum()

    def scores(self, point: Tensors, names: list[str]) -> Tensors:
        """weight * dR/dweight / R; in each layer without bias or shortcut they add up to 1."""
        leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
        total = self.loss(leaves)
        if not torch.isfinite(total) or total <= 0:
            raise ValueError(
                f"the outputs add up to {total.item()}: no path is left, or float64 overflows; "
                "use fewer rounds or a lower sparsity, or another method for this network"
            )
        inputs = [leaves[name] for name in names]
        gradients = torch.autograd.grad(total.log(), inputs, materialize_grads=True)
        return {
            name: leaf.detach() * gradient
            for name, leaf, gradient in zip(names, inputs, gradients, strict=True)
        }


def _magnitude(value: Tensor) -> Tensor:
    return value.double().abs() if value.is_floating_point() else value


def _ones(example_input: Any, model: nn.Module) -> Tensor:
    if not isinstance(example_input, Tensor) or not example_input.dim():
        got = type(example_input).__name__
        raise TypeError(f"example_input must be a batch, a tensor of inputs, got {got}")
    device = next((p.device for p in model.parameters()), example_input.device)
    row = example_input[:1].to(device)
    return torch.ones_like(row, dtype=torch.float64) if row.is_floating_point() else row
