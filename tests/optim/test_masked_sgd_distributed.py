"""MaskedSGD and masked() over gloo processes: the bits of a single process, zeros on each."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastprune as fp
from fastprune.optim import MaskedSGD, masked
from tests.optim.test_gsm_distributed import full, of, same, spawned

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


def split_model(mesh: Any, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    net = model(dtype)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def snapshot(opt: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [opt.state[p][key] for p in params for key in sorted(opt.state.get(p, {}))]
    # Not every back end gathers bools.
    return [full(x.to(torch.uint8) if x.dtype == torch.bool else x) for x in [*params, *state]]


def train(split: nn.Module, alone: nn.Module, make: Any, compiled: bool = False) -> dict[str, Any]:
    """A real backward pass; its full gradients are handed to a single process as well."""
    opts = [make(split), make(alone)]
    run = [opt.step for opt in opts]
    for i in range(STEPS):
        if i == 1 and compiled:
            run[0] = torch.compile(opts[0].step, backend="aot_eager")
        random = torch.Generator().manual_seed(10 * i + dist.get_rank())
        x = torch.randn(4, 6, generator=random).to(split[0].weight.dtype)
        split(x).square().sum().backward()
        for p, q in zip(split.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad)
        for step, opt in zip(run, opts, strict=True):
            step()
            opt.zero_grad()
    masks = masks_of(alone)
    zeros = all(not full(split.get_parameter(n))[~mask].any() for n, mask in masks.items())
    return {"sharded": snapshot(opts[0]), "alone": snapshot(opts[1]), "zeros": zeros, "opt": opts}


# ---------------------------------------------------------------------- inside the processes


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    tests = {"load": load} if world == 1 else TESTS
    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {}
    for name, test in tests.items():
        try:
            results[name] = test(mesh, Path(folder))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{world}.{rank}.pt")
    dist.destroy_process_group()


def float32(mesh: Any, folder: Path) -> dict[str, Any]:
    found = train(split_model(mesh), model(), optimizer)
    opts = found.pop("opt")
    state = opts[0].state[opts[0].param_groups[0]["params"][0]]
    placed = [tuple(v.to_local().shape) for v in state.values()]
    return {**found, "local": placed, "masks": [dict(opt.masks()) for opt in opts]}


def bfloat16(mesh: Any, folder: Path) -> dict[str, Any]:
    found = train(split_model(mesh, torch.bfloat16), model(torch.bfloat16), optimizer)
    del found["opt"]
    return found


def compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    found = train(split_model(mesh), model(), optimizer, compiled=True)
    del found["opt"]
    return found


def wrapped(mesh: Any, folder: Path) -> dict[str, Any]:
    found = train(split_model(mesh), model(), adam)
    del found["opt"]
    return found


def scaled(mesh: Any, folder: Path) -> dict[str, Any]:
    """Loss scaling: one rank overflows in the first step and in the third, which nobody takes."""
    split, alone = split_model(mesh), model()
    opts = [optimizer(split), optimizer(alone)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for i in range(4):
        skipped = i % 2 == 0
        random = torch.Generator().manual_seed(10 * i + dist.get_rank())
        x = torch.randn(4, 6, generator=random)
        if skipped and dist.get_rank() == 1:
            x[0, 0] = torch.inf
        scale = scaler.get_scale()
        scaler.scale(split(x).square().sum()).backward()
        for p, q in zip(split.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad) / scale
        scaler.step(opts[0])
        scaler.update()
        if not skipped:
            opts[1].step()
        opts[0].zero_grad()
    return {"sharded": snapshot(opts[0]), "alone": snapshot(opts[1]), "scale": scaler.get_scale()}


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    """The masks were made for the parameters, so the wrapper's names do not matter."""
    net = model()
    masks = fp.MaskSet(masks_of(net), dict(net.named_parameters()))
    parallel = nn.parallel.DistributedDataParallel(net)
    opt = MaskedSGD(parallel.named_parameters(), masks=masks, **OPTIONS)
    for i in range(STEPS):
        random = torch.Generator().manual_seed(10 * i + dist.get_rank())
        parallel(torch.randn(4, 6, generator=random)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return {"state": snapshot(opt)}


def errors(mesh: Any, folder: Path) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for original in (False, True):
        net = FullyShardedDataParallel(
            model(), device_id=torch.device("cpu"), use_orig_params=original
        )
        for make in (optimizer, adam):
            try:
                make(net)
                said.append("no error")
            except TypeError as error:
                said.append(str(error))
    return said


def steps(net: nn.Module, opt: MaskedSGD, which: range) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for i in which:
        random = torch.Generator().manual_seed(i)
        for p in net.parameters():
            gradient = torch.randn(p.shape, generator=random).to(p.dtype)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        opt.step()
    opt.zero_grad()


def save(mesh: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    for dtype in (torch.float32, torch.bfloat16):
        net = split_model(mesh, dtype)
        opt = optimizer(net)
        steps(net, opt, range(3))
        content = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}
        dcp.save(content, checkpoint_id=folder / str(dtype))


def load(mesh: Any, folder: Path) -> dict[str, Any]:
    """Into a model with other masks: those of the checkpoint count."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        alone = model(dtype)
        uninterrupted = optimizer(alone)
        steps(alone, uninterrupted, range(6))

        net = model(dtype)
        others = fp.MaskSet({name: ~mask for name, mask in masks_of(net).items()})
        opt = MaskedSGD(net.named_parameters(), masks=others, **OPTIONS)
        content = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}
        dcp.load(content, checkpoint_id=folder / str(dtype))
        set_model_state_dict(net, content["model"])
        set_optimizer_state_dict(net, opt, content["optim"])
        steps(net, opt, range(3, 6))
        found[str(dtype)] = {"sharded": snapshot(opt), "alone": snapshot(uninterrupted)}
    return found


TESTS = {
    "float32": float32,
    "bfloat16": bfloat16,
    "compiled": compiled,
    "wrapped": wrapped,
    "scaled": scaled,
    "ddp": ddp,
    "errors": errors,
    "save": save,
}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world found. World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: spawned(world, folder, work) for world in (2, 1)}


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
