"""Dirichlet distributions of many layers at once: the KL to their priors, and random draws.

The concentrations phi of all layers lie one after the other; layer l has those from `offsets[l]` to
`offsets[l + 1]`. Every number is computed in float64, whatever the tensors' type.

    KL = lnG(phi0) - lnG(D a) - sum lnG(phi_j) + D lnG(a) + sum (phi_j - a) (psi(phi_j) - psi(phi0))
    dKL / dphi_j = (phi_j - a) psi'(phi_j) - (phi0 - D a) psi'(phi0)

where phi0 is the sum of a layer's concentrations, D their number and a the layer's prior. As it
stands the formula is as exact as lnG(phi0) in float64; kernels subtract before they add.

A draw is s = z / sum z with z_j ~ Gamma(phi_j), in logarithms. For phi of at least 1 it is that of
Marsaglia and Tsang (2000): with d = phi - 1/3, c = 1 / sqrt(9 d), a normal x and a uniform u,
z = d (1 + c x)^3 is taken if 1 + c x > 0 and ln u < x^2 / 2 + d (1 - v + ln v), v = (1 + c x)^3.
Below 1 it is z = z' U^(1 / phi), z' a draw of Gamma(phi + 1).

The pathwise derivative l = d ln z / d phi is the implicit one, -F_phi(z) / (z f(z)), of the draw of
at least 1 (holding x and u would be biased: acceptance depends on phi), and with the uniform U held
l(z'; phi + 1) - ln U / phi^2 below 1. In expectation given z that is the implicit derivative too.

Random numbers are those of Philox4x32-10 with the key `seed` and the counter (element, sample,
round, offset): one call gives a round's four words, for x the first two, u the third, and the
fourth of round 0 is U. So a draw depends on nothing but these, and the next draw of the same
tensor takes the offset plus 1.
"""

from math import pi

import numpy as np
import torch
from torch import Tensor

