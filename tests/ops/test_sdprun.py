"""SDprun's operators: whatever serves a device against the reference, to the bit, and by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops.reference.sdprun import SETTINGS, channel_rows
from tests.ops.gsm_cases import LAYOUTS
from tests.ops.machine import assert_machines_agree, assert_same, bits
from tests.ops.sdprun_cases import (
    CASES,
    VARIANTS,
    Case,
    guard_arguments,
    results,
    step,
)

OPS = torch.ops.fastprune
BY_LABEL = {case.label: case for case in CASES}


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [on(device, v) for v in value] if isinstance(value, list) else value


def built(case: Case, device: str | torch.device = "cpu") -> dict[str, Any]:
    return {key: on(torch.device(device), value) for key, value in case.build().items()}


# ---------------------------------------------------------------- numbers worked by hand


def setting(**values: float) -> Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in SETTINGS]], dtype=torch.float64)


class Walk:
    """One tensor of pruning groups, its rows, stepped by a gradient that is a function of w."""

    def __init__(self, start: list[list[float]], gradient: Callable[[Tensor], Tensor]) -> None:
        self.w = torch.tensor(start, dtype=torch.float64)
        self.v = self.w.clone()
        self.gradient = gradient
        self.progress = torch.zeros(1, 2, dtype=torch.float64)
        self.norms = torch.zeros(len(start), dtype=torch.float64)

    def step(self, **values: float) -> list[float]:
        numbers = setting(**{"lr": 0.25, "c": 1.0, "mu": 0.5, **values})
        OPS.sdprun_threshold_(self.progress, numbers)
        gradient = self.gradient(self.w)
        OPS.sdprun_update_([self.v], [], [self.w], self.norms, [gradient], self.progress, numbers,
                           [0], [0], [0])  # fmt: skip
        return self.w.flatten().tolist()


def valley(w: Tensor) -> Tensor:
    """The gradient of (w1 + w2 - 2)^2 / 2."""
    return (w.sum() - 2).expand_as(w).clone()


def test_t1_a_flat_direction_is_followed_until_a_group_is_zero() -> None:
    walk = Walk([[3.0], [-1.0]], valley)
    expected = {1: (2.75, -0.75), 4: (2.5, -0.5), 9: (2.25, -0.25), 16: (2.0, 0.0),
                17: (1.9692236, 0.0), 18: (1.9470339, 0.0), 20: (1.9200989, 0.0)}  # fmt: skip
    for n in range(1, 21):
        w = walk.step()
        assert float(walk.progress[0, 1]) == pytest.approx(0.25 * math.sqrt(n), rel=1e-14)
        if n in expected:
            assert w == pytest.approx(expected[n], abs=1e-7)
        if n <= 16:
            assert walk.v.flatten().tolist() == pytest.approx([3, -1], abs=1e-12)
            assert sum(w) == pytest.approx(2, abs=1e-12)  # the loss stays 0
        if n == 17:
            assert (sum(w) - 2) ** 2 / 2 == pytest.approx(4.735936e-4, rel=1e-6)
        if n == 18:
            assert walk.v.flatten().tolist() == pytest.approx([3.0076941, -0.9923059], abs=1e-7)
    assert not walk.w[1].signbit().any()


def test_t3_without_a_flat_direction_nothing_is_pruned() -> None:
    walk = Walk([[1.0], [1.0]], valley)
    expected = {1: 0.75, 2: 0.7714466, 3: 0.8062640, 4: 0.8361447, 5: 0.8590554, 10: 0.9126943}
    for n in range(1, 11):
        w = walk.step()
        if n in expected:
            assert w == pytest.approx([expected[n]] * 2, abs=1e-7)


def test_t5_a_falling_learning_rate_revives_nothing() -> None:
    walk = Walk([[3.0], [-1.0]], valley)
    for n in range(1, 200):
        before = float(walk.progress[0, 1])
        w = walk.step(lr=0.25 if n < 20 else 0.0025)
        assert float(walk.progress[0, 1]) > before
        assert n < 16 or w[1] == 0.0


def test_a_steered_threshold_reaches_its_goal_with_the_last_step() -> None:
    progress, numbers = torch.zeros(1, 2).double(), setting(lr=0.3, mu=0.7, total_steps=50, goal=4)
    for n in range(1, 61):
        OPS.sdprun_threshold_(progress, numbers)
        expected = 4 * min(1.0, n / 50) ** 0.7
        assert progress.tolist()[0] == pytest.approx([n, expected], rel=1e-12)
    numbers[0, SETTINGS.index("goal")] = 3.0
    OPS.sdprun_threshold_(progress, numbers)
    assert float(progress[0, 1]) == 4.0  # never back


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 10**6, 10**9])
@pytest.mark.parametrize(("lr", "c", "mu"), [(0.1, 0.1, 0.6), (1e-6, 5.0, 0.501), (3.0, 1.0, 0.99),
                                             (0.1, 1.0, 2.5), (0.0, 1.0, 0.6)])  # fmt: skip
def test_the_threshold_against_exact_arithmetic(n: int, lr: float, c: float, mu: float) -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    progress = torch.tensor([[n - 1.0, 0.0]], dtype=torch.float64)
    OPS.sdprun_threshold_(progress, setting(lr=lr, c=c, mu=mu, momentum=0.9))
    power = Decimal(mu)
    growth = Decimal(n) ** power - (Decimal(n - 1) ** power if n > 1 else 0)
    rate = Decimal(lr / (1 - 0.9)) ** (Decimal(0.5 + mu)) if lr else Decimal(0)
    assert progress[0, 0] == n
    assert float(progress[0, 1]) == pytest.approx(float(Decimal(c) * rate * growth), rel=1e-14)


def shrunk(v: Tensor, threshold: float, scale: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and norms of a matrix of rows after a step without a gradient."""
    progress = torch.tensor([[1.0, threshold]], dtype=torch.float64)
    w, norms = torch.full_like(v, torch.nan), v.new_zeros(len(v), dtype=torch.float64)
    OPS.sdprun_update_([v.clone()], [], [w], norms, [v.new_empty(0)], progress,
                       setting(scale=float(scale)), [0], [0], [0])  # fmt: skip
    return w, norms


