"""Small networks of well-known architectures with random unstructured zeros, to be sparsified."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from .networks import NETWORKS, calibrate, models, timm

CONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in NETWORKS.items() if name != "vit"},
    "mobilenet_v3": lambda: models.mobilenet_v3_small(width_mult=0.25, num_classes=10),
    "efficientnet": lambda: models.EfficientNet(
        [
            models.efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1, 0.5, 0.5),
            models.efficientnet.MBConvConfig(6, 5, 2, 16, 24, 2, 0.5, 0.5),
        ],
        dropout=0.2,
        num_classes=10,
    ),
    "timm_vgg": lambda: timm.models.VGG(
        [8, "M", 16, "M", 24, "M"], num_classes=10, norm_layer=nn.BatchNorm2d
    ),
    "timm_preactivation": lambda: timm.models.ResNetV2(
        [1, 1, 1, 1],
        [16, 32, 48, 64],
        num_classes=10,
        stem_chs=16,
        norm_layer=timm.layers.BatchNormAct2d,
        conv_layer=timm.layers.create_conv2d,
    ),
    "timm_resnet": lambda: timm.models.ResNet(
        timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
    ),
    "timm_mobilenet_v3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "timm_efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "timm_same_padding": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100"),
}


@torch.no_grad()
def zero_weights(model: nn.Module, sparsity: float, seed: int = 0) -> None:
    """The same share of random zeros in each layer."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight *= torch.rand(module.weight.shape, generator=random) >= sparsity


@cache
def sparse_network(name: str, sparsity: float = 0.8) -> nn.Module:
    """Pruned, with statistics such that outputs depend on the input. Not to be changed."""
    torch.manual_seed(0)
    model = {**NETWORKS, **CONVERTIBLE}[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.5)
    zero_weights(model, sparsity)
    calibrate(model)
    return model.requires_grad_(False)


def tiny(seed: int = 0, sparsity: float = 0.7) -> nn.Module:
    """A few layers with a shortcut."""
    torch.manual_seed(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(self.body(x) + x)
            return self.head(x.mean((2, 3)))

    model = Block()
    zero_weights(model, sparsity, seed)
    calibrate(model)
    return model.requires_grad_(False)
