"""SDprun as an optimizer: torch.optim.SGD without a threshold, channels at zero with one."""

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
from fastprune.optim import SDprun, prunable_groups
from tests.optim.test_gsm import SCHEDULERS, assert_same, fill_gradients, network, steps, tensors

Optimizer = torch.optim.Optimizer


def sdprun(model: nn.Module, **options: Any) -> SDprun:
    return SDprun(model.parameters(), **{"lr": 0.05, "c": 1.0, **options})


def coupled_groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """Convolution 0 with norm 1, and linear layer 3 with its bias; layer 4 is not pruned."""
    return [
        {"params": [*model[0].parameters(), *model[1].parameters()], "prune": True,
         "coupled": True, "channel_dims": [(0, 1)] * 4, "name": "0"},
        {"params": list(model[3].parameters()), "prune": True, "coupled": True, "name": "3"},
        {"params": list(model[4].parameters()), "prune": False},
    ]  # fmt: skip


def progress(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(float(g["num_steps"]), float(g["threshold"])) for g in optimizer.param_groups]


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    numbers = [torch.tensor(pair, dtype=torch.float64) for pair in progress(optimizer)]
    return [*tensors(model, optimizer), *numbers]


# ---------------------------------------------------------------- against torch.optim.SGD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
def test_without_a_threshold_it_has_the_bits_of_sgd(
    momentum: float, maximize: bool, tensor_lr: bool
) -> None:
    ours, theirs = network(), network()
    lr: Any = torch.tensor(0.05) if tensor_lr else 0.05
    options = {"momentum": momentum, "maximize": maximize}
    mine = SDprun(coupled_groups(ours), lr, c=0, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, foreach=False, fused=False, **options)
    for i in range(20):
        steps(ours, mine, range(i, i + 1))
        steps(theirs, sgd, range(i, i + 1))
        assert_same([*ours.parameters()], [*theirs.parameters()])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steers_it_as_it_steers_sgd(name: str) -> None:
    ours, theirs = network(), network()
    mine = sdprun(ours, c=0, momentum=0.9)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, foreach=False)
    pairs = [(ours, mine, SCHEDULERS[name](mine)), (theirs, sgd, SCHEDULERS[name](sgd))]
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    for i in range(8):
        for model, optimizer, scheduler in pairs:
            steps(model, optimizer, range(i, i + 1))
            scheduler.step(*arguments)
    assert_same([*ours.parameters()], [*theirs.parameters()])


# ---------------------------------------------------------------- what it does


def valley_step(w: Tensor, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    ((w.sum() - 2).square() / 2).backward()
    optimizer.step()


def test_the_valley_is_followed_to_a_zero_group() -> None:
    w = nn.Parameter(torch.tensor([[3.0], [-1.0]], dtype=torch.float64))
    optimizer = SDprun([w], 0.25, c=1, mu=0.501)
    for _ in range(30):
        valley_step(w, optimizer)
    assert w[1] == 0 and w[0] > 1.8
    assert optimizer.masks()["0.0"].tolist() == [[True], [False]]


def test_weight_decay_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="flat directions"):
        SDprun([W], 0.1, weight_decay=1e-4)
    with pytest.raises(ValueError, match="flat directions"):
        SDprun([{"params": [W], "weight_decay": 1e-4}], 0.1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_threshold_grows_under_every_schedule(scheduler: str) -> None:
    layer = nn.Linear(4, 6)
    optimizer = sdprun(layer)
    schedule = SCHEDULERS[scheduler](optimizer)
    before = 0.0
    for i in range(8):
        steps(layer, optimizer, range(i, i + 1))
        schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        assert progress(optimizer)[0][1] >= before
        before = progress(optimizer)[0][1]


def test_a_learning_rate_that_falls_revives_no_group() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 10, generator=random), torch.randn(200, 1, generator=random)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 1))
    groups = [{"params": list(model[0].parameters()), "prune": True, "coupled": True},
              {"params": list(model[2].parameters()), "prune": False}]  # fmt: skip
    optimizer = SDprun(groups, 0.1, c=0.8)

    def train(count: int) -> set[int]:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        return set(model[0].weight.any(1).logical_not().nonzero().flatten().tolist())

    before = train(300)
    assert 5 < len(before) < 40
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-4
    assert before <= train(200)


def test_momentum_counts_in_the_threshold() -> None:
    found = []
    for options in ({"lr": 0.5}, {"lr": 0.05, "momentum": 0.9}):
        layer = nn.Linear(4, 6)
        optimizer = sdprun(layer, **options)
        steps(layer, optimizer, range(3))
        found.append(progress(optimizer)[0][1])
    assert found[0] == pytest.approx(3**0.6 * 0.5**1.1) and found[1] == pytest.approx(found[0])


