"""Magnitude pruning: exact counts, the right weights, the model untouched."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastprune.masks import num_kept
from fastprune.methods import magnitude


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(10, 7), nn.Linear(7, 5)
    )


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.951, 1])
def test_global_keeps_the_largest_of_all(sparsity: float) -> None:
    model = network()
    masks = magnitude(model, sparsity)
    assert list(masks) == ["0.weight", "3.weight", "4.weight"]
    assert masks.num_kept == num_kept(sparsity, masks.total)
    weights = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in masks])
    mask = torch.cat([m.flatten() for m in masks.values()])
    largest = torch.zeros_like(mask)
    largest[weights.argsort(descending=True, stable=True)[: masks.num_kept]] = True
    assert torch.equal(mask, largest)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_layer_scope_keeps_the_largest_of_each_layer(sparsity: float) -> None:
    model = network()
    masks = magnitude(model, sparsity, scope="layer")
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach().abs()
        assert masks.layers[name].num_kept == num_kept(sparsity, weight.numel())
        assert weight[mask].min() > weight[~mask].max()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_live_or_die_whole_and_are_counted(scope: Any) -> None:
    masks = magnitude(network(), 0.6, scope=scope, block=(4, 2))
    alive = {}
    for name, mask in masks.items():
        tiles = [t for rows in mask.split(4, 0) for t in rows.split(2, 1)]
        flat = [t.flatten(0, 1).flatten(1) if t.dim() > 2 else t.reshape(-1, 1) for t in tiles]
        assert all(torch.equal(f.all(0), f.any(0)) for f in flat)
        alive[name] = (sum(int(f.any(0).sum()) for f in flat), sum(f.shape[1] for f in flat))
    # 10 outputs are 3 rows of blocks, 3 inputs 2 columns, 9 positions; and so on.
    assert [total for _, total in alive.values()] == [3 * 2 * 9, 2 * 5, 2 * 4]
    if scope == "layer":
        assert all(kept == num_kept(0.6, total) for kept, total in alive.values())
    assert sum(kept for kept, _ in alive.values()) == (
        num_kept(0.6, 72) if scope == "global" else sum(num_kept(0.6, n) for n in (54, 10, 8))
    )


def test_the_model_is_not_changed_and_a_second_prune_finds_the_same() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    masks = magnitude(model, 0.8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    masks.apply(model)
    assert magnitude(model, 0.8) == masks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 90}, ValueError, r"sparsity must be in \[0, 1\]"),
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a number"),
        ({"sparsity": 0.9, "scope": "local"}, ValueError, "'global', 'layer', got 'local'"),
        ({"sparsity": 0.9, "block": 4}, TypeError, "block must be two integers"),
        ({"sparsity": 0.9, "block": (0, 4)}, ValueError, "block must be two positive"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        magnitude(network(), **arguments)


def test_a_model_without_prunable_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d has no convolution"):
        magnitude(nn.BatchNorm1d(3), 0.5)


def test_nan_weights_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        magnitude(model, 0.5)
