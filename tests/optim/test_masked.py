"""Any optimizer of torch, made to keep zeros."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.optim import GSM, masked
from tests.ops.machine import bits
from tests.optim.test_gsm import fill_gradients, network, steps
from tests.optim.test_masked_sgd import masks_of

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=0.1, nesterov=True),
    "SGD fused": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, fused=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 0.01, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), 0.01),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), 0.01),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), 0.01),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.01),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), 10.0),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01, momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), 0.01),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), 0.01),
    "GSM": lambda m: GSM(m.parameters(), 0.01, sparsity=0.1),
}


def assert_zeros(model: nn.Module, optimizer: Optimizer, masks: fp.MaskSet) -> None:
    """Weights and what has their shape in the state, also as it would be saved."""
    saved = list(optimizer.state_dict()["state"].values())
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        alike = [s[k] for s in saved for k in s if torch.is_tensor(s[k])]
        alike = [value for value in alike if value.shape == parameter.shape]
        assert len(alike) >= (1 if saved else 0)
        for value in (parameter, *alike):
            assert not bits(value)[~mask].any(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_after_every_step(name: str, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    masks = masks_of(model)
    assert masked(optimizer, masks) is optimizer
    assert_zeros(model, optimizer, masks)
    for i in range(5):
        fill_gradients(model, i)
        if i == 3 and name != "GSM":  # whose selection would take the NaN for the largest
            for n, mask in masks.items():
                model.get_parameter(n).grad[~mask] = torch.nan
        before = model[4].weight.detach().clone()
        optimizer.step()
        assert_zeros(model, optimizer, masks)
        assert not torch.equal(before, model[4].weight)


def test_kept_weights_train_as_without() -> None:
    """Where gradients of pruned weights are zero, nothing changes for the others."""
    ours, theirs = network(), network()
    masks = masks_of(theirs)
    masks.apply(theirs)
    fp.mask_gradients(theirs, masks)
    optimizers = (
        masked(torch.optim.AdamW(ours.parameters()), masks_of(ours)),
        torch.optim.AdamW(theirs.parameters()),
    )
    for i in range(5):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["SGD", "SGD fused", "AdamW"])
def test_amp(name: str) -> None:
    model = network()
    masks = masks_of(model)
    optimizer = masked(OPTIMIZERS[name](model), masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for i in range(6):
        x = torch.full((2, 3, 5, 5), torch.inf if i in (2, 4) else 1.0 + i)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert any(moved) == (i not in (2, 4))
        for n, mask in masks.items():
            assert not bits(model.get_parameter(n))[~mask].any()


def test_an_average_of_the_weights_stays_sparse() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = masked(torch.optim.AdamW(model.parameters(), 0.01), masks)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for i in range(10):
        steps(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
        for name, mask in masks.items():
            assert not bits(average.module.get_parameter(name))[~mask].any()


def test_the_state_of_a_dense_run_is_zeroed_when_loaded() -> None:
    dense = network()
    source = torch.optim.AdamW(dense.parameters(), 0.01)
    steps(dense, source, range(2))
    model = network(1)
    masks = masks_of(model)
    optimizer = masked(torch.optim.AdamW(model.parameters(), 0.01), masks)
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    assert_zeros(model, optimizer, masks)
    assert all(float(s["step"]) == 2 for s in optimizer.state.values())
    steps(model, optimizer, range(2, 4))
    assert_zeros(model, optimizer, masks)


def test_schedulers_and_closures_see_the_same_optimizer() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = masked(torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3), masks)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 5, 5)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        scheduler.step()
        for name, mask in masks.items():
            assert not bits(model.get_parameter(name))[~mask].any()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_compiled_step_writes_the_zeros() -> None:
    torch.compiler.reset()
    model = network()
    masks = masks_of(model)
    optimizer = masked(torch.optim.SGD(model.parameters(), 0.1, 0.9), masks)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for i in range(3):
        fill_gradients(model, i)
        step()
        assert_zeros(model, optimizer, masks)


def test_wrong_input_says_what_was_expected() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential"):
        masked(model, masks_of(model))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="masks must be a MaskSet, got dict"):
        masked(torch.optim.SGD(model.parameters(), 0.1), {})  # type: ignore[arg-type]
