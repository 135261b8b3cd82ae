"""Networks of every kind the methods must score, small, smooth where derivatives are compared."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 2), nn.InstanceNorm3d(4, affine=True), nn.Tanh(), nn.Conv3d(4, 2, 2),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


class TanhBlock(nn.Module):
    """ResNet-20's basic block, smooth; the shortcut pads with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        shortcut = x[..., :: self.stride, :: self.stride]
        missing = y.shape[1] - shortcut.shape[1]
        return torch.tanh(y + F.pad(shortcut, (0, 0, 0, 0, 0, missing)))


def resnet20() -> nn.Module:
    widths = [16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [
        TanhBlock(before, width, 1 + (width > before))
        for before, width in zip([16, *widths], widths, strict=False)
    ]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Tanh()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*stem, *blocks, *head)


class Attention(nn.Module):
    """Causal, by the fused function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim((-3, -2), (0, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    """Two blocks that share the second's MLP; the output layer is the embedding."""

    def __init__(self, words: int = 11, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        self.blocks = nn.Sequential(GptBlock(width), GptBlock(width))
        self.blocks[0].mlp[0].weight = self.blocks[1].mlp[0].weight
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))) * self.scale


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(y.mean(1))


def vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=12, num_heads=2,
        num_classes=3, drop_rate=0.1,
    )  # fmt: skip


def tokens_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


# name -> network, shape of its input
IMAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (3, 6, 6)),
    "conv1d": (conv1d, (2, 8)),
    "conv3d": (conv3d, (1, 4, 4, 4)),
    "attention": (SelfAttention, (4, 6)),
    "vit": (vit, (3, 16, 16)),
    "resnet20": (resnet20, (3, 8, 8)),
}
NETWORKS = [*IMAGES, "gpt"]


def network(
    name: str, dtype: torch.dtype = torch.float64, num_batches: int = 4, size: int = 4
) -> tuple[nn.Module, Batches, Any]:
    """A model, its batches and its loss, the same in each call."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name == "gpt":
        tokens = torch.randint(11, (num_batches, size, 7), generator=generator)
        return Gpt().to(dtype), [(t[:, :-1], t[:, 1:]) for t in tokens], tokens_loss
    make, shape = IMAGES[name]
    x = torch.randn(num_batches, size, *shape, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(3, (num_batches, size), generator=generator)
    model = make()
    with torch.no_grad():
        model(x[0].float())  # gives lazy layers their shapes
    return model.to(dtype), list(zip(x, target, strict=True)), F.cross_entropy


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and (a.detach().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes())
    )
