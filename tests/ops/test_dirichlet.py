"""Dirichlet operators: against the reference, worked numbers, moments and exact expectations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops import reference
from fastprune.ops.reference import dirichlet as specification
from tests.ops.dirichlet_cases import CASES, KNOWN, QUOTED, Case, excess, numbers
from tests.ops.machine import assert_machines_agree, assert_same

OPERATORS = torch.ops.fastprune
SERVED = fp.build_info().operators["dirichlet_kl"]
HAS_NATIVE = SERVED["CPU"] != "reference"
BOTH = pytest.mark.parametrize("operators", [OPERATORS, reference], ids=["operator", "reference"])
EVERY_CASE = pytest.mark.parametrize("case", [pytest.param(c, id=c.label) for c in CASES])
FLOAT64 = torch.float64


def one_layer(*phi: float) -> tuple[Tensor, Tensor]:
    return numbers(*phi), torch.tensor([0, len(phi)])


# Relative. The reference's quadrature of log derivatives has more points than a kernel's, whose
# error is 1e-7; the backward pass inherits it.
TOLERANCES = {"kl": 1e-9, "gradient": 1e-9, "samples": 1e-12, "log_derivatives": 2e-7}


@EVERY_CASE
def test_values_are_those_of_the_reference(
    case: Case, device: torch.device, poisoned_memory: None
) -> None:
    ours, expected = case.results(OPERATORS, device), case.results(reference, device)
    rounding = 1e-6 if case.dtype == torch.float32 else 0.0
    for name, tolerance in TOLERANCES.items():
        assert ours[name].dtype == case.dtype
        torch.testing.assert_close(
            ours[name], expected[name], rtol=tolerance + rounding, atol=1e-12, msg=name
        )
    scale = expected["backward"].abs().max() if expected["backward"].numel() else 0.0
    torch.testing.assert_close(
        ours["backward"], expected["backward"], rtol=1e-6, atol=1e-6 * float(scale)
    )


# ---------------------------------------------------------------- the divergence

WORKED = [
    ((1, 1), 1, 0.0, (0, 0)),
    ((2, 2), 1, math.log(6) - 5 / 3, (0.07728815, 0.07728815)),
    ((1, 1), 2, 2 - math.log(6), (-0.35506593, -0.35506593)),
    ((3, 1, 1), 1, math.log(6) - 7 / 6, (0.34722222, -0.44264591, -0.44264591)),
    ((1, 1, 1), 2, 0.405655438, (-0.46013187,) * 3),
    ((0.5, 0.5), 0.05, 1.292650940, (0.74022033,) * 2),
]


@BOTH
@pytest.mark.parametrize(("phi", "prior", "kl", "gradient"), WORKED)
def test_worked_divergences(
    operators: Any, phi: tuple[float, ...], prior: float, kl: float, gradient: tuple[float, ...]
) -> None:
    found, slopes = operators.dirichlet_kl(*one_layer(*phi), numbers(prior))
    assert abs(float(found) - kl) < 1e-9
    torch.testing.assert_close(slopes, numbers(*gradient), rtol=0, atol=1e-8)


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
@pytest.mark.parametrize("level", [0.5, 3.0, 1e3, 1e5])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 0.5])
def test_divergences_near_the_prior_do_not_cancel(level: float, distance: float) -> None:
    random = torch.Generator().manual_seed(0)
    spread = 1 + distance * torch.rand(500, generator=random, dtype=FLOAT64)
    phi, prior = level * spread, torch.full((500,), level, dtype=FLOAT64)
    kl, _ = OPERATORS.dirichlet_kl(phi, torch.tensor([0, 500]), prior[:1])
    expected = excess(prior, phi).sum() - excess(prior.sum()[None], phi.sum()[None])
    assert float(kl) == pytest.approx(float(expected), rel=1e-9)


def test_the_divergence_at_the_prior_is_0_and_a_layer_of_one_has_none(device: torch.device) -> None:
    phi = torch.full((9,), 1e5, dtype=FLOAT64, device=device)
    phi[8] = 3.0
    offsets = torch.tensor([0, 8, 9], device=device)
    prior = torch.tensor([1e5, 0.25], dtype=FLOAT64, device=device)
    kl, gradient = OPERATORS.dirichlet_kl(phi, offsets, prior)
    assert kl.abs().max() < 1e-9 and gradient.abs().max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 5), min_size=1, max_size=40), st.floats(-3, 5), st.randoms())
def test_a_divergence_is_not_negative_and_takes_any_order(
    powers: list[float], prior: float, random: Any
) -> None:
    a = numbers(10**prior)
    phi, offsets = one_layer(*(10**p for p in powers))
    order = torch.tensor(random.sample(range(len(phi)), len(phi)))
    kl, gradient = OPERATORS.dirichlet_kl(phi, offsets, a)
    other, moved = OPERATORS.dirichlet_kl(phi[order], offsets, a)
    noise = 1e-14 * float(torch.lgamma(phi.sum()).abs() + torch.lgamma(len(phi) * a).abs())
    assert kl.item() >= -noise and kl.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(other, kl, rtol=1e-11, atol=noise)
    torch.testing.assert_close(moved, gradient[order], rtol=1e-9, atol=1e-12)


def test_gradcheck_of_the_divergence(device: torch.device) -> None:
    phi = numbers(0.05, 0.5, 1, 2, 10, 3, 0.2, 40).to(device).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 8], device=device)
    prior = numbers(1, 1, 0.3).to(device)
    assert torch.autograd.gradcheck(lambda p: fp.ops.dirichlet_kl(p, offsets, prior), (phi,))


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: int, words: tuple[int, ...]
) -> None:
    tensors = [torch.tensor([c]) for c in counter[:3]]
    found = specification.philox((tensors[0], tensors[1], tensors[2], counter[3]), key)
    assert tuple(int(word) for word in found) == words


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    assert_machines_agree("tests.ops.dirichlet_cases")


@EVERY_CASE
def test_equal_keys_give_equal_bits_on_every_device(case: Case, device: torch.device) -> None:
    native = HAS_NATIVE and SERVED[device.type.upper()] != "reference"
    other = "cpu" if native else device
    assert_same(case.results(OPERATORS, device), case.results(OPERATORS, other))


def test_a_draw_depends_on_its_position_and_key_alone(device: torch.device) -> None:
    phi = torch.linspace(0.2, 3, 12, dtype=FLOAT64, device=device)
    offsets = torch.tensor([0, 12], device=device)

    def draw(num_samples: int, seed: int, offset: int) -> Tensor:
        return fp.ops.dirichlet_sample(phi, offsets, num_samples, seed, offset)

    assert torch.equal(draw(9, 5, 1)[:4], draw(4, 5, 1))
    others = [draw(4, 5, 2), draw(4, 6, 1), draw(4, 5 + 2**32, 1), draw(5, 5, 1)[1:]]
    assert all((draw(4, 5, 1) != other).all() for other in others)


def test_offsets_and_seeds_give_independent_draws() -> None:
    phi, offsets = torch.full((2,), 1.5, dtype=FLOAT64), torch.tensor([0, 2])
    keys = [(0, 0), (0, 1), (0, 2), (1, 0), (2**32, 0)]
    draws = [fp.ops.dirichlet_sample(phi, offsets, 20_000, *key)[:, 0] for key in keys]
    draws += [draws[0].roll(1)]  # neighbours of one call
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_nothing_is_nan_from_1e_3_to_1e5(dtype: torch.dtype, device: torch.device) -> None:
    levels = 10 ** torch.linspace(-3, 5, 81, dtype=FLOAT64)
    phi = torch.cat([levels.repeat_interleave(5), levels]).to(dtype).to(device).requires_grad_()
    offsets = torch.cat([torch.arange(0, 406, 5), torch.tensor([486])]).to(device)
    kl = fp.ops.dirichlet_kl(phi, offsets, phi.new_ones(82))
    samples = fp.ops.dirichlet_sample(phi, offsets, 200, 3, 0)
    assert kl.isfinite().all() and samples.isfinite().all() and (samples >= 0).all()
    layer = specification.layers(phi, offsets).expand_as(samples)
    sums = samples.new_zeros(200, 82, dtype=FLOAT64).scatter_add(1, layer, samples.double())
    torch.testing.assert_close(
        sums, torch.ones_like(sums), rtol=0, atol=200 * torch.finfo(dtype).eps
    )
    (gradient,) = torch.autograd.grad(kl.sum() + samples.square().sum(), phi)
    assert gradient.isfinite().all()


def assert_within_4_errors(values: Tensor, expected: Tensor | float) -> None:
    """The mean over the first dimension is the expected one, up to 4 of its standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    distance = (values.mean(0) - expected).abs()
    assert (distance <= 4 * error + 1e-12).all(), (distance / error).tolist()


