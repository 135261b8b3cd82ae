"""Small networks of well-known architectures, with statistics of inputs, to be pruned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastprune.channels import trace_channels
from fastprune.optim import channel_groups

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision").models


def vgg() -> nn.Module:
    widths = [8, "M", 16, "M", 24, 24, "M"]
    with torch.device("meta"):  # its classifier has a hundred million weights
        model = models.VGG(nn.Identity(), init_weights=False)
    model.features = models.vgg.make_layers(widths, batch_norm=True)
    model.classifier = nn.Sequential(
        nn.Linear(24 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10)
    )
    return model


def resnet() -> nn.Module:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def wide_resnet() -> nn.Module:
    bottleneck = models.resnet.Bottleneck
    return models.ResNet(bottleneck, [1, 1, 0, 1], num_classes=10, width_per_group=16)


def mobilenet() -> nn.Module:
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2]]  # expansion, channels, depth, stride
    return models.MobileNetV2(10, width_mult=0.5, inverted_residual_setting=blocks)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2), 16, num_classes=10)


def vit() -> nn.Module:
    return timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (vgg, resnet, wide_resnet, mobilenet, densenet, vit)
}


def images(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def network(name: str, seed: int = 0) -> nn.Module:
    """With statistics and offsets such that outputs depend on the input everywhere."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.5)
    return model.eval()


def calibrate(model: nn.Module) -> None:
    """Statistics of the pruned network's own activations."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for i in range(4):
            model.train()(images(100 + i, 16).to(next(model.parameters()).dtype))
    model.eval()


@torch.no_grad()
def zero_channels(model: nn.Module, example: Tensor, share: float = 0.4, seed: int = 0) -> None:
    """Zeroes a share of the channels of every group, with bias and norm."""
    random = torch.Generator().manual_seed(seed)
    for group in channel_groups(model, example):
        if not group["prune"]:
            continue
        slots = list(zip(group["channel_dims"], group["params"], strict=True))
        (dim, groups), (_, first) = slots[0]
        dead = torch.rand(groups * first.shape[dim], generator=random) < share
        dead[int(torch.randint(len(dead), (), generator=random))] = False
        for (dim, groups), (_, parameter) in slots:
            rows = parameter.detach().unflatten(0, (groups, -1)).movedim(dim + 1, 1)
            rows[dead.view(groups, -1)] = 0
    calibrate(model)


@torch.no_grad()
def zero_rows(model: nn.Module, example: Tensor, share: float = 0.4, seed: int = 0) -> None:
    """Zeroes weights and biases of channels, and leaves norms, which then emit constants.

    Layers whose channels are added together lose the same ones, others different ones.
    """
    channels = trace_channels(model, example)
    for layer in channels.layers.values():
        random = torch.Generator().manual_seed(channels.root(layer.labels[0]) + seed)
        dead = torch.rand(len(layer.labels), generator=random) < share
        if channels.why_pinned(layer.labels[0]) == "it is the model's output":
            continue
        for slot in layer.rows:
            parameter = model.get_parameter(slot.name).detach()
            rows = parameter.unflatten(0, (slot.groups, -1)).movedim(slot.dim + 1, 1)
            rows[dead.view(slot.groups, -1)] = 0
    calibrate(model)


@torch.no_grad()
def relative_error(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    expected = model.eval()(x)
    assert (expected - expected.mean(0)).abs().max() > 0.01 * expected.abs().max()
    return float((small.eval()(x) - expected).abs().max() / expected.abs().max())