def test_the_group_soft_threshold() -> None:
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    w, norms = shrunk(v, 1.0)
    assert w.flatten().tolist() == pytest.approx([2.4, 3.2, 0, 0], rel=1e-15)
    assert norms.tolist() == [5.0, 0.5]
    for tau in (5.0, 5.5):
        w, _ = shrunk(v, tau)
        assert torch.equal(bits(w), torch.zeros(2, 2, dtype=torch.int64))
    w, _ = shrunk(v, 5.0 * (1 - 2.0**-52))
    assert bool((w[0] != 0).all()) and not w[1].any()
    special = torch.tensor([[-0.0, 0.0], [-0.0, 1e-45]])
    assert torch.equal(bits(shrunk(special, 0.0)[0]), bits(special))
    assert torch.equal(bits(shrunk(special, 1e-60)[0][0]), bits(torch.zeros(2)))
    scaled, _ = shrunk(v, 1 / math.sqrt(2), scale=True)
    torch.testing.assert_close(scaled, shrunk(v, 1.0)[0], rtol=1e-15, atol=0)


def test_nan_and_infinity_never_become_zero() -> None:
    v = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [-torch.inf, torch.nan], [1.0, 0.0]])
    w, norms = shrunk(v, 2.0)
    assert w[0].isnan().all() and norms[0].isnan()
    assert w[1].tolist() == [1.0, math.inf] and norms[1] == math.inf
    assert w[2].isnan().all()
    assert w[3].tolist() == [0.0, 0.0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 300), st.floats(0, 30), st.integers(0, 1000))
def test_the_invariants_of_a_proximal_map(groups: int, size: int, tau: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, groups, size, generator=random, dtype=torch.float64)
    wa, norms = shrunk(a, tau)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(norms, a.norm(dim=1), **close)
    assert float((wa - shrunk(b, tau)[0]).norm()) <= float((a - b).norm()) * (1 + 1e-12)
    torch.testing.assert_close(wa * norms[:, None], a * wa.norm(dim=1)[:, None], **close)
    ball = a * (tau / norms.clamp(min=1e-300)).clamp(max=1)[:, None]
    torch.testing.assert_close(wa + ball, a, **close)  # Moreau
    turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q
    if not bool(((norms - tau).abs() < 1e-9).any()):
        torch.testing.assert_close(shrunk(a @ turn, tau)[0], wa @ turn, rtol=1e-9, atol=1e-9)
    order = torch.randperm(groups, generator=random)
    assert torch.equal(shrunk(a[order], tau)[0], wa[order])
    torch.testing.assert_close(shrunk(4 * a, 4 * tau)[0], 4 * wa, rtol=0, atol=0)
    if size == 1:
        soft = a.sign() * (a.abs() - tau).clamp(min=0)
        torch.testing.assert_close(wa, soft, **close)


