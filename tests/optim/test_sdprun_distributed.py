"""SDprun over several gloo processes: the bits of a single process, whatever the sharding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.optim import SDprun
from tests.optim.distributed_training import (
    complaint,
    flat_models,
    load,
    model,
    placer,
    save,
    snapshot,
    split,
    take_steps,
    train_beside,
    train_ddp,
)
from tests.processes import Results, full, of, same, spawned

STEPS = 5
# Layers: each a list of shapes that share their first dimension.
LAYERS = [[(7, 6), (7,)], [(5, 4, 3, 3), (5,), (5,), (5,)], [(1, 9)], [(16, 6)], [(3, 2)]]
CASES: dict[str, dict[str, Any]] = {
    "guard": {"c": 60.0, "min_groups": 2},
    "no guard": {"c": 10.0, "min_groups": 0},
    "momentum": {"c": 3.0, "momentum": 0.5},
    "sqrt": {"c": 2.0, "scale": "sqrt"},
    "target": {"target_sparsity": 0.5, "total_steps": STEPS},
    "bfloat16": {"c": 10.0, "dtype": torch.bfloat16},
    "replicated": {"c": 20.0, "replicated": (0, 2)},
}


def train(case: dict[str, Any], place: Any) -> dict[str, Any]:
    """Every tensor after each step, and what finish() keeps; `place` puts layer i where it is."""
    options = dict(case)
    dtype = options.pop("dtype", torch.float32)
    options.pop("replicated", None)
    random = torch.Generator().manual_seed(1)
    groups = []
    for i, shapes in enumerate(LAYERS):
        tensors = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
        params = [nn.Parameter(place(i, t)) for t in tensors]
        groups.append({"params": params, "prune": True, "coupled": True})
    groups.append({"params": [nn.Parameter(place(-1, torch.ones(4, dtype=dtype)))]})
    optimizer = SDprun(groups, 0.1, **options)
    found = []
    for _ in range(STEPS):
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                gradient = torch.randn(p.shape, generator=random).to(dtype)
                p.grad = place(i if i < len(LAYERS) else -1, gradient)
        optimizer.step()
        found.append(everything(optimizer))
    masks = optimizer.masks()
    optimizer.resync()  # finds nothing changed
    assert masks == optimizer.finish()
    return {"steps": found, "masks": dict(masks), "finished": everything(optimizer)}


def everything(optimizer: SDprun) -> list[Tensor]:
    progress = [g[key] for g in optimizer.param_groups for key in ("num_steps", "threshold")]
    return [*snapshot(optimizer), *(full(x) for x in progress)]


# ---------------------------------------------------------------------- inside the processes


def sharded_cases(mesh: Any, folder: Path) -> dict[str, Any]:
    return {n: train(c, placer(mesh, c.get("replicated", ()))) for n, c in CASES.items()}


def groups_of(net: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(net[0].parameters()), "prune": True, "coupled": True},
        {"params": list(net[2].parameters()), "prune": False},
    ]


def fsdp_model(mesh: Any, folder: Path) -> dict[str, Any]:
    nets = split(model(), mesh), model()
    return train_beside(nets, tuple(SDprun(groups_of(m), 0.1, c=2.0) for m in nets), STEPS)


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model())
    return train_ddp(wrapped, SDprun(groups_of(wrapped.module), 0.1, c=2.0), STEPS)


def errors(mesh: Any, folder: Path) -> dict[str, str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def parameter(dim: int | None) -> nn.Parameter:
        placement = Replicate() if dim is None else Shard(dim)
        return nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [placement]))

    def message(params: Any, **options: Any) -> str:
        return complaint(SDprun, [{"params": params, "prune": True, **options}], 0.1)

    return {
        "columns": message([parameter(1)]),
        "transposed": message([parameter(0)], channel_dims=[(1, 1)]),
        "unlike": message([parameter(0), parameter(None)], coupled=True),
        "flat": message(list(flat_models(model)[0].parameters())),
    }


def checkpointed(mesh: Any | None) -> tuple[nn.Module, SDprun]:
    net = model().to(torch.bfloat16)
    if mesh is not None:
        split(net, mesh)
    return net, SDprun(groups_of(net), 0.1, c=1.0, momentum=0.5)


def save_three_steps(mesh: Any, folder: Path) -> None:
    net, optimizer = checkpointed(mesh)
    take_steps(net, optimizer, range(3))
    save(net, optimizer, folder / "checkpoint")


def load_and_go_on(mesh: Any, folder: Path) -> dict[str, Any]:
    alone, uninterrupted = checkpointed(None)
    take_steps(alone, uninterrupted, range(6))
    net, optimizer = checkpointed(None)
    load(net, optimizer, folder / "checkpoint")
    take_steps(net, optimizer, range(3, 6))
    return {"loaded": everything(optimizer), "uninterrupted": everything(uninterrupted)}


EVERYWHERE = {"cases": sharded_cases, "fsdp": fsdp_model}
TESTS: dict[int, dict[str, Any]] = {
    3: {},
    2: {"ddp": ddp, "errors": errors, "save": save_three_steps},
    1: {"load": load_and_go_on},
}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: spawned(world, folder, EVERYWHERE | TESTS[world]) for world in (3, 2, 1)}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_sharding_does_not_change_a_bit(results: Any, world: int, name: str) -> None:
    expected = train(CASES[name], lambda i, x: x.clone())
    for found in of(results, world, "cases"):
        same(found[name], expected)


def test_the_cases_prune_and_guard() -> None:
    kept = {
        name: [int(mask.flatten(1).any(1).sum()) for mask in masks.values() if mask.dim() > 1]
        for name, case in CASES.items()
        for masks in [train(case, lambda i, x: x.clone())["masks"]]
    }
    assert kept["guard"] == [2, 2, 1, 2, 2]
    assert all(sum(k) < 32 for k in kept.values()) and sum(kept["target"]) > 8


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fully_sharded_model_trains_like_a_single_process(results: Any, world: int) -> None:
    for found in of(results, world, "fsdp"):
        same(found["sharded"], found["alone"])


def test_ddp_needs_no_traffic_and_ranks_agree(results: Any) -> None:
    first, second = of(results, 2, "ddp")
    assert first["collectives"] == second["collectives"] == 0
    same(first["state"], second["state"])


def test_checkpoint_of_two_ranks_continues_on_one(results: Any) -> None:
    of(results, 2, "save")
    [found] = of(results, 1, "load")
    same(found["loaded"], found["uninterrupted"])


def test_what_is_not_supported_is_said(results: Any) -> None:
    for said in of(results, 2, "errors"):
        assert said["columns"].startswith("0.0 has placements (Shard(dim=1),)")
        assert said["transposed"].startswith("0.0 is sharded along dimension 0, but its channels")
        assert "sharded alike, 0.0, 0.1 are not" in said["unlike"]
        assert "flat shard" in said["flat"] and "fully_shard" in said["flat"]
