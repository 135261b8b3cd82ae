"""SynFlow: conservation, worked numbers, rounds, and networks too deep for float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.masks import num_kept


def deep(depth: int, width: int, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=bias) for _ in range(depth)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def test_worked_numbers() -> None:
    """Input (1, 1), first layer |W|, second |V|: R = V W 1; a weight's score is its paths' sum."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[2].weight.data = torch.tensor([[-5.0, 1.0]])
    scores = fp.scores("synflow", model, torch.randn(7, 2))
    total = 5 * (1 + 2) + 1 * (3 + 4)
    first = torch.tensor([[5.0, 10.0], [3.0, 4.0]]).double() / total
    assert torch.allclose(scores["0.weight"], first)
    assert torch.allclose(scores["2.weight"], torch.tensor([[15.0, 7.0]]).double() / total)
    masks = fp.synflow(model, torch.randn(7, 2), 0.5, rounds=1)
    assert masks["0.weight"].tolist() == [[False, True], [False, False]]
    assert masks["2.weight"].tolist() == [[True, True]]


def test_each_layer_carries_the_whole_flow() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, False),
    )  # fmt: skip
    scores = fp.scores("synflow", model, torch.randn(2, 3, 6, 6))
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(1.0)
        assert (score >= 0).all()


def test_a_running_mean_takes_nothing_from_the_flow() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    fresh = fp.scores("synflow", model, torch.ones(1, 3))
    model[1].running_mean.fill_(5.0)
    for name, score in fp.scores("synflow", model, torch.ones(1, 3)).items():
        assert torch.equal(score, fresh[name])


def test_no_overflow_where_float32_overflows() -> None:
    model = deep(60, 64)
    x = torch.ones(1, 64)
    for p in model.parameters():
        x = F.linear(x, p.detach().abs())
    assert x.isinf().all()
    masks = fp.synflow(model, torch.randn(1, 64), 0.9, rounds=10)
    assert masks.num_kept == num_kept(0.9, masks.total)
    for score in fp.scores("synflow", model, torch.randn(1, 64)).values():
        assert score.isfinite().all() and float(score.sum()) == pytest.approx(1.0)


def test_rounds_keep_a_path_where_one_round_collapses() -> None:
    torch.manual_seed(0)
    sizes = [(4, 300), (300, 300), (300, 2)]
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
    with pytest.raises(fp.LayerCollapse, match=r"1\.weight"):
        fp.synflow(model, torch.randn(1, 4), 0.9995, rounds=1)
    masks = fp.synflow(model, torch.randn(1, 4), 0.9995, rounds=100)
    assert masks.num_kept == num_kept(0.9995, masks.total)
    x = torch.ones(4)
    for p, mask in zip(model.parameters(), masks.values(), strict=True):
        x = F.linear(x, p.detach().abs() * mask)
    assert float(x.sum()) > 0


def test_the_example_counts_only_by_its_shape_and_tokens_are_taken() -> None:
    model = deep(3, 8, bias=True)
    one, other = (fp.synflow(model, torch.randn(n, 8), 0.5, rounds=5) for n in (1, 6))
    assert one == other
    words = nn.Sequential(nn.Embedding(5, 8), *deep(2, 8))
    by_word = [fp.scores("synflow", words, torch.tensor([[i]]))["1.weight"] for i in (1, 3)]
    assert not torch.equal(*by_word)


def test_wrong_examples() -> None:
    with pytest.raises(TypeError, match="example_input must be a batch"):
        fp.synflow(deep(2, 4), [torch.ones(1, 4)], 0.5)
    with pytest.raises(ValueError, match="outputs add up to inf"):
        model = deep(2, 4)
        with torch.no_grad():
            model.double()[0].weight.fill_(1e300)
            model[2].weight.fill_(1e300)
        fp.synflow(model, torch.ones(1, 4), 0.5)
