"""Compaction on six architectures: outputs, parameters, file and latency beside the dense model."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.optim import channel_groups
from fastprune.train.measures import file_size

from . import timing
from .experiment import Fact

SHARE = 0.5  # of the channels of every group
ACCEPTED_ERROR = 1e-5  # of the largest output
ROUNDS, BUDGET = 15, 60.0
IMAGE = 224


def architectures() -> dict[str, Callable[[], nn.Module]]:
    import timm
    from torchvision import models

    return {
        "VGG16-BN": models.vgg16_bn,
        "ResNet-50": models.resnet50,
        "WideResNet-50-2": models.wide_resnet50_2,
        "MobileNetV2": models.mobilenet_v2,
        "DenseNet-121": models.densenet121,
        "ViT-Ti/16 (MLPs)": lambda: timm.create_model("vit_tiny_patch16_224"),
    }


def images(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE, IMAGE, generator=random)


@torch.no_grad()
def pruned(make: Callable[[], nn.Module]) -> nn.Module:
    """Random weights and norms, channels of random places zeroed, statistics of random images."""
    torch.manual_seed(0)
    model = make()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.5)
        norm.momentum = None
    for group in channel_groups(model, images(1, 0)):
        if group["prune"]:
            zero(group)
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    for seed in (1, 2):
        model(images(8, seed))
    return model.eval()


def zero(group: dict[str, Any]) -> None:
    """The same random channels in all parameters of a group."""
    parts = [
        parameter.detach().unflatten(0, (groups, -1)).movedim(dim + 1, 1)
        for (dim, groups), (_, parameter) in zip(
            group["channel_dims"], group["params"], strict=True
        )
    ]
    count = parts[0].shape[0] * parts[0].shape[1]
    dead = torch.zeros(count, dtype=torch.bool)
    dead[torch.randperm(count)[: int(count * SHARE)]] = True
    for part in parts:
        part[dead.view(part.shape[0], -1)] = 0


def one_network(subject: str, make: Callable[[], nn.Module]) -> list[Fact]:
    dense = pruned(make)
    small, report = fp.compact(dense, images(1, 0), return_report=True)
    x = images(4, 3)
    with torch.no_grad():
        expected, got = dense(x), small(x)
        error = float((got - expected).abs().max() / expected.abs().max())
        spread = float((expected - expected.mean(0)).abs().max() / expected.abs().max())
        if error > ACCEPTED_ERROR or spread < 100 * ACCEPTED_ERROR:
            raise AssertionError(
                f"{subject}: outputs differ by {error:.2g} of the largest, and over the inputs by "
                f"{spread:.2g}; accepted are at most {ACCEPTED_ERROR} and at least 100 times that"
            )
        one = images(1, 4)
        samples = timing.measure(
            {
                "dense": timing.on_cpu(lambda: dense(one)),
                "compacted": timing.on_cpu(lambda: small(one)),
            },
            ROUNDS,
            BUDGET,
        ).seconds
    ratio = timing.ratio_by_round(samples["dense"], samples["compacted"])
    share = 100 * report.parameters_after / report.parameters_before
    return [
        (subject, "largest difference of outputs, of the largest output", error, ""),
        (subject, "parameters left", round(share, 1), "%"),
        (subject, "file size left", round(100 * file_size(small) / file_size(dense), 1), "%"),
        (subject, "latency dense", round(1e3 * median(samples["dense"]), 2), "ms, one image"),
        (subject, "latency compacted", round(1e3 * median(samples["compacted"]), 2),
         "ms, one image"),
        (subject, "latency dense / compacted", round(ratio, 2), "x, median of rounds"),
    ]  # fmt: skip


def measure() -> list[Fact]:
    return [fact for name, make in architectures().items() for fact in one_network(name, make)]
