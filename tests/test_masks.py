"""MaskSet, the exact count behind a sparsity, and which parameters can be pruned."""

import copy
import gc
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from fastprune.masks import LayerCount, MaskSet, num_kept
from fastprune.structure import prunable_parameters


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [
        (0.95, 1000, 50),
        (0.98, 100, 2),
        (0.29, 100, 71),  # 0.29 * 100 is 28.999… in binary
        (0.5, 5, 2),  # half a weight rounds up to one more pruned
        (0.5, 1, 0),
        (0.0, 7, 7),
        (1.0, 7, 0),
        (0, 7, 7),
        (1, 7, 0),
        (0.9, 0, 0),
        (1e-5, 100_000, 99_999),
        (Fraction(1, 3), 10, 7),
        (Decimal("0.005"), 100, 99),
        (np.float32(0.95), 1000, 50),
        (np.float64(0.95), 1000, 50),
        (np.float16(0.9), 10_000_000, 1_000_000),
        (np.int64(1), np.int64(3), 0),
        (0.95, 10**18 + 1, 50_000_000_000_000_000),
    ],
)
def test_num_kept_counts_the_decimal_number_that_was_typed(
    sparsity: Any, total: int, kept: int
) -> None:
    result = num_kept(sparsity, total)
    assert result == kept and type(result) is int


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10**12))
def test_num_kept_is_within_half_a_weight(ten_thousandths: int, total: int) -> None:
    pruned = total - num_kept(Decimal(ten_thousandths) / 10_000, total)
    exact = Fraction(ten_thousandths, 10_000) * total
    assert Fraction(-1, 2) < pruned - exact <= Fraction(1, 2)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, 90, float("nan"), float("inf"), Decimal("NaN")])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\]"):
        num_kept(sparsity, 10)


def test_a_percentage_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"got 90; 90% is 0\.9"):
        num_kept(90, 10)


@pytest.mark.parametrize("sparsity", ["0.9", None, True, torch.tensor(0.9), 0.5j])
def test_a_sparsity_of_the_wrong_type_is_refused(sparsity: Any) -> None:
    with pytest.raises(TypeError, match="sparsity must be a number"):
        num_kept(sparsity, 10)


@pytest.mark.parametrize(
    ("total", "error"), [(1.0, TypeError), (True, TypeError), (-1, ValueError)]
)
def test_a_wrong_total_is_refused(total: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="total must be"):
        num_kept(0.5, total)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def half_of(model: nn.Module) -> MaskSet:
    return MaskSet(
        {n: (torch.arange(p.numel()) % 2 == 0).view(p.shape) for n, p in model.named_parameters()}
    )


def test_counts() -> None:
    masks = MaskSet({"a": torch.tensor([True, False, False]), "b": torch.ones(2, 2).bool()})
    assert (masks.num_kept, masks.num_pruned, masks.total) == (5, 2, 7)
    assert masks.sparsity == 2 / 7
    assert masks.layers == {"a": LayerCount(1, 3), "b": LayerCount(4, 4)}
    assert masks.layers["a"].num_pruned == 2 and masks.layers["a"].sparsity == 2 / 3
    assert list(masks) == ["a", "b"] and len(masks) == 2
    assert MaskSet({}).sparsity == 0.0


def test_apply_writes_true_zeros_and_nothing_else() -> None:
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    masks = half_of(model)
    with torch.no_grad():
        model[0].weight.view(-1)[1] = torch.inf  # a multiplication would leave NaN
        model[0].weight.view(-1)[3] = -1.0  # and here -0.0
    masks.apply(model)
    for name, parameter in model.named_parameters():
        pruned = parameter.detach()[~masks[name]]
        assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned, dtype=torch.int32))
        assert torch.equal(parameter.detach()[masks[name]], before[name][masks[name]])
        assert parameter.requires_grad and parameter.is_leaf
    assert [p.data_ptr() for p in model.parameters()] == pointers


BAD_MASKS = {
    "unknown name": ("3.weight", torch.ones(2).bool(), r"no parameter named '3\.weight'.*'0\.weig"),
    "shape": ("2.bias", torch.ones(3).bool(), r"mask of 2\.bias.*shape.*\(2,\), got \(3,\)"),
    "device": (
        "2.bias",
        torch.ones(2).bool().to("meta"),
        r"mask of 2\.bias.*device.*cpu, got meta; use masks\.to\('cpu'\)",
    ),
}


