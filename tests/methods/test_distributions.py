"""Random pruning, the distributions over layers, and the checks of what masks are worth."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from fastprune.masks import num_kept

from .networks import network


def linear(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def test_erk_by_hand() -> None:
    """Sizes 10x20, 20x30: parts 30/200 and 50/600; half of 800: 30 s + 50 s = 400, s = 5."""
    assert fp.erk(linear(10, 20, 30), 0.5) == {
        "0.weight": Fraction(50, 200), "1.weight": Fraction(350, 600),
    }  # fmt: skip


def test_erk_leaves_small_layers_dense() -> None:
    """505 of 1,010 stay; the second layer would keep more than its 10, so the first keeps 495."""
    spread = fp.erk(linear(100, 10, 1), 0.5)
    assert spread == {"0.weight": Fraction(505, 1000), "1.weight": 0}


def test_erk_counts_kernel_positions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3))
    spread = fp.erk(model, 0.9)
    kept = {
        name: float((1 - part) * model.get_parameter(name).numel()) for name, part in spread.items()
    }
    assert kept["0.weight"] / kept["1.weight"] == pytest.approx(
        (4 + 8 + 6) / (8 + 16 + 6), abs=0.01
    )


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    sparsity=st.fractions(0, 1, max_denominator=1000),
)
def test_totals_are_exact(sizes: list[int], sparsity: Fraction) -> None:
    model = linear(*sizes)
    total = sum(a * b for a, b in pairwise(sizes))
    for spread in (fp.erk(model, sparsity), fp.uniform(model, sparsity)):
        each = [num_kept(part, model.get_parameter(name).numel()) for name, part in spread.items()]
        assert sum(each) == num_kept(sparsity, total)
        assert all(0 <= part <= 1 for part in spread.values())


def test_random_masks() -> None:
    model = linear(30, 40, 50)
    torch.manual_seed(3)
    masks = fp.random(model, 0.7)
    assert masks.num_kept == num_kept(0.7, masks.total)
    assert all(abs(layer.sparsity - 0.7) < 0.06 for layer in masks.layers.values())
    torch.manual_seed(3)
    assert fp.random(model, 0.7) == masks
    assert fp.random(model, 0.7) != masks
    by_generator = [
        fp.random(model, fp.erk(model, 0.7), generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert by_generator[0] == by_generator[1]
    for name, layer in by_generator[0].layers.items():
        assert layer.num_pruned == fp.erk(model, 0.7)[name] * layer.total
    blocks = fp.random(model, 0.5, granularity=(4, 2))
    assert blocks["0.weight"].unfold(0, 4, 4).unfold(1, 2, 2).float().mean(
        (2, 3)
    ).unique().tolist() == [0, 1]


@pytest.mark.parametrize("method", ["prospr", "snip", "grasp", "magnitude", "random", "synflow"])
def test_scores_name_every_prunable_weight(method: str) -> None:
    model, batches, loss_fn = network("cnn")
    data: Any = batches[0][0] if method == "synflow" else batches
    found = fp.scores(method, model, data, loss_fn)
    assert {n: s.shape for n, s in found.items()} == {
        n: model.get_parameter(n).shape for n in ("0.weight", "3.weight", "8.weight")
    }
    assert not any(score.requires_grad for score in found.values())
    if method == "magnitude":
        masks = fp.masks_from_scores(model, found, 0.5)
        assert masks == fp.magnitude(model, 0.5)


def test_scores_that_are_not_there() -> None:
    model, batches, loss_fn = network("mlp")
    with pytest.raises(ValueError, match=r"'random', got 'force'; it prunes in rounds"):
        fp.scores("force", model, batches, loss_fn)
    with pytest.raises(ValueError, match="method must be one of 'prospr'"):
        fp.scores("taylor", model)
    with pytest.raises(TypeError, match="method 'snip' needs batches"):
        fp.scores("snip", model)


def test_shuffled_masks_keep_each_layers_number() -> None:
    model, batches, loss_fn = network("cnn")
    masks = fp.snip(model, batches, loss_fn, 0.6)
    shuffled = fp.shuffle_masks(masks, generator=torch.Generator().manual_seed(0))
    assert shuffled.layers == masks.layers and shuffled != masks
    assert shuffled == fp.shuffle_masks(masks, generator=torch.Generator().manual_seed(0))
    counts = sum(fp.shuffle_masks({"w": torch.arange(10) < 3})["w"].float() for _ in range(2000))
    assert (counts / 2000 - 0.3).abs().max() < 0.05  # every place as likely as another


def test_reinitialized_weights_are_new_and_masked() -> None:
    model, batches, loss_fn = network("attention", torch.float32)
    masks = fp.snip(model, batches, loss_fn, 0.6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    fp.reinitialize(model, masks)
    for name, mask in masks.items():
        now = model.get_parameter(name).detach()
        assert not now[~mask].any()
        assert (now != before[name])[mask].all()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    fp.reinitialize(model, masks)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())


def test_reinitialize_says_what_it_cannot() -> None:
    model, _, _ = network("gpt", torch.float32)
    with pytest.raises(ValueError, match="Gpt has parameters but no reset_parameters"):
        fp.reinitialize(model)

    def ones(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    fp.reinitialize(model, init=ones)
    assert (model.blocks[0].attention.qkv.weight == 1).all()


def test_inverted_scores_keep_the_worst() -> None:
    model, batches, loss_fn = network("cnn")
    scores = fp.scores("snip", model, batches, loss_fn)
    best = fp.masks_from_scores(model, scores, 0.5)
    worst = fp.masks_from_scores(model, scores, 0.5, invert=True)
    assert not any((best[n] & worst[n]).any() for n in best)
