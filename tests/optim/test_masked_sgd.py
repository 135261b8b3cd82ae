"""MaskedSGD: torch.optim.SGD where weights are kept, zeros to the bit where they are pruned."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.optim import MaskedSGD
from tests.ops.machine import bits
from tests.optim.test_gsm import (
    SCHEDULERS,
    SGD_VARIANTS,
    assert_same,
    fill_gradients,
    network,
    steps,
    tensors,
)

Optimizer = torch.optim.Optimizer
VARIANTS: list[dict[str, Any]] = [*SGD_VARIANTS, {}, {"maximize": True}]


def masks_of(model: nn.Module, kept: float = 0.3, seed: int = 7) -> fp.MaskSet:
    random = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    masks = {
        name: torch.rand(p.shape, generator=random) < kept
        for name, p in parameters.items()
        if p.dim() > 1
    }
    return fp.MaskSet(masks, parameters)


def masked_sgd(model: nn.Module, kept: float = 0.3, **options: Any) -> MaskedSGD:
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, **options}
    return MaskedSGD(model.parameters(), masks=masks_of(model, kept), **options)


def assert_pruned(model: nn.Module, optimizer: Optimizer, masks: fp.MaskSet) -> None:
    """+0.0 to the bit in the weight and in all of its state."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        state = optimizer.state.get(parameter, {})
        for value in (parameter, *state.values()):
            if value.is_floating_point():
                assert not bits(value)[~mask].any(), name


# ---------------------------------------------------------------- against torch.optim.SGD


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
def test_all_kept_has_the_bits_of_sgd(options: dict[str, Any], tensor_lr: bool) -> None:
    ours, theirs = network(), network()
    lr: Any = torch.tensor(0.05) if tensor_lr else 0.05
    mine = MaskedSGD(ours.parameters(), lr, masks=masks_of(ours, kept=1.1), **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=float(lr), foreach=False, fused=False, **options)
    for i in range(20):
        steps(ours, mine, range(i, i + 1))
        steps(theirs, sgd, range(i, i + 1))
        assert_same([*ours.parameters()], [*theirs.parameters()])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_kept_weights_have_the_bits_of_sgd_on_masked_gradients(options: dict[str, Any]) -> None:
    """SGD on a network whose pruned weights are zero and get zero gradients."""
    ours, theirs = network(), network()
    masks = masks_of(theirs)
    masks.apply(theirs)
    mine = MaskedSGD(ours.named_parameters(), 0.05, masks=masks_of(ours), **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, foreach=False, fused=False, **options)
    for i in range(20):
        steps(ours, mine, range(i, i + 1))
        fill_gradients(theirs, i)
        for name, mask in masks.items():
            theirs.get_parameter(name).grad.mul_(mask)
        sgd.step()
        assert_same([*ours.parameters()], [*theirs.parameters()])


def test_default_options_keep_no_momentum() -> None:
    model = network()
    optimizer = MaskedSGD(model.parameters(), 0.1, masks=masks_of(model))
    steps(model, optimizer, range(2))
    assert all(set(state) == {"mask"} for state in optimizer.state.values())


def test_momentum_that_begins_later_begins_undamped() -> None:
    ours, theirs = network(), network()
    mine = masked_sgd(ours, kept=1.1, momentum=0, dampening=0.5)
    sgd = torch.optim.SGD(
        theirs.parameters(), 0.05, dampening=0.5, weight_decay=5e-4, foreach=False
    )
    for i, momentum in enumerate((0, 0, 0.9, 0.9, 0, 0, 0.8)):
        for model, optimizer in ((ours, mine), (theirs, sgd)):
            optimizer.param_groups[0]["momentum"] = momentum
            steps(model, optimizer, range(i, i + 1))
        assert_same([*ours.parameters()], [*theirs.parameters()])


