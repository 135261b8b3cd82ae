"""Scores over two gloo processes: the mean of both, and the same masks in both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastprune as fp
from tests.processes import of, spawned

from .networks import network

WORLD = 2


def share(rank: int, name: str = "cnn") -> tuple[nn.Module, Any, Any]:
    """The same weights in each process, other data."""
    model, batches, loss_fn = network(name, torch.float32, num_batches=4 * WORLD)
    return model, batches[4 * rank : 4 * (rank + 1)], loss_fn


def found(mesh: Any, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    model, batches, loss_fn = share(rank)
    kept: dict[str, Any] = {"min_kept_per_layer": 1}
    torch.manual_seed(rank)
    results: dict[str, Any] = {
        "scores": fp.scores("prospr", model, batches, loss_fn),
        "prospr": fp.prospr(model, batches, loss_fn, 0.7),
        "alone": fp.prospr(model, batches, loss_fn, 0.7, across_ranks=False),
        "channels": fp.prospr(model, batches, loss_fn, 0.5, granularity="channel"),
        "snip": fp.snip(model, batches, loss_fn, 0.7),
        "iter_snip": fp.iter_snip(model, batches, loss_fn, 0.7, rounds=3),
        "force": fp.force(model, batches, loss_fn, 0.7, rounds=3),
        "grasp": fp.grasp(model, batches, loss_fn, 0.7, **kept),
        "random": fp.random(model, 0.7),
        "dirichlet": fp.dirichlet(*share(rank, "resnet20"), kl_weight=0.01).concentration,
    }
    return {name: dict(value) for name, value in results.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return of({WORLD: spawned(WORLD, folder, {"found": found})}, WORLD, "found")


def test_masks_are_equal_on_all_ranks(results: list[dict[str, Any]]) -> None:
    first, second = results
    for name in first.keys() - {"alone"}:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][n], second[name][n]) for n in first[name]), name


def test_without_averaging_each_rank_has_its_own(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        model, batches, loss_fn = share(rank)
        expected = fp.prospr(model, batches, loss_fn, 0.7)
        assert fp.MaskSet(result["alone"]) == expected
        assert fp.MaskSet(result["prospr"]) != expected


def test_scores_are_the_mean(results: list[dict[str, Any]]) -> None:
    both = []
    for rank in range(WORLD):
        model, batches, loss_fn = share(rank)
        both.append(fp.scores("prospr", model, batches, loss_fn))
    for name, score in results[0]["scores"].items():
        mean = (both[0][name] + both[1][name]) / 2
        assert torch.allclose(score, mean, rtol=1e-3, atol=1e-3 * float(mean.abs().max()))


def test_the_posterior_is_that_of_all_data(results: list[dict[str, Any]]) -> None:
    model, first, loss_fn = share(0, "resnet20")
    _, second, _ = share(1, "resnet20")
    both = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(first, second, strict=True)
    ]
    expected = fp.dirichlet(model, both, loss_fn, kl_weight=0.01).concentration
    alone = fp.dirichlet(model, first, loss_fn, kl_weight=0.01).concentration
    for name, phi in results[0]["dirichlet"].items():
        assert torch.allclose(phi, expected[name], rtol=1e-4)
        assert not torch.allclose(phi, alone[name], rtol=1e-4)
