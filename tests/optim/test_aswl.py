"""ASWL as an optimizer: torch.optim.SGD where nothing is pruned, the reference elsewhere."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprune as fp
from fastprune.ops import native
from fastprune.optim import ASWL
from fastprune.optim.shares import settled
from fastprune.reporting import plot_sparsities
from tests.optim.test_gsm import SCHEDULERS, assert_same, fill_gradients, network, steps, tensors

DENSE: dict[str, Any] = {"attention_init": 1, "attention_lr": 0, "density_weight": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"l2": 1e-3},
    "post_bn": {"attention_position": "post_bn"},
    "prune_bias": {"prune_bias": True},
    "prune_bias, post_bn": {"prune_bias": True, "attention_position": "post_bn"},
    "no momentum": {"momentum": 0},
    "alpha 2": {"alpha": 2.0},
    "alpha .5": {"alpha": 0.5},
    "ties": {"ties": "keep"},
}


def aswl(model: nn.Module, **options: Any) -> ASWL:
    """The network has a norm behind its convolution, which the tests know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a norm right behind")
        return ASWL(model, **{"lr": 0.05, "sparsity": 0.7, **options})


def everything(model: nn.Module, optimizer: ASWL) -> list[Tensor]:
    group = optimizer.param_groups[0]
    tables = [group[name].double() for name in ("attention", "tie_end", "multiplier")]
    return [*tensors(model, optimizer), *tables]


def pruned_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dim() > 1]


# ---------------------------------------------------------------- against torch.optim.SGD


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
def test_without_pruning_it_has_the_bits_of_sgd(
    momentum: float, dtype: torch.dtype, tensor_lr: bool
) -> None:
    ours, theirs = network(dtype=dtype), network(dtype=dtype)
    lr: Any = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    mine = aswl(ours, lr=lr, momentum=momentum, **DENSE)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum, foreach=False, fused=False)
    for i in range(20):
        steps(ours, mine, range(i, i + 1))
        steps(theirs, sgd, range(i, i + 1))
        assert_same([*ours.parameters()], [*theirs.parameters()])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steers_it_as_it_steers_sgd(name: str) -> None:
    ours, theirs = network(), network()
    mine = aswl(ours, **DENSE)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, foreach=False)
    pairs = [(ours, mine, SCHEDULERS[name](mine)), (theirs, sgd, SCHEDULERS[name](sgd))]
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    for i in range(8):
        for model, optimizer, scheduler in pairs:
            steps(model, optimizer, range(i, i + 1))
            scheduler.step(*arguments)
        assert mine.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert_same([*ours.parameters()], [*theirs.parameters()])


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("name", VARIANTS)
def test_each_step_is_that_of_the_reference(name: str) -> None:
    ours = network()
    mine = aswl(ours, **VARIANTS[name])
    for i in range(500 if name == "plain" else 40):
        expected, other = copy.deepcopy((ours, mine))
        steps(ours, mine, range(i, i + 1))
        with fp.use_reference():
            steps(expected, other, range(i, i + 1))
        assert_same(everything(ours, mine), everything(expected, other))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_parameter_holds_the_attention_times_the_pruned_weight(name: str) -> None:
    model = network()
    optimizer = aswl(model, **VARIANTS[name])
    behind = optimizer.param_groups[0]["params"]
    for i in range(3):  # also before the first step
        masks, attention = optimizer.masks(), optimizer.param_groups[0]["attention"][:, 0]
        layers = zip(pruned_names(model), attention.tolist(), strict=True)
        for number, (weight, a) in enumerate(layers):
            post = "post_bn" in name and number == 0
            carriers = ["1.weight", "1.bias"] if post else [weight, weight[0] + ".bias"]
            for key in {weight, weight[0] + ".bias", *carriers}:
                parameter = model.get_parameter(key)
                value = optimizer.state[parameter].get("dense", parameter).detach()
                if key in carriers:
                    value = value * torch.tensor(a).to(value.dtype)
                if key in masks:
                    value = value.where(masks[key], 0.0)
                assert torch.equal(parameter, value)
        fill_gradients(model, i)
        optimizer.step()
    assert len(behind) == 8 and list(masks) == [
        key for weight in pruned_names(model)
        for key in ([weight, weight[0] + ".bias"] if "prune_bias" in name else [weight])
    ]  # fmt: skip


