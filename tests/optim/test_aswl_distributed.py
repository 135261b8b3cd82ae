"""ASWL over gloo processes: the masks of a single process; sums are added in another order."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.optim import ASWL
from tests.optim.distributed_training import (
    complaint,
    flat_models,
    load,
    placer,
    save,
    snapshot,
    split,
    take_steps,
    train_beside,
    train_ddp,
    train_scaled,
)
from tests.processes import Results, full, of, same, spawned

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2 and prune_bias": {"l2": 0.01, "prune_bias": True},
    "keep ties, no momentum": {"ties": "keep", "momentum": 0},
    "post_bn": {"attention_position": "post_bn"},
}
TABLES = ("attention", "tie_end", "multiplier")


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that processes cannot share evenly, ties across them, and less rows than processes."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 1)
    )
    with torch.no_grad():
        net[3].weight.mul_(4).round_().div_(4)
    return net.to(dtype)


def optimizer(net: nn.Module, **options: Any) -> ASWL:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a norm right behind")
        return ASWL(net, 0.05, sparsity=0.6, **options)


def pair(mesh: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """The model sharded and alone, and an optimizer of each."""
    nets = split(model(dtype), mesh), model(dtype)
    return nets, tuple(optimizer(net, **options) for net in nets)


def tables(opts: tuple[ASWL, ...]) -> dict[str, Any]:
    """Attention and the rest of both, their masks, and what finish() leaves."""
    found: dict[str, Any] = {
        "tables": [[opt.param_groups[0][name].double() for name in TABLES] for opt in opts],
        "masks": [dict(opt.masks()) for opt in opts],
        "sparsities": [opt.sparsities() for opt in opts],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the layers have learnt")
        found["finished"] = [dict(opt.finish()) for opt in opts]
    found["models"] = [[full(p) for p in opt.param_groups[0]["params"]] for opt in opts]
    return found


# ---------------------------------------------------------------------- inside the processes


def fsdp(mesh: Any, folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in OPTIONS.items():
        nets, opts = pair(mesh, **options)
        start = [dict(opt.masks()) for opt in opts]
        found[name] = {**train_beside(nets, opts, STEPS), "start": start, **tables(opts)}
    nets, opts = pair(mesh, torch.bfloat16)
    found["bfloat16"] = {**train_beside(nets, opts, STEPS), **tables(opts)}
    return found


def compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh)
    return train_beside(nets, opts, STEPS, compiled=True)


def scaled(mesh: Any, folder: Path) -> dict[str, Any]:
    nets, opts = pair(mesh)
    return {**train_scaled(nets, opts), **tables(opts)}


def placed(mesh: Any, folder: Path) -> dict[str, Any]:
    """Some parameters whole on each process: they count once."""
    net, alone = model(), model()
    place = placer(mesh, replicated=(0, 1, 7))
    for i, (name, p) in enumerate(list(net.named_parameters())):
        module, attribute = name.split(".")
        setattr(net[int(module)], attribute, nn.Parameter(place(i, p.detach())))
    opts = optimizer(net), optimizer(alone)
    for one, opt in zip((net, alone), opts, strict=True):
        take_steps(one, opt, range(STEPS))
    return {"sharded": snapshot(opts[0]), "alone": snapshot(opts[1]), **tables(opts)}


def ddp(mesh: Any, folder: Path) -> dict[str, Any]:
    parallel = nn.parallel.DistributedDataParallel(model())
    return train_ddp(parallel, optimizer(parallel), STEPS)


def errors(mesh: Any, folder: Path) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    columns = nn.Linear(4, 4, bias=False)
    weight = distribute_tensor(columns.weight.detach(), mesh, [Shard(1)])
    columns.weight = nn.Parameter(weight)
    return [complaint(optimizer, net) for net in [*flat_models(model), columns]]


def save_three_steps(mesh: Any, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = split(model(dtype), mesh)
        opt = optimizer(net)
        take_steps(net, opt, range(3))
        save(net, opt, folder / str(dtype))


def load_and_go_on(mesh: Any, folder: Path) -> dict[str, Any]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        alone = model(dtype)
        uninterrupted = optimizer(alone)
        take_steps(alone, uninterrupted, range(6))
        net = model(dtype)
        opt = optimizer(net)
        load(net, opt, folder / str(dtype))
        take_steps(net, opt, range(3, 6))
        both = opt, uninterrupted
        states = dict(zip(("sharded", "alone"), map(snapshot, both), strict=True))
        found[str(dtype)] = {**states, **tables(both)}
    return found


TESTS: dict[str, Any] = {
    "fsdp": fsdp,
    "compiled": compiled,
    "scaled": scaled,
    "placed": placed,
    "ddp": ddp,
    "errors": errors,
    "save": save_three_steps,
}


# ---------------------------------------------------------------------- outside


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """World 1 comes last: it loads what world 2 saved."""
    folder = tmp_path_factory.mktemp("distributed")
    some = {"fsdp": fsdp, "placed": placed}
    return {
        3: spawned(3, folder, some),
        2: spawned(2, folder, TESTS),
        1: spawned(1, folder, {**some, "load": load_and_go_on}),
    }


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * eps, equal_nan=True)


def agree(found: dict[str, Any]) -> None:
    close(found["sharded"], found["alone"])
    if "tables" not in found:
        return
    (attention, *ours), (expected, *theirs) = found["tables"]
    torch.testing.assert_close(attention, expected, rtol=1e-6, atol=1e-9)
    close(ours, theirs)
    assert found["sparsities"][0] == found["sparsities"][1]
    for name in ("masks", "finished", "start"):
        if name in found:
            same(*found[name])
    close(*found["models"])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", [*OPTIONS, "bfloat16"])
def test_fully_sharded_model_trains_like_a_single_process(
    results: Any, world: int, name: str
) -> None:
    for found in of(results, world, "fsdp"):
        agree(found[name])


def test_ranks_have_the_same_attention(results: Any) -> None:
    for world in (2, 3):
        first, *others = (found["plain"] for found in of(results, world, "fsdp"))
        for other in others:
            same(first["tables"][0], other["tables"][0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_every_process_holds_counts_once(results: Any, world: int) -> None:
    for found in of(results, world, "placed"):
        agree(found)


def test_a_compiled_sharded_step_is_the_plain_one(results: Any) -> None:
    for found in of(results, 2, "compiled"):
        agree(found)


def test_an_overflow_on_one_rank_skips_the_step_on_all(results: Any) -> None:
    for found in of(results, 2, "scaled"):
        agree(found)
        assert found["scale"] == 16.0


def test_ranks_of_ddp_agree(results: Any) -> None:
    first, second = of(results, 2, "ddp")
    assert first["collectives"] == second["collectives"] == 0
    same(first["state"], second["state"])


def test_checkpoint_of_two_ranks_continues_on_one(results: Any) -> None:
    of(results, 2, "save")
    [found] = of(results, 1, "load")
    for both in found.values():
        agree(both)


def test_what_is_not_supported_is_said(results: Any) -> None:
    for *flat, columns in of(results, 2, "errors"):
        for message in flat:
            assert "is a flat shard" in message and "fully_shard" in message
        assert columns.startswith("weight has placements (Shard(dim=1),)")
