"""SNIP and its iterated forms, and GraSP: formulas by hand, rounds, what may return."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.masks import num_kept
from fastprune.methods.rounds import masked

from .networks import network
from .unrolled import Training


def by_backward(model: nn.Module, batches: Any, loss_fn: Any) -> dict[str, Tensor]:
    """Gradients of the mean loss, through the model itself."""
    loss = sum(loss_fn(model(x), y) for x, y in batches) / len(batches)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_snip_scores_are_weight_times_gradient(num_batches: int) -> None:
    model, batches, loss_fn = network("cnn")
    scores = fp.scores("snip", model, batches, loss_fn, num_batches=num_batches)
    gradients = by_backward(model, batches[:num_batches], loss_fn)
    for name, score in scores.items():
        assert torch.allclose(score, model.get_parameter(name) * gradients[name], rtol=1e-10)
    masks = fp.snip(model, batches, loss_fn, 0.6, num_batches=num_batches)
    assert masks == fp.masks_from_scores(model, scores, 0.6)
    assert masks.num_kept == num_kept(0.6, masks.total)


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_scores_differentiate_the_squared_gradient(
    num_batches: int, temperature: float
) -> None:
    """weight * H g = weight * d(|g|^2 / 2) / d weight."""
    model, batches, loss_fn = network("cnn")

    def tempered(output: Tensor, target: Tensor) -> Tensor:
        return loss_fn(output / temperature, target)

    scores = fp.scores("grasp", model, batches, loss_fn, num_batches=num_batches,
                       temperature=temperature)  # fmt: skip
    gradients = by_backward(model, batches[:num_batches], tempered)
    length = sum(g.square().sum() for g in gradients.values()) / 2
    flow = torch.autograd.grad(length, list(model.parameters()), materialize_grads=True)
    for (name, p), change in zip(model.named_parameters(), flow, strict=True):
        if name in scores:
            assert torch.allclose(scores[name], p * change, rtol=1e-8, atol=1e-18)


def test_grasp_keeps_what_the_gradient_flow_needs() -> None:
    """Half a square: g = A w, the flow |g|^2; removing a weight of high score lowers it most."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
    a = torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)

    def forward(net: Any, batch: Tensor) -> Tensor:
        return (net.weight @ batch @ net.weight.T).sum() / 2

    w = model.weight.detach().flatten()
    expected = w * (a @ a @ w)
    scores = fp.scores("grasp", model, [a], forward=forward)["weight"]
    assert torch.allclose(scores.flatten(), expected)
    masks = fp.grasp(model, [a], None, 2 / 3, forward=forward)
    assert masks["weight"].flatten().tolist() == [False, False, True]

    # A score far below zero is the worst, not the best.
    model.weight.data = torch.ones(1, 3, dtype=torch.float64)
    a = torch.tensor([[2.0, -2.0, -2.0], [-2.0, 1.5, 0.6], [-2.0, 0.6, 1.5]], dtype=torch.float64)
    scores = fp.scores("grasp", model, [a], forward=forward)["weight"].flatten()
    assert torch.allclose(scores, torch.tensor([-4.4, 4.21, 4.21], dtype=torch.float64))
    masks = fp.grasp(model, [a], None, 1 / 3, forward=forward)
    assert masks["weight"].tolist() == [[False, True, True]]


@pytest.mark.parametrize("method", [fp.iter_snip, fp.force])
def test_one_round_is_snip(method: Any) -> None:
    model, batches, loss_fn = network("cnn")
    assert method(model, batches, loss_fn, 0.6, rounds=1) == fp.snip(model, batches, loss_fn, 0.6)