@pytest.mark.parametrize("level", [0.05, 0.3, 0.9, 1.0, 3.0, 20.0, 100.0])
def test_moments_of_the_draws(level: float) -> None:
    phi, offsets = one_layer(level, level, 2 * level, 0.5)
    s = fp.ops.dirichlet_sample(phi, offsets, 40_000, 11, 0)
    total, mean = phi.sum(), phi / phi.sum()
    assert_within_4_errors(s, mean)
    assert_within_4_errors((s - mean) ** 2, mean * (1 - mean) / (total + 1))
    products = (s - mean)[:, :1] * (s - mean)[:, 1:]
    assert_within_4_errors(products, -phi[0] * phi[1:] / (total**2 * (total + 1)))
    logs = s.clamp(min=1e-300).log()  # of the smallest concentration some draws are 0
    if level > 0.05:
        assert_within_4_errors(logs, torch.digamma(phi) - torch.digamma(total))


@pytest.mark.parametrize("alpha", [1.0, 1.7, 30.0])
def test_rejections_are_rare_and_end_at_the_mode(alpha: float) -> None:
    shape = numbers(alpha)
    once, _ = specification.log_gamma_draws(shape, 50_000, 3, 0, rounds=1)
    at_mode = once == (shape - 1 / 3).log()
    assert float(at_mode.double().mean()) ** specification.ROUNDS < 1e-20
    never, slope = specification.log_gamma_draws(shape, 1, 3, 0, rounds=0)
    assert torch.equal(never, (shape - 1 / 3).log().expand(1, 1)) and slope.isfinite().all()