@pytest.mark.parametrize(("name", "mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_an_error_leaves_the_model_as_it_was(name: str, mask: Any, message: str) -> None:
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    good = dict(half_of(model))
    good.pop(name, None)
    with pytest.raises(ValueError, match=message):
        MaskSet({**good, name: mask}).apply(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_wrapper_in_the_way_is_named() -> None:
    masks = half_of(two_layers())
    with pytest.raises(ValueError, match=r"such as 'module\.0\.weight'.*inside its wrapper"):
        masks.apply(nn.ModuleDict({"module": two_layers()}))


def test_tied_weights_are_written_once_and_must_agree() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    eye = torch.eye(3).bool()
    version = model[0].weight._version
    MaskSet({"0.weight": eye, "1.weight": eye.clone()}).apply(model)
    assert model[0].weight._version == version + 1
    assert torch.equal(model[0].weight != 0, eye)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tied parameter"):
        MaskSet({"0.weight": eye, "1.weight": ~eye}).apply(model)


def test_of_a_model_is_its_non_zeros() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[2].weight[0, 0] = -0.0
    masks = MaskSet.of(model)
    assert list(masks) == ["0.weight", "2.weight"]
    assert masks.num_pruned == 4
    assert not masks["0.weight"][1].any() and not masks["2.weight"][0, 0]
    again = copy.deepcopy(model)
    masks.apply(again)
    assert MaskSet.of(again) == masks


def test_equality_compares_names_and_bits() -> None:
    masks = half_of(two_layers())
    assert masks == half_of(two_layers())
    assert masks != MaskSet({**masks, "0.bias": ~masks["0.bias"]})
    assert masks != MaskSet({"0.weight": masks["0.weight"]})
    assert masks.to("cpu") == masks


def test_repr_shows_each_layer() -> None:
    masks = MaskSet({"conv.weight": torch.arange(6).view(2, 3) > 3, "fc": torch.ones(2).bool()})
    assert repr(masks) == (
        "MaskSet: 2 weights, 4 of 8 kept, sparsity 50.00%\n"
        "  conv.weight  (2, 3)   66.67%  2 of 6 kept\n"
        "  fc           (2,)      0.00%  2 of 2 kept"
    )
    assert repr(MaskSet({})) == "MaskSet: 0 weights, 0 of 0 kept, sparsity 0.00%"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(2).bool()], "mapping of parameter name.*got list"),
        ({"w": torch.ones(2)}, r"mask of w must be a bool tensor.*float32.*\.bool\(\)"),
        ({"w": [True]}, "mask of w must be a bool tensor.*got list"),
        ({0: torch.ones(2).bool()}, "named by strings, got 0"),
    ],
)
def test_only_named_bool_tensors_are_masks(masks: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MaskSet(masks)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.tokens = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, groups=2)
        self.conv3 = nn.Conv3d(2, 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.linear = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.linear.weight
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.tokens.weight


def test_prunable_parameters_are_found_by_layer_type_in_registration_order() -> None:
    model = Everything()
    found = prunable_parameters(model)
    assert list(found) == [
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "linear.weight",
    ]
    parameters = dict(model.named_parameters())
    assert all(found[name] is parameters[name] for name in found)


def test_a_weight_that_is_computed_or_not_yet_there_is_named() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"0\.weight is computed from other parameters"):
        prunable_parameters(normed)
    masked = nn.Sequential(nn.Linear(2, 2))
    prune.random_unstructured(masked[0], "weight", 1)
    with pytest.raises(ValueError, match=r"0\.weight is computed.*prune\.remove"):
        prunable_parameters(masked)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        prunable_parameters(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        prunable_parameters({})  # type: ignore[arg-type]


def test_a_mask_set_knows_its_parameters_as_long_as_they_exist() -> None:
    layer = nn.Linear(3, 2)
    masks = MaskSet.of(layer)
    for known in (masks.parameters, masks.to("cpu").parameters):
        assert known.keys() == {"weight"} and known["weight"] is layer.weight
    for other in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks)), MaskSet(masks)):
        assert other == masks and not other.parameters
    del layer, known
    gc.collect()
    assert not masks.parameters and len(masks) == 1