def test_the_attention_takes_the_derivative_of_the_scaled_output() -> None:
    """Autograd through a * layer, and through the fold: after one step without a penalty."""
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 7), torch.randn(32, 9)
    dense = copy.deepcopy(layer)
    optimizer = ASWL(layer, 1.0, sparsity=0.5, attention_lr=1e-3, density_weight=0, momentum=0.9)
    a = torch.tensor(0.5, requires_grad=True)
    sparse = dense.weight.detach() * optimizer.masks()["weight"]
    expected = (a * nn.functional.linear(x, sparse, dense.bias)).square().sum()
    found = layer(x).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    expected.backward()
    found.backward()
    optimizer.step()
    assert a.grad is not None
    velocity = float(optimizer.param_groups[0]["attention"][0, 1])
    assert velocity == pytest.approx(float(a.grad), rel=1e-6)


def test_pruned_weights_move_and_return() -> None:
    weight = nn.Linear(2, 1, bias=False)
    weight.weight.data = torch.tensor([[0.1, 1.0]])
    optimizer = ASWL(weight, 0.1, sparsity=0.5, momentum=0, density_weight=0, attention_lr=0)
    assert weight.weight.tolist() == [[0, 0.5]]
    weight.weight.grad = torch.tensor([[-24.0, 0.0]])
    optimizer.step()
    assert weight.weight.tolist() == [[pytest.approx((0.1 + 0.1 * 12) / 2), 0]]


# ---------------------------------------------------------------- torch.optim's conventions


def test_closures_and_hooks() -> None:
    model = network()
    optimizer = aswl(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("closure")
        loss = model(torch.ones(2, 3, 5, 5)).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == ["before", "closure", "after"]


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not native.HAS_CPU_LIBRARY, reason="the reference reads its settings")
def test_a_step_and_a_record_read_nothing_from_the_device(monkeypatch: Any) -> None:
    model = network()
    optimizer = aswl(model, lr=torch.tensor(0.05))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    with Reads() as reads, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", None, raising=False)
        for i in range(3):
            fill_gradients(model, i)
            optimizer.step()
            optimizer.record()
        assert reads.count == 0
        float(optimizer.found_inf)  # type: ignore[attr-defined]
        assert reads.count == 1
    assert len(optimizer.history().marks) == 3


def test_a_model_that_moved_is_said() -> None:
    model = network()
    optimizer = aswl(model)
    group = optimizer.param_groups[0]
    group["attention"] = group["attention"].to("meta")
    fill_gradients(model, 0)
    with pytest.raises(RuntimeError, match=r"moved from meta to cpu.*after model\.to"):
        optimizer.step()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
def test_the_attention_follows_the_learning_rate(tensor_lr: bool) -> None:
    moved = []
    for lr in (0.05, 0.1):
        model = network()
        start: Any = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = aswl(model, lr=start, momentum=0, attention_lr=1e-4, density_weight=0)
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(lr) if tensor_lr else lr
        steps(model, optimizer, range(1))
        moved.append(group["attention"][:, 0] - 0.5)
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_parameters_without_gradient_stay_but_follow_the_attention() -> None:
    model = network()
    optimizer = aswl(model)
    steps(model, optimizer, range(2))
    bias, weight = model[4].bias, model[4].weight
    dense = {p: optimizer.state[p]["dense"].clone() for p in (bias, weight)}
    before = bias.detach().clone()
    fill_gradients(model, 3)
    bias.grad = weight.grad = None
    optimizer.step()
    assert all(torch.equal(optimizer.state[p]["dense"], value) for p, value in dense.items())
    assert not torch.equal(bias, before)
    a = optimizer.param_groups[0]["attention"][2, 0].float()
    assert torch.equal(bias, dense[bias] * a)