# ---------------------------------------------------------------- pathwise derivatives


def mean_slope(log_z: Tensor, alpha: Tensor) -> Tensor:
    """The expectation of d ln z / d alpha of our draws that end at z.

    A draw below 1 is z = z' U^(1 / alpha). Given z, the difference z' - z is exponential: this is
    the integral of l(z'; alpha + 1) - ln U / alpha^2 over ln z', by Gauss and Legendre.
    """
    if alpha >= 1:
        return specification.implicit_derivative(log_z, alpha)
    at, weights = (numbers(*v) for v in np.polynomial.legendre.leggauss(200))
    length = math.log(60) - log_z
    log_raised = log_z + length * (at + 1) / 2
    density = (log_raised + log_z.exp() - log_raised.exp()).exp()
    slopes = specification.implicit_derivative(log_raised, alpha + 1)
    slopes = slopes + (log_raised - log_z) / alpha
    return (length * weights / 2 * density * slopes).sum(0, keepdim=True)


@pytest.mark.parametrize(("alpha", "z", "expected"), QUOTED)
def test_quoted_derivatives(alpha: float, z: float, expected: float) -> None:
    slope = mean_slope(numbers(z).log(), numbers(alpha))
    assert float(z * slope) == pytest.approx(expected, rel=2e-9)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 2.0, 7.0, 40.0, 500.0])
