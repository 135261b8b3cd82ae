"""GSM over several gloo processes: the bits of a single process, whatever the sharding."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprune.optim import GSM, sharded

TIMEOUT = 60
STEPS = 3
SHAPES = [(7, 6), (5, 4, 3, 3), (1, 9), (3, 8), (16, 6), (11,), (4, 0)]
# name -> dtype, block, shapes, num_kept, ties, placement
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "all": {"num_kept": 351},
    "none": {"num_kept": 0},
    "paper": {"ties": "paper"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "ties": {"quantised": True},
    "replicated": {"quantised": True, "replicated": (0, 3)},
    "block": {"block": (2, 1), "shapes": [(16, 6), (8, 3, 2, 2), (7, 5), (1, 5)], "num_kept": 40},
}


def parameters(case: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [tensor(shape, case, generator) for shape in case.get("shapes", SHAPES)]


def gradients(case: dict[str, Any], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [tensor(shape, case, generator) for shape in case.get("shapes", SHAPES)]


def tensor(shape: tuple[int, ...], case: dict[str, Any], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if case.get("quantised"):  # few values, so that ties are cut
        x = x.sign()
    return x.to(case.get("dtype", torch.float32))


def optimizer(params: Any, case: dict[str, Any]) -> GSM:
    return GSM(
        params,
        lr=0.1,
        momentum=0.5,
        dampening=0.25,
        weight_decay=0.01,
        num_kept=case.get("num_kept", 100),
        block=case.get("block", (1, 1)),
        ties=case.get("ties", "exact"),
    )


def full(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


def snapshot(opt: GSM) -> list[Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [opt.state[p][key] for p in params for key in sorted(opt.state[p])]
    return [full(x) for x in [*params, *state]]


def train(case: dict[str, Any], place: Any) -> dict[str, Any]:
    """Every tensor after each step, and what finish() keeps; `place` puts tensor i where it is."""
    params = [nn.Parameter(place(i, x)) for i, x in enumerate(parameters(case))]
    opt = optimizer(params, case)
    steps = []
    for step in range(STEPS):
        for i, gradient in enumerate(gradients(case, step)):
            params[i].grad = place(i, gradient)
        opt.step()
        steps.append(snapshot(opt))
    masks = opt.masks()
    finished = opt.finish()
    assert masks == finished
    return {"steps": steps, "masks": dict(masks), "finished": snapshot(opt)}


def single(case: dict[str, Any]) -> dict[str, Any]:
    return train(case, lambda i, x: x.clone())


# ---------------------------------------------------------------------- inside the processes


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    sharded.PIECE = 16  # so that small tensors come in several pieces
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    results: dict[str, Any] = {}
    tests = {"cases": sharded_cases, "fsdp": fsdp_model}
    tests |= {
        1: {"load": load},
        2: {
            "ddp": ddp,
            "errors": errors,
            "save": save,
            "scaled": fsdp_scaled,
            "compiled": fsdp_compiled,
        },
        4: {"hybrid": hybrid, "fsdp hybrid": fsdp_hybrid},
    }[world]
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


def hybrid(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    grid = init_device_mesh("cpu", (2, 2))
    return train(CASES["ties"], lambda i, x: distribute_tensor(x, grid, [Replicate(), Shard(0)]))


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def fsdp_model(mesh: Any, folder: Path) -> dict[str, Any]:
    """A real backward pass; its full gradients are handed to a single process as well."""
    from torch.distributed.fsdp import fully_shard

    split, alone = model(), model()
    fully_shard(split[0], mesh=mesh)
    fully_shard(split, mesh=mesh)
    opts = [optimizer(m.parameters(), {"num_kept": 20}) for m in (split, alone)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        split(torch.randn(4, 6, generator=generator)).square().sum().backward()
        for p, q in zip(split.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad)
        for opt in opts:
            opt.step()
            opt.zero_grad()
    return {"sharded": snapshot(opts[0]), "alone": snapshot(opts[1])}


def fsdp_hybrid(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp_model(grid, folder)


def fsdp_scaled(mesh: Any, folder: Path) -> dict[str, Any]:
    """Loss scaling: one rank overflows in the first step and in the third, which nobody takes."""
    from torch.distributed.fsdp import fully_shard

    split, alone = model(), model()
    fully_shard(split, mesh=mesh)
    opts = [optimizer(m.parameters(), {"num_kept": 20}) for m in (split, alone)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        skipped = step % 2 == 0
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        x = torch.randn(4, 6, generator=generator)
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


def fsdp_compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    """The compiler is to leave the step of a sharded model as it is."""
    from torch.distributed.fsdp import fully_shard

    models = model(), model()
    for m in models:
        fully_shard(m, mesh=mesh)
    opts = [optimizer(m.parameters(), {"num_kept": 20}) for m in models]
    steps: list[Any] = [opt.step for opt in opts]
    for step in range(STEPS):
        if step == 1:
            steps[0] = torch.compile(opts[0].step, backend="aot_eager")
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        x = torch.randn(4, 6, generator=generator)
        for m, run, opt in zip(models, steps, opts, strict=True):
            m(x).square().sum().backward()
            run()
            opt.zero_grad()
    return {"sharded": snapshot(opts[0]), "alone": snapshot(opts[1])}


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    wrapped = nn.parallel.DistributedDataParallel(model())
    opt = optimizer(wrapped.parameters(), {"num_kept": 20})
    used = 0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        wrapped(torch.randn(4, 6, generator=generator)).square().sum().backward()
        with CommDebugMode() as traffic:
            opt.step()
        used += traffic.get_total_counts()
        opt.zero_grad()
    return {"state": snapshot(opt), "collectives": used}


def errors(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor

    def message(shape: tuple[int, ...], dim: int, **options: Any) -> str:
        parameter = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]))
        try:
            GSM([("w", parameter)], 0.1, num_kept=1, **options)
        except ValueError as error:
            return str(error)
        return "no error"

    gradient = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    gradient.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    try:
        GSM([gradient], 0.1, num_kept=1).step()
        wrong_gradient = "no error"
    except ValueError as error:
        wrong_gradient = str(error)

    nan = nn.Parameter(distribute_tensor(torch.tensor([[1.0], [torch.nan]]), mesh, [Shard(0)]))
    try:
        GSM([nan], 0.1, num_kept=1).masks()
        not_a_number = "no error"
    except ValueError as error:
        not_a_number = str(error)
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = []
    for original in (False, True):
        net = FullyShardedDataParallel(
            model(), device_id=torch.device("cpu"), use_orig_params=original
        )
        try:
            GSM(net.parameters(), 0.1, num_kept=0)
            flat.append("no error")
        except TypeError as error:
            flat.append(str(error))
    return {
        "columns": message((4, 4), 1),
        "block": message((6, 4), 0, block=(2, 1)),
        "gradient": wrong_gradient,
        "nan": not_a_number,
        "flat": flat,
    }


def checkpointed(mesh: Any | None) -> tuple[nn.Module, GSM]:
    net = model().to(torch.bfloat16)
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=mesh)
    return net, optimizer(net.parameters(), {"num_kept": 20})


def steps(net: nn.Module, opt: GSM, which: range) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in which:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        opt.step()
    opt.zero_grad()


def save(mesh: Any, folder: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    net, opt = checkpointed(mesh)
    steps(net, opt, range(3))
    content = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}
    dcp.save(content, checkpoint_id=folder / "checkpoint")
    return {}


def load(mesh: Any, folder: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    alone, uninterrupted = checkpointed(None)
    steps(alone, uninterrupted, range(6))

    net, opt = checkpointed(None)
    content = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}
    dcp.load(content, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(net, content["model"])
    set_optimizer_state_dict(net, opt, content["optim"])
    steps(net, opt, range(3, 6))
    return {
        "loaded": snapshot(opt),
        "uninterrupted": snapshot(uninterrupted),
        "num_steps": [o.param_groups[0]["num_steps"] for o in (opt, uninterrupted)],
    }


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world found. World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: spawned(world, folder) for world in (4, 2, 1)}


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


def of(results: dict[int, list[dict[str, Any]]], world: int, name: str) -> list[Any]:
    found = [rank[name] for rank in results[world]]
    for result in found:
        assert not isinstance(result, str), result  # a traceback
    return found


def same(a: Any, b: Any) -> None:
    """Equal to the bit, signs of zeros and NaNs included."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (
            a.contiguous().numpy(force=True).tobytes() == b.contiguous().numpy(force=True).tobytes()
            if a.dtype != torch.bfloat16
            else torch.equal(a.view(torch.int16), b.view(torch.int16))
        )
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_sharding_does_not_change_a_bit(results: Any, world: int, name: str) -> None:
    expected = single(CASES[name])
    for found in of(results, world, "cases"):
        same(found[name], expected)


