"""SDprun over several gloo processes: the bits of a single process, whatever the sharding."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprune.optim import SDprun
from tests.optim.test_gsm_distributed import TIMEOUT, full, model, of, same

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
        found.append(snapshot(optimizer))
    masks = optimizer.masks()
    optimizer.resync()  # finds nothing changed
    assert masks == optimizer.finish()
    return {"steps": found, "masks": dict(masks), "finished": snapshot(optimizer)}


def snapshot(optimizer: SDprun) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state.get(p, {}))]
    progress = [g[key] for g in optimizer.param_groups for key in ("num_steps", "threshold")]
    return [full(x) for x in [*params, *state, *progress]]


# ---------------------------------------------------------------------- inside the processes


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    results: dict[str, Any] = {}
    tests = {"cases": sharded_cases, "fsdp": fsdp_model}
    tests |= {2: {"ddp": ddp, "errors": errors, "save": save}, 1: {"load": load}}.get(world, {})
    mesh = init_device_mesh("cpu", (world,))
    for name, test in tests.items():
        try:
            results[name] = test(mesh, Path(folder))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{world}.{rank}.pt")
    dist.destroy_process_group()


def sharded_cases(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def run(case: dict[str, Any]) -> dict[str, Any]:
        def place(i: int, x: Tensor) -> Tensor:
            whole = i in case.get("replicated", ())
            return distribute_tensor(x, mesh, [Replicate() if whole else Shard(0)])

        return train(case, place)

    return {name: run(case) for name, case in CASES.items()}


def groups_of(net: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(net[0].parameters()), "prune": True, "coupled": True},
        {"params": list(net[2].parameters()), "prune": False},
    ]


def fsdp_model(mesh: Any, folder: Path) -> dict[str, Any]:
    """A real backward pass; its full gradients are handed to a single process as well."""
    from torch.distributed.fsdp import fully_shard

    split, alone = model(), model()
    fully_shard(split[0], mesh=mesh)
    fully_shard(split, mesh=mesh)
    optimizers = [SDprun(groups_of(m), 0.1, c=2.0) for m in (split, alone)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        split(torch.randn(4, 6, generator=generator)).square().sum().backward()
        for p, q in zip(split.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {"sharded": snapshot(optimizers[0]), "alone": snapshot(optimizers[1])}


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    wrapped = nn.parallel.DistributedDataParallel(model())
    optimizer = SDprun(groups_of(wrapped.module), 0.1, c=2.0)
    used = 0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        wrapped(torch.randn(4, 6, generator=generator)).square().sum().backward()
        with CommDebugMode() as traffic:
            optimizer.step()
        used += traffic.get_total_counts()
        optimizer.zero_grad()
    return {"state": snapshot(optimizer), "collectives": used}


def errors(mesh: Any, folder: Path) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def parameter(dim: int | None) -> nn.Parameter:
        placement = Replicate() if dim is None else Shard(dim)
        return nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [placement]))

    def message(params: Any, **options: Any) -> str:
        try:
            SDprun([{"params": params, "prune": True, **options}], 0.1)
        except (TypeError, ValueError) as error:
            return str(error)
        return "no error"

    flat = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    return {
        "columns": message([parameter(1)]),
        "transposed": message([parameter(0)], channel_dims=[(1, 1)]),
        "unlike": message([parameter(0), parameter(None)], coupled=True),
        "flat": message(list(flat.parameters())),
    }


def checkpointed(mesh: Any | None) -> tuple[nn.Module, SDprun]:
    net = model().to(torch.bfloat16)
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=mesh)
    return net, SDprun(groups_of(net), 0.1, c=1.0, momentum=0.5)


def steps(net: nn.Module, optimizer: SDprun, which: range) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in which:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def save(mesh: Any, folder: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net, optimizer = checkpointed(mesh)
    steps(net, optimizer, range(3))
    dcp.save(dict(zip(("model", "optim"), get_state_dict(net, optimizer), strict=True)),
             checkpoint_id=folder / "checkpoint")  # fmt: skip
    return {}


def load(mesh: Any, folder: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    alone, uninterrupted = checkpointed(None)
    steps(alone, uninterrupted, range(6))
    net, optimizer = checkpointed(None)
    content = dict(zip(("model", "optim"), get_state_dict(net, optimizer), strict=True))
    dcp.load(content, checkpoint_id=folder / "checkpoint")
    set_state_dict(net, optimizer, model_state_dict=content["model"],
                   optim_state_dict=content["optim"])  # fmt: skip
    steps(net, optimizer, range(3, 6))
    return {"loaded": snapshot(optimizer), "uninterrupted": snapshot(uninterrupted)}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world found. World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: spawned(world, folder) for world in (3, 2, 1)}


def spawned(world: int, folder: Path) -> list[dict[str, Any]]:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(r, world, str(folder))) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join(5)
    assert not stuck, f"{len(stuck)} of {world} processes did not end within {TIMEOUT} s"
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{world}.{rank}.pt", weights_only=False) for rank in range(world)]


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
