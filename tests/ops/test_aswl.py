"""ASWL's reference: the worked numbers of the method, its traps, its properties."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune.ops.reference import aswl
from fastprune.ops.reference.aswl import ATTENTION, BOTH, FLOOR, PRUNED, SCALED, SETTINGS

WORKED = (-4, 3, -2, 1, 0.5, -0.1, 0, 2.5, -1.5, 0.7)
DEFAULTS = {
    "lr": 0.1,
    "momentum": 0.0,
    "l2": 0.0,
    "attention_lr": 0.0,
    "alpha": 1.0,
    "target": 0.5,
    "density_weight": 0.0,
    "gain": 0.3,
}


def settings_of(**changed: float) -> Tensor:
    return torch.tensor([(DEFAULTS | changed)[name] for name in SETTINGS], dtype=torch.float64)


def table(*attention: float) -> Tensor:
    rows = torch.zeros(len(attention), len(ATTENTION), dtype=torch.float64)
    rows[:, 0] = torch.tensor(attention, dtype=torch.float64)
    return rows


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


class Layers:
    """Arguments of a step: each layer a list of (weight, role); the rest is made here."""

    def __init__(self, *layers: list[tuple[Tensor, int]], attention: float, **options: Any) -> None:
        self.roles = [role for layer in layers for _, role in layer]
        self.layers = [number for number, layer in enumerate(layers) for _ in layer]
        self.keep_ties = options.pop("keep_ties", False)
        self.settings = settings_of(**options)
        self.dense = [w.clone() for layer in layers for w, _ in layer]
        self.momenta = [torch.zeros_like(w) for w in self.dense]
        self.parameters = [w.clone() for w in self.dense]
        self.attention = table(*[attention] * len(layers))
        self.tie_end = torch.zeros(len(layers), dtype=torch.int64)
        self.multiplier = zero()
        self.apply()

    def apply(self) -> None:
        """A step without gradients at standstill: selects and forms the parameters."""
        rest = self.settings.clone()
        rest[SETTINGS.index("attention_lr")] = 0
        before = self.attention.clone()
        self._run([w.new_empty(0) for w in self.dense], rest)
        self.attention[:, 1] = before[:, 1]

    def step(self, *gradients: Tensor) -> None:
        self._run(list(gradients), self.settings)

    def _run(self, gradients: list[Tensor], settings: Tensor) -> None:
        state = (self.parameters, self.dense, self.momenta, self.attention, self.tie_end,
                 self.multiplier)  # fmt: skip
        options = self.layers, self.roles, self.keep_ties
        aswl.aswl_step_(*state, gradients, settings, *options)


def pruned(values: Any, p: float, alpha: float = 1.0, **options: Any) -> Layers:
    """One layer at the attention that gives p."""
    weight = torch.as_tensor(values, dtype=torch.float32)
    if p == 1:  # beyond the floor of a, for the limit k <= n - 1
        layer = Layers([(weight, BOTH)], attention=1.0, **options)
        layer.attention[0, 0] = 0.0
        layer._run([weight.new_empty(0)], layer.settings)
        return layer
    return Layers([(weight, BOTH)], attention=1 - p ** (1 / alpha), alpha=alpha, **options)


# ---------------------------------------------------------------- worked numbers


@pytest.mark.parametrize(
    ("alpha", "density", "slopes"),
    [(1.0, 0.725, (0.3625, 1.0875)), (2.0, 0.9075, (0.45375, 0.5445))],
)
def test_the_regulariser_and_its_derivative(
    alpha: float, density: float, slopes: tuple[float, ...]
) -> None:
    """At target 0: phi = density^2, whose derivative is the whole step of a."""
    attention = table(0.5, 0.8)
    options = settings_of(attention_lr=1, alpha=alpha, target=0, density_weight=1, gain=0)
    sizes = torch.tensor([100.0, 300.0], dtype=torch.float64)
    aswl.attention_step(attention, zero(), torch.zeros(2, dtype=torch.float64), sizes, options)
    assert attention[:, 1].tolist() == pytest.approx(slopes, rel=1e-12)
    assert attention[:, 0].tolist() == pytest.approx([0.5 - slopes[0], max(0.8 - slopes[1], FLOOR)])
    p = aswl.power(1 - table(0.5, 0.8)[:, 0], options[SETTINGS.index("alpha")])
    assert float(((1 - p) * sizes).sum() / 400) == pytest.approx(density, rel=1e-12)


def test_the_derivative_at_a_target() -> None:
    attention = table(0.5, 0.8)
    options = settings_of(attention_lr=0.1, target=0.1, density_weight=1, gain=0)
    sizes = torch.tensor([100.0, 300.0], dtype=torch.float64)
    aswl.attention_step(attention, zero(), torch.zeros(2, dtype=torch.float64), sizes, options)
    assert attention[:, 1].tolist() == pytest.approx([0.3125, 0.9375], rel=1e-12)


@pytest.mark.parametrize(
    ("p", "threshold", "kept"), [(0.4, 1.0, 6), (0.9, 4.0, 1), (0.0, 0.0, 10), (1, 4.0, 1)]
)
def test_thresholds_are_of_magnitudes(p: float, threshold: float, kept: int) -> None:
    """Sorted by sign, as in the published code, p = .4 would keep all and p = .9 would keep 2."""
    layer = pruned(WORKED, p)
    assert float(layer.attention[0, 2]) == threshold
    # A kept zero is a zero: count what is selected.
    selected = aswl.kept_elements(layer.dense[0], layer.attention[0, 2], layer.tie_end[0])
    assert int(selected.sum()) == kept
    assert bool((layer.dense[0][selected].abs() >= threshold).all())


def test_pruned_weights_are_updated_straight_through() -> None:
    layer = pruned((0.3, 1.0), 0.5, lr=0.1)
    assert layer.parameters[0].tolist() == [0, 0.5]  # a = .5
    layer.step(torch.tensor([-4.0, 1.0]))  # a * G is (-2, .5)
    assert layer.dense[0].tolist() == pytest.approx([0.5, 0.95])


# ---------------------------------------------------------------- against autograd


def test_folding_the_attention_is_scaling_the_output() -> None:
    random = torch.Generator().manual_seed(0)
    x, w, b, out = (
        torch.randn(shape, generator=random) for shape in ((16, 9), (7, 9), (7,), (16, 7))
    )
    layer = Layers([(w, BOTH), (b, SCALED)], attention=0.6, attention_lr=0.125)
    selected = aswl.kept_elements(layer.dense[0], layer.attention[0, 2], layer.tie_end[0])
    sparse = w.where(selected, 0.0)
    a = torch.tensor(0.6, requires_grad=True)
    scaled = a * F.linear(x, sparse, b)
    held = [p.clone().requires_grad_() for p in layer.parameters]
    folded = F.linear(x, *held)
    torch.testing.assert_close(folded, scaled, rtol=0, atol=1e-6)
    (scaled * out).sum().backward()
    (folded * out).sum().backward()
    layer.step(*(h.grad for h in held if h.grad is not None))
    assert a.grad is not None
    assert float(layer.attention[0, 1]) == pytest.approx(float(a.grad), rel=1e-5)


def test_l2_pulls_at_what_is_kept_only() -> None:
    layer = pruned((0.25, 1.0), 0.5, lr=0.1, l2=0.25)
    layer.step(torch.zeros(2))
    assert layer.dense[0].tolist() == pytest.approx([0.25, 0.95])


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(3))
def test_the_count_is_exact_and_grows_with_p(seed: int) -> None:
    weight = torch.randn(1001, generator=torch.Generator().manual_seed(seed))
    before: Tensor | None = None
    for a in (1.0, 0.9, 0.61, 0.5, 0.25, 0.05, FLOOR):
        layer = Layers([(weight, BOTH)], attention=a)
        kept = layer.parameters[0] != 0
        assert int(kept.sum()) == 1001 - int(1001 * (1 - a))
        assert before is None or bool((before | ~kept).all())
        before = kept


def test_scaling_and_permuting_weights_does_so_with_the_result() -> None:
    random = torch.Generator().manual_seed(0)
    weight, order = torch.randn(500, generator=random), torch.randperm(500, generator=random)
    layer = pruned(weight, 0.7)
    assert torch.equal(pruned(8 * weight, 0.7).parameters[0], 8 * layer.parameters[0])
    assert torch.equal(pruned(weight[order], 0.7).parameters[0], layer.parameters[0][order])


SPECIAL = {
    "random": torch.randn(97, generator=torch.Generator().manual_seed(0)),
    "constant": torch.full((97,), -1.5),
    "denormal": torch.arange(-48, 49) * 1e-45,
    "zeros of both signs": torch.tensor([0.0, -0.0] * 48 + [1.0]),
    "infinities": torch.tensor([torch.inf, -torch.inf, 1.0, -2.0] * 24),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("keep_ties", [False, True])
def test_the_selection_is_that_of_a_plain_sort(name: str, p: float, keep_ties: bool) -> None:
    weight = SPECIAL[name].float()
    layer = pruned(weight, p, keep_ties=keep_ties)
    selected = aswl.kept_elements(layer.dense[0], layer.attention[0, 2], layer.tie_end[0])
    size = weight.numel()
    k = min(int(size * (1 - float(layer.attention[0, 0]))), size - 1)
    ranked = sorted(range(size), key=lambda i: (-abs(float(weight[i])), i))
    expected = torch.zeros(size, dtype=torch.bool)
    expected[ranked[: size - k]] = True
    if keep_ties:
        expected = weight.abs() >= weight.abs()[expected].min()
    assert torch.equal(selected, expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 1.7])
@pytest.mark.parametrize("attention", [FLOOR, 0.02, 0.5, 0.999, 1.0])
def test_no_attention_and_no_power_gives_nan(alpha: float, attention: float) -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    layer = Layers([(weight, BOTH)], attention=attention, alpha=alpha, momentum=0.9,
                   attention_lr=0.05, density_weight=10, target=0.3)  # fmt: skip
    for sign in (1, -1, -1, 1):
        layer.step(sign * layer.dense[0])
        for value in (layer.attention, layer.multiplier, layer.dense[0], layer.parameters[0]):
            assert bool(value.isfinite().all())
        assert FLOOR <= float(layer.attention[0, 0]) <= 1


def test_a_nan_gradient_of_a_pruned_weight_does_not_reach_the_attention() -> None:
    layer = pruned((0.1, 1.0), 0.5, attention_lr=0.01)
    layer.step(torch.tensor([torch.nan, 1.0]))
    assert float(layer.attention[0, 1]) == 1.0


def test_a_pool_of_weight_and_bias_is_pruned_together() -> None:
    weight, bias = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])
    layer = Layers([(weight, BOTH), (bias, BOTH)], attention=0.5)
    assert [p.tolist() for p in layer.parameters] == [[1.5, 0], [1.0, 0]]


def test_post_bn_leaves_the_weight_as_it_is_and_scales_the_norm() -> None:
    weight, gamma, beta = torch.tensor([3.0, 1.0]), torch.tensor([2.0]), torch.tensor([-1.0])
    layer = Layers([(weight, PRUNED), (gamma, SCALED), (beta, SCALED)], attention=0.5,
                   attention_lr=0.001)  # fmt: skip
    assert [p.tolist() for p in layer.parameters] == [[3, 0], [1.0], [-0.5]]
    layer.step(torch.tensor([100.0, 0]), torch.tensor([4.0]), torch.tensor([1.0]))
    assert float(layer.attention[0, 1]) == 4 * 2 + 1 * -1
    assert layer.dense[0].tolist() == [3 - 0.1 * 100, 1]
    assert layer.dense[1].tolist() == pytest.approx([2 - 0.1 * 0.5 * 4])


# ---------------------------------------------------------------- the multiplier


def follow(pull_of_loss: float, steps: int, **options: float) -> tuple[list[float], Tensor]:
    """Densities of two layers at which the loss pulls with a constant force, up and in step."""
    attention, multiplier = table(0.5, 0.5), zero()
    sizes = torch.tensor([100.0, 300.0], dtype=torch.float64)
    force = -pull_of_loss * sizes / sizes.sum()
    chosen = settings_of(
        **{"attention_lr": 0.005, "momentum": 0.9, "target": 0.2, "density_weight": 10} | options
    )
    densities = []
    for _ in range(steps):
        aswl.attention_step(attention, multiplier, force, sizes, chosen)
        densities.append(float((attention[:, 0] * sizes).sum() / 400))
    return densities, multiplier


def test_the_multiplier_closes_the_gap_that_the_penalty_leaves() -> None:
    alone, _ = follow(1, 300, gain=0)
    closed, multiplier = follow(1, 300)
    assert alone[-1] == pytest.approx(0.2 + 1 / (2 * 10), rel=1e-6)
    assert closed[-1] == pytest.approx(0.2, abs=1e-6)
    assert float(multiplier) == pytest.approx(1, rel=1e-5)


def test_the_multiplier_does_not_wind_up_where_nothing_can_follow() -> None:
    _, multiplier = follow(0, 5000, target=0.0)  # below the floor
    assert abs(float(multiplier)) < 1


def test_the_density_does_not_swing() -> None:
    """Plain momentum on the penalty takes it far below the target and back, again and again."""
    a = [0.5, 0.5]
    velocity = [0.0, 0.0]
    shares = (0.25, 0.75)
    swinging = []
    for _ in range(100):
        swinging.append(sum(x * s for x, s in zip(a, shares, strict=True)))
        pull = 2 * 10 * (swinging[-1] - 0.2)
        velocity = [0.9 * v + pull * s for v, s in zip(velocity, shares, strict=True)]
        a = [min(1.0, max(FLOOR, x - 0.005 * v)) for x, v in zip(a, velocity, strict=True)]
    damped, _ = follow(0, 100)
    assert min(swinging) < 0.1 and max(swinging[20:]) > 0.24
    assert min(damped) > 0.18 and max(damped[20:]) < 0.205


def test_motions_at_the_same_density_keep_their_momentum() -> None:
    attention = table(0.5, 0.5)
    attention[:, 1] = torch.tensor([3.0, -1.0])  # times the sizes: 0
    sizes = torch.tensor([100.0, 300.0], dtype=torch.float64)
    options = settings_of(attention_lr=0.005, momentum=0.9, target=0.5, density_weight=10)
    aswl.attention_step(attention, zero(), torch.zeros(2, dtype=torch.float64), sizes, options)
    assert attention[:, 1].tolist() == pytest.approx([2.7, -0.9], rel=1e-12)
    attention = table(0.5, 0.5)
    attention[:, 1] = torch.tensor([1.0, 3.0])  # along the slope
    aswl.attention_step(attention, zero(), torch.zeros(2, dtype=torch.float64), sizes, options)
    stiffness = 2 * 10 * 0.005 * (0.25**2 + 0.75**2)
    left = (1 - stiffness**0.5) ** 2
    assert attention[:, 1].tolist() == pytest.approx([left, 3 * left], rel=1e-12)
