"""From scores to masks: counts, layers that collapse, blocks, channels and what follows them."""

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.masks import num_kept

from .networks import network


def two_layers(*scores: list[list[float]]) -> tuple[nn.Module, dict[str, Tensor]]:
    tensors = [torch.tensor(s) for s in scores]
    model = nn.Sequential(*(nn.Linear(t.shape[1], t.shape[0]) for t in tensors))
    return model, {f"{i}.weight": t for i, t in enumerate(tensors)}


def flat(masks: fp.MaskSet) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


# Ranks and counts


def test_rank_by_magnitude_by_value_and_inverted() -> None:
    model, scores = two_layers([[3.0, -5.0, 1.0]], [[-4.0], [2.0]])
    kept = {
        (rank, invert): flat(
            fp.masks_from_scores(model, scores, 0.6, rank=rank, invert=invert, min_kept_per_layer=1)
        ).tolist()
        for rank in ("magnitude", "value")
        for invert in (False, True)
    }
    assert kept["magnitude", False] == [False, True, False, True, False]
    assert kept["magnitude", True] == [False, False, True, False, True]
    assert kept["value", False] == [True, False, False, False, True]
    assert kept["value", True] == [False, True, False, True, False]


@pytest.mark.parametrize("min_kept", [0, 2])
def test_masks_are_nested_in_sparsity(min_kept: int) -> None:
    model, batches, loss_fn = network("cnn")
    scores = fp.scores("prospr", model, batches, loss_fn)
    total = sum(score.numel() for score in scores.values())
    before: fp.MaskSet | None = None
    for sparsity in (0.3, 0.6, 0.8, 0.9):
        masks = fp.masks_from_scores(model, scores, sparsity, min_kept_per_layer=min_kept)
        assert masks.num_kept == num_kept(sparsity, total)
        assert before is None or not (flat(masks) & ~flat(before)).any()
        before = masks
    assert fp.prospr(model, batches, loss_fn, 0.9, min_kept_per_layer=min_kept) == before


def test_ties_go_by_position_whatever_the_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Linear(2, 2))
    scores = {"0.weight": torch.ones(2, 2, 2, 2), "1.weight": torch.ones(2, 2)}
    scores["0.weight"] = scores["0.weight"].to(memory_format=torch.channels_last)
    masks = fp.masks_from_scores(model, scores, 0.5, min_kept_per_layer=1)
    assert masks["0.weight"].flatten().tolist() == [True] * 9 + [False] * 7
    assert masks["1.weight"].flatten().tolist() == [True] + [False] * 3