def test_frozen_parameters_are_not_touched() -> None:
    model = network()
    model[0].requires_grad_(False)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    optimizer = aswl(model, sparsity=0.5)
    assert list(optimizer.masks()) == ["3.weight", "4.weight"]
    model(torch.ones(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    optimizer.finish()
    assert_same([*model[0].parameters()], frozen)


def test_depthwise_convolutions_and_tables_are_plain() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 1, groups=4), nn.Conv1d(4, 4, 1),
                          nn.Conv1d(4, 4, 1, groups=2), nn.LayerNorm(4))  # fmt: skip
    before = [p.detach().clone() for p in model[1].parameters()]
    optimizer = ASWL(model, 0.1, sparsity=0.5)
    assert list(optimizer.sparsities()) == ["2.weight", "3.weight"]
    assert_same([*model[1].parameters()], before)


def test_attention_layers_and_their_biases() -> None:
    layer = nn.MultiheadAttention(8, 2)
    nn.init.normal_(layer.in_proj_bias)
    bias = layer.in_proj_bias.detach().clone()
    optimizer = ASWL(layer, 0.1, sparsity=0.5)
    assert list(optimizer.masks()) == ["in_proj_weight", "out_proj.weight"]
    assert torch.equal(layer.in_proj_bias, bias / 2)


def test_tied_weights_are_one_layer_and_scale_both_biases() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    biases = [layer.bias.detach().clone() for layer in (first, second)]
    optimizer = ASWL(nn.Sequential(first, second), 0.1, sparsity=0.5)
    assert optimizer.masks().num_kept == 18
    assert_same([first.bias, second.bias], [b / 2 for b in biases])


