"""MaskedSGD and masked() over gloo processes: the bits of a single process, zeros on each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.optim import MaskedSGD, masked
from tests.optim.distributed_training import (
    complaint,
    flat_models,
    load,
    save,
    snapshot,
    split,
    take_steps,
    train_beside,
    train_ddp,
    train_scaled,
)
from tests.processes import Results, full, of, same, spawned

STEPS = 4
OPTIONS = {"lr": 0.1, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.01}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that two processes cannot share evenly, and a layer that gives one of them nothing."""
    torch.manual_seed(3)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)
    return nn.Sequential(*layers).to(dtype)


def masks_of(net: nn.Module) -> fp.MaskSet:
    random = torch.Generator().manual_seed(5)
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    return fp.MaskSet({n: torch.rand(p.shape, generator=random) < 0.5 for n, p in weights.items()})


def optimizer(net: nn.Module) -> MaskedSGD:
    return MaskedSGD(net.named_parameters(), masks=masks_of(net), **OPTIONS)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return masked(torch.optim.AdamW(net.named_parameters(), 0.1, foreach=False), masks_of(net))


def pair(mesh: Any, make: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model sharded and alone, and an optimizer of each."""
    nets = split(model(dtype), mesh), model(dtype)
    return nets, tuple(make(net) for net in nets)


# ---------------------------------------------------------------------- inside the processes


def float32(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh, optimizer)
    found = with_zeros(nets, train_beside(nets, opts, STEPS))
    state = opts[0].state[opts[0].param_groups[0]["params"][0]]
    placed = [tuple(v.to_local().shape) for v in state.values()]
    return {**found, "local": placed, "masks": [dict(opt.masks()) for opt in opts]}


def with_zeros(nets: tuple[nn.Module, nn.Module], found: dict[str, Any]) -> dict[str, Any]:
    masks = masks_of(nets[1])
    zeros = all(not full(nets[0].get_parameter(n))[~mask].any() for n, mask in masks.items())
    return {**found, "zeros": zeros}


def bfloat16(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh, optimizer, torch.bfloat16)
    return with_zeros(nets, train_beside(nets, opts, STEPS))


def compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh, optimizer)
    return with_zeros(nets, train_beside(nets, opts, STEPS, compiled=True))


def wrapped(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh, adam)
    return with_zeros(nets, train_beside(nets, opts, STEPS))


def scaled(mesh: Any, folder: Path) -> dict[str, Any]:
    return train_scaled(*pair(mesh, optimizer))


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    """The masks were made for the parameters, so the wrapper's names do not matter."""
    net = model()
    masks = fp.MaskSet(masks_of(net), dict(net.named_parameters()))
    parallel = nn.parallel.DistributedDataParallel(net)
    opt = MaskedSGD(parallel.named_parameters(), masks=masks, **OPTIONS)
    return train_ddp(parallel, opt, STEPS)


def errors(mesh: Any, folder: Path) -> list[str]:
    return [complaint(make, net) for net in flat_models(model) for make in (optimizer, adam)]


def save_three_steps(mesh: Any, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = split(model(dtype), mesh)
        opt = optimizer(net)
        take_steps(net, opt, range(3))
        save(net, opt, folder / str(dtype))


def load_and_go_on(mesh: Any, folder: Path) -> dict[str, Any]:
    """Into a model with other masks: those of the checkpoint count."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        alone = model(dtype)
        uninterrupted = optimizer(alone)
        take_steps(alone, uninterrupted, range(6))

        net = model(dtype)
        others = fp.MaskSet({name: ~mask for name, mask in masks_of(net).items()})
        opt = MaskedSGD(net.named_parameters(), masks=others, **OPTIONS)
        load(net, opt, folder / str(dtype))
        take_steps(net, opt, range(3, 6))
        found[str(dtype)] = {"sharded": snapshot(opt), "alone": snapshot(uninterrupted)}
    return found


TESTS: dict[str, Any] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "compiled": compiled,
    "wrapped": wrapped,
    "scaled": scaled,
    "ddp": ddp,
    "errors": errors,
    "save": save_three_steps,
}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {2: spawned(2, folder, TESTS), 1: spawned(1, folder, {"load": load_and_go_on})}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "compiled", "wrapped"])
def test_fully_sharded_model_trains_like_a_single_process(results: Any, name: str) -> None:
    for found in of(results, 2, name):
        same(found["sharded"], found["alone"])
        assert found["zeros"]


def test_state_is_placed_like_the_parameter_and_masks_come_back_whole(results: Any) -> None:
    for rank, found in enumerate(of(results, 2, "float32")):
        assert found["local"] == [(4 - rank, 6)] * 2  # momentum and mask of 7 rows
        same(*found["masks"])
        same(found["masks"][0], dict(masks_of(model())))


def test_an_overflow_on_one_rank_skips_the_step_on_all(results: Any) -> None:
    for found in of(results, 2, "scaled"):
        same(found["sharded"], found["alone"])
        assert found["scale"] == 16.0


def test_ranks_of_ddp_agree(results: Any) -> None:
    first, second = of(results, 2, "ddp")
    assert first["collectives"] == second["collectives"] == 0
    same(first["state"], second["state"])
    masks = masks_of(model())
    assert not first["state"][0][~masks["0.weight"]].any()


def test_checkpoint_of_two_ranks_continues_on_one(results: Any) -> None:
    of(results, 2, "save")
    [found] = of(results, 1, "load")
    for both in found.values():
        same(both["sharded"], both["alone"])


def test_flat_shards_are_refused(results: Any) -> None:
    for said in of(results, 2, "errors"):
        assert len(said) == 4
        for message in said:
            assert "is a flat shard" in message and "fully_shard" in message
