"""What every optimizer's distributed tests do: a small sharded model beside a single process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.processes import full


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def split(net: nn.Sequential, mesh: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def placer(mesh: Any, replicated: tuple[int, ...] = ()) -> Callable[[int, Tensor], Tensor]:
    """Puts tensor i on the mesh: by rows, or whole if it is among the replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(i: int, x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Replicate() if i in replicated else Shard(0)])

    return place


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Other data for each rank."""
    random = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, 6, generator=random).to(dtype)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter, then every tensor of state."""
    params = params_of(optimizer)
    states = [optimizer.state.get(p, {}) for p in params]
    return [full(x) for x in [*params, *(s[key] for s in states for key in sorted(s))]]


def train_beside(
    nets: tuple[nn.Module, nn.Module],
    optimizers: tuple[Optimizer, Optimizer],
    num_steps: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """A real backward pass of the sharded net; its full gradients go to the single one as well."""
    sharded, alone = nets
    steps: list[Any] = [optimizer.step for optimizer in optimizers]
    for i in range(num_steps):
        if compiled and i == 1:
            steps[0] = torch.compile(steps[0], backend="aot_eager")
        sharded(batch(i, next(alone.parameters()).dtype)).square().sum().backward()
        for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad)
        for step, optimizer in zip(steps, optimizers, strict=True):
            step()
            optimizer.zero_grad()
    return {"sharded": snapshot(optimizers[0]), "alone": snapshot(optimizers[1])}


def train_scaled(
    nets: tuple[nn.Module, nn.Module], optimizers: tuple[Optimizer, Optimizer]
) -> dict[str, Any]:
    """Loss scaling: one rank overflows in the first step and in the third, which nobody takes."""
    sharded, alone = nets
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for i in range(4):
        skipped = i % 2 == 0
        x = batch(i)
        if skipped and dist.get_rank() == 1:
            x[0, 0] = torch.inf
        scale = scaler.get_scale()
        scaler.scale(sharded(x).square().sum()).backward()
        for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad) / scale
        scaler.step(optimizers[0])
        scaler.update()
        if not skipped:
            optimizers[1].step()
        optimizers[0].zero_grad()
    found = {"sharded": snapshot(optimizers[0]), "alone": snapshot(optimizers[1])}
    return {**found, "scale": scaler.get_scale()}


def train_ddp(
    wrapped: nn.parallel.DistributedDataParallel, optimizer: Optimizer, num_steps: int
) -> dict[str, Any]:
    """Gradients are equal on all ranks, so the step itself has nothing to send."""
    from torch.distributed.tensor.debug import CommDebugMode

    used = 0
    for i in range(num_steps):
        wrapped(batch(i)).square().sum().backward()
        with CommDebugMode() as traffic:
            optimizer.step()
        used += traffic.get_total_counts()
        optimizer.zero_grad()
    return {"state": snapshot(optimizer), "collectives": used}


def take_steps(net: nn.Module, optimizer: Optimizer, which: range) -> None:
    """Steps with gradients that depend on the step alone, for whole and sharded parameters."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in which:
        random = torch.Generator().manual_seed(step)
        for p in net.parameters():
            gradient = torch.randn(p.shape, generator=random).to(p.dtype)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def save(net: nn.Module, optimizer: Optimizer, path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    states = get_state_dict(net, optimizer)
    dcp.save(dict(zip(("model", "optim"), states, strict=True)), checkpoint_id=path)


def load(net: nn.Module, optimizer: Optimizer, path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    content = dict(zip(("model", "optim"), get_state_dict(net, optimizer), strict=True))
    dcp.load(content, checkpoint_id=path)
    set_state_dict(
        net, optimizer, model_state_dict=content["model"], optim_state_dict=content["optim"]
    )


def flat_models(net: Callable[[], nn.Module]) -> list[nn.Module]:
    """FSDP's first form, which flattens its parameters: with and without the original ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    return [
        FullyShardedDataParallel(net(), device_id=cpu, use_orig_params=original)
        for original in (False, True)
    ]


def complaint(make: Callable[..., Any], *args: Any, **options: Any) -> str:
    """What it says when it refuses."""
    try:
        make(*args, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"