ROUNDS = 16  # all are rejected once in 10^21 draws at most; then x = 0, the mode
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dirichlet_kl(concentration: Tensor, offsets: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The KL of each layer, and its gradient at each concentration."""
    phi, layer = concentration.double(), layers(concentration, offsets)
    prior_of, sizes = prior.double(), offsets.diff()
    a = prior_of[layer]
    phi0, a0 = _sums(phi, layer, offsets), sizes * prior_of
    psi = torch.digamma
    own = (phi - a) * (psi(phi) - psi(phi0)[layer]) - torch.lgamma(phi) + torch.lgamma(a)
    kl = _sums(own, layer, offsets) + torch.lgamma(phi0) - torch.lgamma(a0)
    kl = torch.where(sizes > 0, kl, 0.0)
    gradient = (phi - a) * trigamma(phi) - ((phi0 - a0) * trigamma(phi0))[layer]
    return kl.to(concentration.dtype), gradient.to(concentration.dtype)


def dirichlet_sample(
    concentration: Tensor, offsets: Tensor, num_samples: int, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Draws [num_samples, elements] that sum to 1 in each layer, and d ln z / d concentration."""
    log_z, slopes = log_gamma_draws(concentration.double(), num_samples, seed, offset)
    layer = layers(concentration, offsets).expand_as(log_z)
    shape = (num_samples, offsets.numel() - 1)
    largest = log_z.new_full(shape, -torch.inf).scatter_reduce(1, layer, log_z, "amax")
    weights = (log_z - largest.gather(1, layer)).exp()
    sums = log_z.new_zeros(shape).scatter_add(1, layer, weights)
    samples = weights / sums.gather(1, layer)
    return samples.to(concentration.dtype), slopes.to(concentration.dtype)


def dirichlet_sample_backward(
    grad: Tensor, samples: Tensor, log_derivatives: Tensor, offsets: Tensor
) -> Tensor:
    """sum over samples of l_i s_i (g_i - sum_j g_j s_j), the inner sum over the layer of i."""
    g, s = grad.double(), samples.double()
    layer = layers(samples[0] if len(samples) else samples.sum(0), offsets).expand_as(s)
    means = s.new_zeros(len(s), offsets.numel() - 1).scatter_add(1, layer, g * s)
    each = log_derivatives.double() * s * (g - means.gather(1, layer))
    return each.sum(0).to(samples.dtype)


def layers(concentration: Tensor, offsets: Tensor) -> Tensor:
    """The number of each element's layer."""
    numbers = torch.arange(offsets.numel() - 1, device=offsets.device)
    return numbers.repeat_interleave(offsets.diff(), output_size=concentration.numel())


def trigamma(x: Tensor) -> Tensor:
    """Hurwitz' zeta function is exact to the last places; torch's polygamma is to 5e-10."""
    slope: Tensor = torch.special.zeta(x.new_tensor(2.0), x)
    return slope


def _sums(values: Tensor, layer: Tensor, offsets: Tensor) -> Tensor:
    return values.new_zeros(offsets.numel() - 1).index_add(0, layer, values)


def log_gamma_draws(
    alpha: Tensor, num_samples: int, seed: int, offset: int, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """ln z of Gamma(alpha) and d ln z / d alpha, [num_samples, elements]."""
    below = alpha < 1
    shape = torch.where(below, alpha + 1, alpha)
    d = shape - 1 / 3
    c = (9 * d).rsqrt()
    element = torch.arange(alpha.numel(), device=alpha.device).expand(num_samples, -1)
    sample = torch.arange(num_samples, device=alpha.device)[:, None].expand_as(element)
    t = torch.zeros_like(element, dtype=torch.float64)  # c times the accepted x
    boost = t
    waiting = torch.ones_like(element, dtype=torch.bool)
    for number in range(rounds):
        words = philox((element, sample, torch.full_like(element, number), offset), seed)
        if number == 0:
            boost = uniform(words[3]).log()
        x = normal(words[0], words[1])
        v = (1 + c * x).clamp(min=0) ** 3
        accepted = uniform(words[2]).log() < x * x / 2 + d * (1 - v + v.log())
        t = torch.where(waiting & accepted, c * x, t)
        waiting = waiting & ~accepted
        if not waiting.any():
            break
    log_z = d.log() + 3 * (1 + t).log()
    slope = implicit_derivative(log_z, shape)
    return (
        torch.where(below, log_z + boost / alpha, log_z),
        torch.where(below, slope - boost / alpha / alpha, slope),
    )


def implicit_derivative(log_z: Tensor, shape: Tensor, points: int = 48) -> Tensor:
    """-F_a(z) / (z f(z)) of Gamma(a), the derivative of ln z at a constant F, for a >= 1.

    From F, or where the logarithm of z exceeds its mean psi(a) from 1 - F:

        integral over u > 0 of exp(-a u + z (1 - e^-u)) (psi(a) - ln z + u) du
        integral over r > 0 of exp((a - 1) ln(1 + r) - z r) (ln z - psi(a) + ln(1 + r)) dr

    Nothing in them changes its sign, so nothing cancels. By Gauss and Legendre, up to where the
    exponent is under -`reach`.
    """
    reach = 34.0
    z, a = log_z.exp(), shape
    excess = log_z - torch.digamma(a)
    # Where 1 - e^-u <= u / (1 + u / 2) and ln(1 + r) <= r (6 + r) / (6 + 4 r) say that it is.
    lower_end = _positive_root(a / 2, a - z - reach / 2, reach)
    upper_end = _positive_root(4 * z - a + 1, 6 * (z - a + 1) - 4 * reach, 6 * reach)
    lower, upper = torch.zeros_like(z), torch.zeros_like(z)
    for node, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        u, r = lower_end * (node + 1) / 2, upper_end * (node + 1) / 2
        lower += weight / 2 * (-a * u - z * (-u).expm1()).exp() * (u - excess)
        upper += weight / 2 * ((a - 1) * r.log1p() - z * r).exp() * (r.log1p() + excess)
    return torch.where(excess > 0, upper * upper_end, lower * lower_end)


def _positive_root(square: Tensor, linear: Tensor, constant: float) -> Tensor:
    """Of square x^2 + linear x = constant, without cancellation."""
    root = (linear * linear + 4 * square * constant).sqrt()
    return torch.where(linear > 0, 2 * constant / (linear + root), (root - linear) / (2 * square))


def philox(counter: tuple[Tensor, Tensor, Tensor, int], seed: int) -> list[Tensor]:
    """Four words of Philox4x32-10 (Salmon et al. 2011), each in an int64 tensor."""
    c0, c1, c2 = counter[:3]
    c3 = torch.full_like(c0, counter[3])
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [k + w & _WORD for k, w in zip(key, _WEYL, strict=True)]
    return [c0, c1, c2, c3]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words."""
    high = ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16
    return high, a * b & _WORD


def uniform(word: Tensor) -> Tensor:
    """Between 0 and 1, and neither."""
    return (word.double() + 0.5) * 2.0**-32


def normal(first: Tensor, second: Tensor) -> Tensor:
    """Box and Muller's."""
    return (-2 * uniform(first).log()).sqrt() * (2 * pi * uniform(second)).cos()
