"""The loss as a function of a model's parameters; the model itself is left as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..optim.sharded import is_sharded

Tensors = dict[str, Tensor]
LossFn = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts every module's attributes, parameters, buffers and mode back, and the generators."""
    check_model(model)
    held = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    devices = _accelerators(model)
    kind = devices[0].type if devices else "cuda"
    with (
        torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            yield
        finally:
            for module, attributes, parameters, buffers in held:
                _restore(vars(module), attributes)
                _restore(module._parameters, parameters)
                _restore(module._buffers, buffers)


def _restore(current: dict[str, Any], before: dict[str, Any]) -> None:
    current.update(before)
    for name in current.keys() - before.keys():
        del current[name]


def _accelerators(model: nn.Module) -> list[torch.device]:
    tensors = [*model.parameters(), *model.buffers()]
    return list(dict.fromkeys(t.device for t in tensors if t.device.type not in ("cpu", "meta")))


class Objective:
    """Loss, gradient and Hessian products on a few batches, at any point of parameter space.

    A point holds the trainable parameters by name, tied ones once; those of 16 bits in float32.
    Passes of one step see the same batch, buffers and random numbers: they are one function.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        forward: Forward | None = None,
    ) -> None:
        self._call = Call(model, loss_fn, forward)
        self._source = _checked_iterator(batches)
        self._batches: list[Any] = []
        self._buffers = dict(model.named_buffers())
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._dtypes = {name: p.dtype for name, p in trainable.items()}
        self.start = {name: _wide(p) for name, p in trainable.items()}
        self._devices = _accelerators(model)
        self._generators: dict[int, list[Tensor]] = {}

    def loss(self, point: Mapping[str, Tensor], step: int) -> Tensor:
        self._replay(step)
        state = {name: value.to(self._dtypes[name]) for name, value in point.items()}
        state |= {name: buffer.clone() for name, buffer in self._buffers.items()}
        named = {f"model.{name}": value for name, value in state.items()}
        loss: Tensor = functional_call(self._call, named, (self._batch(step),))
        torch.clear_autocast_cache()  # it would keep a copy of every point's weights
        return loss

    def run(self) -> None:
        """One pass at the start, for those who look at what the modules do."""
        self.loss(self.start, 0)

    def gradient(self, point: Tensors, step: int) -> Tensors:
        leaves = _leaves(point)
        loss = checked_loss(self.loss(leaves, step))
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(point, gradients, strict=True))

    def hessian_product(self, point: Tensors, direction: Tensors, step: int) -> Tensors:
        """By double backward; fused attention has no second derivative, so it takes the plain."""
        leaves = _leaves(point)
        inputs = list(leaves.values())
        with sdpa_kernel(SDPBackend.MATH):
            loss = checked_loss(self.loss(leaves, step))
            try:
                gradients = torch.autograd.grad(
                    loss, inputs, create_graph=True, materialize_grads=True
                )
                _check_differentiable(gradients)
                which = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
                if not which:  # the loss is linear
                    return {name: torch.zeros_like(value) for name, value in point.items()}
                directions = [direction[name] for name in point]
                products = torch.autograd.grad(
                    [gradients[i] for i in which],
                    inputs,
                    [directions[i] for i in which],
                    materialize_grads=True,
                )
            except RuntimeError as error:
                error.add_note(
                    "fp.prospr(..., mode='finite_difference') needs first derivatives only"
                )
                raise
        return dict(zip(point, products, strict=True))

    def difference_product(
        self, point: Tensors, direction: Tensors, step: int, reach: float
    ) -> Tensors:
        """By central differences, `reach` times the direction to each side."""
        ahead = self.gradient(added(point, direction, reach), step)
        behind = self.gradient(added(point, direction, -reach), step)
        return {name: (ahead[name] - behind[name]) / (2 * reach) for name in ahead}

    def _batch(self, step: int) -> Any:
        """Drawn when first needed and kept; from the first again when there are no more."""
        self._batches += islice(self._source, max(step + 1 - len(self._batches), 0))
        if not self._batches:
            raise ValueError("batches is empty; a used-up iterator gives nothing a second time")
        return self._batches[step % len(self._batches)]

    def _replay(self, step: int) -> None:
        """Dropout and its like draw the same numbers in each pass of a step."""
        modules = [torch.get_device_module(device) for device in self._devices]
        if step not in self._generators:
            states = [m.get_rng_state(d) for m, d in zip(modules, self._devices, strict=True)]
            self._generators[step] = [torch.get_rng_state(), *states]
            return
        on_cpu, *states = self._generators[step]
        torch.set_rng_state(on_cpu)
        for module, device, state in zip(modules, self._devices, states, strict=True):
            module.set_rng_state(state, device)


class Call(nn.Module):
    """From a batch to the loss, as one module: functional_call replaces what is inside."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, forward: Forward | None) -> None:
        super().__init__()
        if (loss_fn is None) == (forward is None):
            raise ValueError(
                "give either loss_fn(output, target), for batches of (input, target), or "
                "forward(model, batch) that returns the loss, with loss_fn=None"
            )
        self.model = model
        self._loss_fn = loss_fn
        self._forward = forward
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(self, batch: Any) -> Any:
        if self._forward is not None:
            return self._forward(self.model, batch)
        assert self._loss_fn is not None
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                "batches must hold pairs (input, target), or anything with forward=, got "
                f"{type(batch).__name__}; for a single batch pass [(input, target)]"
            )
        inputs, target = (x.to(self.device) if isinstance(x, Tensor) else x for x in batch)
        return self._loss_fn(self.model(inputs), target)


def added(point: Tensors, direction: Tensors, size: float) -> Tensors:
    """point + size * direction"""
    return {name: torch.add(value, direction[name], alpha=size) for name, value in point.items()}


def _leaves(point: Tensors) -> Tensors:
    return {name: value.detach().requires_grad_() for name, value in point.items()}


def _wide(parameter: Tensor) -> Tensor:
    value = parameter.detach().clone()
    return value if value.dtype == torch.float64 else value.float()


def checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss must be a tensor of one element, got {got}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any trainable parameter; look for detach() or no_grad() "
            "in the model, and for a forward that does not call the model it is given"
        )
    return loss.reshape(())


def _check_differentiable(gradients: Sequence[Tensor]) -> None:
    """Finds what torch would pass over as a derivative of zero."""
    waiting = [gradient.grad_fn for gradient in gradients]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":  # torch.autograd.function.once_differentiable
            raise RuntimeError("a function of the model can be differentiated only once")
        waiting += [before for before, _ in node.next_functions]


def _checked_iterator(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; for a single "
            "batch pass [(input, target)]"
        )
    return iter(batches)


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(
            f"model is wrapped in {type(model).__name__}; pass model.module, before training: "
            "scores are averaged over the processes"
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise TypeError("model is sharded over processes; compute masks before fully_shard")
