"""Networks of the longer experiments."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digits_mlp(seed: int) -> nn.Sequential:
    """64-128-64-10: 17,024 prunable weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits_vgg() -> nn.Sequential:
    """Six convolutions and two linear layers for 8x8 images: 76,826 parameters."""
    return nn.Sequential(
        *conv_bn_relu(1, 16), *conv_bn_relu(16, 16), nn.MaxPool2d(2),
        *conv_bn_relu(16, 32), *conv_bn_relu(32, 32), nn.MaxPool2d(2),
        *conv_bn_relu(32, 64), *conv_bn_relu(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits_resnet() -> nn.Sequential:
    """Six residual blocks for 8x8 images: 174,970 parameters."""
    return _resnet(1, 2, Projected)


def resnet20() -> nn.Sequential:
    """For 32x32 images and ten classes: 268,336 weights in convolutions, 640 in the last layer."""
    return _resnet(3, 3, Padded)


def _resnet(channels: int, blocks: int, shortcut: "Shortcut") -> nn.Sequential:
    """That many blocks of each of three widths."""

    def stages() -> Iterator[nn.Module]:
        before = 16
        for width in (16, 32, 64):
            for _ in range(blocks):
                yield Block(before, width, 1 if width == before else 2, shortcut)
                before = width

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*conv_bn_relu(channels, 16), *stages(), *head)


def conv_bn_relu(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: "Shortcut") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Projected(nn.Sequential):
    """A 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        narrow = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        super().__init__(narrow, nn.BatchNorm2d(outputs))


class Padded(nn.Module):
    """Without weights: every `stride`-th pixel, and zeros for the channels that are missing."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


Shortcut = Callable[[int, int, int], nn.Module]  # of inputs, outputs, stride
