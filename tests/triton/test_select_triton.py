"""The Triton selection kernels against the reference, bit for bit."""

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.ops import reference

pytest.importorskip("triton")

from fastprune.ops import triton_kernels
from fastprune.ops.triton_kernels import select

# The interpreter computes with numpy, which warns where a GPU overflows in silence.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]

INF, NAN = float("inf"), float("nan")
SCORES = ("value", "magnitude", "saliency")
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: Tensor) -> Tensor:
    """What must agree: every NaN is one number, -0.0 and 0.0 are two."""
    if not x.dtype.is_floating_point:
        return x
    integers = torch.int64 if x.dtype == torch.float64 else torch.int32
    return torch.where(x.isnan(), NAN, x).view(integers)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert (g.dtype, g.shape, g.stride()) == (e.dtype, e.shape, e.stride())
        assert torch.equal(bits(g), bits(e)), (g, e)


def check(
    device: torch.device,
    values: Sequence[Tensor],
    num_kept: int | Sequence[int],
    score: str = "value",
    gradients: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Threshold, counts, flag and masks agree; the masks keep the (clamped) count exactly."""
    values, gradients = ([t.to(device) for t in tensors] for tensors in (values, gradients))
    k = torch.tensor(num_kept, dtype=torch.int64, device=device)
    rule = triton_kernels.select_threshold(values, gradients, k, score)
    assert_same(rule, reference.select_threshold(values, gradients, k, score))
    threshold, _, tie_end, _ = rule
    masks = triton_kernels.select_masks(values, gradients, threshold, tie_end, score)
    assert_same(masks, reference.select_masks(values, gradients, threshold, tie_end, score))
    sizes = torch.tensor([v.numel() for v in values], device=device)
    kept = torch.tensor([int(m.sum()) for m in masks], device=device)
    if k.dim():
        assert torch.equal(kept, torch.minimum(k.clamp(min=0), sizes))
    else:
        assert kept.sum() == k.clamp(0, int(sizes.sum()))
    return masks


def random_tensor(rng: random.Random, dtype: torch.dtype) -> Tensor:
    shapes = [(), (1,), (3,), (127,), (4097,), (0,), (0, 3), (5, 7), (33, 65), (2, 3, 4, 5)]
    x = torch.randn(rng.choice(shapes))
    if rng.random() < 0.4:
        x = (2 * x).round()  # ties, zeros of both signs
    if rng.random() < 0.2:
        x = x.where(torch.rand(x.shape) < 0.9, rng.choice([INF, -INF, NAN]))
    x = x.to(dtype)
    if rng.random() < 0.5:
        order = rng.sample(range(x.dim()), x.dim())
        x = x.permute(order)  # dense in another order
    return x


@pytest.mark.parametrize("seed", range(48))
def test_random(triton_device: torch.device, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    score = SCORES[seed % 3]
    double = rng.random() < 0.25
    dtypes = [torch.float64 if double else rng.choice(NARROW) for _ in range(rng.randint(1, 6))]
    values = [random_tensor(rng, dtype) for dtype in dtypes]
    gradients = [torch.randn_like(v) for v in values] if score == "saliency" else []
    if rng.random() < 0.4:
        check(triton_device, values, [rng.randint(0, v.numel()) for v in values], score, gradients)
    else:
        check(
            triton_device, values, rng.randint(0, sum(v.numel() for v in values)), score, gradients
        )


def denormals(size: int) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.int32).view(torch.float32)


def one_huge(size: int) -> Tensor:
    x = torch.full((size,), 1e-30)
    x[size // 2] = 3e38
    return x


# Within one chunk: in the interpreter each costs milliseconds.
PATTERNS = {
    "all equal": torch.full((300,), 0.75),
    "all zero": torch.zeros(300),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 150),
    "zeros among others": torch.tensor([0.0, -0.0, 1.0, -1.0] * 70),
    "denormals": denormals(300),
    "denormals of both signs": torch.cat([denormals(150), -denormals(150)]),
    "one huge": one_huge(300),
    "infinities": torch.tensor([INF, -INF, 1.0, -1.0, 0.0] * 50),
    "only infinities": torch.full((300,), INF),
    "NaN": torch.tensor([NAN, 1.0, -2.0, INF, -NAN] * 50),
    "only NaN": torch.full((300,), NAN),
    "neighbours": torch.nextafter(torch.ones(300), torch.tensor([INF, -INF] * 150)),
}


def counts(size: int) -> list[int]:
    return sorted({0, 1, size // 2, size - 1, size})


@pytest.mark.parametrize("score", ["value", "magnitude"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(triton_device: torch.device, name: str, score: str) -> None:
    x = PATTERNS[name]
    several = counts(x.numel())
    check(triton_device, [x] * len(several), several, score)
    check(triton_device, [x], x.numel() // 3, score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_in_float64(triton_device: torch.device, name: str, score: str) -> None:
    x = PATTERNS[name].double()
    check(triton_device, [x], x.numel() // 3, score, [x.flip(0)] if score == "saliency" else [])


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_denormals_of_each_dtype(triton_device: torch.device, dtype: torch.dtype) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.arange(1000).to(integers).view(dtype)
    for score in ("value", "magnitude"):
        kept = check(triton_device, [x], 400, score)[0]
        assert torch.equal(kept.cpu(), torch.arange(1000) >= 600)


def test_products(triton_device: torch.device) -> None:
    """Products that are denormal, vanish, overflow or are undefined; 0 times anything is a tie."""
    w = torch.tensor([1e-30, 1e-30, 1e30, 0.0, INF, -3.0, 0.0, -0.0, 2e-23, 5.0] * 30)
    g = torch.tensor([1e-10, 1e-30, 1e30, 7.0, 1.0, 2.0, 0.0, -8.0, -1e-22, 0.0] * 30)
    check(triton_device, [w] * 7, [0, 1, 61, 91, 150, 299, 300], "saliency", [g] * 7)
    check(triton_device, [w], 150, "saliency", [g])
    check(triton_device, [w], 5, "saliency", [g.where(w != 0, INF)])


def test_saliency_is_formed_in_float32(triton_device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w, g = torch.randn(2, 2000).to(dtype)
        check(triton_device, [w], 700, "saliency", [g])


@pytest.mark.parametrize("size", [1, 3, 127, 4097])
@pytest.mark.parametrize("score", SCORES)
def test_sizes(triton_device: torch.device, size: int, score: str) -> None:
    torch.manual_seed(size)
    w, g = torch.randn(2, size)
    several = counts(size)
    n = len(several)
    check(triton_device, [w] * n, several, score, [g] * n if score == "saliency" else [])
    check(triton_device, [w], size // 3, score, [g] if score == "saliency" else [])


@pytest.mark.parametrize("k", [1, 2048, 4097, 4100, 8192, 8196])
def test_ties_cut_in_every_chunk(triton_device: torch.device, k: int) -> None:
    """Across chunks, tensors, dtypes and an empty tensor between them."""
    first = torch.ones(4097)
    permuted = torch.ones(13, 315).t().bfloat16()
    check(triton_device, [first, torch.empty(0), permuted, torch.ones(5)], k)


def test_ties_in_row_major_order_of_channels_last(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (6, 16, 7, 5)).float().to(memory_format=torch.channels_last)
    ones = int((x == 2).sum()) + int((x == 1).sum()) // 2
    cut = check(triton_device, [x], ones)[0].cpu()
    kept_ones = cut[x == 1].tolist()
    assert kept_ones == sorted(kept_ones, reverse=True)
    check(triton_device, [x, x.contiguous(), x.permute(1, 0, 3, 2)], [ones, ones, ones])


def test_four_merged_dimensions_and_no_more(triton_device: torch.device) -> None:
    x = torch.randint(0, 2, (2, 3, 4, 5)).float().permute(3, 1, 0, 2)
    check(triton_device, [x], 50)
    x = torch.zeros(2, 3, 2, 3, 2).permute(4, 2, 0, 3, 1).to(triton_device)
    with pytest.raises(ValueError, match=r"\.contiguous\(\)"):
        triton_kernels.select_threshold([x], [], torch.tensor(1, device=triton_device), "value")


def test_no_tensors(triton_device: torch.device) -> None:
    check(triton_device, [], 0)
    check(triton_device, [], [])


def test_empty_tensors(triton_device: torch.device) -> None:
    empty = torch.empty(0)
    check(triton_device, [empty], 0)
    check(triton_device, [empty, empty.view(0, 4)], [0, 0])
    check(triton_device, [empty, torch.ones(3), empty, torch.arange(4.0), empty], 5)
    check(triton_device, [empty, torch.ones(3), empty, torch.arange(4.0), empty], [0, 2, 0, 1, 0])


def test_mixed_dtypes_have_one_order(triton_device: torch.device) -> None:
    torch.manual_seed(1)
    x = torch.randn(700).bfloat16()
    check(triton_device, [x.float(), x, torch.randn(500).half(), x.float()], 900, "magnitude")


def test_segments_are_independent(triton_device: torch.device) -> None:
    torch.manual_seed(2)
    values = [torch.randn(4097), torch.ones(3000), torch.zeros(2), torch.randn(9, 9).t()]
    check(triton_device, values, [0, 2500, 1, 81])
    check(triton_device, values, [4097, 3000, 0, 40], "magnitude")


@pytest.mark.parametrize("k", [-5, 10_000_000_000])
def test_counts_are_clamped_on_the_device(triton_device: torch.device, k: int) -> None:
    check(triton_device, [torch.arange(300.0), torch.tensor([NAN, 1.0])], k)
    check(triton_device, [torch.arange(300.0), torch.empty(0), torch.ones(5)], [k, k, 3])


def test_views_at_odd_addresses(triton_device: torch.device) -> None:
    x = torch.randn(5000).bfloat16().to(triton_device)
    check(triton_device, [x[1:2500], x[2501:]], 1234, "magnitude")


def test_a_second_run_gives_the_same_bits(triton_device: torch.device) -> None:
    values = [torch.randn(4097).half().to(triton_device), torch.zeros(100, device=triton_device)]
    k = torch.tensor(2200, device=triton_device)
    first, second = (triton_kernels.select_threshold(values, [], k, "value") for _ in range(2))
    assert_same(first, second)


def test_inputs_are_left_alone(triton_device: torch.device) -> None:
    values, k = [torch.randn(300, device=triton_device)], torch.tensor([400], device=triton_device)
    before, count = values[0].clone(), k.clone()
    triton_kernels.select_threshold(values, [], k, "value")
    assert torch.equal(values[0], before) and torch.equal(k, count)


@pytest.mark.parametrize(
    ("dtype", "score", "block"),
    [
        (torch.float32, "saliency", (1, 16)),
        (torch.float32, "value", (4, 4)),
        (torch.float64, "saliency", (3, 2)),
        (torch.float64, "value", (1, 3)),
        (torch.bfloat16, "saliency", (2, 3)),
        (torch.bfloat16, "magnitude", (4, 4)),
        (torch.float16, "value", (2, 1)),
    ],
)
def test_block_scores(
    triton_device: torch.device, dtype: torch.dtype, score: str, block: tuple[int, int]
) -> None:
    torch.manual_seed(3)
    conv = torch.randn(9, 6, 3, 3).to(memory_format=torch.channels_last)
    shapes = [torch.randn(13, 70), conv, torch.empty(0, 3), torch.randn(8, 5, 2)]
    values = [x.to(triton_device, dtype) for x in shapes]
    gradients = [torch.randn_like(v) for v in values] if score == "saliency" else []
    got = triton_kernels.block_scores(values, gradients, score, block)
    assert_same(got, reference.block_scores(values, gradients, score, block))


class _CountedKernel:
    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


def test_launches_do_not_depend_on_the_number_of_tensors(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[str] = []
    for name in [n for n in vars(select) if n.endswith("_kernel")]:
        monkeypatch.setattr(select, name, _CountedKernel(getattr(select, name), launches))
    seen = []
    for count in (1, 2, 9):
        launches.clear()
        check(triton_device, [torch.randn(7) for _ in range(count)], 3, "magnitude")
        seen.append(list(launches))
    assert seen[0] == seen[1] == seen[2]
    # Three digits of 32 bits, each a histogram and a pick; two for ties; the threshold; the masks.
    assert len(seen[0]) == 3 * 2 + 2 + 1 + 1


def test_positions_beyond_32_bits() -> None:
    """The table's numbers; the kernels compute with them in 64 bits."""
    large = torch.empty(3 << 30, device="meta")
    tables = select._tables([large, large], [], [], torch.device("cpu"), segmented=False)
    row = tables.tensors.view(2, -1)[1]
    assert row[select._FIRST_POSITION.value] == 3 << 30
    tensor, chunk = tables.chunks.view(-1, 2)[-1].tolist()
    assert (tensor, (chunk + 1) * select.CHUNK) == (1, 3 << 30)


@pytest.mark.parametrize(
    ("values", "gradients", "num_kept", "score", "message"),
    [
        ([torch.ones(3)], [], torch.tensor(1), "weight", "score must be"),
        ([torch.ones(3)], [], torch.tensor(1), "saliency", "one tensor per value"),
        ([torch.ones(3)], [torch.ones(4)], torch.tensor(1), "saliency", "dtype, shape and strides"),
        ([torch.ones(3), torch.ones(3).double()], [], torch.tensor(1), "value", "all float64"),
        ([torch.ones(6)[::2]], [], torch.tensor(1), "value", "dense in memory"),
        ([torch.ones(3)], [], torch.tensor([1, 1]), "value", "num_kept must be"),
    ],
)
def test_what_would_be_unsafe_is_refused(
    values: list[Tensor], gradients: list[Tensor], num_kept: Tensor, score: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        triton_kernels.select_threshold(values, gradients, num_kept, score)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, fastprune; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