def test_the_implicit_derivative_keeps_the_distribution_function(alpha: float) -> None:
    z = alpha * (1 + torch.linspace(-2.5, 3, 23, dtype=FLOAT64) / math.sqrt(alpha)).clamp(min=0.02)
    step = 1e-4 * alpha
    cdf = torch.special.gammainc
    slope_of_cdf = cdf(numbers(alpha + step), z) - cdf(numbers(alpha - step), z)
    log_density = alpha * z.log() - z - math.lgamma(alpha)  # of ln z
    expected = -slope_of_cdf / (2 * step) / log_density.exp()
    found = specification.implicit_derivative(z.log(), torch.full_like(z, alpha))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def per_sample(phi: Tensor, offsets: Tensor, gradients: Any, num_samples: int) -> Tensor:
    """d f(s) / d phi of each sample, for the gradient of f at the samples."""
    samples, slopes = OPERATORS.dirichlet_sample(phi, offsets, num_samples, 21, 0)
    g = gradients(samples)
    inner = (g * samples).sum(1, keepdim=True)
    parts = slopes * samples * (g - inner)
    sums = OPERATORS.dirichlet_sample_backward(g, samples, slopes, offsets)
    torch.testing.assert_close(sums, parts.sum(0), rtol=1e-9, atol=1e-9)
    return parts


LEVELS = [(1.0, 1.0), (0.05, 0.2, 0.6), (0.5, 0.5), (0.9, 1.1, 4.0), (1.0, 2.0, 3.0), (10.0, 100.0)]


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_in_expectation(level: tuple[float, ...]) -> None:
    """Against central differences of E s_0 and of E s_0 s_0, which are known."""
    phi, offsets = one_layer(*level)

    def differences(expectation: Any) -> Tensor:
        steps = torch.eye(len(phi), dtype=FLOAT64) * phi * 1e-5
        up, down = expectation(phi + steps), expectation(phi - steps)
        return (up - down) / (2e-5 * phi)

    first = torch.zeros_like(phi)
    first[0] = 1
    means = per_sample(phi, offsets, lambda s: first.expand_as(s), 50_000)
    assert_within_4_errors(means, differences(lambda p: p[:, 0] / p.sum(1)))

    def square(p: Tensor) -> Tensor:
        total = p.sum(1)
        return p[:, 0] * (p[:, 0] + 1) / total / (total + 1)

    squares = per_sample(phi, offsets, lambda s: 2 * s * first, 50_000)
    assert_within_4_errors(squares, differences(square))
    if level == (1.0, 1.0):
        assert differences(lambda p: p[:, 0] / p.sum(1)).tolist() == pytest.approx([0.25, -0.25])


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 1.2, 2.0, 10.0, 1000.0])
def test_the_mean_slope_of_a_gamma_draw(alpha: float) -> None:
    """E z = alpha and E ln z = psi(alpha), so E dz / d alpha = 1 and E d ln z / d alpha = psi'."""
    log_z, slope = specification.log_gamma_draws(numbers(alpha), 200_000, 8, 0)
    assert_within_4_errors(log_z.exp(), alpha)
    assert_within_4_errors(log_z.exp() * slope, 1.0)
    assert_within_4_errors(slope, float(specification.trigamma(numbers(alpha))))