def rounds_by_hand(
    returning: bool, sparsity: float, rounds: int, model: nn.Module, batches: Any, loss_fn: Any
) -> list[dict[str, Tensor]]:
    """Every round's masks, by sorting."""
    training = Training(model, batches, loss_fn, rounds, 0.0, 0.0)
    masks = training.ones
    history = []
    total = sum(m.numel() for m in masks.values())
    for now in range(rounds):
        gradient = training.gradient(training.masked(masks), now, differentiable=False)
        scores = {n: (training.start[n] * gradient[n]).abs() for n in masks}
        if not returning:
            scores = {n: torch.where(masks[n] > 0, s, -1.0) for n, s in scores.items()}
        part = (now + 1) / rounds
        kept = num_kept(1 - (1 - sparsity) ** part, total)
        ranked = torch.cat([s.flatten() for s in scores.values()])
        best = ranked.argsort(descending=True, stable=True)[:kept]
        flat = torch.zeros(total, dtype=torch.float64).index_fill_(0, best, 1.0)
        pieces = flat.split([m.numel() for m in masks.values()])
        masks = {n: p.view_as(m) for (n, m), p in zip(masks.items(), pieces, strict=True)}
        history.append(masks)
    return history


@pytest.mark.parametrize("name", ["cnn", "gpt"])
@pytest.mark.parametrize("returning", [False, True])
def test_rounds_against_sorting_by_hand(name: str, returning: bool) -> None:
    model, batches, loss_fn = network(name)
    history = rounds_by_hand(returning, 0.7, 4, model, batches, loss_fn)
    method = fp.force if returning else fp.iter_snip
    masks = method(model, batches, loss_fn, 0.7, rounds=4)
    for weight, mask in history[-1].items():
        assert torch.equal(masks[weight], mask.bool())
    came_back = [
        any(bool((now[n] > before[n]).any()) for n in now) for before, now in pairwise(history)
    ]
    assert any(came_back) == returning


def test_rounds_in_layers_blocks_and_channels() -> None:
    model, batches, loss_fn = network("cnn")
    for method in (fp.iter_snip, fp.force):
        layered = method(model, batches, loss_fn, fp.erk(model, 0.6), rounds=3)
        assert layered.num_kept == num_kept(0.6, layered.total)
        blocks = method(model, batches, loss_fn, 0.5, rounds=3, granularity=(2, 1), scope="layer")
        assert blocks.layers["0.weight"].num_kept == 2 * num_kept(0.5, 4 * 3 * 9)
        channels = method(model, batches, loss_fn, 0.5, rounds=3, granularity="channel")
        assert int(channels["0.bias"].sum() + channels["3.bias"].sum()) == num_kept(0.5, 16)


def four_weights() -> nn.Module:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    return model


def scaled(net: Any, factor: float) -> Tensor:
    """Scores are the factor times the weights."""
    return factor * net.weight.sum()


@pytest.mark.filterwarnings("ignore:2 of the 2 kept have score 0")
def test_what_iter_snip_has_pruned_does_not_return_by_position() -> None:
    """The first round drops the first weight; in the second all scores are 0."""
    masks = fp.iter_snip(four_weights(), [1.0, 0.0], None, 0.5, forward=scaled, rounds=2)
    assert masks["weight"].tolist() == [[False, True, True, False]]
    masks = fp.force(four_weights(), [1.0, 0.0], None, 0.5, forward=scaled, rounds=2)
    assert masks["weight"].tolist() == [[True, True, False, False]]


def test_only_the_last_round_tells_of_zeros() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.iter_snip(four_weights(), [0.0, 1.0], None, 0.5, forward=scaled, rounds=2)
    with pytest.warns(UserWarning, match="2 of the 2 kept have score 0"):
        fp.iter_snip(four_weights(), [1.0, 0.0], None, 0.5, forward=scaled, rounds=2)


@pytest.mark.parametrize("method", [fp.iter_snip, fp.force])
@pytest.mark.parametrize("rounds", [0, 1.5])
def test_wrong_rounds(method: Any, rounds: Any) -> None:
    model, batches, loss_fn = network("mlp")
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1"):
        method(model, batches, loss_fn, 0.5, rounds=rounds)


def test_wrong_numbers() -> None:
    model, batches, loss_fn = network("mlp")
    with pytest.raises(ValueError, match="num_batches must be an integer of at least 1"):
        fp.snip(model, batches, loss_fn, 0.5, num_batches=0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        fp.grasp(model, batches, loss_fn, 0.5, temperature=0)


def test_masked_leaves_other_parameters() -> None:
    point = {"a": torch.ones(2), "b": torch.ones(2)}
    found = masked(point, {"a": torch.tensor([True, False])})
    assert found["a"].tolist() == [1, 0] and found["b"] is point["b"]