def test_channels_last_gives_the_same() -> None:
    """But for the order of the sums: float64, so the attention agrees and masks do."""
    plain, other = network(), network().to(memory_format=torch.channels_last)
    mine, theirs = aswl(plain), aswl(other)
    steps(plain, mine, range(5))
    steps(other, theirs, range(5))
    for a, b in zip(everything(plain, mine), everything(other, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert mine.masks() == theirs.masks()
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_memory_format_changed_in_training_is_followed() -> None:
    model = network()
    optimizer = aswl(model)
    steps(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    model.to(memory_format=torch.channels_last)
    for i in range(3, 6):
        steps(model, optimizer, range(i, i + 1))
        steps(twin, other, range(i, i + 1))
    for a, b in zip(everything(model, optimizer), everything(twin, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for value in optimizer.state[model[0].weight].values():
        assert value.stride() == model[0].weight.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_are_rounded_from_float32(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = aswl(model)
    steps(model, optimizer, range(5))
    for p in model.parameters():
        assert {v.dtype for v in optimizer.state[p].values()} == {torch.float32}
    weight, a = model[3].weight, optimizer.param_groups[0]["attention"][1, 0].float()
    held = optimizer.state[weight]["dense"].where(optimizer.masks()["3.weight"], 0.0) * a
    assert torch.equal(weight, held.to(dtype))
    norm = model[1].weight
    assert torch.equal(norm, optimizer.state[norm]["dense"].to(dtype))


# ---------------------------------------------------------------- AMP


def test_a_step_skipped_by_the_scaler_changes_no_bit() -> None:
    model = network()
    optimizer = aswl(model)
    steps(model, optimizer, range(2))
    before = [t.detach().clone() for t in everything(model, optimizer)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for unscale in (False, True):
        scaler.scale(model(torch.full((2, 3, 5, 5), torch.inf)).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same(everything(model, optimizer), before)
        optimizer.zero_grad()
    assert scaler.get_scale() < 256.0


def test_a_scaled_accumulated_clipped_step_is_the_plain_one() -> None:
    found = []
    for scaled in (False, True):
        model = network()
        optimizer = aswl(model)
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
        found.append(everything(model, optimizer))
    assert_same(*found)


# ---------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_with_the_same_bits(how: str) -> None:
    model = network()
    optimizer = aswl(model, ties="keep", l2=0.01, alpha=2.0)
    steps(model, optimizer, range(3))
    optimizer.record()
    pair = model, optimizer
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(everything(other, twin), everything(model, optimizer))
    assert twin.history() == optimizer.history() and twin.masks() == optimizer.masks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("model_first", [True, False])
def test_a_checkpoint_goes_on_with_the_same_bits(dtype: torch.dtype, model_first: bool) -> None:
    model = network(dtype=dtype)
    optimizer = aswl(model)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network(1, dtype)
    twin = aswl(other)
    steps(other, twin, range(2))
    for part in (0, 1) if model_first else (1, 0):
        (other, twin)[part].load_state_dict(saved[part])
    assert_same(everything(other, twin), everything(model, optimizer))
    steps(model, optimizer, range(3, 6))
    steps(other, twin, range(3, 6))
    assert_same(everything(other, twin), everything(model, optimizer))


def test_the_state_alone_brings_back_what_it_makes() -> None:
    model = network()
    optimizer = aswl(model)
    steps(model, optimizer, range(3))
    other = network(1)
    twin = aswl(other)
    twin.load_state_dict(optimizer.state_dict())
    for name in ("0.weight", "0.bias", "3.weight", "4.bias"):
        assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_the_state_of_a_plain_sgd_brings_its_momenta() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    steps(model, sgd, range(2))
    optimizer = aswl(model)
    dense = optimizer.state[model[3].weight]["dense"].clone()
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["finished"]) == (0.3, 0.5, False)
    state = optimizer.state[model[3].weight]
    assert torch.equal(state["dense"], dense)
    assert torch.equal(state["momentum_buffer"], sgd.state[model[3].weight]["momentum_buffer"])
    steps(model, optimizer, range(2, 4))


def test_the_state_of_another_model_is_refused() -> None:
    models = [nn.Sequential(nn.Linear(3, 3), last) for last in (nn.Linear(3, 3), nn.LayerNorm(3))]
    first, second = (ASWL(model, 0.1, sparsity=0.5) for model in models)
    with pytest.raises(ValueError, match="of 1 layers, this model has 2"):
        first.load_state_dict(second.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_bits_of_the_plain_one(backend: str) -> None:
    torch.compiler.reset()
    models = [network(), network()]
    optimizers = [aswl(model) for model in models]
    run = [optimizer.step for optimizer in optimizers]
    run[1] = torch.compile(optimizers[1].step, fullgraph=True, backend=backend)
    for i in range(4):
        for model, optimizer, step in zip(models, optimizers, run, strict=True):
            fill_gradients(model, i)
            if i == 2:
                optimizer.param_groups[0]["lr"] = 0.01
            step()
    pairs = [everything(m, o) for m, o in zip(models, optimizers, strict=True)]
    assert_same(*pairs)


def test_forward_and_backward_may_be_compiled_and_averaged() -> None:
    torch.compiler.reset()
    model = network()
    optimizer = aswl(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(torch.ones(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    assert torch.equal(average.module[4].weight, model[4].weight) is False
    copied = copy.deepcopy(model)
    x = torch.ones(2, 3, 5, 5)
    assert torch.equal(copied.eval()(x), model.eval()(x))


# ---------------------------------------------------------------- changes from outside


def test_a_write_into_a_parameter_is_noticed_and_can_be_taken_over() -> None:
    model, other = network(), network(1)
    optimizer = aswl(model)
    steps(model, optimizer, range(2))
    model.load_state_dict(other.state_dict())
    fill_gradients(model, 2)
    with pytest.raises(RuntimeError, match=r"0\.weight was changed from outside.*resync"):
        optimizer.step()
    optimizer.resync()
    steps(model, optimizer, range(2, 4))
    assert optimizer.masks().num_kept > 0


@pytest.mark.parametrize("position", ["weight", "post_bn"])
def test_resync_keeps_what_the_model_computes_but_for_the_pruning(position: str) -> None:
    model, other = network(), network(1)
    optimizer = aswl(model, attention_position=position)
    model.load_state_dict(other.state_dict())
    optimizer.resync()
    masks = optimizer.masks()
    for name, p in model.named_parameters():
        expected = other.get_parameter(name)
        if name in masks:
            expected = expected.where(masks[name], 0.0)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)


def test_resync_of_an_unchanged_model_changes_nothing() -> None:
    model = network(dtype=torch.bfloat16)
    optimizer = aswl(model)
    steps(model, optimizer, range(3))
    before = [t.detach().clone() for t in everything(model, optimizer)]
    optimizer.resync()
    assert_same(everything(model, optimizer), before)


def test_weights_lent_and_given_back_do_not_matter() -> None:
    """As an average swapped in for an evaluation."""
    model = network()
    optimizer = aswl(model)
    steps(model, optimizer, range(2))
    held = copy.deepcopy(model.state_dict())
    model.load_state_dict(network(1).state_dict())
    model.load_state_dict(held)
    steps(model, optimizer, range(2, 3))


# ---------------------------------------------------------------- what is learnt


def test_sparsities_are_those_of_the_masks() -> None:
    model = network()
    optimizer = aswl(model)
    marks = []
    for i in range(4):
        steps(model, optimizer, range(i, i + 1))
        optimizer.record(10 * i)
        marks.append({name: layer.sparsity for name, layer in optimizer.masks().layers.items()})
        assert optimizer.sparsities() == marks[-1]
    history = optimizer.history()
    assert history.marks == [0, 10, 20, 30]
    assert [{n: s[i] for n, s in history.sparsities.items()} for i in range(4)] == marks
    assert len({tuple(mark.values()) for mark in marks}) > 1


def test_nothing_recorded_is_an_empty_history() -> None:
    history = aswl(network()).history()
    assert history.marks == [] and history.sparsities["3.weight"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, Fraction(2, 3), 0.9, 1.0])
@pytest.mark.parametrize("name", ["plain", "post_bn", "prune_bias"])
@pytest.mark.filterwarnings("ignore:.*(out of reach|have learnt|fallen to its floor)")
def test_finish_leaves_exactly_what_was_asked(dtype: torch.dtype, sparsity: Any, name: str) -> None:
    model = network(dtype=dtype)
    optimizer = aswl(model, sparsity=sparsity, **VARIANTS[name])
    steps(model, optimizer, range(3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    present = optimizer.masks()
    masks = optimizer.finish()
    assert masks.num_kept == fp.num_kept(sparsity, masks.total)
    for key, p in model.named_parameters():
        if key not in masks:
            assert torch.equal(p, before[key])
            continue
        assert torch.equal(p != 0, masks[key])
        both = masks[key] & present[key]
        assert torch.equal(p[both], before[key][both])
        zeros = p.detach()[~masks[key]]
        assert not zeros.signbit().any()
    assert optimizer.masks() == masks == optimizer.finish()
    assert optimizer.sparsities() == pytest.approx(
        {n: s for n, s in _layer_sparsities(masks).items()}
    )


def _layer_sparsities(masks: fp.MaskSet) -> dict[str, float]:
    found: dict[str, list[int]] = {}
    for name, layer in masks.layers.items():
        pruned, total = found.setdefault(name.split(".")[0], [0, 0])
        found[name.split(".")[0]] = [pruned + layer.num_pruned, total + layer.total]
    return {f"{n}.weight": pruned / total for n, (pruned, total) in found.items()}


def test_finish_is_the_end() -> None:
    model = network()
    optimizer = aswl(model, sparsity=0.5)
    steps(model, optimizer, range(2))
    masks = optimizer.finish()
    for end in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match=r"finish\(\) was called.*MaskedSGD"):
            end.step()
    fresh = aswl(network(1), sparsity=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"finish\(\) was called"):
        fresh.step()
    plain = fp.optim.MaskedSGD(model.parameters(), 0.1, masks=masks)
    steps(model, plain, range(2, 4))
    assert fp.MaskSet.of(model).num_kept == masks.num_kept


@pytest.mark.parametrize("seed", range(20))
def test_counts_settle_in_proportion(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 1000, (7,), generator=random).tolist()
    kept = [int(torch.randint(0, size + 1, (), generator=random)) for size in sizes]
    for total in (0, sum(kept) // 2, sum(kept), (sum(kept) + sum(sizes)) // 2, sum(sizes)):
        found = settled(kept, sizes, total)
        assert sum(found) == total
        fewer = total <= sum(kept)
        for before, after, size in zip(kept, found, sizes, strict=True):
            assert 0 <= after <= before if fewer else before <= after <= size
            old, new = (before, after) if fewer else (size - before, size - after)
            whole, part = (
                (sum(kept), total) if fewer
                else (sum(sizes) - sum(kept), sum(sizes) - total)
            )  # fmt: skip
            assert abs(new - old * part / max(1, whole)) < 1


# ---------------------------------------------------------------- warnings and errors


def test_a_norm_right_behind_is_said() -> None:
    with pytest.warns(UserWarning, match=r"scale of 0\.weight out again.*post_bn"):
        ASWL(network(), 0.1, sparsity=0.5)
    apart = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASWL(network(), 0.1, sparsity=0.5, attention_position="post_bn")
        ASWL(apart, 0.1, sparsity=0.5)


@pytest.mark.parametrize(("alpha", "reach"), [(1.0, 0.99), (2.0, 0.9801)])
def test_a_sparsity_beyond_the_floor_is_said(alpha: float, reach: float) -> None:
    with pytest.warns(UserWarning, match=f"out of reach.*passes a sparsity of {reach}"):
        ASWL(nn.Linear(50, 50), 0.1, sparsity=0.995, alpha=alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASWL(nn.Linear(50, 50), 0.1, sparsity=math.floor(1000 * reach) / 1000, alpha=alpha)


def test_a_layer_at_the_floor_is_said_once() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    optimizer = ASWL(model, 0.1, sparsity=0.9)
    optimizer.param_groups[0]["attention"][0, 0] = 0.01
    with pytest.warns(UserWarning, match=r"0\.weight has fallen to its floor"):
        optimizer.sparsities()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.sparsities()
        optimizer.param_groups[0]["attention"][0, 0] = 0.5
        optimizer.sparsities()


def test_a_total_that_was_not_learnt_is_said() -> None:
    optimizer = ASWL(nn.Linear(40, 40), 0.1, sparsity=0.9)
    with pytest.warns(UserWarning, match=r"learnt a sparsity of 0\.500 and 0\.900 was asked"):
        optimizer.finish()


LAYER = nn.Linear(4, 4)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ASWL(LAYER.parameters(), 0.1, sparsity=0.5), TypeError, "the model instead of"),  # type: ignore[arg-type]
    (lambda: ASWL(LAYER, -0.1, sparsity=0.5), ValueError, "lr must be at least 0, got -0.1"),
    (lambda: ASWL(LAYER, 0.1, sparsity=50), ValueError, r"sparsity must be in \[0, 1\].*0\.5|50"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, momentum=1), ValueError, "momentum must be below 1"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, alpha=0), ValueError, "alpha must be above 0, got 0"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, l2=-1), ValueError, "l2 must be at least 0"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, density_weight=math.nan), ValueError, "density_weight"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, attention_init=0), ValueError, r"in \[0\.01, 1\]"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, attention_lr=-1), ValueError, "attention_lr must be"),
    (lambda: ASWL(LAYER, 0.0, sparsity=0.5, attention_lr=0.1), ValueError, "keeps its ratio"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, attention_position="bn"), ValueError, "'post_bn'"),
    (
        lambda: ASWL(LAYER, 0.1, sparsity=0.5, attention_position="post_bn"),
        ValueError,
        "registered right behind a layer",
    ),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, ties="paper"), ValueError, "'exact' or 'keep'"),
    (lambda: ASWL(LAYER, 0.1, sparsity=0.5, block=(4, 1)), ValueError, r"block must be \(1, 1\)"),
    (lambda: ASWL(nn.LayerNorm(3), 0.1, sparsity=0.5), ValueError, "nothing to prune"),
    (lambda: ASWL(nn.Linear(2, 2, dtype=torch.cfloat), 0.1, sparsity=0.5), TypeError, "complex"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_input_says_what_was_expected_and_changes_nothing(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    before = [p.detach().clone() for p in LAYER.parameters()]
    with pytest.raises(error, match=message):
        call()
    assert_same([*LAYER.parameters()], before)


def test_groups_are_not_added() -> None:
    optimizer = ASWL(nn.Linear(4, 4), 0.1, sparsity=0.5)
    with pytest.raises(RuntimeError, match="one group, the model that it was made for"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = ASWL(model, 0.1, sparsity=0.5)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="ASWL does not support sparse gradients"):
        optimizer.step()


def test_the_history_has_a_picture(tmp_path: Path) -> None:
    model = network()
    optimizer = aswl(model)
    for i in range(3):
        steps(model, optimizer, range(i, i + 1))
        optimizer.record()
    drawn = tmp_path / "sparsities.svg"
    plot_sparsities(optimizer.history(), drawn, title="learnt")
    for text in ("0.weight", "3.weight", "4.weight", "learnt", "sparsity"):
        assert f"<!-- {text} -->" in drawn.read_text()