def test_ties_are_really_cut() -> None:
    """Quantised scores are all equal at first, so which are active depends on positions alone."""
    exact, paper = single(CASES["ties"]), single({**CASES["ties"], "ties": "paper"})
    assert not torch.equal(exact["steps"][0][1], paper["steps"][0][1])


def test_hybrid_sharding_does_not_change_a_bit(results: Any) -> None:
    for found in of(results, 4, "hybrid"):
        same(found, single(CASES["ties"]))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fully_sharded_model_trains_like_a_single_process(results: Any, world: int) -> None:
    for found in of(results, world, "fsdp"):
        same(found["sharded"], found["alone"])


def test_fully_shard_on_a_grid_trains_like_a_single_process(results: Any) -> None:
    for found in of(results, 4, "fsdp hybrid"):
        same(found["sharded"], found["alone"])


def test_an_overflow_on_one_rank_skips_the_step_on_all(results: Any) -> None:
    for found in of(results, 2, "scaled"):
        same(found["sharded"], found["alone"])
        assert found["scale"] == 16.0


def test_the_compiler_leaves_a_step_of_shards_as_it_is(results: Any) -> None:
    for found in of(results, 2, "compiled"):
        same(found["sharded"], found["alone"])


def test_ddp_needs_no_traffic_and_ranks_agree(results: Any) -> None:
    first, second = of(results, 2, "ddp")
    assert first["collectives"] == second["collectives"] == 0
    same(first["state"], second["state"])


def test_checkpoint_of_two_ranks_continues_on_one(results: Any) -> None:
    of(results, 2, "save")
    [found] = of(results, 1, "load")
    same(found["loaded"], found["uninterrupted"])
    assert found["num_steps"] == [6, 6]


def test_what_is_not_supported_is_said(results: Any) -> None:
    for said in of(results, 2, "errors"):
        assert said["columns"].startswith("w has placements (Shard(dim=1),)")
        assert "prune=False" in said["columns"]
        assert said["block"].startswith("w has 6 rows, 3 on each of 2 ranks")
        assert "redistribute" in said["gradient"]
        assert "NaN" in said["nan"]
        for message in said["flat"]:
            assert message.startswith("params[0] is a flat shard") and "fully_shard" in message


def test_importing_the_optimizers_does_not_import_dtensor() -> None:
    program = "import sys, fastprune.optim; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=TIMEOUT)
