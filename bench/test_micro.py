"""Micro-benchmarks on small inputs: `pytest bench/test_micro.py` (a part of `make bench`).

They show the fixed cost of a call, which the large cases hide. Nothing here asserts a time.
"""

from typing import Any

import pytest
import torch

import fastprune as fp

pytest.importorskip("pytest_benchmark", reason="micro-benchmarks need pytest-benchmark")

SHAPES = {
    "one element x 161": [(1,)] * 161,
    "1K": [(1 << 10,)],
    "64K": [(1 << 16,)],
    "1M": [(1 << 20,)],
}


@pytest.fixture(params=SHAPES)
def pairs(request: pytest.FixtureRequest) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights, gradients = (
        [torch.randn(shape, generator=generator) for shape in SHAPES[request.param]]
        for _ in range(2)
    )
    return weights, gradients


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_tenth(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors) // 10


def test_select_threshold(benchmark: Any, pairs: Any) -> None:
    weights, gradients = pairs
    k = torch.tensor(a_tenth(weights))
    benchmark(torch.ops.fastprune.select_threshold, weights, gradients, k, "saliency")


def test_select_masks(benchmark: Any, pairs: Any) -> None:
    weights, gradients = pairs
    chosen = fp.global_topk(weights, a_tenth(weights), score="saliency", gradients=gradients)
    benchmark(
        torch.ops.fastprune.select_masks,
        weights,
        gradients,
        chosen.threshold,
        chosen.tie_end,
        "saliency",
    )


def test_block_scores(benchmark: Any, pairs: Any) -> None:
    weights, gradients = (
        [t.view(-1, 64) if t.numel() % 64 == 0 else t.view(1, 1) for t in tensors]
        for tensors in pairs
    )
    benchmark(torch.ops.fastprune.block_scores, weights, gradients, "saliency", [16, 1])


def test_global_topk_masks(benchmark: Any, pairs: Any) -> None:
    weights, gradients = pairs
    benchmark(
        fp.global_topk_masks, weights, a_tenth(weights), score="saliency", gradients=gradients
    )


def test_rival_cat_and_kthvalue(benchmark: Any, pairs: Any) -> None:
    weights, gradients = pairs
    k = max(sum(w.numel() for w in weights) - a_tenth(weights) + 1, 1)

    def rival() -> torch.Tensor:
        scores = torch.cat([(w * g).abs_() for w, g in zip(weights, gradients, strict=True)])
        return scores.kthvalue(k).values

    benchmark(rival)
