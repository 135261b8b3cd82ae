"""SDprun goes on after its zero channels have been taken out of model and optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.optim import SDprun, channel_groups


def network() -> nn.Sequential:
    """Every third channel of the convolutions is small, and soon below the threshold."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 3),
    ).double()
    for layer in (*model[0:2], *model[3:5]):
        layer.weight.data[::3] *= 0.3
    return model


X = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(16) % 3


def train(model: nn.Module, optimizer: SDprun, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(X), Y).backward()
        optimizer.step()


def dead(model: nn.Sequential, layer: int) -> Tensor:
    return ~model[layer].weight.detach().flatten(1).any(1)


def forget_dead_columns(model: nn.Sequential, optimizer: SDprun) -> None:
    """What reads a channel of zeros gets no gradient, but would still count in its group's norm."""
    for reader, source in ((3, 0), (8, 3)):
        weight, columns = model[reader].weight, dead(model, source)
        for tensor in (weight, *optimizer.state[weight].values()):
            tensor.detach()[:, columns] = 0
    optimizer.load_state_dict(optimizer.state_dict())  # or it would say that weights changed


@pytest.mark.parametrize(("momentum", "c"), [(0.0, 2.2), (0.5, 1.0)])
def test_the_next_steps_are_those_of_the_masked_model(momentum: float, c: float) -> None:
    large = network()
    optimizer = SDprun(channel_groups(large, X), 0.1, c=c, momentum=momentum)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    train(large, optimizer, 8)
    counts = [int(dead(large, layer).sum()) for layer in (0, 3)]
    assert counts == [4, 4]
    small, other, schedule = copy.deepcopy((large, optimizer, scheduler))
    fp.compact(small, X, other)
    assert [small[0].out_channels, small[3].out_channels] == [12 - counts[0], 10 - counts[1]]

    forget_dead_columns(large, optimizer)
    for model, each, plan in ((large, optimizer, scheduler), (small, other, schedule)):
        for _ in range(5):
            train(model, each, 1)
            plan.step()
    for group, same in zip(optimizer.param_groups, other.param_groups, strict=True):
        for name in ("num_steps", "threshold", "lr"):
            assert float(group[name]) == float(same[name])
    assert float(other.param_groups[0]["num_steps"]) == 13
    cut = fp.compact(large, X)
    for name, expected in fp.compact(small, X).state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], expected, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_of_the_small_model_goes_on() -> None:
    model = network()
    optimizer = SDprun(channel_groups(model, X), 0.1, c=2.2)
    train(model, optimizer, 8)
    fp.compact(model, X, optimizer)
    twin = copy.deepcopy(model)
    again = SDprun(channel_groups(twin, X), 0.1, c=2.2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares what it loads
    train(model, optimizer, 3)
    train(twin, again, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
