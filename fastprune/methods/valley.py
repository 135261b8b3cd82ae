"""The valley a solution lies in: which directions are flat, and what lies between two solutions.

Directional pruning moves along the flat directions of the loss only. `directional_scores` shows how
flat the direction is in which each group would shrink; the loss along a segment, or along a curve
that is bent to avoid what lies between, shows whether two solutions share a valley.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.reference.sdprun import channel_rows
from ..optim.layers import Layer, layers_of
from ..structure import prunable_parameters

Loss = Callable[[Any, Any], Tensor]
Batches = Sequence[tuple[Any, Any]]
State = Mapping[str, Tensor]


# ---------------------------------------------------------------- flat directions


def directional_scores(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    groups: Iterable[Mapping[str, Any]] | None = None,
    *,
    num_products: int = 32,
    flatness: float = 1e-3,
) -> dict[str, Tensor]:
    """How much of each group's pull to zero lies in flat directions of the loss.

    With u the stack of the unit vectors w_g / |w_g| and P the projector on the flat subspace, a
    group's score is <u_g, (P u)_g>: 1 where shrinking it costs nothing to second order, 0 where it
    is resisted altogether, negative where the valley lets the group only grow. The scores add up to
    |P u|^2.

    Directions count as flat whose curvature is at most `flatness` times the largest one. P u comes
    from `num_products` steps of the Lanczos process that starts at u, each a product with the
    Hessian of the mean loss over `batches`, (input, target) pairs, in evaluation mode. The memory
    is a copy of the trained weights per step. `groups` are parameter groups as
    `fp.optim.channel_groups` makes them; without them every row of every prunable weight is a
    group. The model is not changed. Returns one score per channel, by the layer's name.
    """
    if num_products < 1:
        raise ValueError(f"num_products must be at least 1, got {num_products}")
    if not 0 <= flatness < 1:
        raise ValueError(f"flatness must be at least 0 and below 1, got {flatness}")
    _check_batches(batches)
    layers = _layers(groups or [_rows(model)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    pull = _pull(layers, parameters)

    def product(vector: Tensor) -> Tensor:
        return _hessian_product(model, batches, loss_fn, parameters, vector)

    was_training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        flat = _flat_part(product, pull, num_products, flatness)
    finally:
        for module, mode in was_training:
            module.training = mode
    pieces = _unflattened(pull * flat, parameters)
    overlap = {id(p): piece for p, piece in zip(parameters, pieces, strict=True)}
    return {name: _channel_sums(layer, overlap) for name, layer in layers.items()}


def _rows(model: nn.Module) -> dict[str, Any]:
    weights = prunable_parameters(model)
    return {"params": list(weights.values()), "param_names": list(weights), "prune": True}


def _layers(groups: Iterable[Mapping[str, Any]]) -> dict[str, Layer]:
    layers = {}
    for number, group in enumerate(groups):
        options = {"prune": None, "coupled": False, "channel_dims": None, **group}
        for layer in layers_of(options, number, 0):
            coupled_name = group.get("name") if options["coupled"] else None
            layers[coupled_name or layer.names[0]] = layer
    return layers


def _pull(layers: Mapping[str, Layer], parameters: Sequence[Tensor]) -> Tensor:
    """u, over all the parameters: zero for what is in no group, and for a group that is zero."""
    pieces = {id(p): torch.zeros_like(p) for p in parameters}
    for name, layer in layers.items():
        if any(id(p) not in pieces for p in layer.parameters):
            raise ValueError(f"groups: {name!r} holds a parameter that model does not train")
        norms = layer.norms([p.detach() for p in layer.parameters])
        scales = layer.spread(torch.where(norms > 0, 1 / norms, 0.0))
        for p, scale in zip(layer.parameters, scales, strict=True):
            pieces[id(p)] = p.detach() * scale.to(p.dtype)
    return _flattened(pieces.values())


def _channel_sums(layer: Layer, values: Mapping[int, Tensor]) -> Tensor:
    pairs = zip(layer.parameters, layer.columns, strict=True)
    return torch.stack([channel_rows(values[id(p)], c).sum(1) for p, c in pairs]).sum(0)


def _hessian_product(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    parameters: Sequence[Tensor],
    vector: Tensor,
) -> Tensor:
    """The Hessian of the mean over the batches, times a vector, one batch's graph at a time."""
    total = torch.zeros_like(vector)
    direction = _unflattened(vector, parameters)
    for x, y in batches:
        # The fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn(model(x), y)
            first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            slope = torch.stack(
                [(g * d).sum() for g, d in zip(first, direction, strict=True)]
            ).sum()
            second = torch.autograd.grad(slope, parameters, materialize_grads=True)
        total += _flattened(second)
    return total / len(batches)