def test_the_order_of_a_sum_is_the_written_one() -> None:
    """Against plain Python floats, with numbers whose sum depends on the order."""
    for size in (1, 5, 127, 128, 129, 300, 1000):
        random = torch.Generator().manual_seed(size)
        row = torch.randn(size, generator=random, dtype=torch.float64).exp()
        lanes = [0.0] * 128
        for i, x in enumerate(row.tolist()):
            lanes[i % 128] += x * x
        half = 64
        while half:
            lanes = [lanes[j] + lanes[j + half] for j in range(half)]
            half //= 2
        assert float(shrunk(row[None], 0.0)[1]) == math.sqrt(lanes[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_channels_by_dimension(layout: str, columns: int) -> None:
    t = LAYOUTS[layout](torch.arange(6 * 4 * 2 * 3.0).view(6, 4, 2, 3))
    found = channel_rows(t, columns)
    if columns == 0:
        expected = [t[j].flatten() for j in range(6)]
    else:
        of_group = 6 // columns
        expected = [
            t[a * of_group : (a + 1) * of_group, c].flatten()
            for a in range(columns)
            for c in range(4)
        ]
    assert [r.sort().values.tolist() for r in found] == [e.sort().values.tolist() for e in expected]


def test_coupled_tensors_share_a_norm_and_a_factor() -> None:
    """Norms 5 and 13 over (row, bias): one group shrinks by 2/5, the other by 2/13."""
    row = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    bias = torch.tensor([4.0, 12.0], dtype=torch.float64)
    weights = [torch.empty_like(row), torch.empty_like(bias)]
    norms, none = torch.zeros(2, dtype=torch.float64), row.new_empty(0)
    progress = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    OPS.sdprun_update_([row, bias], [], weights, norms, [none, none], progress, setting(),
                       [0, 0], [0, 0], [0, 0])  # fmt: skip
    assert norms.tolist() == [5, 13]
    assert weights[0].flatten().tolist() == pytest.approx([3 * 0.6, 5 * 11 / 13])
    assert weights[1].tolist() == pytest.approx([4 * 0.6, 12 * 11 / 13])


@pytest.mark.parametrize(
    ("min_groups", "expected"),
    [
        (0, [0, 0, 0, 0]),
        (1, [0, 2, 0, 0]),
        (2, [0, 2, 0, -2]),
        (3, [1, 2, 0, -2]),
        (9, [1, 2, 1, -2]),
    ],
)
def test_the_guard_keeps_the_largest_ties_by_index(min_groups: int, expected: list[int]) -> None:
    v = torch.tensor([[1.0], [2.0], [1.0], [-2.0]])
    w, norms = shrunk(v, 2.0)
    progress = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    numbers = setting(min_groups=min_groups)
    arguments = [[w], [v], norms, progress, numbers, [0], [0], [0], [0], [4]]
    OPS.sdprun_guard_(*arguments, torch.ones(()))
    assert not w.any()
    OPS.sdprun_guard_(*arguments, torch.zeros(()))
    assert w.flatten().tolist() == expected


def test_the_guard_touches_no_layer_that_keeps_enough() -> None:
    v = torch.tensor([[1.0], [2.0], [1.0], [-2.0]])
    w, norms = shrunk(v, 1.5)
    progress = torch.tensor([[1.0, 1.5]], dtype=torch.float64)
    OPS.sdprun_guard_([w], [v], norms, progress, setting(min_groups=2), [0], [0], [0], [0], [4])
    assert w.flatten().tolist() == [0, 0.5, 0, -0.5]


def test_the_guard_of_a_part_of_a_layer_looks_at_the_whole() -> None:
    """The rows of this process are numbers 2 and 3 of a layer of 4, behind a layer of 3."""
    v = torch.tensor([[1.0], [3.0]])
    progress = torch.tensor([[1.0, 9.0]], dtype=torch.float64)
    for norms, expected in (([2.0, 4.0], [0, 0]), ([2.0, 3.0], [0, 0]), ([2.0, 1.0], [0, 3])):
        everywhere = torch.tensor([7.0, 7, 7, *norms, 1, 3], dtype=torch.float64)
        w = torch.zeros_like(v)
        OPS.sdprun_guard_([w], [v], everywhere, progress, setting(min_groups=1), [0], [5], [0],
                          [3], [4])  # fmt: skip
        assert w.flatten().tolist() == expected


# ---------------------------------------------------------------- against the reference and SGD


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_the_guard_may_follow_in_the_same_call(case: Case, device: torch.device) -> None:
    ours, expected = built(case, device), built(case, device)
    OPS.sdprun_update_(**ours, guard=True)
    OPS.sdprun_update_(**expected)
    OPS.sdprun_guard_(**guard_arguments(expected))
    assert_same(results(ours), results(expected))
    reference = built(case, device)
    with fp.use_reference():
        OPS.sdprun_update_(**reference, guard=True)
    assert_same(results(ours), results(reference))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_bits_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    ours, expected = built(case, device), built(case, device)
    with fp.use_reference():
        OPS.sdprun_threshold_(expected["progress"], expected["settings"], expected["found_inf"])
    threshold = built(case, device)["progress"]
    OPS.sdprun_threshold_(threshold, ours["settings"], ours["found_inf"])
    torch.testing.assert_close(threshold, expected["progress"], rtol=1e-14, atol=0)
    expected["progress"].copy_(threshold)  # other logarithms may differ in the last place
    ours["progress"].copy_(threshold)
    for arguments, mode in ((ours, torch.no_grad), (expected, fp.use_reference)):
        with mode():
            OPS.sdprun_update_(**arguments)
            OPS.sdprun_guard_(**guard_arguments(arguments))
    assert_same(results(ours), results(expected))
    before = built(case, device)
    for name in ("gradients", "settings"):
        pairs = zip(ours[name], before[name], strict=True)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)
    if case.found_inf:
        assert_same(results(ours), results(before))


def test_cases_are_what_they_say() -> None:
    assert len(BY_LABEL) == len(CASES) >= 40
    assert {v for case in CASES for v in case.variants} == set(VARIANTS)
    arguments = step(BY_LABEL["every variant in one call"].build())
    kept = torch.cat([
        channel_rows(w, columns).any(1)
        for w, columns in zip(arguments["weights"], arguments["column_groups"], strict=True)
    ])  # fmt: skip
    assert 0.3 < kept.float().mean() < 0.9


@pytest.mark.parametrize("label", ["c 0", "c 0, fp64", "momentum", "maximize"])
def test_without_a_threshold_the_bits_are_those_of_sgd(label: str) -> None:
    arguments = BY_LABEL[label].build()
    arguments["progress"].zero_()
    for z in arguments["momenta"]:
        z.zero_()
    options = VARIANTS[label.split(",")[0]]
    theirs = [torch.nn.Parameter(w.clone()) for w in arguments["weights"]]
    sgd = torch.optim.SGD(theirs, options["lr"], options.get("momentum", 0), foreach=False,
                          fused=False, maximize=bool(options.get("maximize")))  # fmt: skip
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        for i, parameter in enumerate(theirs):
            gradient = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            arguments["gradients"][i], parameter.grad = gradient, gradient.clone()
        OPS.sdprun_update_(**arguments)
        sgd.step()
        for w, v, expected in zip(arguments["weights"], arguments["accumulators"], theirs,
                                  strict=True):  # fmt: skip
            assert torch.equal(w, expected) and torch.equal(v, expected)


# ---------------------------------------------------------------- machine and graph


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("label", ["big", "big, bf16", "every variant in one call"])
def test_thread_counts_and_a_second_run_give_the_same_bits(label: str) -> None:
    expected = None
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        arguments = step(built(BY_LABEL[label]))
        expected = expected or arguments
        assert_same(results(arguments), results(expected))


NATIVE = fp.build_info().operators["sdprun_update_"]["CPU"] != "reference"


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.sdprun_cases")


def test_streamed_weights_are_those_of_the_reference() -> None:
    """A call of 32 MB and more writes past the caches; rows begin anywhere in a line."""
    v = torch.randn(8_600, 1_001)
    gradients = torch.randn_like(v)
    progress = torch.tensor([[1.0, 31.6]], dtype=torch.float64)
    found = []
    for mode in (torch.no_grad, fp.use_reference):
        accumulator, weight = v.clone(), torch.full_like(v, torch.nan)
        norms = torch.zeros(len(v), dtype=torch.float64)
        with mode():
            OPS.sdprun_update_([accumulator], [], [weight], norms, [gradients], progress,
                               setting(lr=0.1), [0], [0], [0])  # fmt: skip
        found.append((accumulator, weight, norms))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(bits(ours), bits(expected))
    assert 0.1 < float((found[0][1][:, 0] == 0).float().mean()) < 0.9


OPCHECKED = [
    "momentum",
    "plain, fp64",
    "every variant in one call",
    "bf16, channels_last",
    "outside only, without copies",
    "some have no gradient",
    "found_inf 1",
]


@pytest.mark.parametrize("label", OPCHECKED)
def test_opcheck(label: str, device: torch.device) -> None:
    arguments = built(BY_LABEL[label], device)
    table = arguments["progress"], arguments["settings"], arguments["found_inf"]
    torch.library.opcheck(OPS.sdprun_threshold_.default, table)
    torch.library.opcheck(OPS.sdprun_update_.default, (), arguments)
    torch.library.opcheck(OPS.sdprun_guard_.default, (), guard_arguments(arguments))


@pytest.mark.parametrize("label", ["every variant in one call", "bf16, channels_last"])
def test_compiled_without_a_break_gives_the_same(label: str, device: torch.device) -> None:
    torch.compiler.reset()
    ours, expected = built(BY_LABEL[label], device), built(BY_LABEL[label], device)

    def two_steps(arguments: dict[str, Any]) -> None:
        step(arguments)
        step(arguments)

    two_steps(expected)
    torch.compile(two_steps, fullgraph=True, backend="aot_eager")(ours)
    assert_same(results(ours), results(expected))


def small() -> dict[str, Any]:
    return {
        "accumulators": [torch.ones(2, 3), torch.ones(2)],
        "momenta": [],
        "weights": [torch.ones(2, 3), torch.ones(2)],
        "norms": torch.zeros(2, dtype=torch.float64),
        "gradients": [torch.ones(2, 3), torch.ones(2)],
        "progress": torch.zeros(1, 2, dtype=torch.float64),
        "settings": setting(lr=0.1),
        "rows": [0, 0],
        "first_groups": [0, 0],
        "column_groups": [0, 0],
    }


UNSAFE: list[tuple[dict[str, Any], str]] = [
    ({"accumulators": [torch.ones(2, 3)]}, "one entry per weight"),
    ({"momenta": [torch.ones(2, 3)]}, "one entry per weight"),
    ({"first_groups": [0]}, "one entry per weight"),
    ({"rows": [0, 1]}, r"rows\[1\] is not a row"),
    ({"settings": setting(lr=0.1).float()}, "float64"),
    ({"settings": torch.zeros(1, 3, dtype=torch.float64)}, "float64 matrices"),
    ({"progress": torch.zeros(2, 2, dtype=torch.float64)}, "equally many"),
    ({"norms": torch.zeros(2)}, "norms must be"),
    ({"norms": torch.zeros(1, dtype=torch.float64)}, "room for its channels"),
    ({"first_groups": [1, -1]}, "room for its channels"),
    ({"accumulators": [torch.ones(3, 2), torch.ones(2)]}, r"accumulators\[0\] must"),
    ({"accumulators": [torch.ones(0), torch.ones(2)]}, r"accumulators\[0\] must"),
    ({"accumulators": [torch.ones(2, 3).half(), torch.ones(2)]}, r"accumulators\[0\] must"),
    ({"gradients": [torch.ones(3, 2).mT, torch.ones(2)]}, r"gradients\[0\] must"),
    ({"gradients": [torch.ones(2, 3).double(), torch.ones(2)]}, r"gradients\[0\] must"),
    ({"momenta": [torch.ones(2, 3), torch.ones(3)]}, r"momenta\[1\] must"),
    (
        {"column_groups": [1, 0], "norms": torch.zeros(3).double()},
        r"weights\[1\] must have as many channels",
    ),
    ({"column_groups": [0, 1]}, r"weights\[1\] must .*dimension of channels"),
    ({"column_groups": [3, 0]}, r"weights\[0\] must have its convolution groups"),
]


@pytest.mark.skipif(not NATIVE, reason="the reference trusts its callers")
@pytest.mark.parametrize(("change", "message"), UNSAFE, ids=str)
def test_what_would_be_unsafe_memory_access_is_refused(
    change: dict[str, Any], message: str
) -> None:
    arguments = {**small(), **change}
    with pytest.raises(RuntimeError, match=message):
        OPS.sdprun_update_(**arguments)
    assert all(bool((w == 1).all()) for w in arguments["weights"])


@pytest.mark.skipif(not NATIVE, reason="the reference trusts its callers")
def test_a_layer_outside_the_norms_is_refused() -> None:
    arguments = guard_arguments({**small(), "found_inf": None})
    for change in ({"layer_firsts": [1, 1]}, {"layer_sizes": [3, 3]}, {"layer_firsts": [-1, -1]}):
        with pytest.raises(RuntimeError, match="must lie in norms"):
            OPS.sdprun_guard_(**{**arguments, **change})
    with pytest.raises(RuntimeError, match="one entry per weight"):
        OPS.sdprun_guard_(**{**arguments, "layer_sizes": [2]})
