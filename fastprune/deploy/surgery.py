"""Cuts channels out of a model's tensors, and out of an optimizer's state."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..channels import Channels, Sink, Slot
from ..channels.flow import EVALUATION
from ..channels.rules import CONVOLUTIONS, NORMS, TRANSPOSED, by_group
from ..masks import num_kept
from ..optim.gsm import GSM
from ..optim.sharded import is_sharded


class Cut(NamedTuple):
    """Along `dim`, for each of `groups` equal parts of dimension 0, the positions that stay."""

    dim: int
    kept: list[list[int]]


Cuts = Mapping[str, list[Cut]]


def plan_cuts(channels: Channels, gone: set[int]) -> dict[str, list[Cut]]:
    """For each tensor that changes how it is cut."""
    cuts: dict[str, list[Cut]] = {}
    for slot in sorted(channels.slots, key=lambda slot: -slot.groups):  # groups need every row
        stays = [root not in gone for root in channels.roots(slot.labels)]
        if not all(stays):
            cuts.setdefault(slot.name, []).append(Cut(slot.dim, positions(slot, stays)))
    return cuts


def positions(slot: Slot, stays: list[bool]) -> list[list[int]]:
    size = len(stays) // slot.groups
    parts = [stays[i * size : (i + 1) * size] for i in range(slot.groups)]
    return [[i for i, stay in enumerate(part) if stay] for part in parts]


@torch.no_grad()
def cut_tensor(tensor: Tensor, cuts: list[Cut]) -> Tensor:
    result = tensor.detach()
    for dim, kept in cuts:
        parts = [
            part.index_select(dim, torch.tensor(indices, device=tensor.device))
            for part, indices in zip(result.chunk(len(kept)), kept, strict=True)
        ]
        result = torch.cat(parts) if len(parts) > 1 else parts[0]
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if memory_format is torch.channels_last else 5
        if tensor.dim() == rank and tensor.is_contiguous(memory_format=memory_format):
            return result.contiguous(memory_format=memory_format)
    return result


def cut_parameter(parameter: nn.Parameter, cuts: list[Cut]) -> nn.Parameter:
    result = nn.Parameter(cut_tensor(parameter, cuts), parameter.requires_grad)
    result.__dict__.update(parameter.__dict__)
    if parameter.grad is not None:
        result.grad = cut_tensor(parameter.grad, cuts)
    return result


# ---------------------------------------------------------------- the model


@torch.no_grad()
def absorb(model: nn.Module, channels: Channels, sink: Sink, gone: set[int]) -> None:
    """Adds what channels that go still contribute to a layer to its bias."""
    if sink.at_border:  # what goes is 0, or ignored
        return
    module = model.get_submodule(sink.name)
    leaving = torch.tensor([root in gone for root in channels.roots(sink.columns.labels)])
    constants = sink.emits[EVALUATION].where(leaving, 0.0).nan_to_num(0.0)
    if not constants.any():
        return
    weight = model.get_parameter(sink.columns.name)
    taps = by_group(weight.detach(), sink.columns.groups, transposed=False)
    sums = taps.sum(3, dtype=torch.float64)
    constants = constants.to(weight.device).reshape(len(taps), -1)
    change = torch.einsum("goi,gi->go", sums, constants).flatten()
    if isinstance(module.bias, Tensor):
        module.bias.copy_(module.bias.double() + change)
    elif sink.running_mean is not None:
        mean = model.get_buffer(sink.running_mean)
        mean.copy_(mean.double() - change)
    else:
        module.bias = nn.Parameter(change.to(weight.dtype), weight.requires_grad)
        channels.slots.append(Slot(f"{sink.name}.bias", 0, channels.layers[sink.name].labels))


def cut_tensors(model: nn.Module, cuts: Cuts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, cut in cuts.items():
        path, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute)
        whole = isinstance(tensor, nn.Parameter)
        tensors[name] = cut_parameter(tensor, cut) if whole else cut_tensor(tensor, cut)
    return tensors


def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    owners = {}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owners[path] = model.get_submodule(path)
        setattr(owners[path], attribute, tensor)
    for module in owners.values():
        resize(module)


def resize(module: nn.Module) -> None:
    """Brings the sizes that a layer remembers in line with its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        tensor = next(t for t in (module.weight, module.running_mean) if t is not None)
        module.num_features = tensor.numel()
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        first, second = module.weight.shape[:2]
        if 1 < module.groups == module.in_channels:
            whole = isinstance(module, TRANSPOSED)
            module.groups = first if whole else first * module.groups // module.out_channels
        sizes = (first, second * module.groups)
        module.in_channels, module.out_channels = (
            sizes if isinstance(module, TRANSPOSED) else sizes[::-1]
        )


