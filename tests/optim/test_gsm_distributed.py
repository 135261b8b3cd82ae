"""GSM over several gloo processes: the bits of a single process, whatever the sharding."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.optim import GSM, sharded
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
    train_scaled,
)
from tests.processes import Results, of, same, spawned

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


def in_pieces() -> None:
    sharded.PIECE = 16  # so that small tensors come in several pieces


def sharded_cases(mesh: Any, folder: Path) -> dict[str, Any]:
    in_pieces()
    return {n: train(c, placer(mesh, c.get("replicated", ()))) for n, c in CASES.items()}


def grid() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def hybrid(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    in_pieces()
    both = grid()
    return train(CASES["ties"], lambda i, x: distribute_tensor(x, both, [Replicate(), Shard(0)]))


def pair(mesh: Any) -> tuple[Any, Any]:
    """The model sharded and alone, and an optimizer of each."""
    in_pieces()
    nets = split(model(), mesh), model()
    return nets, tuple(optimizer(net.parameters(), {"num_kept": 20}) for net in nets)


def fsdp_model(mesh: Any, folder: Path) -> dict[str, Any]:
    return train_beside(*pair(mesh), STEPS)


def fsdp_hybrid(mesh: Any, folder: Path) -> dict[str, Any]:
    return fsdp_model(grid(), folder)


def fsdp_scaled(mesh: Any, folder: Path) -> dict[str, Any]:
    return train_scaled(*pair(mesh))


def fsdp_compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    """The compiler is to leave the step of a sharded model as it is."""
    return train_beside(*pair(mesh), STEPS, compiled=True)


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model())
    return train_ddp(wrapped, optimizer(wrapped.parameters(), {"num_kept": 20}), STEPS)


def errors(mesh: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor

    def parameter(x: Tensor, dim: int = 0) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(x, mesh, [Shard(dim)]))

    odd = parameter(torch.ones(4, 4))
    odd.grad = parameter(torch.ones(4, 4), 1).data
    nan = parameter(torch.tensor([[1.0], [torch.nan]]))
    columns = [("w", parameter(torch.ones(4, 4), 1))]
    rows = [("w", parameter(torch.ones(6, 4)))]
    return {
        "columns": complaint(GSM, columns, 0.1, num_kept=1),
        "block": complaint(GSM, rows, 0.1, num_kept=1, block=(2, 1)),
        "gradient": complaint(GSM([odd], 0.1, num_kept=1).step),
        "nan": complaint(GSM([nan], 0.1, num_kept=1).masks),
        "flat": [complaint(GSM, net.parameters(), 0.1, num_kept=0) for net in flat_models(model)],
    }


def checkpointed(mesh: Any | None) -> tuple[nn.Module, GSM]:
    in_pieces()
    net = model().to(torch.bfloat16)
    if mesh is not None:
        split(net, mesh)
    return net, optimizer(net.parameters(), {"num_kept": 20})


def save_three_steps(mesh: Any, folder: Path) -> None:
    net, opt = checkpointed(mesh)
    take_steps(net, opt, range(3))
    save(net, opt, folder / "checkpoint")


def load_and_go_on(mesh: Any, folder: Path) -> dict[str, Any]:
    alone, uninterrupted = checkpointed(None)
    take_steps(alone, uninterrupted, range(6))
    net, opt = checkpointed(None)
    load(net, opt, folder / "checkpoint")
    take_steps(net, opt, range(3, 6))
    return {
        "loaded": snapshot(opt),
        "uninterrupted": snapshot(uninterrupted),
        "num_steps": [o.param_groups[0]["num_steps"] for o in (opt, uninterrupted)],
    }


EVERYWHERE = {"cases": sharded_cases, "fsdp": fsdp_model}
TESTS: dict[int, dict[str, Any]] = {
    4: {"hybrid": hybrid, "fsdp hybrid": fsdp_hybrid},
    2: {
        "ddp": ddp,
        "errors": errors,
        "save": save_three_steps,
        "scaled": fsdp_scaled,
        "compiled": fsdp_compiled,
    },
    1: {"load": load_and_go_on},
}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: spawned(world, folder, EVERYWHERE | TESTS[world]) for world in (4, 2, 1)}


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
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
