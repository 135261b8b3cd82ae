"""ProsPr: worked numbers, its definition by unrolled differentiation, and finite differences."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.masks import num_kept
from fastprune.methods import prospr as module
from fastprune.methods.objective import Objective

from .networks import NETWORKS, network
from .unrolled import Training

MODES = ["exact", "first_order", "finite_difference", "reference_compat"]


class Weights(nn.Module):
    """Weights of one linear output without bias, for functions that are worked by hand."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weights), 1, bias=False, dtype=torch.float64)
        self.linear.weight.data.copy_(torch.tensor([weights]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def quadratic(*weights: float, c: float = 1.0, b: float = 0.0) -> tuple[nn.Module, Any, Any]:
    """c / 2 * (sum of weights - b)^2"""
    ones = torch.ones(1, len(weights), dtype=torch.float64)
    return Weights(*weights), [(ones, b)], lambda out, b: c / 2 * (out - b).square().sum()


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Relative to the largest entry."""
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# Worked numbers


@pytest.mark.parametrize(
    ("momentum", "steps", "exact", "first_order", "reference_compat"),
    [(0.0, 2, 0.25, 1.0, 0.25), (0.9, 1, 1.0, 2.0, 2.0), (0.9, 2, 0.16, -0.8, -0.4)],
)
def test_scalar_quadratic(
    momentum: float, steps: int, exact: float, first_order: float, reference_compat: float
) -> None:
    model, batches, loss_fn = quadratic(2.0)
    expected = dict(zip(MODES, [exact, first_order, exact, reference_compat], strict=True))
    for mode, score in expected.items():
        found = fp.scores("prospr", model, batches, loss_fn, steps=steps, inner_lr=0.5,
                          inner_momentum=momentum, mode=mode)  # fmt: skip
        assert found["linear.weight"].item() == pytest.approx(score, rel=1e-8)
    snip = fp.scores("snip", model, batches, loss_fn)
    assert snip["linear.weight"].item() == 4


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_closed_form_on_one_batch_without_momentum(steps: int) -> None:
    c, b, theta, lr = 1.3, 0.4, -2.0, 0.2
    model, batches, loss_fn = quadratic(theta, c=c, b=b)
    shrink = 1 - lr * c
    for mode, power in (("exact", 2 * steps), ("first_order", steps)):
        found = fp.scores("prospr", model, batches, loss_fn, steps=steps, inner_lr=lr,
                          inner_momentum=0.0, mode=mode)  # fmt: skip
        score = c * (theta - b) * theta * shrink**power
        assert found["linear.weight"].item() == pytest.approx(score, rel=1e-12)


def test_coupled_weights_and_their_group() -> None:
    model, batches, loss_fn = quadratic(2.0, -0.5, b=1.0)
    options = {"steps": 1, "inner_lr": 0.25}
    for mode, expected in (("exact", [0.25, -0.0625]), ("first_order", [0.5, -0.125])):
        found = fp.scores("prospr", model, batches, loss_fn, mode=mode, **options)
        assert found["linear.weight"].tolist() == [expected]
    snip = fp.scores("snip", model, batches, loss_fn)
    assert snip["linear.weight"].tolist() == [[1.0, -0.25]]

    # As a group they score |0.25 - 0.0625| = 0.1875, more than |0.2 - 0.21|.
    four = nn.Sequential(nn.Linear(4, 1, bias=False, dtype=torch.float64))
    scores = {"0.weight": torch.tensor([[0.2, -0.21, 0.25, -0.0625]]).double()}
    masks = fp.masks_from_scores(four, scores, 0.5, granularity=(1, 2))
    assert masks["0.weight"].tolist() == [[False, False, True, True]]


def test_small_rates_mix_snip_and_grasp() -> None:
    """(score(lr) - score(0)) / lr -> -2 K theta * H g, one batch, no momentum."""
    model, batches, loss_fn = network("mlp", num_batches=1)
    lr, steps = 1e-6, 3
    snip = fp.scores("snip", model, batches, loss_fn)
    grasp = fp.scores("grasp", model, batches, loss_fn, temperature=1.0)
    found = fp.scores("prospr", model, batches, loss_fn, steps=steps, inner_lr=lr,
                      inner_momentum=0.0)  # fmt: skip
    for name in snip:
        close((found[name] - snip[name]) / lr, -2 * steps * grasp[name], 1e-4)


# The definition


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "conv3d", "attention", "vit", "gpt"])
@pytest.mark.parametrize("mode", ["exact", "first_order", "reference_compat"])
def test_equals_differentiation_through_the_steps(name: str, mode: str) -> None:
    model, batches, loss_fn = network(name)
    found = fp.scores("prospr", model, batches, loss_fn, steps=3, inner_lr=0.1, mode=mode)
    expected = Training(model, batches, loss_fn, 3, 0.1, 0.9).scores(mode)
    assert list(found) == list(expected)
    for weight in found:
        close(found[weight], expected[weight], 1e-10)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_resnet20_equals_differentiation_through_the_steps(steps: int) -> None:
    model, batches, loss_fn = network("resnet20", num_batches=steps + 1)
    found = fp.scores("prospr", model, batches, loss_fn, steps=steps, inner_lr=0.1)
    expected = Training(model, batches, loss_fn, steps, 0.1, 0.9).scores()
    assert len(found) == 20
    largest = max(float(score.abs().max()) for score in expected.values())
    for weight in found:
        assert float((found[weight] - expected[weight]).abs().max()) <= 1e-10 * largest


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mode", MODES)
def test_equals_finite_differences_in_each_mask_entry(
    name: str, momentum: float, mode: Any
) -> None:
    model, batches, loss_fn = network(name, num_batches=3)
    found = fp.scores("prospr", model, batches, loss_fn, steps=2, inner_lr=0.3,
                      inner_momentum=momentum, mode=mode, reach=1e-5)  # fmt: skip
    training = Training(model, batches, loss_fn, 2, 0.3, momentum)
    of = "exact" if mode == "finite_difference" else mode
    largest = max(float(score.abs().max()) for score in found.values())
    every = 1 if name == "mlp" else 61
    for weight, score in found.items():
        for index in range(0, score.numel(), every):
            difference = training.difference(weight, index, of)
            assert score.flatten()[index].item() == pytest.approx(difference, abs=1e-6 * largest)


@pytest.mark.parametrize("name", ["cnn", "vit", "gpt"])
def test_finite_differences_come_close_to_the_exact_scores(name: str) -> None:
    model, batches, loss_fn = network(name)
    exact, near = (
        fp.scores("prospr", model, batches, loss_fn, inner_lr=0.1, mode=mode, reach=1e-5)
        for mode in ("exact", "finite_difference")
    )
    largest = max(float(score.abs().max()) for score in exact.values())
    for weight in exact:
        assert float((exact[weight] - near[weight]).abs().max()) <= 1e-7 * largest


def overlap(a: fp.MaskSet, b: fp.MaskSet) -> float:
    """The part of what the first keeps that the second keeps too."""
    return sum(int((a[n] & b[n]).sum()) for n in a) / a.num_kept


@pytest.mark.parametrize("name", ["cnn", "gpt"])
@pytest.mark.parametrize("narrow", ["float32", "autocast", "bfloat16"])
def test_lower_precisions_keep_much_the_same(name: str, narrow: str) -> None:
    dtype = torch.bfloat16 if narrow == "bfloat16" else torch.float32
    wide, batches, loss_fn = network(name, size=32)
    model, narrow_batches, _ = network(name, dtype, size=32)
    options: dict[str, Any] = {"inner_lr": 0.1, "min_kept_per_layer": 1}
    exact = fp.prospr(wide, batches, loss_fn, 0.8, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast"):
        masks = fp.prospr(model, narrow_batches, loss_fn, 0.8, mode="finite_difference", **options)
    assert overlap(exact, masks) >= 0.9


# SNIP as a special case


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{"steps": 0}, {"inner_lr": 0.0, "steps": 2}])
@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_without_steps_or_rate_it_is_snip(name: str, options: dict[str, Any], mode: Any) -> None:
    model, batches, loss_fn = network(name, torch.float32, num_batches=1)
    if options["steps"]:
        model.eval()  # with dropout, the loss after two steps is another one than before them
    snip = fp.scores("snip", model, batches, loss_fn)
    found = fp.scores("prospr", model, batches, loss_fn, mode=mode, **options)
    for weight in snip:
        assert torch.equal(found[weight], snip[weight])
    kept = {"sparsity": 0.7, "min_kept_per_layer": 1}
    assert fp.prospr(model, batches, loss_fn, mode=mode, **options, **kept) == fp.snip(
        model, batches, loss_fn, **kept
    )


# Masks


@pytest.mark.parametrize(("total", "sparsity", "kept"), [(100, 0.98, 2), (1000, 0.95, 50), (1000, 0.999, 1)])  # fmt: skip  # noqa: E501
def test_exact_counts(total: int, sparsity: float, kept: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(total // 10, 10)
    batch = torch.randn(8, total // 10), torch.arange(8)
    assert fp.prospr(model, [batch], F.cross_entropy, sparsity).num_kept == kept


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_of_every_network(name: str, scope: Any) -> None:
    model, batches, loss_fn = network(name, torch.float32)
    options: dict[str, Any] = {"inner_lr": 0.1, "scope": scope, "min_kept_per_layer": 1}
    masks = fp.prospr(model, batches, loss_fn, 0.8, **options)
    assert list(masks) == list(fp.scores("snip", model, batches, loss_fn))
    for weight, layer in masks.layers.items():
        assert layer.num_kept >= 1
        if scope == "layer":
            assert layer.num_kept == num_kept(0.8, masks[weight].numel())
    if scope == "global":
        assert masks.num_kept == num_kept(0.8, masks.total)
    masks.apply(model)
    assert fp.MaskSet.of(model) == masks


def test_a_tied_weight_has_one_mask() -> None:
    model, batches, loss_fn = network("gpt")
    masks = fp.prospr(model, batches, loss_fn, 0.5)
    assert "blocks.0.mlp.0.weight" in masks and "blocks.1.mlp.0.weight" not in masks
    assert "embed.weight" not in masks and "head.weight" not in masks


def test_frozen_weights_are_left_out() -> None:
    model, batches, loss_fn = network("mlp")
    model[2].weight.requires_grad_(False)
    assert list(fp.prospr(model, batches, loss_fn, 0.5)) == ["0.weight", "4.weight"]


def test_the_same_seed_gives_the_same_masks() -> None:
    model, batches, loss_fn = network("gpt")  # with dropout
    first, second, other = (
        (torch.manual_seed(seed), fp.prospr(model, batches, loss_fn, 0.7))[1] for seed in (5, 5, 6)
    )
    assert first == second != other


def test_forward_serves_any_loss() -> None:
    model, batches, loss_fn = network("cnn")
    dicts = [{"image": x, "label": y} for x, y in batches]

    def forward(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_fn(net(batch["image"]), batch["label"])

    masks = fp.prospr(model, dicts, None, 0.7, forward=forward)
    assert masks == fp.prospr(model, batches, loss_fn, 0.7)


def test_takes_one_batch_more_than_steps_and_no_more() -> None:
    model, batches, loss_fn = network("mlp", num_batches=6)
    source = iter(batches)
    masks = fp.prospr(model, source, loss_fn, 0.5, steps=3)
    assert len(list(source)) == 2
    assert masks == fp.prospr(model, batches, loss_fn, 0.5, steps=3)
    cycled = fp.prospr(model, batches[:2], loss_fn, 0.5, steps=3)
    assert cycled == fp.prospr(model, [*batches[:2], *batches[:2]], loss_fn, 0.5, steps=3)


def test_memory_grows_by_one_copy_of_the_weights_for_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Points, momenta and adjoints that are alive when a pass begins."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    added, loss = module.added, Objective.loss

    def recorded(*arguments: Any) -> Any:
        result = added(*arguments)
        made.extend(map(weakref.ref, result.values()))
        return result

    def counted(self: Objective, point: Any, step: int) -> Tensor:
        alive.append(sum(x() is not None for x in made))
        return loss(self, point, step)

    monkeypatch.setattr(module, "added", recorded)
    monkeypatch.setattr(Objective, "loss", counted)
    model, batches, loss_fn = network("mlp")
    peaks = {}
    for mode in ("exact", "first_order"):
        for steps in (3, 6):
            alive.clear()
            fp.scores("prospr", model, batches, loss_fn, steps=steps, mode=mode)
            peaks[mode, steps] = max(alive)
    tensors = len(list(model.parameters()))
    assert peaks["exact", 6] - peaks["exact", 3] == 3 * tensors
    assert peaks["exact", 6] <= (6 + 2) * tensors
    assert peaks["first_order", 6] == peaks["first_order", 3] <= 2 * tensors


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 98}, ValueError, r"sparsity must be in \[0, 1\]"),
        ({"steps": -1}, ValueError, "steps must be an integer of at least 0, got -1"),
        ({"steps": 2.0}, ValueError, "steps must be an integer"),
        ({"inner_lr": -0.1}, ValueError, "inner_lr must be a finite number of at least 0"),
        ({"inner_momentum": float("nan")}, ValueError, "inner_momentum must be a finite number"),
        ({"mode": "full"}, ValueError, "'reference_compat', got 'full'"),
        ({"granularity": "row"}, ValueError, "'channel' or \\(outputs, inputs\\), got 'row'"),
        ({"granularity": (0, 1)}, ValueError, "positive integers"),
        ({"scope": "local"}, ValueError, "'global', 'layer', got 'local'"),
        ({"min_kept_per_layer": -1}, ValueError, "min_kept_per_layer must be an integer"),
        (
            {"min_kept_per_layer": 9},
            ValueError,
            "asks for 27 in 3 layers, but sparsity 0.9 keeps 9",
        ),
        ({"exclude": ["0"]}, ValueError, "such as 0.weight, 2.weight, 4.weight; got 0"),
        ({"reach": 0}, ValueError, "reach must be a positive number"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": torch.ones(2, 6)}, TypeError, r"pass \[\(input, target\)\]"),
        ({"batches": [torch.ones(2, 6)]}, TypeError, r"pairs \(input, target\).*got Tensor"),
        ({"loss_fn": None}, ValueError, "give either loss_fn"),
        ({"forward": lambda net, batch: None}, ValueError, "give either loss_fn"),
        ({"loss_fn": lambda out, y: out}, TypeError, r"one element, got shape \(4, 3\)"),
        ({"loss_fn": lambda out, y: 1.0}, TypeError, "one element, got float"),
        ({"loss_fn": lambda out, y: out.detach().sum()}, ValueError, "does not depend on any"),
        ({"loss_fn": lambda out, y: (1e200 * out).square().sum()}, ValueError, "not finite.*lower"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    model, batches, loss_fn = network("mlp")
    given = {"batches": batches, "loss_fn": loss_fn, "sparsity": 0.9, **arguments}
    with pytest.raises(error, match=message):
        fp.prospr(model, **given)


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        fp.prospr(lambda x: x, [], None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="BatchNorm1d has no convolution"):
        fp.prospr(nn.BatchNorm1d(3), [(torch.ones(2, 3), 0)], lambda out, y: out.sum(), 0.5)
    with pytest.raises(TypeError, match=r"pass model\.module"):
        fp.prospr(nn.DataParallel(nn.Linear(2, 2)), [], F.cross_entropy, 0.5)


def test_a_missing_second_derivative_is_explained() -> None:
    class OneDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    model, batches, _ = network("mlp")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return OneDerivative.apply(output).square().sum()

    with pytest.raises(RuntimeError) as caught:
        fp.prospr(model, batches, loss_fn, 0.5)
    assert "finite_difference" in caught.value.__notes__[0]
    fp.prospr(model, batches, loss_fn, 0.5, mode="finite_difference", inner_lr=0.01)