# ---------------------------------------------------------------- the optimizer


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS keeps its state in one flat tensor, which cannot be cut; make a "
                         "new one for the compacted model")  # fmt: skip
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer must hold parameters of the model, but holds none of them")
    if isinstance(optimizer, GSM) and optimizer._block != (1, 1):
        raise ValueError(
            f"GSM chooses blocks of {optimizer._block}, whose borders would move; compact after "
            "training, without optimizer"
        )


def check_cuts(model: nn.Module, channels: Channels, cuts: Cuts, optimizer: Optimizer) -> None:
    """Everything that could fail or be lost, before anything is changed."""
    parameters = dict(model.named_parameters())
    unused = [name for name in channels.unused if name in parameters]
    if unused and cuts:
        raise ValueError(
            f"{unused[0]} is not used in evaluation with this example_input; if training uses it, "
            "it would meet fewer channels than it has. Remove it, or compact without optimizer"
        )
    for name, parameter in parameters.items():
        if name in cuts:
            check_state(name, parameter, optimizer.state.get(parameter, {}))
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"{name} has a gradient hook, perhaps of fp.mask_gradients, made for its "
                    "present shape; remove it (handle.remove()) before compacting and set it again"
                )


def check_state(name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    if is_sharded(parameter):
        raise ValueError(f"{name} is sharded; compact before sharding the model")
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer's {key!r} of {name} has shape {tuple(value.shape)}, not the "
                f"parameter's {tuple(parameter.shape)}, so it is not known how to cut it; compact "
                "without optimizer and make a new one"
            )


def cut_in_place(model: nn.Module, cuts: Cuts, optimizer: Optimizer) -> None:
    """Changes model and optimizer; all new tensors exist before the first is put in."""
    old: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = cut_tensors(model, cuts)
    new = {old[name]: tensor for name, tensor in tensors.items()}
    states = {
        old[name]: {
            key: cut_tensor(value, cut)
            if isinstance(value, Tensor) and value.shape == old[name].shape
            else value
            for key, value in optimizer.state[old[name]].items()
        }
        for name, cut in cuts.items()
        if old[name] in optimizer.state
    }
    active = optimizer.num_kept() if isinstance(optimizer, GSM) else 0
    total = optimizer._pool_size() if isinstance(optimizer, GSM) else 0

    replace_tensors(model, tensors)
    for parameter, state in states.items():
        del optimizer.state[parameter]
        optimizer.state[new[parameter]] = state
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    # As load_state_dict does: an optimizer drops here what it has derived from its parameters.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    if isinstance(optimizer, GSM):
        keep_count(optimizer, active, total)


class SameCount:
    """A sparsity that keeps of a smaller pool as many weights as before of the whole one."""

    def __init__(self, sparsity: Any, total: int, left: int) -> None:
        self.sparsity, self.total, self.left = sparsity, total, left

    def __call__(self, step: int) -> Fraction:
        sparsity = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        return 1 - Fraction(min(num_kept(sparsity, self.total), self.left), self.left)


def keep_count(optimizer: GSM, active: int, total: int) -> None:
    """A channel of zeros has no active weight, so the others' number stays."""
    left = optimizer._pool_size()
    if optimizer._num_kept is not None:
        optimizer._num_kept = min(active, left)
    else:
        optimizer._sparsity = SameCount(optimizer._sparsity, total, left)
