"""Rewinding and masked retraining: the first values where kept, exact zeros elsewhere, for good."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.tickets import mask_gradients, rewind


def trained() -> tuple[nn.Module, dict[str, Tensor], fp.MaskSet]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    initial = copy.deepcopy(model.state_dict())
    train(model)
    return model, initial, fp.magnitude(model, 0.75)


def train(model: nn.Module, steps: int = 20) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, **options)
    for i in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_kept_weights_are_the_first_ones_and_the_rest_is_zero() -> None:
    model, initial, masks = trained()
    rewind(model, initial, masks)
    for name, value in model.state_dict().items():
        expected = initial[name].where(masks[name], 0.0) if name in masks else initial[name]
        assert torch.equal(value, expected)
    assert fp.MaskSet.of(model) == masks


def test_zeros_stay_exactly_zero_through_momentum_and_weight_decay() -> None:
    model, initial, masks = trained()
    rewind(model, initial, masks)
    handles = mask_gradients(model, masks)
    train(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any() and not weight[~mask].signbit().any()
        assert (weight[mask] != initial[name][mask]).all()
    for handle in handles:
        handle.remove()
    train(model, 1)
    assert fp.MaskSet.of(model).num_kept > masks.num_kept


def test_everything_is_checked_before_the_first_write() -> None:
    model, initial, masks = trained()
    before = copy.deepcopy(model.state_dict())
    wrong_shape = {**initial, "3.weight": torch.zeros(2, 7)}
    wrong_mask = fp.MaskSet({**masks, "3.weight": torch.ones(2, 7, dtype=torch.bool)})
    unknown = fp.MaskSet({"4.weight": torch.ones(2, 8, dtype=torch.bool)})
    missing = {k: v for k, v in initial.items() if k != "3.bias"}
    for state, mask, message in [
        (wrong_shape, masks, r"initial_state\['3.weight'\] must have shape \(2, 8\)"),
        (missing, masks, "it lacks '3.bias'"),
        ({**initial, "x": torch.zeros(1)}, masks, "it has 'x'"),
        (initial, wrong_mask, "the mask of 3.weight must have the shape"),
        (initial, unknown, "no parameter named '4.weight'"),
        (model.state_dict(), masks, "own memory.*deepcopy"),
    ]:
        with pytest.raises(ValueError, match=message):
            rewind(model, state, mask)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


def test_wrong_types() -> None:
    model, initial, masks = trained()
    with pytest.raises(TypeError, match="masks must be a MaskSet, got dict"):
        rewind(model, initial, dict(masks))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="initial_state must be a state_dict, got list"):
        rewind(model, [1], masks)  # type: ignore[arg-type]