# ---------------------------------------------------------------- zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_after_each_of_1000_steps(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = masked_sgd(model, nesterov=True)
    masks = masks_of(model)
    assert_pruned(model, optimizer, masks)  # zeroed at once
    for i in range(1_000):
        fill_gradients(model, i)
        if i % 10 == 0:  # what is pruned may get any gradient
            for name, mask in masks.items():
                grad = model.get_parameter(name).grad
                grad[~mask] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        if i % 100 == 50:  # and be overwritten
            with torch.no_grad():
                model[3].weight.add_(1.0)
            optimizer.resync()
        optimizer.step()
        assert_pruned(model, optimizer, masks)
    everything = torch.cat([p.flatten().float() for p in model.parameters()])
    assert everything.isfinite().all() and int((everything != 0).sum()) > masks.num_kept // 2


def test_a_checkpoint_of_any_moment_is_sparse() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = masked_sgd(model)
    for i in range(3):
        steps(model, optimizer, range(i, i + 1))
        saved = model.state_dict(), optimizer.state_dict()
        for name, mask in masks.items():
            assert not saved[0][name][~mask].any()
        by_shape = {tuple(s["mask"].shape): s for s in saved[1]["state"].values() if "mask" in s}
        assert len(by_shape) == len(masks)
        for mask in masks.values():
            state = by_shape[tuple(mask.shape)]
            assert torch.equal(state["mask"], mask)
            assert not state["momentum_buffer"][~mask].any()


