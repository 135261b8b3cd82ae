"""ASWL: the sparsity of each layer learnt together with dense and sparse weights."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks import MaskSet, Sparsity, num_kept
from ..ops.reference.aswl import (
    ATTENTION,
    FLOOR,
    PLAIN,
    SETTINGS,
    effective,
    is_pruned,
    is_scaled,
    kept_elements,
    num_pruned,
)
from ..ops.select import checked_block, global_topk_masks
from .aswl_advice import warn_if_cancelled, warn_if_far, warn_if_out_of_reach, warn_of_collapse
from .aswl_sharded import aswl_step_sharded
from .attention import POSITIONS, cancelled_layers, check_parts, parts_of
from .half import HALF, restore_float32, state_dtype
from .settings import check_numbers
from .sharded import (
    Shard,
    is_sharded,
    local,
    local_gradient,
    magnitude_masks,
    shard_of,
    whole,
)
from .shares import settled
from .tensors import follow_layout, usable

TIES = ("exact", "keep")
GAIN = 0.3  # the multiplier's rate over the penalty's: it comes after it, with room to spare
TABLES = ("attention", "tie_end", "multiplier")  # of all layers, on the device
OURS = (*TABLES, "attention_ratio", "finished")
OPTIONS = ("_alpha", "_l2", "_density_weight", "_keep_ties", "_num_kept", "_total", "_places",
           "_log", "_warned")  # fmt: skip
LR, ATTENTION_LR = SETTINGS.index("lr"), SETTINGS.index("attention_lr")


class Place(NamedTuple):
    """A parameter's part in the model: a number among the group's parameters, and what it does."""

    number: int
    name: str
    layer: int
    role: int


class History(NamedTuple):
    """What `record()` kept: the marks, and for each layer its sparsity at each of them."""

    marks: list[float]
    sparsities: dict[str, list[float]]


class _Lists(NamedTuple):
    """One step's tensors, layer by layer: the operator's arguments."""

    parameters: list[Tensor]
    dense: list[Tensor]
    momenta: list[Tensor]
    gradients: list[Any]
    shards: list[Shard]  # empty if nothing is sharded


class ASWL(Optimizer):
    """Momentum SGD of a model whose layers learn their own sparsities, for a total that is given.

    Each layer has one attention a. It scales the layer's output, and it says how much of the layer
    is pruned: the smallest (1 - a)^alpha of its weights. A parameter holds a times the pruned
    weight (a bias a times itself) from the moment the optimizer is made; the dense weight is state,
    gets every gradient, and lets weights return. A penalty on the total, with a slowly moving
    multiplier, leads it to `sparsity`. `finish()` selects the exact count.

    Args:
        model: all of it; what is trainable now is what is trained. Convolutions, linear and
            attention layers are pruned, but not depthwise ones.
        lr, momentum: as in `torch.optim.SGD`.
        sparsity: fraction of zeros among the pruned weights in the end.
        alpha: below 1 prunes harder at the same attention, above 1 less.
        attention_lr: lr / 10 by default. It keeps its ratio to lr, whatever a scheduler does.
        attention_init: 1 starts with the dense model.
        density_weight: of the penalty on the distance to the target; 0 lets only the loss decide.
        l2: of the squares of the pruned weights in the loss.
        attention_position: "post_bn" scales the batch, instance or group norm that is registered
            right behind a layer, in place of the layer, whose scale such a norm would cancel.
        prune_bias: biases are pruned too, together with their layer's weight.
        block: only (1, 1).
        ties: "exact" prunes exactly what the attention asks for, highest position first; "keep"
            keeps all that equal the threshold.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        sparsity: Sparsity,
        momentum: float = 0.9,
        alpha: float = 1.0,
        attention_lr: float | None = None,
        attention_init: float = 0.5,
        density_weight: float = 10.0,
        l2: float = 0.0,
        attention_position: str = "weight",
        prune_bias: bool = False,
        block: tuple[int, int] = (1, 1),
        ties: str = "exact",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; ASWL must know its "
                "layers, so give it the model instead of model.parameters()"
            )
        _check_choice("attention_position", attention_position, POSITIONS)
        _check_choice("ties", ties, TIES)
        if checked_block(block) != (1, 1):
            raise ValueError(
                f"block must be (1, 1), got {block}: ASWL chooses single weights only; GSM prunes "
                "in blocks"
            )
        for name, value in (("density_weight", density_weight), ("l2", l2)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        if not FLOOR <= attention_init <= 1:
            raise ValueError(f"attention_init must be in [{FLOOR}, 1], got {attention_init}")
        group = {"lr": lr, "momentum": momentum}
        _check_group(group)
        num_kept(sparsity, 0)  # a wrong one is said before anything is changed
        parts = parts_of(model, attention_position, prune_bias)
        check_parts(parts, attention_position)
        order = {id(p): i for i, p in enumerate(model.parameters()) if p.requires_grad}
        trained = sorted(parts, key=lambda part: order[id(part.parameter)])
        numbers = {part.name: i for i, part in enumerate(trained)}
        self._places = [Place(numbers[p.name], p.name, p.layer, p.role) for p in parts]
        self._alpha, self._l2, self._density_weight = float(alpha), float(l2), float(density_weight)
        self._keep_ties = ties == "keep"
        self._total = sum(p.parameter.numel() for p in parts if is_pruned(p.role))
        self._num_kept = num_kept(sparsity, self._total)
        self._log: list[tuple[float, Tensor]] = []
        self._warned: set[str] = set()
        self._forget()
        super().__init__([(p.name, p.parameter) for p in trained], group)
        layers = 1 + max(part.layer for part in parts)
        device = local(trained[0].parameter).device
        attention = torch.zeros(layers, len(ATTENTION), dtype=torch.float64, device=device)
        attention[:, 0] = attention_init
        self.param_groups[0].update(
            attention=attention,
            tie_end=torch.zeros(layers, dtype=torch.int64, device=device),
            multiplier=torch.zeros((), dtype=torch.float64, device=device),
            attention_ratio=_ratio(attention_lr, lr),
            finished=False,
        )
        if attention_position == "weight":
            warn_if_cancelled(cancelled_layers(model))
        warn_if_out_of_reach(sparsity, alpha)
        self._form()

    def _forget(self) -> None:
        """Everything that can be made anew from the group and the state."""
        self._lists: _Lists | None = None
        self._strides: list[tuple[int, ...]] = []
        self._has_momentum = False
        self._versions: list[int] = []  # of the parameters that are made from dense weights
        self._device_settings: tuple[Any, Tensor] | None = None

    # ------------------------------------------------------------------ group and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise RuntimeError(
                "ASWL has one group, the model that it was made for: the sparsities of its layers "
                "depend on each other; make a new ASWL for a model that has grown"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # torch's own names three attributes
        return {**state, **{name: getattr(self, name) for name in OPTIONS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also forms the parameters anew. What a plain SGD's state lacks stays as it is here."""
        [mine] = self.param_groups
        groups = [
            {**{name: mine[name] for name in OURS}, **saved} for saved in state_dict["param_groups"]
        ]
        for group in groups:
            _check_group(group)
            for name in TABLES:
                if group[name].shape != mine[name].shape:
                    raise ValueError(
                        f"the saved state is of {len(group['attention'])} layers, this model has "
                        f"{len(mine['attention'])}; make the same model with the same options"
                    )
        states = {p: dict(self.state.get(p, {})) for p in mine["params"]}
        devices = {name: mine[name].device for name in TABLES}
        super().load_state_dict({**state_dict, "param_groups": groups})
        restore_float32(self, state_dict)
        [group] = self.param_groups
        for parameter, state in states.items():
            if state:
                self.state[parameter] = {**state, **self.state.get(parameter, {})}
        for name, device in devices.items():
            group[name] = group[name].to(device, mine[name].dtype)
        self._forget()
        if not group["finished"]:
            self._form()

    def _parameter(self, place: Place) -> Tensor:
        parameter: Tensor = self.param_groups[0]["params"][place.number]
        return parameter

    def _state(self, place: Place, has_momentum: bool) -> dict[str, Tensor]:
        parameter = self._parameter(place)
        state: dict[str, Tensor] = self.state.get(parameter, {})
        dtype = state_dtype(parameter)
        if "dense" not in state and (place.role != PLAIN or parameter.dtype in HALF):
            state["dense"] = parameter.detach().to(dtype, copy=True)
        if has_momentum and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        follow_layout(state, parameter)
        if state:
            self.state[parameter] = state
        return state

    def _dense(self, place: Place) -> Tensor:
        return local(self.state[self._parameter(place)]["dense"])

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.param_groups[0]["finished"]:
            raise RuntimeError(
                "finish() was called: the model is pruned and this optimizer is done; to train on, "
                "use MaskedSGD(model.parameters(), lr, masks=masks), which keeps the zeros"
            )
        run = self._run
        if torch.compiler.is_compiling() and self._has_shards():
            run = torch.compiler.disable(run, reason="processes exchange sums in it")
        run()
        return loss

    def _run(self) -> None:
        lists = self._collect()
        self._check_unchanged(lists)
        self._update(lists, self._settings(self._device(lists)))
        self._remember(lists)

    def _update(self, lists: _Lists, settings: Tensor) -> None:
        group = self.param_groups[0]
        arguments: list[Any] = [
            *lists[:3],
            *(group[name] for name in TABLES),
            lists.gradients,
            settings,
            [place.layer for place in self._places],
            [place.role for place in self._places],
            self._keep_ties,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        ]
        if lists.shards:
            aswl_step_sharded(lists.shards, self._l2, *arguments)
        else:
            torch.ops.fastprune.aswl_step_(*arguments)

    def _device(self, lists: _Lists) -> torch.device:
        now, then = lists.parameters[0].device, self.param_groups[0]["attention"].device
        if now != then:
            raise RuntimeError(
                f"the model has moved from {then} to {now} since the optimizer was made, which "
                "holds its dense weights; make the optimizer after model.to(device)"
            )
        return now

    def _has_shards(self) -> bool:
        return any(is_sharded(p) for p in self.param_groups[0]["params"])

    def _collect(self) -> _Lists:
        """Only gradients change from step to step."""
        has_momentum = self.param_groups[0]["momentum"] != 0
        lists = self._lists
        if (
            lists is None
            or has_momentum != self._has_momentum
            or torch.compiler.is_compiling()  # a compiled step has no use for caches
        ):
            return self._collect_anew(has_momentum)
        gradients = []
        for parameter, dense, stride in zip(
            lists.parameters, lists.dense, self._strides, strict=True
        ):
            gradient = parameter.grad
            if gradient is None or gradient.stride() != stride:
                if parameter.stride() != stride:  # its memory format has changed
                    return self._collect_anew(has_momentum)
                gradient = self._gradient(parameter, dense)
            gradients.append(gradient)
        return lists._replace(gradients=gradients)

    def _collect_anew(self, has_momentum: bool) -> _Lists:
        lists = _Lists([], [], [], [], [])
        for place in self._places:
            parameter = self._parameter(place)
            state = self._state(place, has_momentum)
            held = local(parameter)
            dense = local(state["dense"]) if "dense" in state else held.new_empty(0)
            lists.parameters.append(held)
            lists.dense.append(dense)
            if has_momentum:
                lists.momenta.append(local(state["momentum_buffer"]))
            lists.gradients.append(self._gradient(parameter, dense))
            lists.shards.append(_shard(parameter, place))
        if all(shard.group is None for shard in lists.shards):
            lists = lists._replace(shards=[])
        if not torch.compiler.is_compiling():
            self._lists = None if self._has_shards() else lists._replace(gradients=[])
            self._strides = [held.stride() for held in lists.parameters]
            self._has_momentum = has_momentum
        return lists

    def _gradient(self, parameter: Tensor, dense: Tensor) -> Tensor:
        if parameter.grad is None:
            return dense.new_empty(0, dtype=parameter.dtype)
        return usable(local_gradient(parameter), local(parameter), "ASWL")

    def _settings(self, device: torch.device) -> Tensor:
        group = self.param_groups[0]
        lr, ratio = group["lr"], group["attention_ratio"]
        rate = 0.0 if isinstance(lr, Tensor) else float(lr)
        numbers = {
            "lr": rate,
            "momentum": group["momentum"],
            "l2": self._l2,
            "attention_lr": rate * ratio,
            "alpha": self._alpha,
            "target": self._num_kept / self._total,
            "density_weight": self._density_weight,
            "gain": GAIN,
        }
        row = [float(numbers[name]) for name in SETTINGS]
        held, compiling = self._device_settings, torch.compiler.is_compiling()
        if held is not None and held[0] == (row, device) and not compiling:
            settings = held[1]
        else:
            settings = torch.tensor(row, dtype=torch.float64, device=device)
            if not compiling:
                self._device_settings = (row, device), settings
        if isinstance(lr, Tensor):
            settings[LR].copy_(lr.reshape(()))
            settings[ATTENTION_LR].copy_(settings[LR] * ratio)
        return settings

    @torch.no_grad()
    def _form(self) -> None:
        """Thresholds and parameters from dense weights and attention: a step at standstill."""
        lists = self._collect()
        lists = lists._replace(gradients=[p.new_empty(0) for p in lists.parameters])
        group = self.param_groups[0]
        settings = self._settings(self._device(lists)).clone()
        for name in ("lr", "attention_lr", "density_weight"):
            settings[SETTINGS.index(name)] = 0
        held = group["attention"].clone()
        amp = {name: self.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")}
        self._update(lists, settings)
        self.__dict__.update({name: value for name, value in amp.items() if value is not None})
        group["attention"][:, :2] = held[:, :2]
        self._remember(lists)

    # ------------------------------------------------------------------ changes from outside

    def _check_unchanged(self, lists: _Lists) -> None:
        """What is written into a parameter would be lost: the next step forms it from `dense`."""
        if torch.compiler.is_compiling():
            return
        for held, version, place in zip(
            lists.parameters, self._versions, self._places, strict=False
        ):
            if held._version != version and bool(self._differs(place).any()):
                raise RuntimeError(
                    f"{place.name} was changed from outside since the last step, which the next "
                    "one would undo: parameters are made from dense weights. Call opt.resync() "
                    "after writing into parameters, or load the optimizer's state with the model's"
                )

    def _remember(self, lists: _Lists) -> None:
        if torch.compiler.is_compiling():
            self._versions.clear()
        else:
            self._versions = [held._version for held in lists.parameters]

    def _differs(self, place: Place) -> Tensor:
        """Where a parameter is not what its dense weight makes it."""
        held = local(self._parameter(place))
        if "dense" not in self.state.get(self._parameter(place), {}):
            return torch.zeros_like(held, dtype=torch.bool)
        expected = self._effective(place).to(held.dtype)
        return (expected != held) & ~(expected.isnan() & held.isnan())

    def _effective(self, place: Place) -> Tensor:
        if place.layer < 0:
            return self._dense(place)
        group = self.param_groups[0]
        end = group["tie_end"][place.layer] - self._start(place)
        return effective(self._dense(place), group["attention"][place.layer], end, place.role)

    def _start(self, place: Place) -> int:
        """Elements of the layer's pool before the local ones of this parameter."""
        before = [p for p in self._places if p.layer == place.layer and is_pruned(p.role)]
        before = before[: before.index(place)] if place in before else []
        parameter = self._parameter(place)
        return sum(self._parameter(p).numel() for p in before) + shard_of(parameter).offset

    @torch.no_grad()
    def resync(self) -> None:
        """Takes over parameters that something else has changed since the last step.

        Their dense weights become those that the present attention turns into the new values; then
        the layers are pruned anew.
        """
        for place in self._places:
            if "dense" not in self.state.get(self._parameter(place), {}):
                continue
            dense, held = self._dense(place), local(self._parameter(place))
            new = held.to(dense.dtype)
            if is_scaled(place.role):
                new = new / self.param_groups[0]["attention"][place.layer, 0].to(dense.dtype)
            dense.copy_(torch.where(self._differs(place), new, dense))
        self._form()

    # ------------------------------------------------------------------ what is learnt

    def _layers(self) -> Iterator[tuple[str, list[Place]]]:
        """The name of each layer's weight, and all that is pruned in the layer."""
        pruned = [place for place in self._places if is_pruned(place.role)]
        for layer in range(len(self.param_groups[0]["attention"])):
            places = [place for place in pruned if place.layer == layer]
            yield places[0].name, places

    def _pool_sizes(self) -> dict[str, int]:
        return {
            name: sum(self._parameter(place).numel() for place in places)
            for name, places in self._layers()
        }

    def _counts(self, tables: Tensor) -> list[dict[str, int]]:
        """How many weights each of these [times, layers, columns] tables prunes: one read."""
        sizes = self._pool_sizes()
        alpha = tables.new_tensor(self._alpha)
        pools = tables.new_tensor(list(sizes.values()))
        found = torch.stack([num_pruned(table, pools, alpha) for table in tables])
        floored = (tables[-1, :, 0] <= FLOOR).to(found.dtype)
        *counts, floored = torch.cat([found, floored[None]]).tolist()
        low = [name for name, at_floor in zip(sizes, floored, strict=True) if at_floor]
        warn_of_collapse(low, self._warned)
        return [dict(zip(sizes, row, strict=True)) for row in counts]

    @torch.no_grad()
    def sparsities(self) -> dict[str, float]:
        """The learnt sparsity of each layer, by its weight's name."""
        sizes = self._pool_sizes()
        if self.param_groups[0]["finished"]:
            masks = self.masks()
            pruned = {
                name: sum(int((~masks[place.name]).sum()) for place in places)
                for name, places in self._layers()
            }
        else:
            [pruned] = self._counts(self.param_groups[0]["attention"][None])
        return {name: pruned[name] / size for name, size in sizes.items()}

    @torch.no_grad()
    def record(self, mark: float | None = None) -> None:
        """Keeps the present sparsities for `history()`, on the device: nothing is read here.

        `mark` says when, a step or an epoch; by default the number of records so far.
        """
        attention = self.param_groups[0]["attention"].clone()
        self._log.append((len(self._log) if mark is None else mark, attention))

    @torch.no_grad()
    def history(self) -> History:
        """The sparsity of each layer at each `record()`; `plot_sparsities` draws it."""
        sizes = self._pool_sizes()
        if not self._log:
            return History([], {name: [] for name in sizes})
        marks, tables = zip(*self._log, strict=True)
        counts = self._counts(torch.stack(tables))
        return History(
            list(marks), {n: [count[n] / size for count in counts] for n, size in sizes.items()}
        )

    # ------------------------------------------------------------------ the end

    @torch.no_grad()
    def masks(self) -> MaskSet:
        """True where a weight is kept, of what the attention asks for now; later of `finish()`."""
        masks, owners = {}, {}
        group = self.param_groups[0]
        for _, places in self._layers():
            for place in places:
                parameter = self._parameter(place)
                mask = local(parameter) != 0 if group["finished"] else self._kept(place)
                masks[place.name] = whole(mask, parameter)
                owners[place.name] = parameter
        return MaskSet(masks, owners)

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Leaves a plain model of exactly the sparsity that was asked for; returns its masks.

        Layers keep their learnt sparsities, but for what the total is still off: there they give or
        take in proportion. The parameters then are all there is, and `step()` refuses.
        """
        if self.param_groups[0]["finished"]:
            return self.masks()
        sizes = self._pool_sizes()
        [pruned] = self._counts(self.param_groups[0]["attention"][None])
        kept = settled([size - pruned[name] for name, size in sizes.items()], list(sizes.values()),
                       self._num_kept)  # fmt: skip
        warn_if_far(sum(pruned.values()) / self._total, 1 - self._num_kept / self._total)
        attention = self.param_groups[0]["attention"][:, 0]
        masks, owners, new = {}, {}, []
        for (_, places), count in zip(self._layers(), kept, strict=True):
            for place, mask in zip(places, self._largest(places, count), strict=True):
                parameter = self._parameter(place)
                value = self._dense(place)
                if is_scaled(place.role):
                    value = value * attention[place.layer].to(value.dtype)
                new.append((local(parameter), value.where(mask, 0.0)))
                masks[place.name] = whole(mask, parameter)
                owners[place.name] = parameter
        for held, value in new:
            held.copy_(value)
        self.param_groups[0]["finished"] = True
        return MaskSet(masks, owners)

    def _kept(self, place: Place) -> Tensor:
        group = self.param_groups[0]
        end = group["tie_end"][place.layer] - self._start(place)
        return kept_elements(self._dense(place), group["attention"][place.layer, 2], end)

    def _largest(self, places: list[Place], count: int) -> list[Tensor]:
        """Masks of the `count` largest dense weights of a layer, of the local rows."""
        weights = [self._dense(place) for place in places]
        shards = [shard_of(self._parameter(place), place.name) for place in places]
        if all(shard.group is None for shard in shards):
            return global_topk_masks(weights, count, score="magnitude")
        num = torch.tensor(count, device=weights[0].device)
        return magnitude_masks(weights, num, (1, 1), shards)


def _shard(parameter: Tensor, place: Place) -> Shard:
    """Plain parameters may lie as they like."""
    return shard_of(parameter, place.name) if place.layer >= 0 else Shard(parameter.shape)


def _ratio(attention_lr: float | None, lr: float | Tensor) -> float:
    if attention_lr is None:
        return 0.1
    if not attention_lr >= 0:
        raise ValueError(f"attention_lr must be at least 0, got {attention_lr}")
    if attention_lr and not float(lr):
        raise ValueError(
            f"attention_lr keeps its ratio to lr, but lr is 0 and attention_lr {attention_lr}; "
            "give the lr that a warm-up leads to, and let the scheduler start below it"
        )
    return attention_lr / float(lr) if attention_lr else 0.0


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _check_group(group: dict[str, Any]) -> None:
    check_numbers(group, ("lr", "momentum"))
    if not group["momentum"] < 1:
        raise ValueError(f"momentum must be below 1, got {group['momentum']}")
