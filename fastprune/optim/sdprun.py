"""SDprun: structured directional pruning as a drop-in optimizer."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..masks import MaskSet, Sparsity, num_kept
from ..ops.reference.sdprun import (
    PROGRESS,
    SETTINGS,
    channel_rows,
    guarded_groups,
    is_pruned,
)
from .half import HALF, restore_float32, state_dtype
from .layers import Layer, Pool, check_one_mesh, exchanged, gathered, layers_of
from .layers import is_pruned as is_prunable
from .settings import check_numbers
from .sharded import check_not_flat, is_sharded, local, local_gradient, whole
from .tensors import check_parameter, follow_layout, usable

SCALES = ("none", "sqrt")
OPTIONS = ("lr", "momentum", "maximize", "c", "mu", "scale", "min_groups")
GOAL = SETTINGS.index("goal")
# What a parameter group has beyond the options of torch.optim.SGD, and what it then is.
OURS: dict[str, Any] = {"prune": None, "coupled": False, "channel_dims": None}


class _Lists(NamedTuple):
    """One step's tensors: the operators' arguments."""

    accumulators: list[Tensor]
    momenta: list[Tensor]
    weights: list[Tensor]
    gradients: list[Any]
    rows: list[int]
    first_groups: list[int]
    column_groups: list[int]
    layer_firsts: list[int]  # of the pruned ones, which come first
    layer_sizes: list[int]


class SDprun(Optimizer):
    """SGD that drives whole channels to zero along the directions in which the loss is flat.

    The optimizer moves an accumulator v by the gradient; the weights are v with every pruning group
    shrunk by a threshold that grows slowly, so that groups whose removal the loss does not feel
    become exactly zero: they can be removed without retraining. With c=0 this is
    `torch.optim.SGD`, whose conventions it shares.

    Args:
        params, lr, momentum, maximize: as in `torch.optim.SGD`. `channel_groups(model, input)`
            makes groups of whole channels, with their biases and norm layers.
        c: strength. After n steps the threshold is c * lr^(1/2 + mu) * n^mu, with momentum that of
            lr / (1 - momentum).
        mu: growth, in theory between 0.5 and 1.
        scale: "none", or "sqrt": a group of d elements has sqrt(d) times the threshold.
        target_sparsity: fraction of zeros among the pruned parameters after `total_steps`, in place
            of c, which then follows from it at each step. It is met from below to within one group
            and those that cross the threshold in the very last step; it is missed where groups fall
            below the threshold by themselves, since the threshold never shrinks, or where
            `min_groups` keeps them.
        total_steps: the planned number of steps, for `target_sparsity`.
        min_groups: a layer that would keep fewer groups keeps that many, its largest, unshrunk.

    A parameter group with `prune=True` makes a pruning group of every index of dimension 0 of each
    of its parameters; with `coupled=True` its parameters are one layer and share their groups.
    `channel_dims` says where the channels are, (dimension, convolution groups) per parameter.
    Without `prune`, parameters of two or more dimensions are pruned.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        c: float = 0.1,
        mu: float = 0.6,
        *,
        scale: str = "none",
        target_sparsity: Sparsity | None = None,
        total_steps: int | None = None,
        min_groups: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if (target_sparsity is None) != (total_steps is None):
            raise ValueError(
                "target_sparsity and total_steps go together: the threshold must know when the "
                f"sparsity is due; got {target_sparsity} and {total_steps}"
            )
        if target_sparsity is not None:
            num_kept(target_sparsity, 0)  # a wrong one is said now
            if total_steps is None or total_steps < 1:
                raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self._target_sparsity, self._total_steps = target_sparsity, total_steps
        self._forget()
        self._layers: list[Layer] = []
        self._rest: list[tuple[int, Tensor]] = []  # not pruned: number of the group, parameter
        self._started = False  # no step yet: every threshold is 0
        defaults = {
            "lr": lr,
            "c": c,
            "mu": mu,
            "scale": scale,
            "min_groups": min_groups,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            **OURS,
        }
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Everything that can be made anew from the groups and the state."""
        self._lists: _Lists | None = None
        self._parameters: list[Tensor] = []
        self._strides: list[tuple[int, ...]] = []
        self._has_momentum: list[bool] = []
        self._held: list[Tensor] = []  # weights that are made from accumulators
        self._versions: dict[int, int] = {}  # of those, after the last step
        self._progress: Tensor | None = None
        self._norms: Tensor | None = None
        self._exchange: tuple[Any, Tensor | None] = (None, None)
        self._pool: Pool | None = None
        self._device_settings: tuple[Any, Tensor] | None = None

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for i, parameter in enumerate(group["params"]):
                name = group.get("param_names", {i: f"params[{i}]"})[i]
                check_parameter(name, parameter, "SDprun")
                check_not_flat(name, parameter)
            self._arrange()
            check_one_mesh(self._layers)
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._arrange()
            raise
        for name in PROGRESS:
            group[name] = torch.zeros((), dtype=torch.float64)
        self._forget()

    def _arrange(self) -> None:
        self._layers, self._rest = [], []
        for number, group in enumerate(self.param_groups):
            first = sum(layer.channels for layer in self._layers)
            self._layers += layers_of(group, number, first)
            if not group["coupled"]:
                self._rest += [(number, p) for p in group["params"] if not is_prunable(group, p)]

    def __getstate__(self) -> dict[str, Any]:
        # torch's own names three attributes; without ours a copy would not know its target.
        options = ("_target_sparsity", "_total_steps", "_started")
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._arrange()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the state of a plain SGD: options that it lacks stay as they are here.

        The accumulators come with it. Load the model's own state too, before or after.
        """
        names = (*OURS, *PROGRESS, "c", "mu", "scale", "min_groups")
        ours = [{name: group[name] for name in names} for group in self.param_groups]
        groups = [
            {**mine, **saved} for mine, saved in zip(ours, state_dict["param_groups"], strict=False)
        ]
        groups += state_dict["param_groups"][len(groups) :]
        for group in groups:
            _check_group({**self.defaults, **group})
        super().load_state_dict({**state_dict, "param_groups": groups})
        restore_float32(self, state_dict)
        self._forget()
        self._started = True

    # ------------------------------------------------------------------ tables on the device

    def _progress_table(self, device: torch.device) -> Tensor:
        """One row a group; the groups' own numbers are views of it."""
        if self._progress is None:
            rows = [[group[name].to(device) for name in PROGRESS] for group in self.param_groups]
            self._progress = torch.stack([torch.stack(row) for row in rows])
            for group, row in zip(self.param_groups, self._progress, strict=True):
                group.update(zip(PROGRESS, row.unbind(), strict=True))
        return self._progress

    def _norms_table(self, device: torch.device) -> Tensor:
        if self._norms is None:
            size = sum(layer.channels for layer in self._layers)
            self._norms = torch.zeros(size, dtype=torch.float64, device=device)
            self._exchange = exchanged(self._layers, device)
            if self._target_sparsity is not None and size:
                for layer in self._layers:  # the first step already asks for them
                    self._norms[layer.own] = layer.norms(self._sources(layer))
                self._pool = Pool(self._layers, self.param_groups, self._target_sparsity, device)
        return self._norms

    def _settings(self, device: torch.device) -> Tensor:
        rates = [group["lr"] for group in self.param_groups]
        options = [[group[name] for name in OPTIONS[1:]] for group in self.param_groups]
        numbers = [0.0 if isinstance(lr, Tensor) else lr for lr in rates], options, device
        compiling = torch.compiler.is_compiling()
        held = self._device_settings
        if held is not None and held[0] == numbers and not compiling:
            settings = held[1]
        else:
            rest = [self._total_steps or 0, 0]
            rows = [
                [lr, momentum, maximize, c, mu, scale == "sqrt", min_groups, *rest]
                for lr, (momentum, maximize, c, mu, scale, min_groups) in zip(
                    numbers[0], options, strict=True
                )
            ]
            settings = torch.tensor(rows, dtype=torch.float64, device=device)
            if not compiling:
                self._device_settings = (numbers, settings)
        for i, lr in enumerate(rates):
            if isinstance(lr, Tensor):
                settings[i, 0].copy_(lr.reshape(()))
        return settings

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists = self._collect()
        if lists.weights:
            self._update(lists)
            if not torch.compiler.is_compiling():
                self._started = True
        return loss

    def _collect(self) -> _Lists:
        """Only gradients change from step to step, once every parameter has had its first."""
        lists = self._lists
        if lists is None or torch.compiler.is_compiling():  # a compiled step has no use for caches
            return self._collect_anew()
        if self._has_momentum != [group["momentum"] != 0 for group in self.param_groups]:
            return self._collect_anew()
        fit = []
        for parameter, stride in zip(self._parameters, self._strides, strict=True):
            gradient = parameter.grad
            if gradient is None:
                return self._collect_anew()
            if gradient.stride() != stride:
                if parameter.stride() != stride:  # its memory format has changed
                    return self._collect_anew()
                gradient = usable(gradient, parameter, "SDprun")
            fit.append(gradient)
        return lists._replace(gradients=fit)

    def _collect_anew(self) -> _Lists:
        has_momentum = [group["momentum"] != 0 for group in self.param_groups]
        lists = _Lists([], [], [], [], [], [], [], [], [])
        parameters = []
        for layer in self._layers:
            if all(p.grad is None for p in layer.parameters):
                continue
            self._start(layer)
            first = layer.own.start
            for parameter, columns in zip(layer.parameters, layer.columns, strict=True):
                self._append(lists, parameter, layer.group, has_momentum[layer.group])
                lists.first_groups.append(first)
                lists.column_groups.append(columns)
                lists.layer_firsts.append(layer.first)
                lists.layer_sizes.append(layer.channels)
                parameters.append(parameter)
        for number, parameter in self._rest:
            if parameter.grad is not None:
                self._append(lists, parameter, number, has_momentum[number])
                lists.first_groups.append(-1)
                lists.column_groups.append(0)
                parameters.append(parameter)
        if not any(has_momentum):
            lists = lists._replace(momenta=[])
        if not torch.compiler.is_compiling():
            everything = sum(len(group["params"]) for group in self.param_groups)
            complete = len(parameters) == everything and not any(
                p.grad is None or is_sharded(p) for p in parameters
            )
            self._parameters = parameters
            self._lists = lists._replace(gradients=[]) if complete else None
            self._strides = [weight.stride() for weight in lists.weights]
            pairs = zip(lists.weights, lists.accumulators, strict=True)
            self._held = [weight for weight, accumulator in pairs if accumulator.numel()]
            self._has_momentum = has_momentum
        return lists

    def _append(self, lists: _Lists, parameter: Tensor, row: int, has_momentum: bool) -> None:
        if parameter.dtype in HALF:
            self._accumulator(parameter)
        if has_momentum and self.state[parameter].get("momentum_buffer") is None:
            buffer = torch.zeros_like(parameter, dtype=state_dtype(parameter))
            self.state[parameter]["momentum_buffer"] = buffer
        state = self.state.get(parameter, {})
        follow_layout(state, parameter)
        weight = local(parameter)
        absent = weight.new_empty(0)
        lists.accumulators.append(local(state.get("accumulator", absent)))
        lists.momenta.append(local(state["momentum_buffer"]) if has_momentum else absent)
        lists.weights.append(weight)
        lists.gradients.append(
            absent
            if parameter.grad is None
            else usable(local_gradient(parameter), weight, "SDprun")
        )
        lists.rows.append(row)

    def _update(self, lists: _Lists) -> None:
        device = lists.weights[0].device
        self._check_unchanged()
        progress = self._progress_table(device)
        norms = self._norms_table(device)
        settings = self._settings(device)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._pool is not None:
            settings[:, GOAL] = self._pool.goal(gathered(norms, *self._exchange))
        places = lists.rows, lists.first_groups, lists.column_groups
        guarded = any(group["min_groups"] for group in self.param_groups)
        shared = self._exchange[1] is not None  # layers of which this process has a part
        torch.ops.fastprune.sdprun_threshold_(progress, settings, found)
        torch.ops.fastprune.sdprun_update_(
            lists.accumulators,
            lists.momenta,
            lists.weights,
            norms,
            lists.gradients,
            progress,
            settings,
            *places,
            scale,
            found,
            guarded and not shared,
        )
        if guarded and shared:
            pruned = slice(len(lists.layer_firsts))
            torch.ops.fastprune.sdprun_guard_(
                lists.weights[pruned],
                lists.accumulators[pruned],
                gathered(norms, *self._exchange),
                progress,
                settings,
                *(numbers[pruned] for numbers in places),
                lists.layer_firsts,
                lists.layer_sizes,
                found,
            )
        self._remember()

    # ------------------------------------------------------------------ changes from outside

    def _check_unchanged(self) -> None:
        """What is written into a weight would be lost: the next step forms it from v."""
        if torch.compiler.is_compiling():
            return
        versions = self._versions
        for weight in self._held:
            version = weight._version
            if version != versions.get(id(weight), version):
                name = next(
                    name
                    for name, parameter in self._named_parameters()
                    if local(parameter) is weight
                )
                raise RuntimeError(
                    f"{name} was changed from outside since the last step, which the next one "
                    "would undo: the weights are made from an accumulator. Call opt.resync() "
                    "after writing into parameters, or load the optimizer's state with the model's"
                )

    def _remember(self) -> None:
        if torch.compiler.is_compiling():
            self._versions.clear()
        else:
            self._versions.update((id(weight), weight._version) for weight in self._held)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._layers:
            yield from zip(layer.names, layer.parameters, strict=True)
        for number, parameter in self._rest:
            yield f"a parameter of group {number}", parameter

    @torch.no_grad()
    def resync(self) -> None:
        """Takes over parameters that something else has changed since the last step.

        The accumulator of a changed group becomes the one that the threshold turns into the group's
        weights; those of other groups stay as they are.
        """
        kept = self._kept()
        for layer, (norms, is_kept, is_guarded) in zip(self._layers, kept, strict=True):
            if not self._has_state(layer):
                continue
            threshold = self._threshold(layer, norms.device)
            factor = torch.where(threshold == 0, 1.0, 1 - threshold / norms)
            factor = torch.where(is_guarded, 1.0, factor)
            changed = torch.zeros_like(is_kept)
            pieces = zip(
                layer.parameters, layer.spread(factor), layer.spread(is_kept), layer.columns,
                strict=True,
            )  # fmt: skip
            for parameter, by, stays, columns in pieces:
                weight, accumulator = local(parameter), self._accumulator(parameter)
                expected = (accumulator * by.to(accumulator.dtype)).where(stays, 0.0)
                different = weight != expected.to(weight.dtype)
                changed |= channel_rows(different, columns).any(1)
            self._take_over(layer, changed)
        for _, parameter in self._rest:
            if "accumulator" in self.state.get(parameter, {}):
                weight, accumulator = local(parameter), self._accumulator(parameter)
                same = accumulator.to(weight.dtype) == weight
                accumulator.copy_(torch.where(same, accumulator, weight.to(accumulator.dtype)))
        self._versions = {}

    def _take_over(self, layer: Layer, where: Tensor | None = None) -> None:
        """The accumulators from which the present threshold makes the weights that are there."""
        accumulators = [self._accumulator(p) for p in layer.parameters]
        weights = [
            local(p).to(v.dtype) for p, v in zip(layer.parameters, accumulators, strict=True)
        ]
        norms = layer.norms(weights)
        threshold = self._threshold(layer, norms.device)
        factor = torch.where(norms > 0, 1 + threshold / norms, 1.0)
        where = torch.ones_like(factor, dtype=torch.bool) if where is None else where
        pieces = zip(accumulators, weights, layer.spread(factor), layer.spread(where), strict=True)
        for accumulator, weight, by, changed in pieces:
            accumulator.copy_(torch.where(changed, weight * by.to(weight.dtype), accumulator))

    def _start(self, layer: Layer) -> None:
        """Makes accumulators; one that joins late must not be shrunk by all of the threshold."""
        if not self._has_state(layer):
            for parameter in layer.parameters:
                self._accumulator(parameter)
            if self._started:
                self._take_over(layer)

    def _has_state(self, layer: Layer) -> bool:
        return all("accumulator" in self.state.get(p, {}) for p in layer.parameters)

    def _accumulator(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "accumulator" not in state:
            state["accumulator"] = parameter.detach().to(state_dtype(parameter), copy=True)
        return local(state["accumulator"])

    def _threshold(self, layer: Layer, device: torch.device) -> Tensor:
        eta = sqrt(layer.size) if self.param_groups[layer.group]["scale"] == "sqrt" else 1.0
        return eta * self._progress_table(device)[layer.group, PROGRESS.index("threshold")]

    # ------------------------------------------------------------------ the end

    def _kept(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each layer the norms of its local groups, which are kept, and which by the guard."""
        if not self._layers:
            return []
        device = local(self._layers[0].parameters[0]).device
        norms = torch.zeros_like(self._norms_table(device))
        for layer in self._layers:
            norms[layer.own] = layer.norms(self._sources(layer))
        everywhere = gathered(norms, *self._exchange)
        found = []
        for layer in self._layers:
            own, first = layer.own, layer.shard.first_row
            threshold = self._threshold(layer, device)
            if not self._has_state(layer):  # never had a gradient
                threshold = torch.zeros_like(threshold)
            floor = self.param_groups[layer.group]["min_groups"]
            guarded = guarded_groups(everywhere[layer.whole], threshold, floor)
            guarded = guarded[first : first + own.stop - own.start]
            found.append((norms[own], ~is_pruned(norms[own], threshold) | guarded, guarded))
        return found

    def _sources(self, layer: Layer) -> list[Tensor]:
        states = [self.state.get(p, {}) for p in layer.parameters]
        return [
            local(state.get("accumulator", p))
            for p, state in zip(layer.parameters, states, strict=True)
        ]

    def _local_masks(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for layer, (_, kept, _) in zip(self._layers, self._kept(), strict=True):
            pieces = zip(layer.names, layer.parameters, layer.spread(kept), strict=True)
            for name, parameter, mask in pieces:
                full = torch.empty_like(local(parameter), dtype=torch.bool).copy_(mask)
                yield name, parameter, full

    @torch.no_grad()
    def masks(self) -> MaskSet:
        """True for the groups that are kept, for each pruned parameter."""
        return MaskSet({name: whole(mask, p) for name, p, mask in self._local_masks()})

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Returns what stayed. Pruned groups are zero already, but where a gradient was missing."""
        masks = {}
        for name, parameter, mask in self._local_masks():
            local(parameter).masked_fill_(~mask, 0.0)
            masks[name] = whole(mask, parameter)
        self._versions = {}
        return MaskSet(masks)


def _check_group(group: dict[str, Any]) -> None:
    check_numbers(group, ("lr", "c", "momentum"))
    if not group["momentum"] < 1:
        raise ValueError(f"momentum must be below 1, got {group['momentum']}")
    if group["weight_decay"]:
        raise ValueError(
            f"weight_decay must be 0, got {group['weight_decay']}: decay pulls on the flat "
            "directions of the loss, along which SDprun prunes, and nothing would become zero; "
            "the threshold shrinks the weights already"
        )
    if group["scale"] not in SCALES:
        raise ValueError(f"scale must be 'none' or 'sqrt', got {group['scale']!r}")
    min_groups = group["min_groups"]
    if isinstance(min_groups, bool) or not isinstance(min_groups, int) or min_groups < 0:
        raise ValueError(f"min_groups must be an integer of at least 0, got {min_groups!r}")
    if not 0.5 < group["mu"] < 1:
        warnings.warn(
            f"mu={group['mu']} is outside (0.5, 1): below, noise outruns the threshold; above, it "
            "grows so fast that the loss suffers",
            stacklevel=5,
        )
