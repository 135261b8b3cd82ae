"""Channels that live and die together are one group."""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.channels import Channels, confirm, trace_channels
from fastprune.optim import channel_groups

from ..deploy.networks import NETWORKS, images, network

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
Group = dict[str, Any]
groups_module = importlib.import_module("fastprune.optim.groups")


def names(group: Group) -> list[str]:
    return [name for name, _ in group["params"]]


def by_name(groups: list[Group]) -> dict[str, list[str]]:
    return {group["name"]: names(group) for group in groups if "name" in group}


@pytest.fixture(autouse=True)
def one_trace_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "trace_channels", traced)


@cache
def traced(model: nn.Module, example: Any) -> Channels:
    return trace_channels(model, example)


SETTINGS = [(c, r) for c in (True, False) for r in ("join", "leave")]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_in_one_group(name: str) -> None:
    model, x = network(name), images()
    classifier = list(model.named_modules())[-1][0]
    for coupled, residual in SETTINGS:
        groups = channel_groups(model, x, coupled=coupled, residual=residual)
        found = sorted(name for group in groups for name in names(group))
        assert found == sorted(name for name, _ in model.named_parameters())
        assert [g["prune"] for g in groups] == [True] * (len(groups) - 1) + [False]
        assert f"{classifier}.weight" in names(groups[-1])
        for group in groups[:-1]:
            if group.get("coupled"):
                slots = zip(group["channel_dims"], group["params"], strict=True)
                assert len({p.shape[dim] * parts for (dim, parts), (_, p) in slots}) == 1
        torch.optim.SGD(groups, 0.1)


def test_a_plain_chain_couples_row_bias_and_norm() -> None:
    groups = by_name(channel_groups(network("vgg"), images()))
    assert groups["features.0"] == ["features.0.weight", "features.0.bias",
                                    "features.1.weight", "features.1.bias"]  # fmt: skip
    assert groups["classifier.0"] == ["classifier.0.weight", "classifier.0.bias"]
    assert len(groups) == 5


def test_residual_channels_are_joined_or_left() -> None:
    model = network("resnet")
    joined = by_name(channel_groups(model, images()))
    assert joined["layer2.0.conv2"] == [
        "layer2.0.conv2.weight", "layer2.0.bn2.weight", "layer2.0.bn2.bias",
        "layer2.0.downsample.0.weight", "layer2.0.downsample.1.weight",
        "layer2.0.downsample.1.bias",
    ]  # fmt: skip
    assert "layer1.0.conv2.weight" in joined["conv1"]
    left = by_name(channel_groups(model, images(), residual="leave"))
    assert set(left) == {f"layer{i}.0.conv1" for i in (1, 2, 3, 4)}


def test_depthwise_rows_belong_to_the_layer_before() -> None:
    groups = by_name(channel_groups(network("mobilenet"), images(), residual="leave"))
    assert [n for n in groups["features.2.conv.0.0"] if n.endswith("0.weight")] == [
        "features.2.conv.0.0.weight", "features.2.conv.1.0.weight"]  # fmt: skip


def test_norms_behind_a_concatenation_are_nobodys() -> None:
    groups = by_name(channel_groups(network("densenet"), images()))
    layer = "features.denseblock1.denselayer1"
    assert groups[f"{layer}.conv1"] == [f"{layer}.{n}" for n in
                                        ("conv1.weight", "norm2.weight", "norm2.bias")]  # fmt: skip
    assert groups[f"{layer}.conv2"] == [f"{layer}.conv2.weight"]


def test_only_the_mlp_of_a_transformer() -> None:
    groups = by_name(channel_groups(network("vit"), images()))
    assert set(groups) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}


def test_rows_share_one_group_unless_several_layers_make_a_channel() -> None:
    *sets, plain, rest = channel_groups(network("resnet"), images(), coupled=False)
    assert names(plain) == [f"layer{i}.0.conv1.weight" for i in (1, 2, 3, 4)]
    assert "coupled" not in plain and "channel_dims" not in plain
    assert by_name(sets)["layer2.0.conv2"] == ["layer2.0.conv2.weight",
                                               "layer2.0.downsample.0.weight"]  # fmt: skip
    assert "bn1.weight" in names(rest)


LAYERS: list[tuple[Callable[[], list[nn.Module]], list[tuple[int, int]]]] = [
    (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], [(0, 1)] * 4),
    (lambda: [nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)], [(1, 1), (0, 1), (0, 1), (0, 1)]),
    (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()], [(0, 1)] * 2),
    (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU()], [(1, 2), (0, 1)]),
    (lambda: [nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True)], [(0, 1)] * 4),
    (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(6, 6, 1, groups=6)], [(0, 1)] * 3),
]


@pytest.mark.parametrize(("layers", "dims"), LAYERS)
def test_the_dimension_of_the_channels(
    layers: Callable[[], list[nn.Module]], dims: list[tuple[int, int]]
) -> None:
    model = nn.Sequential(*layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    first, *_ = channel_groups(model, X)
    assert first["channel_dims"] == dims and len(first["params"]) == len(dims)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.Linear])
def test_other_ranks(kind: type[nn.Module]) -> None:
    sizes = {nn.Conv1d: (2, 4, 9), nn.Conv3d: (2, 4, 3, 3, 3), nn.Linear: (2, 4)}
    arguments = () if kind is nn.Linear else (2,)
    model = nn.Sequential(kind(4, 5, *arguments), nn.ReLU(), kind(5, 3, *arguments))
    first, rest = channel_groups(model, torch.randn(sizes[kind]))
    assert names(first) == ["0.weight", "0.bias"] and names(rest) == ["2.weight", "2.bias"]


def test_a_frozen_layer_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    model[2].requires_grad_(True)
    (rest,) = channel_groups(model, torch.randn(2, 4))
    assert names(rest) == ["2.weight", "2.bias"] and rest["prune"] is False


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_pruning_finds_the_same_sets(name: str) -> None:
    """It says so when it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with torch.no_grad():
            assert len(channel_groups(network(name), images())) > 1


def test_what_torch_pruning_does_not_confirm_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("vgg")
    *groups, _ = channel_groups(model, images())
    first = groups[0]["name"]
    real = confirm.coupled_layers

    def without_first(*arguments: Any) -> set[frozenset[str]]:
        return {names for names in real(*arguments) if first not in names}

    monkeypatch.setattr(confirm, "coupled_layers", without_first)
    with pytest.warns(UserWarning, match=f"the channels of {first} are not pruned"):
        *fewer, rest = channel_groups(model, images())
    assert [g["name"] for g in fewer] == [g["name"] for g in groups[1:]]
    assert f"{first}.weight" in names(rest)


def test_missing_torch_pruning_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"fastprune\[surgery\]"):
        channel_groups(network("vgg"), images())


def test_wrong_input_says_what_was_expected() -> None:
    model: Any = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="residual must be 'join' or 'leave', got 'drop'"):
        channel_groups(model, torch.ones(1, 3), residual="drop")
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        channel_groups(model, None)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        channel_groups("model", Tensor())  # type: ignore[arg-type]