@torch.no_grad()
def _flat_part(
    product: Callable[[Tensor], Tensor], start: Tensor, num_products: int, flatness: float
) -> Tensor:
    """f(H) start, where f is 1 on flat eigenvalues and 0 elsewhere, from the Krylov space.

    Each new vector is made orthogonal to all others twice: in float32 the process alone forgets.
    """
    length = start.norm()
    if length == 0:
        return torch.zeros_like(start)
    basis = [start / length]
    projected = torch.zeros(num_products, num_products, dtype=torch.float64)
    size = num_products
    for j in range(num_products):
        image = product(basis[j])
        stack = torch.stack(basis)
        projected[: j + 1, j] = (stack @ image).cpu()
        for _ in range(2):
            image = image - stack.T @ (stack @ image)
        left = image.norm()
        closed = left <= 10 * torch.finfo(start.dtype).eps * projected.abs().max()
        if closed or j + 1 == num_products:  # closed: what is found is exact
            size = j + 1
            break
        projected[j + 1, j] = left
        basis.append(image / left)
    symmetric = projected[:size, :size]
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    flat = values.abs() <= flatness * values.abs().max()
    weights = vectors[:, flat] @ vectors[0, flat] * length.cpu()
    found: Tensor = weights.to(start) @ torch.stack(basis[:size])
    return found


def _flattened(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflattened(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = vector.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


# ---------------------------------------------------------------- between two solutions


@dataclass(frozen=True)
class Curve:
    """A quadratic Bezier curve between two states of a model, as `state_dict` gives them."""

    start: State
    bend: State
    end: State

    def at(self, t: float) -> dict[str, Tensor]:
        """What is not a floating-point number, such as a count of batches, is the start's."""
        weights = ((1 - t) ** 2, 2 * t * (1 - t), t**2)
        point = {}
        for name, first in self.start.items():
            if first.is_floating_point():
                corners = (first, self.bend[name], self.end[name])
                first = sum(w * c for w, c in zip(weights, corners, strict=True))  # type: ignore[assignment]
            point[name] = first
        return point


def segment(start: State, end: State) -> Curve:
    """The straight line between two states."""
    _check_states(start, end)
    middle = {
        name: (first + end[name]) / 2 if first.is_floating_point() else first
        for name, first in start.items()
    }
    return Curve(dict(start), middle, dict(end))


def find_curve(
    model: nn.Module,
    start: State,
    end: State,
    batches: Batches,
    loss_fn: Loss,
    *,
    num_steps: int = 500,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
) -> Curve:
    """Bends the segment so that the loss along it is low (Garipov et al. 2018).

    Each step takes a random point of the curve and the next of the `batches` and moves the bend by
    momentum SGD. `model` gives the architecture; it is not changed.
    """
    _check_batches(batches)
    straight = segment(start, end)
    model = copy.deepcopy(model).train()
    trained = {name for name, _ in model.named_parameters()}
    bend = {
        name: value.detach().clone().requires_grad_(name in trained and value.is_floating_point())
        for name, value in straight.bend.items()
    }
    curve = Curve(straight.start, bend, straight.end)
    optimizer = torch.optim.SGD([b for b in bend.values() if b.requires_grad], lr, momentum)
    random = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        x, y = batches[step % len(batches)]
        point = curve.at(float(torch.rand((), generator=random)))
        point = {k: v if k in trained else v.clone() for k, v in point.items()}
        optimizer.zero_grad()
        loss_fn(functional_call(model, point, (x,)), y).backward()
        optimizer.step()
    return Curve(curve.start, {name: b.detach() for name, b in bend.items()}, curve.end)


@torch.no_grad()
def losses_along(
    model: nn.Module,
    curve: Curve,
    batches: Batches,
    loss_fn: Loss,
    *,
    num_points: int = 21,
) -> Tensor:
    """The mean loss over the batches at equally spaced points of the curve, ends included.

    In evaluation mode, with the statistics of batch norms taken anew from the batches at every
    point: those between two solutions are of no network at all. `model` is not changed.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}")
    _check_batches(batches)
    model = copy.deepcopy(model).eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    losses = []
    for t in torch.linspace(0, 1, num_points).tolist():
        model.load_state_dict(curve.at(t))
        _calibrate(model, norms, batches)
        losses.append(torch.stack([loss_fn(model(x), y) for x, y in batches]).mean())
    return torch.stack(losses)


def _calibrate(model: nn.Module, norms: Sequence[_BatchNorm], batches: Batches) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    if norms:
        for x, _ in batches:
            model(x)
    for norm in norms:
        norm.eval()


def barrier(losses: Tensor) -> float:
    """How far the loss rises above the straight line between its two ends."""
    chord = torch.linspace(0, 1, len(losses), dtype=losses.dtype, device=losses.device)
    return float((losses - torch.lerp(losses[0], losses[-1], chord)).max())


def _check_batches(batches: Batches) -> None:
    if not isinstance(batches, Sequence) or len(batches) == 0:
        raise TypeError(
            "batches must be a list of (input, target) pairs, since they are used many times; "
            f"got {type(batches).__name__}: pass list(loader), or a few batches of it"
        )


def _check_states(start: State, end: State) -> None:
    if [(k, v.shape) for k, v in start.items()] != [(k, v.shape) for k, v in end.items()]:
        raise ValueError(
            "start and end must be state dicts of one architecture; write the zeros of a pruned "
            "model (finish()) instead of removing them (compact) before comparing"
        )
