"""The operator that runs a region of a network, and the reference that defines it."""

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.ops import reference
from fastprune.ops.reference.sparse import (
    CEIL_MODE,
    COLUMNS,
    COUNT_INCLUDE_PAD,
    FLATTEN,
    Activation,
    Kernel,
    Kind,
    Step,
    dense_rows,
    sparse_rows,
)

from .sparse_cases import FUNCTIONS, KEYS, convolutions, convolve, packed, program

OPERATORS = torch.ops.fastprune
TOLERANCE = 1e-5  # of the sum of the absolute terms


@pytest.fixture(params=["operator", "reference"])
def network(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What the dispatcher runs, and the specification; prepared networks are freed after a test."""
    if request.param == "reference":
        yield reference.sparse_network
        return
    keys: list[int] = []

    def call(inputs: Any, weights: Any, code: Any, key: int) -> Any:
        keys.append(key)
        return OPERATORS.sparse_network(inputs, weights, code, key)

    yield call
    for key in keys:
        OPERATORS.sparse_release(torch.empty(0), key)


def run(network: Any, inputs: list[Tensor], weights: list[Tensor], *steps: Step) -> Tensor:
    """The one result of steps whose last but output fills the slot that leaves."""
    code = program(*steps, Step(Kind.OUTPUT, first=steps[-1].out))
    (result,) = network(inputs, weights, code, next(KEYS))
    return result


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_program_row_has_the_18_columns_of_the_operator() -> None:
    assert COLUMNS == 18
    assert [Step._fields[i] for i in (0, 4, 13, 14, 15, 16)] == [
        "kind", "weights", "groups", "activation", "kernel", "flags",
    ]  # fmt: skip


def test_rows_by_hand() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    values, columns, row_starts = sparse_rows(dense)
    assert values.tolist() == [2, -1, 5]
    assert columns.tolist() == [1, 3, 0] and columns.dtype == torch.int32
    assert row_starts.tolist() == [0, 2, 2, 3] and row_starts.dtype == torch.int32
    assert torch.equal(dense_rows(values, columns, row_starts, 4), dense)
    nothing = sparse_rows(torch.zeros(2, 3))
    assert torch.equal(dense_rows(*nothing, 3), torch.zeros(2, 3))


def test_a_convolution_by_hand(network: Any) -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
    # One output, taps (0, 0) and (1, 1) of 2x2: x[i, j] * 10 - x[i + 1, j + 1] + 0.5
    weights = [
        torch.tensor([10.0, -1.0]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([0.5]),
    ]
    step = Step(Kind.CONV, 1, 0, weights=0, kernel_height=2, kernel_width=2)
    got = run(network, [x], weights, step)
    assert got.tolist() == [[[[5.5, 14.5], [32.5, 41.5]]]]


@pytest.mark.parametrize("part", range(10))
def test_random_convolutions(part: int, network: Any) -> None:
    kernels = list(Kernel)
    for number, case in enumerate(convolutions(50, seed=part)):
        got, expected, size = convolve(case, kernels[number % 4], network)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert got.shape == expected.shape
        excess = (got.double() - expected).abs() - TOLERANCE * size.clamp_min(0.1)
        assert excess.numel() == 0 or excess.max() <= 0, (case, kernels[number % 4])


@pytest.mark.parametrize("threads_used", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 16, 31])
def test_equal_bits_with_any_number_of_threads_and_on_a_second_run(
    batch: int, threads_used: int, threads: None
) -> None:
    torch.set_num_threads(1)
    x = image(batch, 24, 13, 11)
    weight = image(40, 24, 3, 3, seed=1) * (image(40, 24, 3, 3, seed=2) > 1)
    weights = packed(weight, image(40))
    step = Step(Kind.CONV, 1, 0, -1, 0, 3, 3, pad_height=1, pad_width=1)
    code, key = program(step, Step(Kind.OUTPUT, first=1)), next(KEYS)
    (first,) = OPERATORS.sparse_network([x], weights, code, key)
    torch.set_num_threads(threads_used)
    for _ in range(2):
        (again,) = OPERATORS.sparse_network([x], weights, code, key)
        assert torch.equal(first, again)
    OPERATORS.sparse_release(torch.empty(0), key)


def test_linear(network: Any) -> None:
    x, weight, bias = image(5, 30), image(7, 30, seed=1), image(7, seed=2)
    weight[weight < 0.5] = 0
    step = Step(Kind.LINEAR, 1, 0, weights=0, activation=Activation.RELU)
    code = program(step, Step(Kind.OUTPUT, first=1, flags=FLATTEN))
    (got,) = network([x], packed(weight, bias), code, next(KEYS))
    torch.testing.assert_close(got, F.relu(F.linear(x, weight, bias)))
    whole = run(network, [x[:, :, None, None]], packed(weight, bias), step)
    assert torch.equal(whole, got[:, :, None, None])


@pytest.mark.parametrize("height", [5, 8, 13])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation"),
    [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 3, 1, 1), (3, 2, 1, 2)],
)
def test_pools(
    size: int, stride: int, padding: int, dilation: int, ceil_mode: bool, height: int, network: Any
) -> None:
    x = image(2, 5, height, height + 3) - 2  # a pad of 0 would win a maximum
    numbers = (size, size, stride, stride, padding, padding, dilation, dilation)
    step = Step(Kind.MAX_POOL, 1, 0, -1, -1, *numbers, flags=CEIL_MODE * ceil_mode)
    expected = F.max_pool2d(x, size, stride, padding, dilation, ceil_mode)
    assert torch.equal(run(network, [x], [], step), expected)
    if dilation > 1:
        return
    for count_include_pad in (False, True):
        flags = CEIL_MODE * ceil_mode + COUNT_INCLUDE_PAD * count_include_pad
        step = Step(Kind.AVERAGE_POOL, 1, 0, -1, -1, *numbers, flags=flags)
        expected = F.avg_pool2d(x, size, stride, padding, ceil_mode, count_include_pad)
        torch.testing.assert_close(run(network, [x], [], step), expected)


@pytest.mark.parametrize("batch", [1, 3, 16, 19])
def test_the_other_steps(batch: int, network: Any) -> None:
    x, y = image(batch, 6, 5, 7), image(batch, 6, 5, 7, seed=1)
    gate, scale, shift = image(batch, 6, 1, 1), image(6, seed=2), image(6, seed=3)
    pooled = run(network, [x], [], Step(Kind.GLOBAL_AVERAGE_POOL, 1, 0))
    torch.testing.assert_close(pooled, x.mean((2, 3), keepdim=True))
    assert torch.equal(run(network, [x, y], [], Step(Kind.CONCAT, 2, 0, 1)), torch.cat([x, y], 1))
    wide = torch.cat([y, x, y], 1)
    assert torch.equal(
        run(network, [x, wide], [], Step(Kind.CONCAT, 2, 0, 1)), torch.cat([x, wide], 1)
    )
    for number, function in FUNCTIONS.items():
        for step, inputs, before in (
            (Step(Kind.ADD, 2, 0, 1, activation=number), [x, y], x + y),
            (Step(Kind.SCALE, 2, 0, 1, activation=number), [x, gate], x * gate),
            (
                Step(Kind.AFFINE, 1, 0, weights=0, activation=number),
                [x],
                x * scale[:, None, None] + shift[:, None, None],
            ),
            (Step(Kind.AFFINE, 1, 0, activation=number), [x], x),
        ):
            got = run(network, inputs, [scale, shift], step)
            torch.testing.assert_close(got, function(before))


def block() -> tuple[nn.Module, list[Tensor], list[int]]:
    """A bottleneck with a strided shortcut, a pool, and two results."""
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 16, 3, 2, 1),
            "reduce": nn.Conv2d(16, 8, 1),
            "middle": nn.Conv2d(8, 8, 3, 2, 1),
            "expand": nn.Conv2d(8, 24, 1),
            "shortcut": nn.Conv2d(16, 24, 1, 2),
            "last": nn.Linear(24, 5),
        }
    ).requires_grad_(False)
    for layer in layers.values():
        layer.weight[torch.rand_like(layer.weight) < 0.7] = 0
    weights = [t for layer in layers.values() for t in packed(layer.weight, layer.bias)]
    relu = {"activation": Activation.RELU}
    strided = (3, 3, 2, 2, 1, 1)
    code = program(
        Step(Kind.CONV, 1, 0, -1, 0, *strided, **relu),
        Step(Kind.MAX_POOL, 2, 1, -1, -1, *strided),
        Step(Kind.CONV, 3, 2, -1, 4, **relu),
        Step(Kind.CONV, 4, 3, -1, 8, *strided, **relu),
        Step(Kind.CONV, 5, 2, -1, 16, 1, 1, 2, 2),
        Step(Kind.CONV, 6, 4, 5, 12, **relu),
        Step(Kind.OUTPUT, first=6),
        Step(Kind.GLOBAL_AVERAGE_POOL, 7, 6),
        Step(Kind.LINEAR, 8, 7, -1, 20),
        Step(Kind.OUTPUT, first=8, flags=FLATTEN),
        Step(Kind.OUTPUT, first=0),
    )
    return layers, weights, code


def block_by_torch(layers: Any, x: Tensor) -> list[Tensor]:
    stem = F.max_pool2d(F.relu(layers["stem"](x)), 3, 2, 1)
    inner = F.relu(layers["middle"](F.relu(layers["reduce"](stem))))
    features = F.relu(layers["expand"](inner) + layers["shortcut"](stem))
    return [features, layers["last"](features.mean((2, 3))), x]


def test_a_block_of_layers_with_other_sizes_under_one_key(network: Any) -> None:
    layers, weights, code = block()
    key = next(KEYS)
    for seed, shape in enumerate(
        [(1, 32, 32), (2, 29, 35), (16, 32, 32), (21, 17, 9), (1, 32, 32)]
    ):
        x = image(shape[0], 3, *shape[1:], seed=seed)
        if seed == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        got = network([x], weights, code, key)
        for mine, theirs in zip(got, block_by_torch(layers, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert got[2].data_ptr() != x.data_ptr()


def test_results_are_not_overwritten_by_the_next_call() -> None:
    _, weights, code = block()
    key = next(KEYS)
    first = OPERATORS.sparse_network([image(2, 3, 16, 16)], weights, code, key)
    copies = [t.clone() for t in first]
    OPERATORS.sparse_network([image(2, 3, 16, 16, seed=9)], weights, code, key)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    OPERATORS.sparse_release(torch.empty(0), key)


def test_a_released_key_and_an_unknown_one_can_be_released_again() -> None:
    _, weights, code = block()
    key, x = next(KEYS), image(1, 3, 16, 16)
    before = OPERATORS.sparse_network([x], weights, code, key)
    for _ in range(2):
        OPERATORS.sparse_release(torch.empty(0), key)
    after = OPERATORS.sparse_network([x], weights, code, key)  # prepared anew
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    OPERATORS.sparse_release(torch.empty(0), key)


@pytest.mark.parametrize("profile", [OPERATORS.sparse_profile, reference.sparse_profile])
def test_a_profile_has_the_seconds_of_every_step(profile: Any) -> None:
    _, weights, code = block()
    key, x = next(KEYS), image(4, 3, 64, 64)
    seconds = []
    for _ in range(3):
        start = perf_counter()
        each = profile([x], weights, code, key)
        assert each.sum() <= perf_counter() - start
        seconds.append(each)
    assert all(s.dtype == torch.float64 and s.shape == (len(code) // COLUMNS,) for s in seconds)
    assert all((s >= 0).all() and s.sum() > 0 for s in seconds)
    OPERATORS.sparse_release(torch.empty(0), key)


def test_an_empty_batch(network: Any) -> None:
    _, weights, code = block()
    got = network([image(0, 3, 16, 16)], weights, code, next(KEYS))
    assert [tuple(t.shape) for t in got] == [(0, 24, 2, 2), (0, 5), (0, 3, 16, 16)]


def test_non_finite_inputs_reach_only_what_reads_them(network: Any) -> None:
    weight = torch.zeros(2, 2, 1, 1)
    weight[0, 0] = weight[1, 1] = 1
    x = torch.zeros(1, 2, 3, 3)
    x[0, 0, 1, 1], x[0, 1, 0, 0] = torch.nan, torch.inf
    step = Step(Kind.CONV, 1, 0, weights=0)
    got = run(network, [x], packed(weight, torch.zeros(2)), step)
    assert got.isnan().sum() >= 1 and got[0, 0, 1, 1].isnan() and got[0, 1, 0, 0] == torch.inf
    if network is not reference.sparse_network:  # zeros are skipped, not multiplied
        assert torch.equal(got[0, 1].isinf(), x[0, 1].isinf())


def test_opcheck() -> None:
    _, weights, code = block()
    arguments = ([image(2, 3, 18, 20)], weights, code, next(KEYS))
    torch.library.opcheck(OPERATORS.sparse_network.default, arguments)
    tests = ("test_schema", "test_faketensor")  # its values are never twice the same
    torch.library.opcheck(OPERATORS.sparse_profile.default, arguments, test_utils=tests)
    torch.library.opcheck(OPERATORS.sparse_release.default, (torch.empty(0), next(KEYS)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic: bool) -> None:
    torch.compiler.reset()
    layers, weights, code = block()
    key = next(KEYS)

    def function(x: Tensor) -> Any:
        return torch.ops.fastprune.sparse_network([x * 2], weights, code, key)[1].relu()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 3, 16, 16), (5, 3, 22, 18)]:
        x = image(*shape)
        expected = block_by_torch(layers, x * 2)[1].relu()
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_use_reference_reaches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = reference.sparse_network
    monkeypatch.setattr(
        reference, "sparse_network", lambda *args: (calls.append(1), original(*args))[1]
    )
    _, weights, code = block()
    with fp.use_reference():
        OPERATORS.sparse_network([image(1, 3, 16, 16)], weights, code, next(KEYS))
    assert calls == [1]


def test_a_step_that_does_not_exist_is_refused(network: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        run(network, [image(1, 2, 3, 3)], [], Step(77, 1, 0))