def test_coupled_parameters_are_zero_together() -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=18)
    steps(model, optimizer, range(5))
    masks = optimizer.masks()
    conv = model[0].weight.flatten(1).any(1)
    assert 0 < int(conv.sum()) < 5
    for i, p in enumerate([*model[0].parameters(), *model[1].parameters()]):
        assert torch.equal(p.flatten(1).any(1) if p.dim() > 1 else p != 0, conv)
        assert torch.equal(masks[f"0.{i}"].view(5, -1).all(1), conv)
        assert not p[~conv].signbit().any()
    assert list(masks) == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_dead_coupled_channel_emits_nothing_and_stays_dead(momentum: float) -> None:
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    groups = [{"params": [*conv.parameters(), *norm.parameters()], "prune": True, "coupled": True},
              {"params": list(head.parameters()), "prune": False}]  # fmt: skip
    optimizer = SDprun(groups, 0.05, c=3.0 * (1 - momentum), momentum=momentum)
    dead = torch.zeros(8, dtype=torch.bool)
    for i in range(60):
        random = torch.Generator().manual_seed(i)
        loss = model(torch.randn(16, 3, 8, 8, generator=random)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for p in (conv.weight, norm.weight, norm.bias):
            assert not p.grad[dead].any()
        optimizer.step()
        now = conv.weight.flatten(1).any(1).logical_not()
        assert not (dead & ~now).any()
        dead = now
        out = model[:3](torch.randn(4, 3, 8, 8, generator=random))
        assert not out[:, dead].any()
    assert 0 < int(dead.sum()) < 8


def test_a_zero_row_in_front_of_a_norm_with_an_offset_is_torn_back() -> None:
    """Why channels are coupled with their norm: rows alone do not stay zero."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)
    nn.init.constant_(norm.bias, 0.1)
    with torch.no_grad():
        conv.weight[0] = 0
    out = nn.functional.relu(norm(conv(torch.randn(8, 16, 9, 9))))
    (out * torch.randn_like(out)).sum().backward()
    sizes = conv.weight.grad.flatten(1).norm(dim=1)
    assert float(sizes[0]) >= 100 * float(sizes[1:].median())


def test_transposed_convolutions_are_pruned_by_their_outputs() -> None:
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(6, 8, 3, groups=2)
    group = {"params": list(conv.parameters()), "prune": True, "coupled": True,
             "channel_dims": [(1, 2), (0, 1)]}  # fmt: skip
    optimizer = SDprun([group], 0.05, c=10)
    steps(conv, optimizer, range(5))
    dead = conv.bias == 0
    assert 0 < int(dead.sum()) < 8
    out = conv(torch.randn(2, 6, 5, 5))
    assert not out[:, dead].any() and out[:, ~dead].flatten(2).any(2).all()
    assert torch.equal(optimizer.masks()["0.1"], ~dead)


@pytest.mark.parametrize(("min_groups", "left"), [(0, 0), (1, 1), (4, 4), (9, 6)])
def test_a_layer_keeps_min_groups(min_groups: int, left: int) -> None:
    layer = nn.Linear(4, 6, bias=False)
    optimizer = sdprun(layer, c=1e4, min_groups=min_groups)
    steps(layer, optimizer, range(3))
    kept = layer.weight.any(1)
    assert int(kept.sum()) == left
    accumulator = optimizer.state[layer.weight]["accumulator"]
    assert torch.equal(layer.weight[kept], accumulator[kept])
    largest = accumulator.double().norm(dim=1).argsort(descending=True)[:left]
    assert kept[largest].all()
    assert torch.equal(optimizer.masks()["0.0"], kept[:, None].expand(6, 4))
    assert optimizer.finish().num_kept == 4 * left


@pytest.mark.parametrize("target", [0.0, 0.25, 0.6, 0.9])
@pytest.mark.parametrize("scale", ["none", "sqrt"])
def test_a_target_sparsity_is_met(target: float, scale: str) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=random)
    y = torch.randn(256, 3, generator=random)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 3))  # fmt: skip
    groups = [
        {"params": list(model[0].parameters()), "prune": True, "coupled": True},
        {"params": list(model[2].parameters()), "prune": True, "coupled": True, "lr": 0.05},
        {"params": list(model[4].parameters()), "prune": False},
    ]
    optimizer = SDprun(groups, 0.1, scale=scale, target_sparsity=target, total_steps=200)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    group = 65 / (64 * 21 + 64 * 65)
    masks = optimizer.finish()
    assert target - 2 * group <= masks.sparsity <= target + group
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in ("0.weight", "2.weight"))
    assert zeros == sum(int((~m).sum()) for n, m in masks.items() if m.dim() > 1)


# ---------------------------------------------------------------- torch.optim's conventions


def test_closures_and_hooks() -> None:
    model = network()
    optimizer = sdprun(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("closure")
        loss = model(torch.ones(2, 3, 5, 5)).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert calls == ["before", "closure", "after"]


def test_groups_prune_or_do_not_and_have_their_own_options() -> None:
    model = network()
    bare = sdprun(model)
    assert list(bare.masks()) == ["0.0", "0.4", "0.6"]  # two dimensions and more
    named = SDprun(prunable_groups(model), 0.1)
    assert list(named.masks()) == ["0.weight", "3.weight", "4.weight"]
    vector = nn.Parameter(torch.tensor([1.0, -3.0]))
    optimizer = SDprun([{"params": [vector], "prune": True, "c": 2.0, "mu": 0.9, "lr": 1.0}], 0.1)
    vector.grad = torch.zeros(2)
    optimizer.step()
    assert vector.tolist() == pytest.approx([0, -1])
    assert progress(optimizer) == [(1, 2)]


def test_what_is_not_pruned_needs_no_copy() -> None:
    model = network()
    optimizer = sdprun(model, momentum=0.0)
    steps(model, optimizer, range(2))
    assert set(optimizer.state) == {p for p in model.parameters() if p.dim() > 1}


def test_a_group_added_after_training_started() -> None:
    first, second = network(0), network(1)
    optimizer = sdprun(first)
    steps(first, optimizer, range(3))
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.0})
    kept = [p.detach().clone() for p in second.parameters()]
    fill_gradients(second, 9)
    steps(first, optimizer, range(3, 6))
    assert_same([*second.parameters()], kept)  # its own learning rate of 0, its own threshold
    assert [n for n, _ in progress(optimizer)] == [6, 3]


def test_a_parameter_that_joins_late_is_not_shrunk_at_once() -> None:
    first, late = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    optimizer = SDprun([*first.parameters(), *late.parameters()], 0.05, c=1.0)
    steps(first, optimizer, range(20))
    before = late.weight.detach().clone()
    steps(nn.Sequential(first, late), optimizer, range(20, 21))
    moved = before - 0.05 * late.weight.grad
    grown = progress(optimizer)[0][1] - 0.05**1.1 * 20**0.6
    gap = (moved - late.weight).norm(dim=1)
    assert (gap <= 2 * grown + 0.05 * late.weight.grad.norm(dim=1)).all()
    assert progress(optimizer)[0][1] > 5 * grown


def test_coupled_with_a_frozen_member() -> None:
    model = network()
    model[1].bias.requires_grad_(False)
    optimizer = SDprun(coupled_groups(model), 0.05, c=18)
    for i in range(5):
        fill_gradients(model, i)
        model[1].bias.grad = None
        optimizer.step()
    dead = ~model[0].weight.flatten(1).any(1)
    assert int(dead.sum()) > 0 and not model[1].bias[dead].any()


def test_channels_last_gives_the_same() -> None:
    plain, other = network(), network().to(memory_format=torch.channels_last)
    mine, theirs = sdprun(plain), sdprun(other)
    steps(plain, mine, range(5))
    steps(other, theirs, range(5))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p == 0, q == 0)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_have_float32_accumulators(dtype: torch.dtype) -> None:
    model, wide = network(dtype=dtype), network(dtype=dtype).float()
    mine, theirs = (
        SDprun(coupled_groups(model), 0.05, c=5, momentum=0.5),
        SDprun(coupled_groups(wide), 0.05, c=5, momentum=0.5),
    )
    for i in range(10):
        fill_gradients(model, i)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        mine.step()
        theirs.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))
        for key, value in mine.state[p].items():
            assert value.dtype == torch.float32 and torch.equal(value, theirs.state[q].get(key, q))


# ---------------------------------------------------------------- changes from outside


def test_a_change_from_outside_is_said_and_taken_over_by_resync() -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=5)
    steps(model, optimizer, range(5))
    with torch.no_grad():
        model[0].weight[0] = 1.0
    fill_gradients(model, 5)
    with pytest.raises(RuntimeError, match=r"0\.0 was changed .*opt\.resync\(\)"):
        optimizer.step()
    accumulators = [optimizer.state[p]["accumulator"].clone() for p in model[0].parameters()]
    optimizer.resync()
    for before, p in zip(accumulators, model[0].parameters(), strict=True):
        now = optimizer.state[p]["accumulator"]
        assert torch.equal(now[1:], before[1:])  # groups that did not change keep theirs
        assert not torch.equal(now[0], before[0])
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["c"] = 0.0
    optimizer.step()
    for before, p in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(p, before, rtol=1e-5, atol=1e-6)


def test_weights_that_were_swapped_out_and_back_lose_nothing() -> None:
    """As an average of weights is evaluated: resync finds the same groups and keeps their v."""
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=10)
    steps(model, optimizer, range(5))
    before = [t.clone() for t in everything(model, optimizer)]
    held = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    model.load_state_dict(held)
    optimizer.resync()
    assert_same(everything(model, optimizer), before)
    steps(model, optimizer, range(5, 6))


def test_what_is_not_pruned_may_change_at_any_time() -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05)
    steps(model, optimizer, range(2))
    with torch.no_grad():
        model[4].weight.fill_(1.0)
    fill_gradients(model, 2)
    optimizer.step()
    torch.testing.assert_close(model[4].weight, 1 - 0.05 * model[4].weight.grad)


@pytest.mark.parametrize("model_first", [True, False])
def test_loading_both_states_in_any_order_is_no_change(model_first: bool) -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=5, momentum=0.9)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(3, 6))
    expected = [t.clone() for t in everything(model, optimizer)]
    if model_first:
        model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if not model_first:
        model.load_state_dict(saved[0])
    steps(model, optimizer, range(3, 6))
    assert_same(everything(model, optimizer), expected)


def test_finish_leaves_the_weights_and_training_may_go_on() -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=10)
    steps(model, optimizer, range(5))
    before = [p.detach().clone() for p in model.parameters()]
    masks = optimizer.masks()
    assert optimizer.finish() == masks and 0 < masks.sparsity < 1
    assert_same([*model.parameters()], before)
    steps(model, optimizer, range(5, 7))


# ---------------------------------------------------------------- AMP


def test_a_step_skipped_by_the_scaler_changes_no_bit() -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, c=5, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for taken in (0, 2):
        steps(model, optimizer, range(taken))
        before = None
        for unscale in (False, True):
            scaler.scale(model(torch.full((2, 3, 5, 5), torch.inf)).sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            values = [p.detach().clone() for p in model.parameters()], progress(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert_same([*model.parameters()], values[0])
            assert progress(optimizer) == values[1] and values[1][0][0] == taken
            now = [t.clone() for t in everything(model, optimizer)]
            assert before is None or all(map(torch.equal, before, now))
            before = now
            optimizer.zero_grad()


def test_a_scaled_step_is_the_plain_one() -> None:
    found = []
    for scaled in (False, True):
        model = network()
        optimizer = SDprun(coupled_groups(model), 0.05, c=5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for i in range(3):
            random = torch.Generator().manual_seed(i)
            x = torch.randn(4, 3, 5, 5, generator=random)
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([*model.parameters()])
    assert_same(*found)


# ---------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_with_the_same_bits(how: str) -> None:
    model = network()
    optimizer = SDprun(coupled_groups(model), 0.05, target_sparsity=0.4, total_steps=8)
    steps(model, optimizer, range(3))
    pair = model, optimizer
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(everything(other, twin), everything(model, optimizer))


@pytest.mark.parametrize("target", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_goes_on_with_the_same_bits(
    dtype: torch.dtype, target: float | None, tmp_path: Any
) -> None:
    def fresh(seed: int) -> tuple[nn.Sequential, SDprun]:
        model = network(seed, dtype)
        total = None if target is None else 8
        return model, SDprun(coupled_groups(model), 0.05, c=5, momentum=0.9,
                             target_sparsity=target, total_steps=total)  # fmt: skip

    model, optimizer = fresh(0)
    steps(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    other, twin = fresh(1)
    steps(other, twin, range(2))
    saved = torch.load(tmp_path / "checkpoint")
    other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(everything(other, twin), everything(model, optimizer))


def test_the_state_of_a_plain_sgd_leaves_our_options() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    steps(model, sgd, range(2))
    optimizer = SDprun([{"params": model.parameters(), "prune": True}], 0.1, c=0.0)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["prune"], group["lr"], group["momentum"]) == (True, 0.3, 0.5)
    other = copy.deepcopy(model)
    twin = torch.optim.SGD(other.parameters(), 0.3, momentum=0.5, foreach=False)
    twin.load_state_dict(sgd.state_dict())
    steps(model, optimizer, range(2, 4))
    steps(other, twin, range(2, 4))
    assert_same([*model.parameters()], [*other.parameters()])


def test_a_state_with_weight_decay_is_refused_and_changes_nothing() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5, weight_decay=1e-4)
    steps(model, sgd, range(2))
    optimizer = SDprun(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="flat directions"):
        optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1 and not optimizer.state


# ---------------------------------------------------------------- the compiler, messages


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_bits_of_the_plain_one(backend: str) -> None:
    """The first step makes the state and is not compiled; a float lr is a constant of the graph."""
    torch.compiler.reset()
    plain, compiled = network(), network()
    optimizers = [SDprun(coupled_groups(m), 0.05, c=5, momentum=0.9) for m in (plain, compiled)]
    take = [optimizers[0].step, optimizers[1].step]
    for i in range(5):
        if i == 1:
            take[1] = torch.compile(optimizers[1].step, fullgraph=True, backend=backend)
        if i == 3:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.02
        for model, step in zip((plain, compiled), take, strict=True):
            fill_gradients(model, i)
            step()
        assert_same(everything(compiled, optimizers[1]), everything(plain, optimizers[0]))
    fill_gradients(compiled, 5)
    optimizers[1].step()  # and eager again: a compiled step is no change from outside


W = nn.Parameter(torch.ones(2, 2))
V = nn.Parameter(torch.ones(3))
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SDprun([W], -0.1), ValueError, "lr must be at least 0, got -0.1"),
    (lambda: SDprun([W], 0.1, -1), ValueError, "c must be at least 0, got -1"),
    (lambda: SDprun([W], 0.1, momentum=-1), ValueError, "momentum must be at least 0"),
    (lambda: SDprun([W], 0.1, momentum=1), ValueError, "momentum must be below 1"),
    (lambda: SDprun([W], 0.1, scale="sum"), ValueError, "'none' or 'sqrt', got 'sum'"),
    (lambda: SDprun([W], 0.1, min_groups=-1), ValueError, "min_groups must be an integer of"),
    (lambda: SDprun([W], 0.1, min_groups=0.5), ValueError, "min_groups must be an integer of"),
    (lambda: SDprun([W], 0.1, target_sparsity=0.5), ValueError, "go together"),
    (lambda: SDprun([W], 0.1, total_steps=5), ValueError, "go together"),
    (lambda: SDprun([W], 0.1, target_sparsity=2.0, total_steps=5), ValueError, r"in \[0, 1\]"),
    (lambda: SDprun([W], 0.1, target_sparsity=0.5, total_steps=0), ValueError, "total_steps must"),
    (lambda: SDprun([W], torch.ones(2)), ValueError, "one-element tensor"),
    (lambda: SDprun([nn.Parameter(W.to(torch.cfloat))], 0.1), TypeError, "complex"),
    (lambda: SDprun([{"params": [W, V], "coupled": True}], 0.1), ValueError,
     "equally many channels, got {'0.0': 2, '0.1': 3}"),
    (lambda: SDprun([{"params": [W], "channel_dims": [(2, 1)]}], 0.1), ValueError,
     r"must be \(0, 1\)"),
    (lambda: SDprun([{"params": [W], "channel_dims": [(1, 3)]}], 0.1), ValueError,
     r"must be \(0, 1\)"),
    (lambda: SDprun([{"params": [W], "channel_dims": []}], 0.1), ValueError, "got 0 for 1"),
    (lambda: SDprun([{"params": [nn.Parameter(torch.ones(()))], "prune": True}], 0.1), ValueError,
     "single number"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_input_says_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_mu_outside_its_range_warns() -> None:
    for mu in (0.5, 1.0):
        with pytest.warns(UserWarning, match="outside"):
            SDprun([W], 0.1, mu=mu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SDprun([W], 0.1, mu=0.501, min_groups=0)


def test_each_step_is_that_of_the_reference() -> None:
    ours = network()
    mine = SDprun(coupled_groups(ours), 0.05, c=2, momentum=0.9)
    schedule = lr_scheduler.CosineAnnealingLR(mine, 60)
    for i in range(60):
        expected, other = copy.deepcopy((ours, mine))
        steps(ours, mine, range(i, i + 1))
        with fp.use_reference():
            steps(expected, other, range(i, i + 1))
        for a, b in zip(everything(ours, mine), everything(expected, other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            assert torch.equal(a == 0, b == 0)
        schedule.step()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_memory_format_changed_in_training_is_followed(momentum: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).double()
    other = copy.deepcopy(plain)
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    optimizers = [
        SDprun(model.parameters(), 0.1, c=0.5, momentum=momentum) for model in (plain, other)
    ]
    for step in range(6):
        if step == 3:
            other.to(memory_format=torch.channels_last)
        for model, optimizer in zip((plain, other), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    weight = other[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizers[1].state[weight]["accumulator"].stride() == weight.stride()
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
