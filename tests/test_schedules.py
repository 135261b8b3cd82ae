"""Sparsity by step: the ends exactly, the way between by hand."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastprune.optim import GSM
from fastprune.schedules import Schedule, constant, cubic, linear


def test_constant() -> None:
    assert [constant(0.9)(step) for step in (0, 1, 10**9)] == [0.9] * 3


def test_linear_and_cubic_by_hand() -> None:
    assert [linear(0.8, 4)(step) for step in range(6)] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 0.8]
    )
    ramp = cubic(0.8, 30, initial=0.4, first_step=10)
    expected = {0: 0.4, 10: 0.4, 15: 0.8 - 0.4 * 0.75**3, 20: 0.75, 30: 0.8, 99: 0.8}
    assert {step: ramp(step) for step in expected} == pytest.approx(expected)
    assert ramp(30) == 0.8  # exactly what was typed


@pytest.mark.parametrize("make", [linear, cubic])
def test_it_never_falls_and_stays_between_the_ends(make: Callable[..., Schedule]) -> None:
    values = [make(0.97, 50, initial=0.1, first_step=7)(step) for step in range(60)]
    assert values == sorted(values) and (values[0], values[-1]) == (0.1, 0.97)


def test_an_optimizer_follows_it_and_is_pickled_with_it() -> None:
    weight = torch.nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([weight], 0.1, sparsity=linear(0.5, 5))
    counts = []
    for _ in range(7):
        counts.append(optimizer.num_kept())
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert counts == [100, 90, 80, 70, 60, 50, 50]
    assert pickle.loads(pickle.dumps(optimizer)).num_kept() == 50
    assert optimizer.finish().num_kept == 50


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: constant(90), ValueError, r"must be in \[0, 1\].*90% is 0.9"),
        (lambda: constant("0.9"), TypeError, "must be a number"),
        (lambda: linear(float("nan"), 5), ValueError, "final must be in"),
        (lambda: linear(0.9, -1), ValueError, "0 <= first_step <= last_step"),
        (lambda: cubic(0.9, 5, first_step=6), ValueError, "got 6 and 5"),
        (lambda: cubic(0.9, 5.0), TypeError, "last_step must be an integer, got 5.0"),
        (lambda: cubic(0.9, 5, initial=-0.1), ValueError, "initial must be in"),
    ],
)
def test_wrong_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
