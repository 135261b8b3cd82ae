"""MaskedSGD: momentum SGD of a pruned network, which stays pruned."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..masks import MaskSet
from ..ops.reference.masked_sgd import packed
from .half import HALF, restore_float32, state_dtype
from .masked import BitMask, masks_by_parameter
from .settings import SettingsTable, check_options, row_of
from .sharded import check_not_flat, is_sharded, local, local_gradient, whole
from .tensors import check_parameter, follow_layout, is_skipped_start, usable


class _Lists(NamedTuple):
    """One step's tensors, in registration order."""

    weights: list[Tensor]
    momenta: list[Tensor]
    copies: list[Tensor]
    gradients: list[Any]
    masks: list[Tensor]
    rows: list[int]


class MaskedSGD(Optimizer):
    """`torch.optim.SGD` for a pruned network: what a mask prunes is zero after every step.

    The mask is one bit per parameter inside the step. Where it is False the weight, its momentum
    and its 16-bit parameter are exactly +0.0, whatever the gradient is, and so they are in every
    checkpoint. Elsewhere the arithmetic is that of `torch.optim.SGD`, whose arguments and behaviour
    this shares. The masks are saved with the state; loading a state without masks keeps those that
    are here.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        masks: a MaskSet; parameters without a mask are dense. A mask belongs to the parameter that
            it was made for, else to the one of its name (give `model.named_parameters()`), else to
            the only one of its shape. Pruned weights are zeroed at once.

    A group that `add_param_group` adds later may bring `masks` of its own.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        masks: MaskSet,
        maximize: bool = False,
    ) -> None:
        self._masks: dict[Tensor, Tensor] = {}  # bools, laid out and sharded like the parameters
        self._forget()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self._masks |= masks_by_parameter(self.param_groups, masks)
        self._write_zeros()

    def _forget(self) -> None:
        """Everything that can be made anew from the groups, the state and the masks."""
        self._settings = SettingsTable()
        self._bits: dict[int, Tensor] = {}  # by the parameter's number: its part of the mask here
        self._lists: _Lists | None = None
        self._parameters: list[Tensor] = []
        self._strides: list[tuple[int, ...]] = []
        self._has_momentum: list[bool] = []

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group = {**param_group}
        masks = param_group.pop("masks", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            names = group.get("param_names") or [
                f"params[{i}]" for i in range(len(group["params"]))
            ]
            for name, parameter in zip(names, group["params"], strict=True):
                _check_parameter(name, parameter)
            found = {} if masks is None else masks_by_parameter([group], masks)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._masks |= found
        self._forget()
        self._write_zeros()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # torch's own names three attributes
        return {**state, "_masks": self._masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the state of a plain SGD: the masks then stay as they are here."""
        super().load_state_dict(state_dict)
        restore_float32(self, state_dict)
        for parameter, state in self.state.items():
            if "mask" in state:  # torch made it a float
                self._masks[parameter] = state["mask"] = state["mask"].bool()
        self._forget()
        self._write_zeros()

    def _state(self, parameter: Tensor, has_momentum: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state.get(parameter, {})
        if has_momentum and state.get("momentum_buffer") is None:
            dtype = state_dtype(parameter)
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        if parameter.dtype in HALF and "master" not in state:
            state["master"] = parameter.detach().float()
        if parameter in self._masks:
            state["mask"] = self._masks[parameter]
        if follow_layout(state, parameter):
            self._bits.clear()
        if "mask" in state:
            self._masks[parameter] = state["mask"]
        if state:
            self.state[parameter] = state
        return state

    def _packed(self, number: int, mask: Tensor) -> Tensor:
        if number not in self._bits:
            self._bits[number] = packed(local(mask))
        return self._bits[number]

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_skipped_start(self):
            return loss
        lists = self._collect()
        if lists.weights:
            settings = self._settings.of(self.param_groups, lists.weights[0].device)
            scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            tensors = (lists.weights, lists.momenta, lists.copies, lists.gradients, lists.masks)
            torch.ops.fastprune.masked_sgd_(*tensors, settings, lists.rows, scale, found)
        return loss

    def _collect(self) -> _Lists:
        """Only gradients change from step to step, once every parameter has had its first."""
        lists = self._lists
        has_momentum = [group["momentum"] != 0 for group in self.param_groups]
        # A compiled step has no use for caches.
        if lists is None or has_momentum != self._has_momentum or torch.compiler.is_compiling():
            return self._collect_anew(has_momentum)
        fit = []
        for parameter, stride in zip(self._parameters, self._strides, strict=True):
            gradient = parameter.grad
            if gradient is None:
                return self._collect_anew(has_momentum)
            if gradient.stride() != stride:
                if parameter.stride() != stride:  # its memory format has changed
                    return self._collect_anew(has_momentum)
                gradient = usable(gradient, parameter, "MaskedSGD")
            fit.append(gradient)
        return lists._replace(gradients=fit)

    def _collect_anew(self, has_momentum: list[bool]) -> _Lists:
        lists = _Lists([], [], [], [], [], [])
        parameters = [(g, p) for g, group in enumerate(self.param_groups) for p in group["params"]]
        complete = True
        for number, (g, parameter) in enumerate(parameters):
            if parameter.grad is None:
                complete = False
                continue
            held = self.state.get(parameter, {}).get("momentum_buffer")
            first_step = has_momentum[g] and held is None
            complete = complete and not first_step and not is_sharded(parameter)
            state = self._state(parameter, has_momentum[g])
            weight = local(state.get("master", parameter))
            momentum = local(state["momentum_buffer"]) if has_momentum[g] else weight.new_empty(0)
            bits = self._packed(number, state["mask"]) if "mask" in state else None
            lists.weights.append(weight)
            lists.momenta.append(momentum)
            lists.copies.append(local(parameter) if "master" in state else weight.new_empty(0))
            lists.gradients.append(usable(local_gradient(parameter), weight, "MaskedSGD"))
            lists.masks.append(weight.new_empty(0, dtype=torch.uint8) if bits is None else bits)
            lists.rows.append(row_of(g, first_step))
        if not any(copy.numel() for copy in lists.copies):
            lists = lists._replace(copies=[])
        if not torch.compiler.is_compiling():
            self._parameters = [parameter for _, parameter in parameters]
            self._lists = lists._replace(gradients=[]) if complete else None
            self._strides = [weight.stride() for weight in lists.weights]
            self._has_momentum = has_momentum
        return lists

    # ------------------------------------------------------------------ masks

    @torch.no_grad()
    def masks(self) -> MaskSet:
        """The masks in full, by the names the parameters were given with (else "group.number")."""
        masks, parameters = {}, {}
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter in self._masks:
                    masks[name] = whole(local(self._masks[parameter]), parameter)
                    parameters[name] = parameter
        return MaskSet(masks, parameters)

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Writes the zeros anew, also where something else has changed weights; the masks."""
        self._write_zeros()
        return self.masks()

    @torch.no_grad()
    def _write_zeros(self) -> None:
        for parameter, mask in self._masks.items():
            BitMask(mask).write_zeros(parameter, self.state.get(parameter, {}))

    @torch.no_grad()
    def resync(self) -> None:
        """Takes over 16-bit parameters that something else has changed since the last step."""
        for parameter, state in self.state.items():
            if "master" in state:
                state["master"].copy_(parameter)


def _check_parameter(name: str, parameter: Tensor) -> None:
    check_not_flat(name, parameter)
    check_parameter(name, parameter, "MaskedSGD")
