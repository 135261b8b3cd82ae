"""The CUDA kernels of selection, run in the host simulator, against the reference."""

import ctypes
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.ops import reference
from tests.ops.select_cases import BIG, CASES, DTYPES, LAYOUTS, SCORES, Case
from tests.sim_library import HAS_COMPILER, NAMESPACE

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler (g++ or CXX)")

DENSE = ("contiguous", "channels last", "five dims", "transposed", "reversed", "offset")


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bits, of NaNs their places alone; equal dtypes, shapes and strides."""
    for a, b in zip(ours, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if b.dtype.is_floating_point:
            a, b = (t.masked_fill(t.isnan(), torch.nan) for t in (a, b))
            a, b = (t.view(torch.int64 if t.itemsize == 8 else torch.int32) for t in (a, b))
        assert torch.equal(a, b), (a, b)


def check(
    simulator: Any, values: list[Tensor], gradients: list[Tensor], num_kept: Tensor, score: str
) -> None:
    """Threshold, number of ties, tie end, flags and masks."""
    expected = reference.select_threshold(values, gradients, num_kept, score)
    found = simulator.select_threshold(values, gradients, num_kept, score)
    assert_same(found, expected)
    threshold, _, tie_end, _ = found
    masks = simulator.select_masks(values, gradients, threshold, tie_end, score)
    wanted = reference.select_masks(values, gradients, threshold, tie_end, score)
    assert_same(masks, wanted)
    for mask, value in zip(masks, values, strict=True):
        assert mask.stride() == value.stride()


# Of the largest lists a few: the simulator takes its time, and the kernels meet nothing new.
ELEMENT_CASES = [
    c
    for c in CASES
    if c.block == (1, 1) and c.layout in DENSE and (c.shapes is not BIG or c.kept == 0.002)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in ELEMENT_CASES])
def test_shared_cases(case: Case, simulator: Any) -> None:
    x = case.build(torch.device("cpu"))
    num_kept = torch.as_tensor(x.num_kept, dtype=torch.int64)
    check(simulator, x.values, x.gradients or [], num_kept, x.score)


BLOCK_CASES = [c for c in CASES if c.block != (1, 1) and c.layout in DENSE]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in BLOCK_CASES])
def test_block_scores(case: Case, simulator: Any) -> None:
    x = case.build(torch.device("cpu"))
    arguments = x.values, x.gradients or [], x.score, list(x.block)
    sums = simulator.block_scores(*arguments)
    assert_same(sums, reference.block_scores(*arguments))
    assert all(s.is_contiguous() for s in sums)


def strange(shape: tuple[int, ...], choice: random.Random) -> Tensor:
    """Values of one of the kinds that kernels get wrong."""
    generator = torch.Generator().manual_seed(choice.getrandbits(32))
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-41, -1e-41, 5e-324, 3e38, 1.0]
    picks = torch.randint(len(special), shape, generator=generator)
    specials = torch.tensor(special, dtype=torch.float64)[picks]
    few = torch.randint(-2, 3, shape, generator=generator).double()
    # One bin of the histogram holds them all, so that candidates overflow.
    narrow = 1 + torch.rand(shape, generator=generator, dtype=torch.float64) * 2.0**-9
    sparse = normal * (picks == 0)
    mixed = torch.where(picks < 2, specials, normal)
    return choice.choice([normal, specials, few, narrow, sparse, mixed])


def random_list(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor, str]:
    choice = random.Random(seed)
    shapes = [
        (0,),
        (1,),
        (3,),
        (127,),
        (4097,),
        (9, 33, 3, 3),
        (4, 5, 3, 2, 7),
        (2, 0, 3),
        (64, 70),
    ]
    double = choice.random() < 0.3
    score = choice.choice(SCORES)
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    for _ in range(choice.randrange(1, 45)):
        shape = choice.choice(shapes)
        dtype = torch.float64 if double else choice.choice([d for d in DTYPES if d.itemsize < 8])
        layout = LAYOUTS[choice.choice(DENSE)]
        values.append(layout(strange(shape, choice).to(dtype)))
        if score == "saliency":
            gradients.append(LAYOUTS["offset"](strange(shape, choice).to(dtype)))
            gradients[-1] = torch.empty_like(values[-1]).copy_(gradients[-1])
    if choice.random() < 0.4:
        counts = [choice.randrange(-1, v.numel() + 2) for v in values]
        return values, gradients, torch.tensor(counts), score
    total = sum(v.numel() for v in values)
    count = choice.choice(
        [0, 1, total - 1, total, total + 5, -3, *[choice.randrange(total + 1)] * 6]
    )
    return values, gradients, torch.tensor(count), score


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(80))
def test_random_lists(seed: int, simulator: Any) -> None:
    check(simulator, *random_list(seed))


@pytest.mark.parametrize("score", ["value", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("bound", [0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan])
def test_masks_of_any_threshold(
    bound: float, dtype: torch.dtype, score: str, simulator: Any
) -> None:
    values = [
        torch.tensor([0.0, -0.0, -2.0, 1.0, torch.nan, torch.inf, -torch.inf, -1], dtype=dtype)
    ]
    for tie_end in (0, 1, 8):
        rule = torch.tensor(bound, dtype=dtype), torch.tensor(tie_end)
        masks = simulator.select_masks(values, [], *rule, score)
        assert_same(masks, reference.select_masks(values, [], *rule, score))


def test_counts_need_not_be_contiguous(simulator: Any) -> None:
    values = [torch.randn(5000), torch.randn(70)]
    check(simulator, values, [], torch.tensor([2000, 9, 30, 9])[::2], "value")


def test_second_run_has_equal_bits(simulator: Any) -> None:
    values = [torch.randint(-3, 4, (64, 300)).float(), torch.randn(20_000)]
    first = simulator.select_threshold(values, [], torch.tensor(9000), "magnitude")
    assert_same(simulator.select_threshold(values, [], torch.tensor(9000), "magnitude"), first)


def test_unsafe_arguments_are_refused(simulator: Any) -> None:
    values = [torch.randn(4, 4)]
    one = torch.tensor(1)
    for arguments, message in [
        ((values, [], one, "best"), "score must be"),
        ((values, [], one, "saliency"), "one tensor per value"),
        ((values, values * 2, one, "saliency"), "one tensor per value"),
        ((values, [values[0].t()], one, "saliency"), "shape and strides"),
        (([*values, values[0].double()], [], one, "value"), "all float64 or none"),
        (([values[0][:, ::2]], [], one, "value"), "must be dense"),
        (([values[0].int()], [], one, "value"), "float32, float64"),
        ((values, [], one.int(), "value"), "int64"),
        ((values, [], torch.tensor([1, 2]), "value"), "one count per tensor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            simulator.select_threshold(*arguments)
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        simulator.block_scores([torch.randn(3)], [], "value", [2, 2])
    with pytest.raises(RuntimeError, match="two positive integers"):
        simulator.block_scores(values, [], "value", [0, 2])


# ---------------------------------------------------------------- one pass where possible
# Lists this long are sampled; the numbers are those of csrc/cuda/select_bracket.cu.

LONG = 200_003
SAMPLE_STRIDE = 256


@pytest.fixture
def elements_read(simulator: Any) -> ctypes.c_int64:
    """How many elements all launches together read from tensors, counted by the library."""
    (library,) = (path for path in torch.ops.loaded_libraries if NAMESPACE in path)
    return ctypes.c_int64.in_dll(ctypes.CDLL(library), "fastprune_elements_read")


def passes(
    simulator: Any, counter: ctypes.c_int64, values: list[Tensor], num_kept: int, score: str
) -> float:
    """Checks a selection against the reference; how many times it read the tensors."""
    gradients = [torch.ones_like(v) for v in values] if score == "saliency" else []
    count = torch.tensor(num_kept)
    counter.value = 0
    found = simulator.select_threshold(values, gradients, count, score)
    read = counter.value / sum(v.numel() for v in values)
    assert_same(found, reference.select_threshold(values, gradients, count, score))
    return read


def long_list(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Ones among the layouts of networks: filters in two formats, a bias, nothing."""
    generator = torch.Generator().manual_seed(7)
    values = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(64, 130, 3, 3), (0,), (37,), (LONG // 3,), (48, 32, 5, 5)]
    ]
    values[0] = values[0].contiguous(memory_format=torch.channels_last)
    return values


