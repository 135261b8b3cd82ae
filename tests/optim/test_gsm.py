"""GSM as an optimizer: torch.optim.SGD where every weight is active, the reference elsewhere."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fastprune as fp
from fastprune.optim import GSM, prunable_groups
from fastprune.optim.decay import passive_residual

Optimizer = torch.optim.Optimizer
SGD_VARIANTS: list[dict[str, Any]] = [
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.0, "weight_decay": 5e-4},
    {"momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    {"momentum": 0.98, "weight_decay": 1e-3, "maximize": True},
]


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 7), nn.Linear(7, 3)
    ).to(dtype)


def fill_gradients(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=random).to(p.dtype)
        p.grad = torch.empty_like(p).copy_(gradient)


def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
    for i in numbers:
        fill_gradients(model, i)
        optimizer.step()


def pool_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def gsm(model: nn.Module, **options: Any) -> GSM:
    if "num_kept" not in options:
        options.setdefault("sparsity", 0.7)
    return GSM(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [*model.parameters(), *(v for v in state if isinstance(v, Tensor))]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- against torch.optim.SGD


@pytest.mark.parametrize("options", SGD_VARIANTS, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
def test_all_active_has_the_bits_of_sgd(options: dict[str, Any], tensor_lr: bool) -> None:
    ours, theirs = network(), network()
    lr: Any = torch.tensor(0.05) if tensor_lr else 0.05
    mine = gsm(ours, lr=lr, num_kept=pool_size(ours), **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=float(lr), foreach=False, fused=False, **options)
    for i in range(20):
        steps(ours, mine, range(i, i + 1))
        steps(theirs, sgd, range(i, i + 1))
        assert_same([*ours.parameters()], [*theirs.parameters()])


@pytest.mark.parametrize("options", SGD_VARIANTS, ids=str)
def test_all_active_is_within_2_ulp_of_the_fused_sgd(options: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    mine = gsm(ours, num_kept=pool_size(ours), **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, fused=True, **options)
    for i in range(20):
        theirs.load_state_dict(ours.state_dict())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if mine.state[p] and options["momentum"]:
                sgd.state[q]["momentum_buffer"].copy_(mine.state[p]["momentum_buffer"])
        steps(ours, mine, range(i, i + 1))
        steps(theirs, sgd, range(i, i + 1))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            scale = torch.maximum(p.abs(), q.abs()).max()
            ulp = torch.nextafter(scale, scale * 2) - scale
            assert float((p - q).abs().max()) <= 2 * float(ulp)


# ---------------------------------------------------------------- against the reference


def test_each_of_1000_steps_is_that_of_the_reference_and_q_are_active() -> None:
    ours = network()
    mine = gsm(ours, momentum=0.98, weight_decay=1e-3)
    for i in range(1_000):
        expected, other = copy.deepcopy((ours, mine))
        before = {n: mine.state[p]["momentum_buffer"].clone() if mine.state[p] else None
                  for n, p in ours.named_parameters()}  # fmt: skip
        old = {n: p.detach().clone() for n, p in ours.named_parameters()}
        steps(ours, mine, range(i, i + 1))
        with fp.use_reference():
            steps(expected, other, range(i, i + 1))
        assert_same(tensors(ours, mine), tensors(expected, other))
        active = 0
        for name, p in ours.named_parameters():
            if p.dim() > 1:
                z = before[name]
                passive = (0 * p if z is None else 0.98 * z) + 1e-3 * old[name]
                now = mine.state[p]["momentum_buffer"]
                active += int(((now - passive).abs() > 1e-5 * (1 + passive.abs())).sum())
        # A gradient near 0 can hide in the tolerance, none can be added.
        assert mine.num_kept() - 2 <= active <= mine.num_kept()


def test_free_running_in_fp64_stays_with_the_reference() -> None:
    ours, expected = network(dtype=torch.float64), network(dtype=torch.float64)
    mine, other = gsm(ours), gsm(expected)
    steps(ours, mine, range(200))
    with fp.use_reference():
        steps(expected, other, range(200))
    for p, q in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_nothing_kept_is_pure_decay() -> None:
    weight = nn.Parameter(torch.tensor([[3.0]], dtype=torch.float64))
    optimizer = GSM([weight], 0.1, momentum=0.5, weight_decay=0.01, num_kept=0)
    for expected in (2.997, 2.992503, 2.987261997):
        weight.grad = torch.full_like(weight, 1e6)
        optimizer.step()
        assert float(weight) == pytest.approx(expected, rel=1e-9)


def test_a_passive_bf16_weight_decays_like_an_fp32_one() -> None:
    left = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.ones(4, 4, dtype=dtype))
        optimizer = GSM([weight], 0.02, momentum=0.9, weight_decay=0.01, num_kept=0)
        for _ in range(1000):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        left.append(float(weight[0, 0]))
    assert left[1] == pytest.approx(passive_residual(1000, 0.02, 0.9, 0.01), rel=1e-3)
    assert left[0] == pytest.approx(left[1], rel=2**-8) and left[0] < 0.2


# ---------------------------------------------------------------- torch.optim's conventions


def test_closures_and_hooks() -> None:
    model = network()
    optimizer = gsm(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = model[3].weight.detach().clone()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("closure")
        loss = model(torch.ones(2, 3, 5, 5)).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert calls == ["before", "closure", "after"]
    assert not torch.equal(before, model[3].weight)


def test_a_group_added_after_training_started() -> None:
    first, second = network(0), network(1)
    optimizer = gsm(first)
    steps(first, optimizer, range(3))
    before = optimizer.num_kept()
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.0})
    assert optimizer.num_kept() == fp.num_kept(0.7, 2 * pool_size(first)) > before
    kept = [p.detach().clone() for p in second.parameters()]
    fill_gradients(second, 9)
    steps(first, optimizer, range(3, 6))
    assert_same([*second.parameters()], kept)  # its own learning rate of 0
    assert all(optimizer.state[p] for p in second.parameters())


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steers_it_as_it_steers_sgd(name: str) -> None:
    ours, theirs = network(), network()
    mine = gsm(ours, num_kept=pool_size(ours))
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, foreach=False)
    pairs = [(ours, mine, SCHEDULERS[name](mine)), (theirs, sgd, SCHEDULERS[name](sgd))]
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    for i in range(8):
        for model, optimizer, scheduler in pairs:
            steps(model, optimizer, range(i, i + 1))
            scheduler.step(*arguments)
        assert mine.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert_same([*ours.parameters()], [*theirs.parameters()])


def test_groups_prune_or_do_not() -> None:
    model = network()
    groups = prunable_groups(model)
    assert [g["prune"] for g in groups] == [True, False]
    optimizer = GSM(groups, 0.1, num_kept=0)
    assert list(optimizer.masks()) == ["0.weight", "3.weight", "4.weight"]
    groups = [{"params": [model[3].weight], "prune": False, "lr": 0.0},
              {"params": [model[4].weight], "prune": True}]  # fmt: skip
    assert GSM(groups, 0.1, num_kept=21).num_kept() == 21
    with pytest.raises(ValueError, match=r"num_kept must be in 0\.\.21.*got 22"):
        GSM(groups, 0.1, num_kept=22)


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    optimizer = GSM(prunable_groups(nn.Sequential(first, second)), 0.1, sparsity=0.5)
    assert optimizer.num_kept() == 18 and optimizer.finish().num_kept == 18


def test_channels_last_gives_the_same() -> None:
    plain, other = network(), network().to(memory_format=torch.channels_last)
    mine, theirs = gsm(plain), gsm(other)
    steps(plain, mine, range(5))
    steps(other, theirs, range(5))
    assert_same([*other.parameters()], [*plain.parameters()])
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_memory_format_changed_in_training_is_followed() -> None:
    plain, other = network(), network()
    mine, theirs = gsm(plain), gsm(other)
    steps(plain, mine, range(6))
    steps(other, theirs, range(3))
    other.to(memory_format=torch.channels_last)
    steps(other, theirs, range(3, 6))
    assert_same(tensors(other, theirs), tensors(plain, mine))
    assert theirs.state[other[0].weight]["momentum_buffer"].stride() == other[0].weight.stride()


# ---------------------------------------------------------------- AMP


def test_a_first_step_that_is_skipped_leaves_the_next_the_first() -> None:
    """torch damps every gradient but the first."""
    weights = [nn.Parameter(torch.tensor([[1.0, 2.0]])) for _ in range(2)]
    optimizers = [fp.optim.GSM([w], 0.1, dampening=0.5, num_kept=2) for w in weights]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weights[0].grad = torch.tensor([[torch.inf, 1.0]])
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.step(optimizers[0])
    scaler.update()
    assert not optimizers[0].state and weights[0].tolist() == [[1.0, 2.0]]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.tensor([[0.5, 1.0]])
        optimizer.step()
    assert torch.equal(*weights)


def test_a_step_skipped_by_the_scaler_changes_no_bit() -> None:
    model = network()
    optimizer = gsm(model)
    steps(model, optimizer, range(2))
    before = [t.detach().clone() for t in tensors(model, optimizer)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for unscale in (False, True):
        scaler.scale(model(torch.full((2, 3, 5, 5), torch.inf)).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same(tensors(model, optimizer), before)
        optimizer.zero_grad()
    assert scaler.get_scale() < 256.0


def test_a_scaled_accumulated_clipped_step_is_the_plain_one() -> None:
    found = []
    for scaled in (False, True):
        model = network()
        optimizer = gsm(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for i in range(3):
            random = torch.Generator().manual_seed(i)
            for _ in range(2):
                x = torch.randn(4, 3, 5, 5, generator=random)
                scaler.scale(model(x).square().mean()).backward()
            if i == 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([*model.parameters()])
    assert_same(*found)


# ---------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_with_the_same_bits(how: str) -> None:
    model = network()
    optimizer = gsm(model, ties="paper")
    steps(model, optimizer, range(3))
    pair = model, optimizer
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(tensors(other, twin), tensors(model, optimizer))
    assert twin.num_kept() == optimizer.num_kept()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = gsm(model)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network(1, dtype)
    twin = gsm(other)
    steps(other, twin, range(2))
    other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(tensors(other, twin), tensors(model, optimizer))
    if dtype == torch.bfloat16:
        assert {v.dtype for s in twin.state.values() for v in s.values()} == {torch.float32}


def test_the_state_of_a_plain_sgd_leaves_our_options() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    steps(model, sgd, range(2))
    optimizer = GSM([{"params": model.parameters(), "prune": True}], 0.1, sparsity=0.7)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["prune"], group["lr"], group["momentum"]) == (True, 0.3, 0.5)
    assert optimizer.num_kept() == fp.num_kept(0.7, sum(p.numel() for p in model.parameters()))
    steps(model, optimizer, range(2, 4))


def test_forward_and_backward_may_be_compiled() -> None:
    torch.compiler.reset()
    model = network()
    optimizer = gsm(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        compiled(torch.ones(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before[-2:], [*model.parameters()][-2:],
                                                     strict=True))  # fmt: skip


# ---------------------------------------------------------------- the end, schedules, messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finish_leaves_exactly_what_was_asked(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = GSM(model.named_parameters(), 0.05, num_kept=40)
    steps(model, optimizer, range(3))
    masks = optimizer.masks()
    assert masks.num_kept == 40
    assert optimizer.finish() == masks
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight != 0, mask) and not weight[~mask].signbit().any()


def test_blocks_are_kept_whole() -> None:
    layer = nn.Linear(9, 37, bias=False)
    optimizer = GSM(layer.parameters(), 0.05, num_kept=10, block=(16, 1))
    steps(layer, optimizer, range(3))
    optimizer.finish()
    tiles = [t for rows in layer.weight.split(16, 0) for t in rows.split(1, 1)]
    assert sum(bool(t.any()) for t in tiles) == 10 == sum(bool(t.all()) for t in tiles)


def test_sparsity_may_be_a_function_of_the_step() -> None:
    layer = nn.Linear(10, 10, bias=False)
    optimizer = GSM(layer.parameters(), 0.05, sparsity=lambda step: min(step, 5) / 10)
    for i, kept in enumerate((100, 90, 80, 70, 60, 50, 50)):
        assert optimizer.num_kept() == kept
        steps(layer, optimizer, range(i, i + 1))


def resnet56_lr(step: int) -> float:
    epoch = step // 781
    return 5e-3 * (0.1 if epoch >= 400 else 1) * (0.1 if epoch >= 500 else 1)


@pytest.mark.parametrize(("beta", "left"), [(0.98, 3.4e-4), (0.9, 0.20), (0.99, 1.1e-7)])
def test_check_schedule_knows_the_published_schedules(beta: float, left: float) -> None:
    optimizer = GSM(nn.Linear(3, 3).parameters(), 5e-3, beta, weight_decay=1e-4, sparsity=0.9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        residual = optimizer.check_schedule(600 * 781, resnet56_lr)
    assert residual == pytest.approx(left, rel=0.1)
    assert len(said) == (beta == 0.9)
    if said:
        assert "momentum=0.95" in str(said[0].message) or "momentum=0.98" in str(said[0].message)


W = nn.Parameter(torch.ones(2, 2))
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: GSM([W], 0.1), ValueError, "either sparsity or num_kept"),
    (lambda: GSM([W], 0.1, sparsity=0.5, num_kept=2), ValueError, "either sparsity or num_kept"),
    (lambda: GSM([W], -0.1, sparsity=0.5), ValueError, "lr must be at least 0, got -0.1"),
    (lambda: GSM([W], 0.1, momentum=-1, sparsity=0.5), ValueError, "momentum must be at least 0"),
    (lambda: GSM([W], 0.1, sparsity=1.5), ValueError, r"sparsity must be in \[0, 1\]"),
    (lambda: GSM([W], 0.1, num_kept=5), ValueError, r"num_kept must be in 0\.\.4.*got 5"),
    (lambda: GSM([W], 0.1, num_kept=0.5), TypeError, "num_kept must be an integer"),
    (lambda: GSM([W], 0.1, sparsity=0.5, ties="some"), ValueError, "'exact' or 'paper'"),
    (lambda: GSM([W], 0.1, sparsity=0.5, block=(0, 1)), ValueError, "block must be two positive"),
    (lambda: GSM([W], 0.1, 0, nesterov=True, sparsity=0.5), ValueError, "nesterov needs"),
    (lambda: GSM([W], torch.ones(2), sparsity=0.5), ValueError, "one-element tensor"),
    (lambda: GSM([nn.Parameter(W.to(torch.cfloat))], 0.1, sparsity=0.5), TypeError, "complex"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_input_says_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_weight_decay_warns() -> None:
    with pytest.warns(UserWarning, match="passive weights never decay"):
        GSM([W], 0.1, weight_decay=0, sparsity=0.5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_bits_of_the_plain_one(backend: str) -> None:
    """The first step makes the state and is not compiled; a float lr is a constant of the graph."""
    random = torch.Generator().manual_seed(0)
    shapes = ((16, 8), (16,), (4, 3, 3, 3))
    values = [torch.randn(shape, generator=random) for shape in shapes]
    plain, compiled = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    optimizers = [fp.optim.GSM(p, lr=0.1, sparsity=0.5) for p in (plain, compiled)]
    steps = [optimizers[0].step, optimizers[1].step]
    for i in range(5):
        if i == 1:
            steps[1] = torch.compile(optimizers[1].step, fullgraph=True, backend=backend)
        if i == 3:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.05
        for a, b in zip(plain, compiled, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        for step in steps:
            step()
        assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