def test_an_average_of_the_weights_stays_sparse() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = masked_sgd(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for i in range(20):
        steps(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
        for name, mask in masks.items():
            assert not bits(average.module.get_parameter(name))[~mask].any()
    assert not torch.equal(average.module[3].weight, model[3].weight)


def test_finish_restores_zeros_and_returns_the_masks() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = MaskedSGD(model.named_parameters(), 0.1, 0.9, masks=masks)
    steps(model, optimizer, range(2))
    with torch.no_grad():
        model[3].weight.fill_(-1.0)
    assert optimizer.masks() == optimizer.finish() == masks
    assert_pruned(model, optimizer, masks)
    assert (model[3].weight == -1.0).sum() == masks["3.weight"].sum()


# ---------------------------------------------------------------- which mask is whose


def test_masks_find_their_parameters_by_identity() -> None:
    """Names play no part, nor do order and equal shapes."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    masks = masks_of(model)
    shuffled = fp.MaskSet(dict(reversed([*masks.items()])), dict(model.named_parameters()))
    wrapped = [(f"module.{n}", p) for n, p in model.named_parameters()]
    for params in (model.parameters(), reversed([*model.parameters()]), wrapped):
        model.load_state_dict({n: torch.ones_like(v) for n, v in model.state_dict().items()})
        MaskedSGD(params, 0.1, masks=shuffled)
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
    assert masks.to("cpu").parameters.keys() == masks.keys()


def test_masks_find_their_parameters_by_name() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    masks = copy.deepcopy(masks_of(model))
    assert masks == masks_of(model) and not masks.parameters
    MaskedSGD(reversed([*model.named_parameters()]), 0.1, masks=masks)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_masks_find_their_parameters_by_a_shape_that_is_the_only_one() -> None:
    model = network()
    masks = pickle.loads(pickle.dumps(masks_of(model)))
    assert not masks.parameters
    MaskedSGD(model.parameters(), 0.1, masks=masks)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_masks_of_this_library_know_their_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    fp.magnitude(model, 0.5).apply(model)
    gsm = fp.optim.GSM(model.parameters(), 0.1, sparsity=0.5)
    for masks in (fp.MaskSet.of(model), gsm.masks(), gsm.finish()):
        assert len(masks.parameters) == len(masks) > 0
        optimizer = MaskedSGD(model.parameters(), 0.1, masks=masks)
        assert optimizer.masks().num_kept == masks.num_kept


def test_tied_weights_have_one_mask() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    mask = torch.rand(6, 6) < 0.5
    parameters = {"0.weight": first.weight, "1.weight": first.weight}
    masks = fp.MaskSet({"0.weight": mask, "1.weight": mask.clone()}, parameters)
    MaskedSGD(first.parameters(), 0.1, masks=masks)
    assert torch.equal(first.weight != 0, mask)
    masks = fp.MaskSet({"0.weight": mask, "1.weight": ~mask}, parameters)
    with pytest.raises(ValueError, match="one tied parameter, but differ"):
        MaskedSGD(first.parameters(), 0.1, masks=masks)


# ---------------------------------------------------------------- torch.optim's conventions


def test_closures_and_hooks() -> None:
    model = network()
    optimizer = masked_sgd(model)
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
    assert_pruned(model, optimizer, masks_of(model))


def test_groups_added_after_training_started_bring_their_masks() -> None:
    first, dense, pruned = network(0), network(1), network(2)
    optimizer = masked_sgd(first)
    steps(first, optimizer, range(2))
    optimizer.add_param_group({"params": dense.parameters(), "lr": 0.0})
    optimizer.add_param_group({"params": pruned.parameters(), "masks": masks_of(pruned)})
    before = [p.detach().clone() for p in dense.parameters()]
    for model in (dense, pruned):
        fill_gradients(model, 9)
    steps(first, optimizer, range(2, 4))
    assert_same([*dense.parameters()], before)  # its own learning rate of 0
    for model in (first, pruned):
        assert_pruned(model, optimizer, masks_of(model))
    assert "masks" not in optimizer.param_groups[2] and len(optimizer.masks()) == 6


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steers_it_as_it_steers_sgd(name: str) -> None:
    ours, theirs = network(), network()
    mine = masked_sgd(ours, kept=1.1)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, foreach=False)
    pairs = [(ours, mine, SCHEDULERS[name](mine)), (theirs, sgd, SCHEDULERS[name](sgd))]
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    for i in range(8):
        for model, optimizer, scheduler in pairs:
            steps(model, optimizer, range(i, i + 1))
            scheduler.step(*arguments)
        assert mine.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert_same([*ours.parameters()], [*theirs.parameters()])


def test_a_memory_format_changed_in_training_is_followed() -> None:
    plain, other = network(), network()
    mine, theirs = masked_sgd(plain), masked_sgd(other)
    steps(plain, mine, range(6))
    steps(other, theirs, range(3))
    other.to(memory_format=torch.channels_last)
    steps(other, theirs, range(3, 6))
    assert_same(tensors(other, theirs), tensors(plain, mine))
    for value in theirs.state[other[0].weight].values():
        assert value.stride() == other[0].weight.stride()


def test_a_parameter_without_gradient_stays() -> None:
    model = network()
    optimizer = masked_sgd(model)
    steps(model, optimizer, range(2))
    fill_gradients(model, 5)
    model[3].weight.grad = None
    before = model[3].weight.detach().clone(), model[4].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[3].weight, before[0])
    assert not torch.equal(model[4].weight, before[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_compiled_step_gives_the_bits_of_the_plain_one(backend: str, momentum: float) -> None:
    torch.compiler.reset()
    plain, compiled = network(), network()
    optimizers = [masked_sgd(m, momentum=momentum) for m in (plain, compiled)]
    run = [optimizer.step for optimizer in optimizers]
    for i in range(5):
        if i == 1:
            run[1] = torch.compile(optimizers[1].step, fullgraph=True, backend=backend)
        if i == 3:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.02
        for model, step in zip((plain, compiled), run, strict=True):
            fill_gradients(model, i)
            step()
        assert_same(tensors(compiled, optimizers[1]), tensors(plain, optimizers[0]))


# ---------------------------------------------------------------- AMP


def test_a_step_skipped_by_the_scaler_changes_no_bit() -> None:
    model = network()
    optimizer = masked_sgd(model)
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


def test_a_first_step_that_is_skipped_leaves_the_next_the_first() -> None:
    models = network(), network()
    optimizers = [masked_sgd(m, dampening=0.5) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    fill_gradients(models[0], 0)
    models[0][3].weight.grad[0, 0] = torch.inf
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.step(optimizers[0])
    scaler.update()
    assert not optimizers[0].state
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, range(1, 3))
    assert_same([*models[0].parameters()], [*models[1].parameters()])


def test_scaled_steps_are_the_plain_ones() -> None:
    found = []
    for scaled in (False, True):
        model = network()
        optimizer = masked_sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for i in range(3):
            random = torch.Generator().manual_seed(i)
            x = torch.randn(4, 3, 5, 5, generator=random)
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(tensors(model, optimizer))
    assert_same(*found)


# ---------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("started", [False, True])
def test_a_copy_goes_on_with_the_same_bits(how: str, started: bool) -> None:
    model = network()
    optimizer = masked_sgd(model)
    steps(model, optimizer, range(3 * started))
    pair = model, optimizer
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(tensors(other, twin), tensors(model, optimizer))
    assert_pruned(other, twin, masks_of(model))
    assert twin.masks() == optimizer.masks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    """Its masks are those that count, not those of the optimizer that loads it."""
    model = network(dtype=dtype)
    optimizer = masked_sgd(model)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network(1, dtype)
    twin = MaskedSGD(other.parameters(), 0.05, 0.9, masks=masks_of(other, seed=8))
    steps(other, twin, range(2))
    other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(tensors(other, twin), tensors(model, optimizer))
    assert twin.masks() == optimizer.masks()
    assert_pruned(other, twin, masks_of(model))


@pytest.mark.parametrize("started", [False, True])
def test_the_state_of_a_dense_sgd_leaves_our_masks(started: bool) -> None:
    dense = network()
    sgd = torch.optim.SGD(dense.parameters(), 0.3, momentum=0.5)
    steps(dense, sgd, range(2))
    model = network(1)
    optimizer = masked_sgd(model)
    steps(model, optimizer, range(2 * started))
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert_pruned(model, optimizer, masks_of(model))
    steps(model, optimizer, range(2, 4))
    assert_pruned(model, optimizer, masks_of(model))
    assert optimizer.masks().num_kept == masks_of(model).num_kept


# ---------------------------------------------------------------- messages

LINEAR = nn.Linear(3, 3)
TWO = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
MASK = torch.ones(3, 3, dtype=torch.bool)
NAMED = fp.MaskSet({"weight": MASK})
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: MaskedSGD(LINEAR.parameters(), 0.1), TypeError, "masks"),
    (lambda: MaskedSGD(LINEAR.parameters(), 0.1, masks={"weight": MASK}), TypeError, "a MaskSet"),
    (lambda: MaskedSGD(LINEAR.parameters(), -1.0, masks=NAMED), ValueError, "lr must be at least"),
    (
        lambda: MaskedSGD(LINEAR.parameters(), 0.1, nesterov=True, masks=NAMED),
        ValueError,
        "nesterov needs a momentum",
    ),
    (
        lambda: MaskedSGD(TWO.parameters(), 0.1, masks=NAMED),
        ValueError,
        r"mask of 'weight' belongs to is not known: 2 of .*named_parameters\(\)",
    ),
    (
        lambda: MaskedSGD(TWO.named_parameters(), 0.1, masks=NAMED),
        ValueError,
        "no parameter named 'weight'.*'0.weight'",
    ),
    (
        lambda: MaskedSGD([("weight", nn.Parameter(torch.ones(3, 2)))], 0.1, masks=NAMED),
        ValueError,
        r"shape of its parameter, \(3, 2\), got \(3, 3\)",
    ),
    (
        lambda: MaskedSGD([nn.Parameter(MASK.to(torch.cfloat))], 0.1, masks=NAMED),
        TypeError,
        "complex",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_input_says_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = MaskedSGD(table.parameters(), 0.1, masks=fp.MaskSet({}))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
