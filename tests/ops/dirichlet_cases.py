"""Inputs of the Dirichlet operators. As a program: the digest of what they give on this CPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastprune  # noqa: F401  # registers the operators
from fastprune.ops.reference.dirichlet import trigamma
from tests.ops.machine import print_digest

ODD_SIZES = (1, 3, 0, 127, 128, 129, 2, 300)


@dataclass(frozen=True)
class Case:
    """Layers whose concentrations are spread evenly over the powers of ten between two of them."""

    label: str
    sizes: tuple[int, ...]
    powers: tuple[float, float] = (-3, 5)
    dtype: torch.dtype = torch.float64
    num_samples: int = 3
    seed: int = 7
    offset: int = 0

    def build(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        random = torch.Generator().manual_seed(1)
        low, high = self.powers
        spread = torch.rand(sum(self.sizes), generator=random, dtype=torch.float64)
        prior = torch.rand(len(self.sizes), generator=random, dtype=torch.float64)
        return {
            "concentration": (10 ** (low + (high - low) * spread)).to(self.dtype).to(device),
            "offsets": torch.tensor([0, *self.sizes]).cumsum(0).to(device),
            "prior": (10 ** (low + (high - low) * prior)).to(self.dtype).to(device),
        }

    @property
    def key(self) -> tuple[int, int, int]:
        return self.num_samples, self.seed, self.offset

    def results(self, operators: Any, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """What the three operators of a namespace give, the last for a random gradient."""
        inputs = self.build(device)
        kl, gradient = operators.dirichlet_kl(**inputs)
        phi, offsets = inputs["concentration"], inputs["offsets"]
        samples, slopes = operators.dirichlet_sample(phi, offsets, *self.key)
        random = torch.Generator().manual_seed(2)
        grad = torch.randn(samples.shape, generator=random, dtype=torch.float64)
        grad = grad.to(self.dtype).to(device)
        backward = operators.dirichlet_sample_backward(grad, samples, slopes, offsets)
        return {
            "kl": kl,
            "gradient": gradient,
            "samples": samples,
            "log_derivatives": slopes,
            "backward": backward,
        }


CASES = [
    Case("odd sizes", ODD_SIZES),
    Case("odd sizes, fp32", ODD_SIZES, dtype=torch.float32),
    Case("around 1", (70, 200), powers=(-0.5, 0.5), num_samples=5),
    Case("tiny concentrations", (50, 9), powers=(-3, -2)),
    Case("large concentrations", (50, 9), powers=(4, 5)),
    Case("keys of many bits", (40,), seed=-(2**62) + 12345, offset=2**32 - 1),
    Case("many samples", (5, 8), num_samples=70),
    Case("enough for several threads", (300,) * 30, powers=(-2, 2), num_samples=30),
    Case("no samples", (5, 8), num_samples=0),
    Case("no layers", ()),
    Case("one element", (1,)),
]


KNOWN = [  # counter, key and words of Philox, by its authors' implementation
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

QUOTED = [  # alpha, z, dz / d alpha: implicit derivatives, to 40 digits before they were rounded
    (1, 0.01, 0.05055692237),
    (1, 0.5, 0.8069791168),
    (1, 1, 1.173563027),
    (1, 2, 1.631691462),
    (2, 2, 1.086208577),
    (10, 10, 1.01682349),
    (100, 100, 1.001668324),
    (0.05, 0.025, 1.645521906),
    (0.05, 0.05, 2.666841901),
    (0.5, 0.5, 1.337352594),
]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def excess(y: Tensor, x: Tensor) -> Tensor:
    """ln G(y) - ln G(x) - (y - x) psi(x) as an integral of psi', in which nothing cancels."""
    at, weights = (numbers(*v) for v in np.polynomial.legendre.leggauss(60))
    s, weights = (at + 1) / 2, weights / 2
    slopes = trigamma(x[:, None] + s * (y - x)[:, None])
    return (y - x) ** 2 * (weights * (1 - s) * slopes).sum(1)


if __name__ == "__main__":
    print_digest(case.results(torch.ops.fastprune) for case in CASES)