def test_zero_scores_that_must_be_kept_are_told() -> None:
    model, scores = two_layers([[1.0, 0.0, 0.0, 2.0]])
    with pytest.warns(UserWarning, match="1 of the 3 kept have score 0"):
        masks = fp.masks_from_scores(model, scores, 0.25)
    assert masks["0.weight"].tolist() == [[True, True, False, True]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.masks_from_scores(model, scores, 0.5)


def test_each_layer_its_own_sparsity() -> None:
    model, scores = two_layers([[1.0, 2.0, 3.0, 4.0]], [[9.0, 8.0, 7.0, 6.0]])
    masks = fp.masks_from_scores(model, scores, {"0.weight": 0.25, "1.weight": 0.75})
    assert flat(masks).tolist() == [False, True, True, True, True, False, False, False]
    with pytest.raises(ValueError, match=r"sparsity names 1 weights, but not 1\.weight"):
        fp.masks_from_scores(model, scores, {"0.weight": 0.25})


def test_scores_of_both_widths_rank_together() -> None:
    model, scores = two_layers([[1.0, 3.0]], [[2.0, 4.0]])
    model[1].double()
    scores["1.weight"] = scores["1.weight"].double()
    assert flat(fp.masks_from_scores(model, scores, 0.5, min_kept_per_layer=1)).tolist() == [
        False, True, False, True,
    ]  # fmt: skip


def test_wrong_scores() -> None:
    model, scores = two_layers([[1.0, 3.0]])
    with pytest.raises(ValueError, match=r"1\.weight of shape \(1,\) is none"):
        fp.masks_from_scores(model, {"1.weight": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="needs the data"):
        fp.masks_from_scores(model, scores, 0.5, granularity="channel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be 'magnitude' or 'value'"):
        fp.masks_from_scores(model, scores, 0.5, rank="abs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores of 0\.weight are not finite"):
        fp.masks_from_scores(model, {"0.weight": torch.tensor([[1.0, torch.inf]])}, 0.5)


# Layers that collapse


@pytest.mark.parametrize("granularity", ["weight", (1, 1), (2, 1)])
def test_a_layer_without_weights_is_refused_and_how_to_help(granularity: Any) -> None:
    model, scores = two_layers([[9.0, 8.0], [7.0, 6.0]], [[1.0, 2.0], [1.5, 0.5]])
    options = {"granularity": granularity}
    with pytest.raises(fp.LayerCollapse) as caught:
        fp.masks_from_scores(model, scores, 0.5, **options)
    assert isinstance(caught.value, ValueError)
    assert "1.weight would lose all" in str(caught.value) and "0.weight" not in str(caught.value)
    assert "min_kept_per_layer=1" in str(caught.value)

    helped = fp.masks_from_scores(model, scores, 0.5, min_kept_per_layer=1, **options)
    assert all(layer.num_kept for layer in helped.layers.values())
    assert helped.num_kept == 4
    by_layer = fp.masks_from_scores(model, scores, 0.5, scope="layer", **options)
    assert [layer.num_kept for layer in by_layer.layers.values()] == [2, 2]


def test_the_methods_raise_it_too() -> None:
    model, batches, loss_fn = network("mlp")
    for method in (fp.prospr, fp.snip, fp.iter_snip, fp.force, fp.grasp):
        with pytest.raises(fp.LayerCollapse, match="min_kept_per_layer"):
            method(model, batches, loss_fn, 1.0)
    with pytest.raises(fp.LayerCollapse):
        fp.random(model, 1.0)


def test_least_per_layer_in_layer_scope_and_in_layers_smaller_than_it() -> None:
    model, scores = two_layers([[5.0, 4.0, 3.0, 2.0, 1.0]], [[1.0]])
    masks = fp.masks_from_scores(model, scores, 0.9, scope="layer", min_kept_per_layer=2)
    assert flat(masks).tolist() == [True, True, False, False, False, True]


# Blocks


def test_blocks_rank_by_the_sum_with_signs() -> None:
    model, scores = two_layers([[3.0, -3.0, 1.0, 1.0], [1.0, 1.0, -2.0, -2.0]])
    masks = fp.masks_from_scores(model, scores, 0.5, granularity=(1, 2))
    assert masks["0.weight"].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


# Channels


class Residual(nn.Module):
    """Norms behind a layer, behind an addition, before a layer, and behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm_sum = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.norm_up = nn.GroupNorm(2, 8)
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm_shared = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).tanh()
        x = self.norm_sum(x + self.conv(x)).tanh()
        x = self.norm_up(self.up(x)).tanh()
        x = self.norm_shared(self.a(x)) + self.norm_shared(self.b(x))
        return self.head(x.mean((2, 3)))


def residual() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Residual()
    x, y = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    return model, [(x, y)], F.cross_entropy


@pytest.mark.parametrize("method", [fp.prospr, fp.snip, fp.grasp])
def test_channels_take_their_biases_and_norms_along(method: Any) -> None:
    model, batches, loss_fn = residual()
    masks = method(model, batches, loss_fn, 0.5, granularity="channel", min_kept_per_layer=1)
    followers = {
        "stem.weight": ["stem.bias", "norm.weight", "norm.bias"],
        "conv.weight": [],
        "up.weight": ["up.bias", "norm_up.weight", "norm_up.bias"],
        "a.weight": ["a.bias"],
        "b.weight": ["b.bias"],
    }
    assert set(masks) == {*followers, *(v for vectors in followers.values() for v in vectors)}
    kept = {}
    for name, vectors in followers.items():
        rows = masks[name]
        if name == "up.weight":  # [6, 8 / 2, 2, 2]: outputs 0-3 from inputs 0-2, 4-7 from 3-5
            rows = torch.cat([rows[:3].transpose(0, 1), rows[3:].transpose(0, 1)])
        rows = rows.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        kept[name] = rows.any(1)
        for vector in vectors:
            assert torch.equal(masks[vector], kept[name])
    assert sum(int(k.sum()) for k in kept.values()) == num_kept(0.5, 6 + 6 + 8 + 4 + 4)


def test_channel_scores_are_sums_with_signs() -> None:
    """The derivative in one mask entry that multiplies a channel's weights, bias and norm."""
    model, batches, loss_fn = residual()
    x, y = batches[0]
    vectors = {"stem": ["stem.bias", "norm.weight", "norm.bias"], "conv": [], "a": ["a.bias"],
               "b": ["b.bias"], "up": ["up.bias", "norm_up.weight", "norm_up.bias"]}  # fmt: skip
    entries = {
        name: torch.ones(size, requires_grad=True)
        for name, size in {"stem": 6, "conv": 6, "up": 8, "a": 4, "b": 4}.items()
    }
    state = {}
    for name, entry in entries.items():
        spread = entry.view(-1, 1, 1, 1)
        if name == "up":  # [6, 8 / 2, 2, 2]
            spread = entry.view(2, 1, 4).expand(2, 3, 4).reshape(6, 4, 1, 1)
        state[f"{name}.weight"] = model.get_parameter(f"{name}.weight") * spread
        state |= {v: model.get_parameter(v) * entry for v in vectors[name]}
    loss = loss_fn(torch.func.functional_call(model, state, (x,)), y)
    sums = dict(zip(entries, torch.autograd.grad(loss, list(entries.values())), strict=True))
    masks = fp.snip(model, batches, loss_fn, 0.5, granularity="channel", scope="layer")
    for name in ("stem", "conv", "up"):  # behind a and b the norm makes nothing of these sums
        best = sums[name].abs().topk(len(sums[name]) // 2).indices
        kept = masks["up.bias"] if name == "up" else masks[f"{name}.weight"][:, 0, 0, 0]
        assert kept.nonzero().flatten().tolist() == best.sort().values.tolist()


def test_dropped_channels_are_zero_and_can_be_cut_out() -> None:
    torch.manual_seed(0)
    names = ["conv1", "norm", "relu", "conv2", "pool", "flat", "head"]
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]  # fmt: skip
    model = nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    masks = fp.prospr(model, [(x, y)], F.cross_entropy, 0.5, granularity="channel")
    masks.apply(model)
    keep1, keep2 = masks["conv1.bias"], masks["conv2.bias"]
    small = nn.Sequential(
        nn.Conv2d(3, int(keep1.sum()), 3), nn.BatchNorm2d(int(keep1.sum())), nn.ReLU(),
        nn.Conv2d(int(keep1.sum()), int(keep2.sum()), 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(int(keep2.sum()), 3),
    )  # fmt: skip
    values = [
        model.conv1.weight[keep1], model.conv1.bias[keep1], model.norm.weight[keep1],
        model.norm.bias[keep1], model.conv2.weight[keep2][:, keep1], model.conv2.bias[keep2],
        model.head.weight[:, keep2], model.head.bias,
    ]  # fmt: skip
    with torch.no_grad():
        for parameter, value in zip(small.parameters(), values, strict=True):
            parameter.copy_(value)
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_attention_channels_take_their_part_of_the_bias() -> None:
    model, batches, loss_fn = network("attention")
    masks = fp.prospr(model, batches, loss_fn, 0.5, granularity="channel")
    rows = masks["attention.in_proj_weight"]
    assert torch.equal(masks["attention.in_proj_bias"], rows.all(1))
    assert "head.weight" not in masks


def test_a_bias_of_two_layers_keeps_what_either_keeps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].bias = model[0].bias
    batch = torch.randn(5, 4), torch.arange(5) % 3
    masks = fp.snip(model, [batch], F.cross_entropy, 0.5, granularity="channel", scope="layer")
    rows = [masks[f"{i}.weight"].all(1) for i in (0, 2)]
    assert torch.equal(masks["0.bias"], rows[0] | rows[1])
    assert not torch.equal(rows[0], rows[1]) and "2.bias" not in masks


def test_excluded_weights_are_left_whole() -> None:
    model, batches, loss_fn = network("mlp")
    masks = fp.snip(model, batches, loss_fn, 0.5, exclude=["0.weight"])
    assert list(masks) == ["2.weight", "4.weight"]
    masks = fp.snip(model, batches, loss_fn, 0.5, exclude=[], granularity="channel")
    assert "4.weight" in masks


@pytest.mark.parametrize("granularity", ["weight", "channel", (2, 1)])
def test_masks_know_their_parameters(granularity: Any) -> None:
    """So that an optimizer finds them among bare parameters of one shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(6, 8), torch.arange(6) % 4)]
    loss = nn.functional.cross_entropy
    masks = fp.snip(model, batches, loss, 0.5, granularity=granularity)
    optimizer = fp.optim.MaskedSGD(model.parameters(), lr=0.1, masks=masks)
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
