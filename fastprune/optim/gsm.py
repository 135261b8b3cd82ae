"""GSM: global sparse momentum SGD as a drop-in optimizer."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..masks import MaskSet, Sparsity, num_kept
from ..ops.select import (
    PoolChoice,
    checked_block,
    global_topk_masks,
    num_blocks,
    select_pool,
)
from .decay import warn_if_weights_stay
from .half import HALF, restore_float32, state_dtype
from .settings import SettingsTable, check_options, row_of
from .sharded import (
    Shard,
    check_not_flat,
    check_pool,
    is_sharded,
    local,
    local_gradient,
    magnitude_masks,
    select_pool_sharded,
    shard_of,
    whole,
)
from .tensors import check_parameter, follow_layout, is_skipped_start, usable

TIES = ("exact", "paper")


class _Lists(NamedTuple):
    """One step's tensors, in registration order; the pool's are those at a position."""

    weights: list[Tensor]
    momenta: list[Tensor]
    copies: list[Tensor]
    gradients: list[Any]
    positions: list[int]
    rows: list[int]

    pool: list[int]  # which of them are in the pool
    shards: list[Shard]  # of the pool's; empty if none is sharded


class GSM(Optimizer):
    """Momentum SGD that passes the loss gradient only to the weights that matter most.

    At each step the `num_kept` weights of largest |w * gradient|, over all pruned parameters
    together, are active; the others get no loss gradient, and weight decay and momentum bring them
    to zero. After training `finish()` zeroes them: train on from a well-trained dense model. With
    every weight active this is `torch.optim.SGD`, whose arguments and behaviour it shares.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        sparsity: fraction of zeros among the pruned weights in the end, or a function of the step
            (from 0) that returns it.
        num_kept: the exact number of weights (of blocks, if `block` is given) to keep, instead.
        block: (outputs, inputs) of the blocks that are chosen as a whole.
        ties: "exact" keeps exactly `num_kept` active, lowest position first; "paper" also all that
            equal the threshold.

    A parameter group prunes its parameters of two or more dimensions; `prune=True` or `False` in
    the group decides for all of them. `prunable_groups(model)` chooses by module type.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.98,
        dampening: float = 0,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        *,
        sparsity: Sparsity | Callable[[int], Sparsity] | None = None,
        num_kept: int | None = None,
        block: tuple[int, int] = (1, 1),
        ties: str = "exact",
        maximize: bool = False,
    ) -> None:
        if (sparsity is None) == (num_kept is None):
            raise ValueError("give either sparsity or num_kept: how much of the pool stays")
        if ties not in TIES:
            raise ValueError(f"ties must be 'exact' or 'paper', got {ties!r}")
        self._sparsity = sparsity
        self._num_kept = num_kept
        self._block = checked_block(block)
        self._ties = ties
        self._parameters: list[Tensor] = []
        self._strides: list[tuple[int, ...]] = []
        self._lists: _Lists | None = None
        self._total: int | None = None
        self._counted: tuple[Any, int] = (None, 0)  # the last sparsity and pool, and their count
        self._device_counts: dict[tuple[int, torch.device], Tensor] = {}
        self._settings = SettingsTable()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "prune": None,
            "num_steps": 0,
        }
        super().__init__(params, defaults)
        self.num_kept()  # a count that does not fit the pool is said now

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for i, parameter in enumerate(group["params"]):
                _check_parameter(i, parameter, self._is_pruned(group, parameter), self._block)
                check_not_flat(group.get("param_names", {i: f"params[{i}]"})[i], parameter)
            check_pool(self._pool(), self._block)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._lists = self._total = None

    def __getstate__(self) -> dict[str, Any]:
        # torch's own names three attributes; without ours a copy would not know its sparsity.
        options = ("_sparsity", "_num_kept", "_block", "_ties")
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters, self._strides = [], []
        self._lists = self._total = None
        self._counted = (None, 0)
        self._device_counts, self._settings = {}, SettingsTable()
        for group in self.param_groups:
            group.setdefault("prune", None)
            group.setdefault("num_steps", 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the state of a plain SGD: options that it lacks stay as they are here."""
        ours = [{key: group[key] for key in ("prune", "num_steps")} for group in self.param_groups]
        groups = [
            {**mine, **saved} for mine, saved in zip(ours, state_dict["param_groups"], strict=False)
        ]
        groups += state_dict["param_groups"][len(groups) :]
        super().load_state_dict({**state_dict, "param_groups": groups})
        restore_float32(self, state_dict)
        self._lists = None

    def _is_pruned(self, group: dict[str, Any], parameter: Tensor) -> bool:
        prune = group["prune"]
        return parameter.dim() >= 2 if prune is None else bool(prune)

    def _pool(self) -> list[tuple[str, Tensor]]:
        """Names and parameters in registration order, which is the order of positions."""
        pool = []
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            pool += [
                (name, parameter)
                for name, parameter in zip(names, group["params"], strict=True)
                if self._is_pruned(group, parameter)
            ]
        return pool

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        if parameter.dtype in HALF and "master" not in state:
            state["master"] = parameter.detach().float()
        follow_layout(state, parameter)
        return state

    # ------------------------------------------------------------------ counts

    def num_kept(self) -> int:
        """How many weights (or blocks) are active in the next step, and stay in the end."""
        total = self._pool_size()
        if self._num_kept is not None:
            return _checked_count(self._num_kept, total)
        sparsity = self._sparsity
        if callable(sparsity):
            steps = self.param_groups[0]["num_steps"]
            sparsity = sparsity(steps)
        if torch.compiler.is_compiling():
            return _count(sparsity, total)
        if self._counted[0] != (sparsity, total):  # exact decimals cost as much as fifty tensors
            self._counted = (sparsity, total), _count(sparsity, total)
        return self._counted[1]

    def _pool_size(self) -> int:
        if self._total is None:
            self._total = sum(
                num_blocks(p.shape, self._block) if p.dim() > 1 else p.numel()
                for _, p in self._pool()
            )
        return self._total

    def _count_tensor(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(self.num_kept(), device=device)
        key = (self.num_kept(), device)
        if key not in self._device_counts:
            self._device_counts = {key: torch.tensor(key[0], device=device)}
        return self._device_counts[key]

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_skipped_start(self):
            return loss
        run = self._run
        if torch.compiler.is_compiling() and self._has_shards():
            run = torch.compiler.disable(run, reason="processes exchange counts in it")
        run()
        for group in self.param_groups:
            group["num_steps"] += 1
        return loss

    def _run(self) -> None:
        lists = self._collect()
        if lists.weights:
            self._update(lists)

    def _has_shards(self) -> bool:
        return any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def _collect(self) -> _Lists:
        """Only gradients change from step to step, once every parameter has had its first."""
        lists = self._lists
        if lists is None or torch.compiler.is_compiling():  # a compiled step has no use for caches
            return self._collect_anew()
        fit = []
        for parameter, stride in zip(self._parameters, self._strides, strict=True):
            gradient = parameter.grad
            if gradient is None:
                return self._collect_anew()
            if gradient.stride() != stride:
                if parameter.stride() != stride:  # its memory format has changed
                    return self._collect_anew()
                gradient = usable(gradient, parameter, "GSM")
            fit.append(gradient)
        return lists._replace(gradients=fit)

    def _collect_anew(self) -> _Lists:
        lists = _Lists([], [], [], [], [], [], [], [])
        position = 0
        complete = True
        for g, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    complete = False
                    continue
                first_step = not self.state[parameter]
                complete = complete and not first_step and not is_sharded(parameter)
                state = self._state(parameter)
                weight = local(state.get("master", parameter))
                copied = "master" in state
                lists.weights.append(weight)
                lists.momenta.append(local(state["momentum_buffer"]))
                lists.copies.append(local(parameter) if copied else weight.new_empty(0))
                lists.gradients.append(usable(local_gradient(parameter), weight, "GSM"))
                lists.rows.append(row_of(g, first_step))
                if self._is_pruned(group, parameter):
                    lists.pool.append(len(lists.positions))
                    shard = shard_of(parameter)
                    lists.shards.append(shard)
                    lists.positions.append(position + shard.offset)
                    position += parameter.numel()
                else:
                    lists.positions.append(-1)
        if not any(copy.numel() for copy in lists.copies):
            lists = lists._replace(copies=[])
        if all(shard.group is None for shard in lists.shards):
            lists = lists._replace(shards=[])
        if not torch.compiler.is_compiling():
            self._parameters = [p for group in self.param_groups for p in group["params"]]
            self._lists = lists._replace(gradients=[]) if complete else None
            self._strides = [weight.stride() for weight in lists.weights]
        return lists

    def _update(self, lists: _Lists) -> None:
        device = lists.weights[0].device
        step = (self._settings.of(self.param_groups, device), lists.rows)
        amp = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        tensors = (lists.weights, lists.momenta, lists.copies, lists.gradients)
        num_kept = self._count_tensor(device)
        if self._block == (1, 1) and self._ties == "exact" and not lists.shards:
            torch.ops.fastprune.gsm_step_(*tensors, num_kept, lists.positions, *step, *amp)
            return
        choice = self._choose(lists, num_kept)
        gates: list[Tensor] = []
        if choice.gates is not None:
            gates = [lists.weights[0].new_empty(0, dtype=torch.bool)] * len(lists.weights)
            for i, gate in zip(lists.pool, choice.gates, strict=True):
                gates[i] = gate
        where = (gates, choice.threshold, choice.tie_end, lists.positions)
        torch.ops.fastprune.gsm_update_(*tensors, *where, *step, self._block, *amp)

    def _choose(self, lists: _Lists, num_kept: Tensor) -> PoolChoice:
        pool = [lists.weights[i] for i in lists.pool], [lists.gradients[i] for i in lists.pool]
        if lists.shards:
            choice = select_pool_sharded(*pool, num_kept, self._block, lists.shards)
        else:
            choice = select_pool(*pool, num_kept, self._block)
        if self._ties == "paper":
            everywhere = torch.full_like(choice.tie_end, torch.iinfo(torch.int64).max)
            choice = choice._replace(tie_end=everywhere)
        return choice

    # ------------------------------------------------------------------ the end

    @torch.no_grad()
    def masks(self) -> MaskSet:
        """True for the `num_kept` weights of largest magnitude: what `finish()` would keep."""
        pieces = zip(self._pool(), self._local_masks(), strict=True)
        masks = {name: whole(mask, parameter) for (name, parameter), mask in pieces}
        return MaskSet(masks, dict(self._pool()))

    def _local_masks(self) -> list[Tensor]:
        pool = [p for _, p in self._pool()]
        weights = [local(self.state[p].get("master", p) if p in self.state else p) for p in pool]
        shards = [shard_of(p) for p in pool]
        if any(shard.group is not None for shard in shards):
            num_kept = self._count_tensor(weights[0].device)
            return magnitude_masks(weights, num_kept, self._block, shards)
        return global_topk_masks(weights, self.num_kept(), score="magnitude", block=self._block)

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Writes true zeros to all but the `num_kept` largest weights; returns what stayed."""
        masks = {}
        for (name, parameter), kept in zip(self._pool(), self._local_masks(), strict=True):
            for tensor in (parameter, self.state[parameter].get("master")):
                if tensor is not None:
                    local(tensor).masked_fill_(~kept, 0.0)
            masks[name] = whole(kept, parameter)
        return MaskSet(masks, dict(self._pool()))

    @torch.no_grad()
    def resync(self) -> None:
        """Takes over 16-bit parameters that something else has changed since the last step."""
        for parameter, state in self.state.items():
            if "master" in state:
                state["master"].copy_(parameter)

    def check_schedule(self, steps: int, lr: float | Callable[[int], float] | None = None) -> float:
        """What is left, after `steps`, of a weight that is always passive; warns if that is much.

        `lr` is a number, a function of the step, or None for the present one. The largest residual
        over the pruned groups is returned.
        """
        residual = 0.0
        for group in self.param_groups:
            if any(self._is_pruned(group, p) for p in group["params"]):
                rate = lr if lr is not None else float(group["lr"])
                residual = max(
                    residual,
                    warn_if_weights_stay(steps, rate, group["momentum"], group["weight_decay"]),
                )
        return residual


def _count(sparsity: Any, total: int) -> int:
    return num_kept(sparsity, total)


# Exact decimal arithmetic is not traced: its result is a constant of a compiled step. This is what
# torch.compiler.assume_constant_result does, which would import the compiler here and now.
_count._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_group(group: dict[str, Any]) -> None:
    check_options(group)
    if group["weight_decay"] == 0 and group["prune"] is not False:
        warnings.warn(
            "weight_decay=0: passive weights never decay, so zeroing them at the end will hurt; "
            "GSM needs some weight decay (default 5e-4)",
            stacklevel=5,
        )


def _check_parameter(i: int, parameter: Tensor, pruned: bool, block: tuple[int, int]) -> None:
    check_parameter(f"params[{i}]", parameter, "GSM")
    if pruned and block != (1, 1) and parameter.dim() < 2:
        raise ValueError(
            f"params[{i}] has {parameter.dim()} dimensions and cannot be pruned in blocks of "
            "(outputs, inputs); put it into a group with prune=False"
        )


def _checked_count(count: int, total: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"num_kept must be an integer, got {type(count).__name__} {count!r}")
    if not 0 <= count <= total:
        raise ValueError(f"num_kept must be in 0..{total} (the size of the pool), got {count}")
    return count