def sampled_elements(numel: int) -> Tensor:
    """Where the sample takes its keys: one of each stride, by a hash of its number."""
    strides = range(numel // SAMPLE_STRIDE)
    mask = 2**64 - 1
    places = []
    for i in strides:
        mixed = (i + 1) * 0x9E3779B97F4A7C15 & mask
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & mask
        mixed = (mixed ^ mixed >> 32) >> 32
        places.append(i * SAMPLE_STRIDE + (mixed * SAMPLE_STRIDE >> 32))
    return torch.tensor(places)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 1e-5, 0.002, 0.1, 0.5, 0.9, 0.9999, 1.0])
def test_long_lists_are_read_once(
    kept: float, dtype: torch.dtype, score: str, simulator: Any, elements_read: ctypes.c_int64
) -> None:
    values = long_list(dtype)
    count = round(kept * sum(v.numel() for v in values))
    assert 1 <= passes(simulator, elements_read, values, count, score) < 1.05


def test_ties_among_candidates_need_no_second_pass(
    simulator: Any, elements_read: ctypes.c_int64
) -> None:
    """The cut falls into a tensor whose memory is in another order, and behind it."""
    values = [(v * 50).round() for v in long_list()]
    above = sum(int((v > 38).sum()) for v in values)
    ties = sum(int((v == 38).sum()) for v in values)
    for kept in (1, ties // 8, ties // 4, ties - 1):
        assert passes(simulator, elements_read, values, above + kept, "value") < 1.05


def test_frequent_keys_are_counted_where_they_are(
    simulator: Any, elements_read: ctypes.c_int64
) -> None:
    """Of a pruned list at most the ties are read again, wherever the threshold lies."""
    values = [v * (v.abs() > 1.6) for v in long_list()]
    nonzero = sum(int(v.count_nonzero()) for v in values)
    numel = sum(v.numel() for v in values)
    for count in (nonzero // 2, nonzero - 3, nonzero):
        assert passes(simulator, elements_read, values, count, "magnitude") < 1.05
    for count in (nonzero + 1, numel // 2):  # some of the zeros are kept
        assert 2 <= passes(simulator, elements_read, values, count, "magnitude") < 2.2
    for value in (0.0, -2.5, torch.nan, -torch.inf):
        equal = [torch.full_like(v, value) for v in values]
        assert passes(simulator, elements_read, equal, numel, "value") < 1.05
        assert 2 <= passes(simulator, elements_read, equal, numel // 3, "value") < 2.2


@pytest.mark.parametrize(
    "seen, hidden",
    [
        pytest.param([(1, 3)], (4, 5), id="above the bracket"),
        pytest.param([(1, 3)], (0, 0.5), id="below the bracket"),
        pytest.param([(1, 1.9), (2.1, 3)], (1.95, 2.05), id="inside, more than it has room for"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_misleading_sample_costs_time_alone(
    seen: list[tuple[float, float]],
    hidden: tuple[float, float],
    dtype: torch.dtype,
    simulator: Any,
    elements_read: ctypes.c_int64,
) -> None:
    """The k-th is among what the sample does not see: evenly from one number to the other."""
    value = torch.linspace(*hidden, LONG, dtype=dtype)
    places = sampled_elements(LONG).tensor_split(len(seen))
    for part, ends in zip(places, seen, strict=True):
        value[part] = torch.linspace(*ends, len(part), dtype=dtype)
    digits = 6 if dtype == torch.float64 else 3
    read = passes(simulator, elements_read, [value], LONG // 2, "value")
    assert 1 + digits <= read < 1.1 + digits


def test_a_bracket_of_one_key_is_trusted_as_far_as_it_goes(
    simulator: Any, elements_read: ctypes.c_int64
) -> None:
    value = torch.linspace(0, 4, LONG)
    value[(value > 1.5) & (value < 2.5)] = 2
    value[sampled_elements(LONG)] = 2
    above = int((value > 2).sum())
    ties = int((value == 2).sum())
    for count, expected in [(above, 4), (above + 1, 2), (above + ties, 1), (above + ties + 1, 4)]:
        read = passes(simulator, elements_read, [value], count, "value")
        assert expected <= read < expected + 0.1


def test_short_lists_and_segments_are_not_sampled(
    simulator: Any, elements_read: ctypes.c_int64
) -> None:
    assert passes(simulator, elements_read, [torch.randn(5000)], 400, "value") == 3
    values = long_list()
    counts = torch.tensor([v.numel() // 2 for v in values])
    elements_read.value = 0
    simulator.select_threshold(values, [], counts, "value")
    assert elements_read.value == 3 * sum(v.numel() for v in values)
