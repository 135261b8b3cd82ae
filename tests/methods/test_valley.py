"""Flat directions against an exact projector, and the loss between solutions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.methods.valley import (
    Curve,
    barrier,
    directional_scores,
    find_curve,
    losses_along,
    segment,
)
from fastprune.reporting import plot_losses


class Quadratic(nn.Module):
    """(w - 1)' H (w - 1) / 2 with a singular H; the input scales it."""

    def __init__(self, rank: int, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        factor = torch.randn(12, rank, generator=random, dtype=torch.float64)
        self.register_buffer("hessian", factor @ factor.T)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=random, dtype=torch.float64))

    def forward(self, scale: Tensor) -> Tensor:
        offset = self.weight.flatten() - 1
        return scale * (offset @ self.hessian @ offset) / 2


def first(output: Tensor, target: Any) -> Tensor:
    return output


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_scores_are_those_of_the_exact_projector(rank: int) -> None:
    model = Quadratic(rank)
    unit = F.normalize(model.weight.detach(), dim=1).flatten()
    values, vectors = torch.linalg.eigh(model.hessian)
    null = vectors[:, values.abs() < 1e-9]
    assert null.shape[1] == 12 - rank
    projected = null @ (null.T @ unit)
    expected = (unit * projected).view(4, 3).sum(1)
    batches = [(torch.tensor(0.5), None), (torch.tensor(2.5), None)]
    groups = [{"params": [model.weight], "param_names": ["w"], "prune": True}]
    found = directional_scores(model, batches, first, groups, flatness=1e-9)
    torch.testing.assert_close(found["w"], expected, rtol=1e-7, atol=1e-9)
    assert float(found["w"].sum()) == pytest.approx(float(projected @ projected), abs=1e-9)


def test_a_threshold_on_the_curvature_decides_what_is_flat() -> None:
    model = Quadratic(12)
    model.hessian = torch.diag(10.0 ** -torch.arange(12, dtype=torch.float64))
    unit = F.normalize(model.weight.detach(), dim=1).flatten()
    for flatness, flat in ((1e-2, 10), (1e-5, 7), (0.5, 11)):
        groups = [{"params": [model.weight], "param_names": ["w"], "prune": True}]
        found = directional_scores(
            model, [(torch.tensor(1.0), None)], first, groups, flatness=flatness * 1.001
        )
        expected = unit.square().where(torch.arange(12) >= 12 - flat, 0).view(4, 3).sum(1)
        torch.testing.assert_close(found["w"], expected, rtol=1e-4, atol=1e-6)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


def data(seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 1, 5, 5, generator=random)
    y = (x[:, 0, :2].sum((1, 2)) > 0).long() + (x[:, 0, 3:].sum((1, 2)) > 0).long()
    return list(zip(x.split(16), y.split(16), strict=True))


def trained(seed: int, epochs: int = 40) -> nn.Sequential:
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def test_a_network_is_left_as_it_was() -> None:
    model = trained(0).train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scores = directional_scores(model, data(), F.cross_entropy, num_products=40)
    assert list(scores) == ["0.weight", "4.weight"]
    assert [len(s) for s in scores.values()] == [6, 3]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    total = torch.cat(list(scores.values())).sum()
    assert 0 < float(total) <= 9 + 1e-4  # |P u|^2 of nine unit vectors


def test_more_products_than_directions_change_nothing() -> None:
    model = Quadratic(4)
    batches = [(torch.tensor(1.0), None)]
    few = directional_scores(model, batches, first, groups_of(model), num_products=6)
    many = directional_scores(model, batches, first, groups_of(model), num_products=60)
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-8)


def groups_of(model: Quadratic) -> list[dict[str, Any]]:
    return [{"params": [model.weight], "param_names": ["w"], "prune": True}]


# ---------------------------------------------------------------- between two solutions


def test_the_curve_starts_bends_and_ends_where_it_should() -> None:
    start, bend, end = ({"w": torch.tensor([v])} for v in (0.0, 4.0, 2.0))
    curve = Curve(start, bend, end)
    assert [float(curve.at(t)["w"]) for t in (0, 0.5, 1)] == [0.0, 2.5, 2.0]
    straight = segment(start, end)
    assert [float(straight.at(t)["w"]) for t in (0, 0.25, 1)] == [0.0, 0.5, 2.0]


def test_barrier_is_the_height_above_the_chord() -> None:
    assert barrier(torch.tensor([1.0, 3.0, 2.0])) == 1.5
    assert barrier(torch.tensor([1.0, 0.0, 2.0])) == 0.0


def test_the_loss_of_a_quadratic_along_a_segment() -> None:
    model = Quadratic(12)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    end = {**start, "weight": 2 - start["weight"]}  # mirrored at the minimum
    batches = [(torch.tensor(1.0), None)]
    losses = losses_along(model, segment(start, end), batches, first, num_points=5)
    whole = float(losses[0])
    assert losses.tolist() == pytest.approx([whole, whole / 4, 0, whole / 4, whole], abs=1e-9)
    assert barrier(losses) == pytest.approx(0, abs=1e-9)


def test_a_bent_curve_finds_the_way_around_a_barrier(tmp_path: Path) -> None:
    """Two independent solutions: the segment crosses a ridge, the curve does not."""
    one, other = trained(0), trained(1)
    straight = segment(one.state_dict(), other.state_dict())
    bent = find_curve(
        one, one.state_dict(), other.state_dict(), data(), F.cross_entropy, num_steps=400
    )
    losses = {
        name: losses_along(one, curve, data(), F.cross_entropy, num_points=11)
        for name, curve in (("segment", straight), ("curve", bent))
    }
    assert torch.equal(losses["segment"][0], losses["curve"][0])
    assert barrier(losses["segment"]) > 0.2
    assert barrier(losses["curve"]) < barrier(losses["segment"]) / 3
    picture = tmp_path / "valley.png"
    plot_losses(losses, picture, title="two solutions")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000


def test_statistics_of_norms_are_taken_anew_at_each_point() -> None:
    model = trained(0)
    state = model.state_dict()
    wrong = {**state, "1.running_mean": state["1.running_mean"] + 100}
    right = losses_along(model, segment(state, state), data(), F.cross_entropy, num_points=2)
    again = losses_along(model, segment(wrong, wrong), data(), F.cross_entropy, num_points=2)
    assert torch.equal(right, again)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: directional_scores(m, iter(data()), F.cross_entropy), "list of"),
        (lambda m: directional_scores(m, [], F.cross_entropy), "list of"),
        (lambda m: directional_scores(m, data(), F.cross_entropy, num_products=0), "num_products"),
        (lambda m: directional_scores(m, data(), F.cross_entropy, flatness=1), "flatness"),
        (lambda m: segment(m.state_dict(), nn.Linear(2, 2).state_dict()), "one architecture"),
        (
            lambda m: losses_along(
                m, segment(m.state_dict(), m.state_dict()), data(), F.cross_entropy, num_points=1
            ),
            "num_points",
        ),
    ],
)
def test_wrong_input_is_said(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(network())


def test_the_public_names() -> None:
    assert fp.directional_scores is directional_scores