def test_backward_is_the_derivative_of_normalised_exponentials(device: torch.device) -> None:
    phi = numbers(0.3, 2, 1, 5, 0.02).to(device)
    offsets = torch.tensor([0, 3, 5], device=device)
    samples, slopes = OPERATORS.dirichlet_sample(phi, offsets, 6, 1, 0)
    moved = phi.clone().requires_grad_()
    logs = samples.log() + slopes * (moved - phi)
    again = torch.cat([part.softmax(1) for part in logs.split([3, 2], 1)], 1)
    grad = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    grad = grad.to(device)
    (expected,) = torch.autograd.grad(again, moved, grad)
    drawn = phi.clone().requires_grad_()
    (found,) = torch.autograd.grad(fp.ops.dirichlet_sample(drawn, offsets, 6, 1, 0), drawn, grad)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- torch, and bad input


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool, device: torch.device) -> None:
    inputs = Case("", (3, 0, 5), (-1, 1), dtype).build(device)
    phi, offsets = inputs["concentration"].requires_grad_(requires_grad), inputs["offsets"]
    torch.library.opcheck(OPERATORS.dirichlet_kl.default, (phi, offsets, inputs["prior"]))
    torch.library.opcheck(OPERATORS.dirichlet_sample.default, (phi, offsets, 4, 7, 2))
    samples, slopes = (t.detach() for t in OPERATORS.dirichlet_sample(phi, offsets, 4, 7, 2))
    arguments = samples, samples, slopes, offsets
    torch.library.opcheck(OPERATORS.dirichlet_sample_backward.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break_or_a_graph_per_offset(backend: str, device: torch.device) -> None:
    inputs = Case("", (3, 5), (-1, 1)).build(device)
    phi, offsets = inputs["concentration"].requires_grad_(), inputs["offsets"]

    def loss(phi: Tensor, offset: int) -> Tensor:
        kl = fp.ops.dirichlet_kl(phi, offsets, inputs["prior"])
        return kl.sum() + fp.ops.dirichlet_sample(phi, offsets, 4, 7, offset).square().sum()

    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for offset in range(6):
        ours, expected = compiled(phi, offset), loss(phi, offset)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        (found,), (wanted,) = (torch.autograd.grad(value, phi) for value in (ours, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert graphs.frame_count <= 3  # 0, 1, and every other offset


def test_a_second_derivative_is_refused() -> None:
    phi, offsets = one_layer(1.0, 2.0)
    phi.requires_grad_()
    for value in (
        fp.ops.dirichlet_kl(phi, offsets, numbers(1.0)),
        fp.ops.dirichlet_sample(phi, offsets, 2, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(value.square().sum(), phi, create_graph=True)


def test_strided_inputs_and_gradients() -> None:
    wide, offsets = torch.rand(6, 2, dtype=FLOAT64) + 0.1, torch.tensor([0, 9, 2, 9, 6])[::2]
    phi = wide[:, 0]
    assert not phi.is_contiguous() and not offsets.is_contiguous()
    ours = OPERATORS.dirichlet_sample(phi, offsets, 3, 0, 0)
    expected = OPERATORS.dirichlet_sample(phi.contiguous(), offsets.contiguous(), 3, 0, 0)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    samples, slopes = ours
    grad = torch.rand(6, 3, dtype=FLOAT64).T
    found = OPERATORS.dirichlet_sample_backward(grad, samples, slopes, offsets)
    wanted = OPERATORS.dirichlet_sample_backward(grad.contiguous(), samples, slopes, offsets)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"concentration": torch.ones(4, dtype=torch.float16)}, "concentration: expected one"),
        ({"concentration": torch.ones(2, 2)}, "concentration: expected one"),
        ({"offsets": torch.tensor([0.0, 4.0])}, "offsets: expected int64"),
        ({"prior": torch.ones(2)}, "prior: expected .* the 1 layers"),
        ({"num_samples": -1}, "num_samples: expected 0 or more, got -1"),
        ({"offset": 2**32}, "offset: expected 0 to"),
        ({"offset": -1}, "offset: expected 0 to"),
        ({"seed": 2**63}, "seed: expected a 64-bit integer"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    inputs = {"concentration": torch.ones(4), "offsets": torch.tensor([0, 4])} | {
        k: v for k, v in changed.items() if k in ("concentration", "offsets")
    }
    if "prior" in changed:
        with pytest.raises(ValueError, match=message):
            fp.ops.dirichlet_kl(**inputs, prior=changed["prior"])
        return
    key = {"num_samples": 1, "seed": 0, "offset": 0}
    key |= {k: v for k, v in changed.items() if k in key}
    with pytest.raises(ValueError, match=message):
        fp.ops.dirichlet_sample(**inputs, **key)


@pytest.mark.skipif(not HAS_NATIVE, reason="no native library")
@pytest.mark.parametrize("offsets", [[0, 3], [0, 5], [1, 4], [0, 3, 2, 4]])
def test_offsets_that_leave_the_tensor_are_refused(offsets: list[int]) -> None:
    with pytest.raises(RuntimeError, match="offsets must"):
        OPERATORS.dirichlet_sample(torch.ones(4), torch.tensor(offsets), 1, 0, 0)
    with pytest.raises(RuntimeError, match="offsets must"):
        OPERATORS.dirichlet_kl(torch.ones(4), torch.tensor(offsets), torch.ones(len(offsets) - 1))
