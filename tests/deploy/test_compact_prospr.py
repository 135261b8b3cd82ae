"""Channels chosen before training are removed, and the small network trains as the masked one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp


@pytest.mark.parametrize("method", [fp.prospr, fp.snip])
def test_pruning_at_initialisation_trains_a_smaller_network(method: object) -> None:
    torch.manual_seed(0)
    large = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).double()
    x, y = torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.arange(32) % 4
    masks = method(large, [(x, y)], F.cross_entropy, sparsity=0.5, granularity="channel")
    masks.apply(large)
    small, report = fp.compact(large, x[:2], return_report=True)
    kept = [int(masks[f"{i}.bias"].sum()) for i in (0, 3)]
    assert sum(kept) == 14 and [layer.after for layer in report.layers] == [*kept, 4]

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [
        fp.optim.MaskedSGD(large.parameters(), masks=masks, **options),
        torch.optim.SGD(small.parameters(), **options),
    ]
    for _ in range(5):
        for model, optimizer in zip((large, small), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
    cut = fp.compact(large, x[:2])
    for name, expected in cut.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected, rtol=1e-8, atol=1e-10)
