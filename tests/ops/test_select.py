"""Exact selection: whatever serves a device against the reference and against a plain sort."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops import reference
from fastprune.ops.schemas import SCHEMAS
from tests.ops.select_cases import BIG, CASES, DTYPES, Case, Inputs, oracle_masks, oracle_scores

OPERATORS = torch.ops.fastprune


def masks_of(x: Inputs) -> list[Tensor]:
    choose = fp.layer_topk_masks if x.segmented else fp.global_topk_masks
    return choose(x.values, x.num_kept, block=x.block, **x.keywords)


def selection_of(x: Inputs) -> fp.ops.Selection:
    choose = fp.layer_topk if x.segmented else fp.global_topk
    return choose(x.values, x.num_kept, **x.keywords)


def bits(t: Tensor) -> Tensor:
    """Floats as integers: -0.0 differs from +0.0, and every NaN is one and the same."""
    t = t.cpu()
    if not t.is_floating_point():
        return t
    words = {4: torch.int32, 8: torch.int64}
    return t.masked_fill(t.isnan(), torch.nan).view(words[t.itemsize])


def assert_same(ours: Any, expected: Any) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
def test_masks_are_those_of_the_reference_and_of_a_sort(case: Case, device: torch.device) -> None:
    inputs = case.build(device)
    before = [v.detach().clone() for v in inputs.values]
    masks = masks_of(inputs)
    for mask, expected in zip(masks, oracle_masks(inputs), strict=True):
        assert mask.dtype == torch.bool and not mask.requires_grad
        assert torch.equal(mask.cpu(), torch.from_numpy(np.array(expected)))
    with fp.use_reference():
        assert_same(masks, masks_of(inputs))
    for value, was in zip(inputs.values, before, strict=True):
        assert torch.equal(value, was)


ELEMENT_CASES = [pytest.param(c, id=c.label) for c in CASES if c.block == (1, 1)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ELEMENT_CASES)
def test_selection_has_the_bits_of_the_reference(case: Case, device: torch.device) -> None:
    inputs = case.build(device)
    selection = selection_of(inputs)
    with fp.use_reference():
        assert_same(selection, selection_of(inputs))
    infinite = any(np.isinf(s).any() for s in oracle_scores(inputs))
    assert int(selection.non_finite) == int(infinite)


BLOCK_CASES = [pytest.param(c, id=c.label) for c in CASES if c.block != (1, 1)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_block_scores_have_the_bits_of_the_defined_sum(case: Case, device: torch.device) -> None:
    x = case.build(device)
    arguments = [v.detach() for v in x.values], x.gradients or [], x.score, list(x.block)
    sums = OPERATORS.block_scores(*arguments)
    assert_same(sums, reference.block_scores(*arguments))
    assert_same(sums, [torch.from_numpy(s) for s in oracle_scores(x)])


def test_there_are_200_cases() -> None:
    assert len({case.label for case in CASES}) >= 200


BIG_CASES = [pytest.param(c, id=c.label) for c in CASES if c.shapes == BIG][::4]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", BIG_CASES)
def test_a_second_run_and_another_thread_count_give_the_same_bits(case: Case) -> None:
    inputs = case.build(torch.device("cpu"))
    first, first_masks = selection_of(inputs), masks_of(inputs)
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        assert_same(selection_of(inputs), first)
        assert_same(masks_of(inputs), first_masks)


def test_ties_go_to_the_lowest_logical_position_whatever_the_memory_format() -> None:
    ones = torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    (mask,) = fp.global_topk_masks([ones], 13)
    assert mask.reshape(-1).tolist() == [True] * 13 + [False] * 11
    assert mask.stride() == ones.stride()


@pytest.mark.parametrize("grad_layout", ["same", "other"])
def test_a_gradient_may_have_another_memory_format_than_its_weight(grad_layout: str) -> None:
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(2))
    plain = fp.global_topk_masks([weight], 50, score="saliency", gradients=[gradient])
    weight = weight.contiguous(memory_format=torch.channels_last)
    if grad_layout == "same":
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    mixed = fp.global_topk_masks([weight], 50, score="saliency", gradients=[gradient])
    assert_same(mixed, plain)


def test_parameters_are_taken_as_they_are_and_inside_inference_mode() -> None:
    weights = [torch.nn.Parameter(torch.tensor([3.0, -4.0, 1.0]))]
    (mask,) = fp.global_topk_masks(weights, 2, score="magnitude")
    assert mask.tolist() == [True, True, False]
    with torch.inference_mode():
        (mask,) = fp.global_topk_masks(weights, 1, score="magnitude")
    assert mask.tolist() == [False, True, False]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_exactly_k_are_kept_and_none_below_a_dropped_one(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=6))
    few = data.draw(st.integers(1, 6))  # few distinct values: many ties
    seed = data.draw(st.integers(0, 10_000))
    random = torch.Generator().manual_seed(seed)
    scores = [torch.randint(-few, few, (size,), generator=random).float() for size in sizes]
    num_kept = data.draw(st.integers(0, sum(sizes)))
    masks = torch.cat(fp.global_topk_masks(scores, num_kept))
    everything = torch.cat(scores)
    kept, dropped = everything[masks], everything[~masks]
    assert len(kept) == num_kept
    if len(kept) and len(dropped):
        limit = kept.min()
        assert limit >= dropped.max()
        ties = masks[everything == limit].tolist()
        assert ties == sorted(ties, reverse=True)


def dispatched(name: str) -> bool:
    return fp.build_info().operators[name]["CPU"] != "reference"


@pytest.mark.skipif(not dispatched("select_threshold"), reason="the reference sorts: minutes")
def test_positions_pass_two_to_the_31() -> None:
    """34 aliases of one buffer of 2^26 numbers: 2.3 billion positions in 128 MB."""
    size, copies, best = 2**26, 34, 12_345_678
    flat = torch.full((size,), 0.5, dtype=torch.float16)
    flat[best] = 2.0
    aliases = [flat] * copies
    found = fp.global_topk(aliases, 33)
    assert float(found.threshold) == 2.0
    assert int(found.num_ties) == 33
    assert int(found.tie_end) == 33 * size + best > 2**31
    found = fp.global_topk(aliases, copies + 33 * size)
    assert float(found.threshold) == 0.5
    assert int(found.num_ties) == 33 * size > 2**31
    # The 33 best and 33 * size others are ahead of the first dropped 0.5.
    assert int(found.tie_end) == 33 * size + 33
    masks = OPERATORS.select_masks(aliases, [], found.threshold, found.tie_end, "value")
    assert all(bool(mask.all()) for mask in masks[:33])
    assert masks[33].nonzero().flatten().tolist() == [*range(33), best]


def lists(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    shapes = [(6, 5, 3, 3), (40,), (8, 7)]
    values = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    return values, [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segmented", [False, True], ids=["global", "segmented"])
@pytest.mark.parametrize("score", ["value", "saliency"])
def test_opcheck_of_the_selection(
    dtype: torch.dtype, segmented: bool, score: str, device: torch.device
) -> None:
    values, gradients = ([t.to(device) for t in ts] for ts in lists(dtype))
    gradients = gradients if score == "saliency" else []
    num_kept = torch.tensor([9, 1, 56] if segmented else 77, device=device)
    arguments = values, gradients, num_kept, score
    torch.library.opcheck(OPERATORS.select_threshold.default, arguments)
    threshold, _, tie_end, _ = OPERATORS.select_threshold(*arguments)
    torch.library.opcheck(
        OPERATORS.select_masks.default, (values, gradients, threshold, tie_end, score)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_opcheck_of_block_scores(dtype: torch.dtype, score: str, device: torch.device) -> None:
    values, gradients = ([t.to(device) for t in ts if t.dim() > 1] for ts in lists(dtype))
    gradients = gradients if score == "saliency" else []
    torch.library.opcheck(OPERATORS.block_scores.default, (values, gradients, score, [4, 2]))


def test_every_operator_has_its_opcheck() -> None:
    selection = {"select_threshold", "select_masks", "block_scores"}  # here
    steps = {"gsm_step_", "gsm_update_", "masked_sgd_"}  # test_gsm.py, test_masked_sgd.py
    steps |= {"sdprun_threshold_", "sdprun_update_", "sdprun_guard_"}  # test_sdprun.py
    steps |= {"aswl_step_"}  # test_aswl_kernels.py
    switches = {"dirichlet_kl", "dirichlet_sample", "dirichlet_sample_backward"}  # test_dirichlet
    switches |= {"channel_switch", "channel_switch_backward"}  # test_switch.py
    inference = {"sparse_network", "sparse_profile", "sparse_release"}  # test_sparse_network.py
    assert set(SCHEMAS) == selection | steps | switches | inference


PUBLIC: dict[str, Callable[[list[Tensor], list[Tensor], Any], Any]] = {
    "global_topk": lambda w, g, k: fp.global_topk(w, k, score="saliency", gradients=g),
    "layer_topk": lambda w, g, k: fp.layer_topk(w, k, score="magnitude"),
    "global_topk_masks": lambda w, g, k: fp.global_topk_masks(w, k),
    "layer_topk_masks": lambda w, g, k: fp.layer_topk_masks(w, k, score="saliency", gradients=g),
    "blocks": lambda w, g, k: fp.global_topk_masks(w, k, score="magnitude", block=(4, 2)),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device_count", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_without_a_break_gives_the_same(
    name: str, device_count: bool, backend: str, device: torch.device
) -> None:
    torch.compiler.reset()
    values, gradients = ([t.to(device) for t in ts if t.dim() > 1] for ts in lists())
    num_kept: Any = [9, 30] if name.startswith("layer") else 25
    if device_count:
        num_kept = torch.tensor(num_kept, device=device)
    function = PUBLIC[name]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = function(values, gradients, num_kept)
    assert_same(compiled(values, gradients, num_kept), expected)


@pytest.mark.parametrize("name", ["select_threshold", "select_masks", "block_scores"])
def test_use_reference_reaches_the_reference_and_only_inside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *args: (calls.append(name), original(*args))[1])
    values = [torch.arange(12.0).view(3, 4)]
    outside = fp.global_topk_masks(values, 2, block=(2, 2))
    assert calls == []
    with fp.use_reference():
        inside = fp.global_topk_masks(values, 2, block=(2, 2))
    assert calls == [name]
    assert_same(outside, inside)
    fp.global_topk_masks(values, 2, block=(2, 2))
    assert calls == [name]


def test_build_info_names_one_implementation_for_each_operator_and_device() -> None:
    info = fp.build_info()
    assert set(info.operators) == set(SCHEMAS)
    for by_device in info.operators.values():
        assert set(by_device) == {"CPU", "CUDA"}
    assert all(name in str(info) for name in SCHEMAS)
    assert ("plain-PyTorch reference" in str(info)) == info.reference_only


V = torch.tensor([1.0, 2.0, 3.0])
M = torch.ones(3, 2)
K = torch.tensor(1)
ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("negative k", lambda: fp.global_topk([V], -1), ValueError, r"num_kept must be in 0\.\.3.*-1"),
    ("k > N", lambda: fp.global_topk([V], 4), ValueError, r"num_kept must be in 0\.\.3 .*got 4"),
    ("float k", lambda: fp.global_topk([V], 0.5), TypeError, "num_kept must be an integer.*0.5"),
    ("bool k", lambda: fp.global_topk([V], True), TypeError, "num_kept must be an integer.*True"),
    ("str k", lambda: fp.global_topk([V], "2"), TypeError, "num_kept must be an integer.*'2'"),
    ("int32 k", lambda: fp.global_topk([V], K.int()), TypeError, "num_kept.*int64.*int32"),
    ("1-d k", lambda: fp.global_topk([V], K[None]), ValueError, r"num_kept.*\(\).*\(1,\)"),
    ("k on meta", lambda: fp.global_topk([V], K.to("meta")), ValueError, "num_kept.*cpu.*meta"),
    ("blocks k", lambda: fp.global_topk_masks([M], 3, block=(3, 1)), ValueError, r"in 0\.\.2"),
    ("one tensor", lambda: fp.global_topk(V, 1), TypeError, r"scores must be a list.*\[scores\]"),
    (
        "generator",
        lambda: fp.global_topk((v for v in [V]), 1),
        TypeError,
        r"scores must be a list.*generator.*list\(scores\)",
    ),
    ("a number", lambda: fp.global_topk([V, 2.0], 1), TypeError, r"scores\[1\].*tensor, got float"),
    ("ints", lambda: fp.global_topk([V.int()], 1), TypeError, r"scores\[0\].*int32.*\.float\(\)"),
    ("sparse", lambda: fp.global_topk([V.to_sparse()], 1), TypeError, r"scores\[0\].*to_dense"),
    (
        "mixed float64",
        lambda: fp.global_topk([V, V.double()], 1),
        ValueError,
        r"all float64 or none.*scores\[1\] torch.float64",
    ),
    ("devices", lambda: fp.global_topk([V, V.to("meta")], 1), ValueError, "one device.*cpu.*meta"),
    ("NaN", lambda: fp.global_topk([V / V.sub(1) * 0], 1), ValueError, "scores must not be NaN"),
    (
        "NaN weight",
        lambda: fp.global_topk_masks([V * torch.nan], 1, score="magnitude"),
        ValueError,
        "weights must not be NaN",
    ),
    (
        "infinity times zero",
        lambda: fp.global_topk([V * 0], 1, score="saliency", gradients=[V * torch.inf]),
        ValueError,
        r"weight \* gradient must not be NaN",
    ),
    (
        "NaN in a block",
        lambda: fp.global_topk_masks([M * torch.nan], 1, score="magnitude", block=(3, 1)),
        ValueError,
        "must not be NaN",
    ),
    ("score", lambda: fp.global_topk([V], 1, score="taylor"), ValueError, "'saliency'.*'taylor'"),
    ("no gradients", lambda: fp.global_topk([V], 1, score="saliency"), ValueError, "gradients"),
    ("stray gradients", lambda: fp.global_topk([V], 1, gradients=[V]), ValueError, "gradients"),
    (
        "too few gradients",
        lambda: fp.global_topk([V, V], 1, score="saliency", gradients=[V]),
        ValueError,
        "one tensor per weight, got 1 for 2",
    ),
    (
        "a missing gradient",
        lambda: fp.global_topk([V, V], 1, score="saliency", gradients=[V, None]),
        TypeError,
        r"gradients\[1\] must be a tensor, got NoneType",
    ),
    (
        "gradient's shape",
        lambda: fp.global_topk([V], 1, score="saliency", gradients=[V[:2]]),
        ValueError,
        r"gradients\[0\] must have the shape of its weight",
    ),
    (
        "gradient's dtype",
        lambda: fp.global_topk([V], 1, score="saliency", gradients=[V.double()]),
        ValueError,
        r"gradients\[0\] must have the dtype.*float32, got torch.float64",
    ),
    (
        "block of a vector",
        lambda: fp.global_topk_masks([M, V], 1, block=(2, 1)),
        ValueError,
        r"scores\[1\] has 1 dimensions",
    ),
    ("block 0", lambda: fp.global_topk_masks([M], 1, block=(0, 1)), ValueError, r"block.*\(0, 1\)"),
    ("block int", lambda: fp.global_topk_masks([M], 1, block=4), TypeError, "block.*two integers"),
    ("block of 3", lambda: fp.global_topk_masks([M], 1, block=(1, 2, 3)), TypeError, "block.*two"),
    ("float block", lambda: fp.global_topk_masks([M], 1, block=(1.5, 2)), TypeError, "block.*two"),
    ("layer counts", lambda: fp.layer_topk([V, V], [1]), ValueError, "one count per.*1 for 2"),
    ("layer int", lambda: fp.layer_topk([V], 1), TypeError, "nums_kept must be a list"),
    ("layer k", lambda: fp.layer_topk([V, V], [1, 4]), ValueError, r"nums_kept\[1\].*0\.\.3.*4"),
    ("layer bool", lambda: fp.layer_topk([V], [True]), TypeError, r"nums_kept\[0\].*integer"),
    ("layer tensor", lambda: fp.layer_topk([V], K), ValueError, r"nums_kept.*\(1,\).*\(\)"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*e[1:], id=e[0]) for e in ERRORS]
)
def test_wrong_input_says_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_infinity_is_a_score_and_is_reported() -> None:
    scores = [torch.tensor([-torch.inf, 1.0, torch.inf, 5.0])]
    selection = fp.global_topk(scores, 1)
    assert float(selection.threshold) == torch.inf and int(selection.non_finite) == 1
    (mask,) = fp.global_topk_masks(scores, 3)
    assert mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_nan_ranks_above_infinity_in_the_operator(dtype: torch.dtype) -> None:
    """The public function refuses NaN; a captured graph cannot, so the order is defined."""
    values = [torch.tensor([1.0, torch.nan, torch.inf, -torch.nan], dtype=dtype)]
    for num_kept in range(5):
        k = torch.tensor(num_kept)
        ours = OPERATORS.select_threshold(values, [], k, "value")
        assert_same(ours, reference.select_threshold(values, [], k, "value"))
        assert int(ours[3]) == 3
        (mask,) = OPERATORS.select_masks(values, [], ours[0], ours[2], "value")
        order = [1, 3, 2, 0]
        assert mask.nonzero().flatten().tolist() == sorted(order[:num_kept])
