"""Where the switches of a model stand, and how most of them cost no pass over its activations.

A switch multiplies channels by s. Behind a norm that is a change of the norm's weight and bias:

    s (gamma x + beta) = (s gamma) x + (s beta)

It is then behind a ReLU that follows the norm too, since relu(s x) = s relu(x) for s >= 0. Layers
that are added together have one switch, and s a + s b = s (a + b).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..channels import Layer
from ..ops import channel_switch

PLACEMENTS = ("auto", "layer")
Scales = Mapping[str, Tensor]


class Switches:
    """One switch for each set of layers whose channels live and die together.

    A switch takes [channels] numbers, or [examples, channels] for each example its own.

    Args:
        sets: the layers of each switch.
        placement: "auto" switches behind the norm that follows a layer, or behind a layer without
            norm; "layer" always right behind the layer.
    """

    def __init__(
        self, model: nn.Module, sets: Mapping[str, Sequence[Layer]], *, placement: str = "auto"
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be 'auto' or 'layer', got {placement!r}")
        self.sizes = {name: len(layers[0].labels) for name, layers in sets.items()}
        self._model = model
        # A depthwise layer passes on channels that were switched where they were made.
        self._places = {
            name: [_Place(model, each, placement) for each in layers if not each.depthwise]
            for name, layers in sets.items()
        }

    def tensors(self, scales: Scales) -> dict[str, Tensor]:
        """Norms' weights and biases by name, as functions of those switches that norms can take."""
        folded: dict[str, Tensor] = {}
        for place, scale in self._each(scales):
            if place.takes(scale):
                folded |= place.folded(scale)
        return folded

    @contextmanager
    def hooks(self, scales: Scales) -> Iterator[None]:
        """While it is open, the model's modules multiply by all other switches."""
        with ExitStack() as stack:
            for place, scale in self._each(scales):
                if not place.takes(scale):
                    handle = place.module.register_forward_hook(_multiply_by(scale))
                    stack.callback(handle.remove)
            yield

    def run(self, scales: Scales, *inputs: Any) -> Any:
        """The model's output with these switches; those that are not named are off."""
        with self.hooks(scales):
            return functional_call(self._model, self.tensors(scales), inputs)

    def _each(self, scales: Scales) -> Iterator[tuple["_Place", Tensor]]:
        for name, scale in scales.items():
            yield from ((place, scale) for place in self._places[name])


class _Place:
    """Behind a layer, or behind its norm."""

    def __init__(self, model: nn.Module, layer: Layer, placement: str) -> None:
        self._before_norm = placement == "layer"
        names = [slot.name for slot in layer.norm]
        self.module = model.get_submodule(layer.name)
        self._norm: nn.Module | None = None
        if names:
            self._path = names[0].rpartition(".")[0]
            self._norm = model.get_submodule(self._path)
            if not self._before_norm:
                self.module = self._norm

    def takes(self, scale: Tensor) -> bool:
        """Whether the norm can multiply by it: once for all examples."""
        norm = self._norm
        if norm is None or scale.dim() != 1 or norm.weight is None or norm.bias is None:
            return False
        return not self._before_norm or (
            isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
        )

    def folded(self, scale: Tensor) -> dict[str, Tensor]:
        norm: Any = self._norm
        if norm.training:
            raise ValueError(f"{self._path} is in training mode: call model.eval() first")
        weight, bias = norm.weight.detach(), norm.bias.detach()
        if self._before_norm:  # the norm subtracts its mean, unswitched, from what is switched
            mean = norm.running_mean * (norm.running_var + norm.eps).rsqrt()
            shifted = bias + (scale - 1) * weight * mean
        else:
            shifted = bias * scale
        folded = {"weight": weight * scale, "bias": shifted}
        return {f"{self._path}.{name}": t.to(weight.dtype) for name, t in folded.items()}


def _multiply_by(scale: Tensor) -> Any:
    def multiply(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if isinstance(module, nn.Linear) and output.dim() > 2:  # channels are the last dimension
            return channel_switch(output.movedim(-1, 1), scale).movedim(1, -1)
        return channel_switch(output, scale)

    return multiply
