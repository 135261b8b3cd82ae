"""Tests that need several processes: each world runs its functions over gloo and saves the results.

Also used by them: whole tensors of sharded ones, and equality to the bit.
"""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 180  # seconds
Results = dict[int, list[dict[str, Any]]]


def spawned(
    world: int, folder: Path, tests: Mapping[str, Callable[[Any, Path], Any]]
) -> list[dict[str, Any]]:
    """What each test(mesh, folder) returned on each rank; the traceback of one that failed."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(rank, world, folder, tests)) for rank in range(world)
    ]
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


def _work(rank: int, world: int, folder: Path, tests: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for name, test in tests.items():
        try:
            results[name] = test(mesh, folder)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"{world}.{rank}.pt")
    dist.destroy_process_group()


def of(results: Results, world: int, name: str) -> list[Any]:
    """One result of every rank."""
    found = [rank[name] for rank in results[world]]
    for result in found:
        assert not (isinstance(result, str) and result.startswith("Traceback")), result
    return found


def full(x: Tensor) -> Tensor:
    """A copy of all of a tensor that may be sharded. Not every back end gathers bools."""
    x = x.detach()
    if not hasattr(x, "full_tensor"):
        return x.clone()
    if x.dtype == torch.bool:
        return x.to(torch.uint8).full_tensor().bool()
    return x.full_tensor().clone()


def same(a: Any, b: Any) -> None:
    """Equal to the bit, signs of zeros and NaNs included."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(_bytes(a), _bytes(b))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)
