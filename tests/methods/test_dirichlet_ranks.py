"""How many channels stay, and that those which go are really gone and nothing else changes."""

import math
import pickle
from collections import OrderedDict
from time import sleep
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.methods import budget
from fastprune.methods.removal import ChannelSets

from .networks import same_bits

A = torch.tensor([1.0, 5.0, 2.0, 2.0])  # means .1 .5 .2 .2
B = torch.tensor([3.0, 1.0, 0.5, 0.25, 0.25])  # means .6 .2 .1 .05 .05
SHARES = {"a": [2.0, 0.8, 0.8, 0.4], "b": [3.0, 1.0, 0.5, 0.25, 0.25]}


@pytest.fixture
def ranks() -> fp.DirichletRanks:
    return fp.DirichletRanks({"a": A, "b": B})


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(
        a=nn.Linear(3, 4), relu1=nn.ReLU(), b=nn.Linear(4, 5), relu2=nn.ReLU(), c=nn.Linear(5, 2)
    )
    return nn.Sequential(layers)


EXAMPLE = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the posterior


def test_orders_are_stable_and_moments_those_of_the_distribution(ranks: fp.DirichletRanks) -> None:
    assert list(ranks) == ["a", "b"] and len(ranks) == 2
    assert ranks["a"].tolist() == [1, 2, 3, 0] and ranks["b"].tolist() == [0, 1, 2, 3, 4]
    for name, phi in (("a", A), ("b", B)):
        expected = Dirichlet(phi.double())
        torch.testing.assert_close(ranks.mean[name], expected.mean)
        torch.testing.assert_close(ranks.variance[name], expected.variance)
        assert torch.equal(ranks.concentration[name], phi.double())
    ties = fp.DirichletRanks({"x": torch.ones(100)})
    assert ties["x"].tolist() == list(range(100))
    assert repr(ranks) == "DirichletRanks(a: 4, b: 5)"


def test_pickled_ranks_prune_alike() -> None:
    model, y = two_layers(), torch.tensor([0, 1])
    ranks = fp.dirichlet(model, [(EXAMPLE, y)], F.cross_entropy)
    again = pickle.loads(pickle.dumps(ranks))
    assert torch.equal(again.example_input, EXAMPLE) and again == ranks
    assert all(torch.equal(again[name], order) for name, order in ranks.items())
    again.concentration["b"][0] += 1e-12
    assert again != ranks and ranks != {}
    first, second = (r.prune(model, ratio=0.5).state_dict() for r in (ranks, again))
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", [[1.0, 0.0], [1.0, math.nan], [], [[1.0, 2.0]]])
def test_wrong_concentrations(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"concentration\['x'\] must hold a positive number"):
        fp.DirichletRanks({"x": torch.tensor(wrong)})


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keep": {"b": 2}}, (4, 2)),
        ({"keep": {"a": 1, "b": 5}}, (1, 5)),
        ({"ratio": 1.0}, (4, 5)),
        ({"ratio": 8 / 9}, (4, 4)),
        ({"ratio": 7 / 9}, (4, 3)),
        ({"ratio": 6 / 9}, (3, 3)),
        ({"ratio": 5 / 9}, (3, 2)),
        ({"ratio": 0.5}, (2, 2)),  # 4.5 channels, of which Python makes 4
        ({"ratio": 3 / 9}, (1, 2)),
        ({"ratio": 1e-9}, (1, 1)),
        ({"mass": 1.0}, (4, 5)),
        ({"mass": 0.95}, (4, 4)),
        ({"mass": 0.9}, (3, 3)),
        ({"mass": 0.91}, (4, 4)),
        ({"mass": 0.5}, (1, 1)),
        ({"mass": 0.6}, (2, 1)),
        ({"mass": 0.61}, (2, 2)),
    ],
    ids=str,
)
def test_counts(ranks: fp.DirichletRanks, given: Any, expected: tuple[int, int]) -> None:
    assert tuple(ranks.counts(**given).values()) == expected


def test_the_smallest_share_goes_first_and_of_equal_ones_the_later_rank() -> None:
    greedy = budget.Greedy(SHARES)
    assert len(greedy) == 7
    counts = [tuple(greedy.counts(n).values()) for n in range(8)]
    assert counts == [(4, 5), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2), (1, 2), (1, 1)]


def parameters_of(a: int, b: int) -> int:
    return 4 * a + (a + 1) * b + (b + 1) * 2


def flops_of(a: int, b: int) -> int:
    return 2 * 2 * (3 * a + a * b + 2 * b)


@pytest.mark.parametrize(("kind", "cost"), [("parameters", parameters_of), ("flops", flops_of)])
def test_the_fewest_channels_go_that_meet_a_budget(
    ranks: fp.DirichletRanks, kind: str, cost: Any
) -> None:
    model, greedy = two_layers(), budget.Greedy(SHARES)
    ways = [tuple(greedy.counts(n).values()) for n in range(8)]
    costs = [cost(*way) for way in ways]
    for left in {cost + change for cost in costs for change in (0, -1)} - {costs[-1] - 1}:
        expected = next(way for way, c in zip(ways, costs, strict=True) if c <= left)
        asked = ranks.counts(model, EXAMPLE, **{kind: left})
        assert tuple(asked.values()) == expected
        share = ranks.counts(model, EXAMPLE, **{kind: min(1.0, (left + 0.5) / costs[0])})
        assert tuple(share.values()) == expected
    small = ranks.prune(model, EXAMPLE, **{kind: 0.6})
    assert sum(p.numel() for p in small.parameters()) in map(
        parameters_of, *zip(*ways, strict=True)
    )
    with pytest.raises(ValueError, match=f"{kind} of at most {costs[-1] - 1} cannot be reached: "
                                         f"{costs[-1]} are left"):  # fmt: skip
        ranks.prune(model, EXAMPLE, **{kind: costs[-1] - 1})


class Shapes(nn.Module):
    """Strides, a depthwise and a transposed convolution, a layer that runs twice, a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.mix = nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.depthwise(F.relu(self.conv(x))))))
        return self.last(self.mix(self.mix(x)).mean((2, 3)))


def test_counted_flops_are_those_of_torch() -> None:
    torch.manual_seed(0)
    model, x = Shapes(), torch.randn(2, 3, 8, 8)
    sets = ChannelSets(model, x)
    assert sets.names == {"conv": ("conv", "depthwise")}  # what a layer used twice has, stays
    sizes, weights = budget.Sizes(sets), budget.positions(sets)
    order = {"conv": torch.randperm(8).tolist()}
    for count in (8, 5, 1):
        gone = sets.gone(order, {"conv": count})
        small = sets.removed(order, {"conv": count})
        assert small.conv.out_channels == count == small.depthwise.groups
        with FlopCounterMode(display=False) as counter:
            small(x)
        assert sizes.cost(gone, weights) == counter.get_total_flops()
        assert sizes.cost(gone, None) == sum(p.numel() for p in small.parameters())
    assert all(not m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- measured milliseconds


def test_milliseconds_are_those_of_the_candidates(
    ranks: fp.DirichletRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def clock(model: nn.Module, arguments: tuple[Any, ...]) -> float:
        assert torch.equal(arguments[0], EXAMPLE)
        model(*arguments)  # candidates run
        timed.append(sum(p.numel() for p in model.parameters()))
        return timed[-1] / 10

    monkeypatch.setattr(budget, "milliseconds", clock)
    model = two_layers()
    for left in (10, 11, 20, 33, 34, 52, 53, 60):
        by_size = ranks.counts(model, EXAMPLE, parameters=left)
        assert ranks.counts(model, EXAMPLE, milliseconds=left / 10) == by_size
        assert len(timed) <= 5
        timed.clear()
    with pytest.raises(ValueError, match=r"milliseconds of at most 0\.9 cannot be reached: 1 are"):
        ranks.prune(model, EXAMPLE, milliseconds=0.9)


class Slow(nn.Linear):
    """0.2 ms for each output at least."""

    def forward(self, x: Tensor) -> Tensor:
        sleep(2e-4 * len(self.weight))
        return super().forward(x)


def test_milliseconds_are_measured() -> None:
    model, x = nn.Sequential(Slow(4, 64), nn.ReLU(), nn.Linear(64, 2)), torch.randn(2, 4)
    ranks = fp.DirichletRanks({"0": torch.rand(64) + 0.1}, example_input=x)
    assert budget.milliseconds(model, (x,)) >= 12.8
    small = ranks.prune(model, milliseconds=8.0)
    assert 8 <= small[0].out_features <= 40
    with pytest.raises(ValueError, match=r"milliseconds of at most 0\.1 cannot be reached"):
        ranks.counts(model, milliseconds=0.1)


# ---------------------------------------------------------------- removal


def random_ranks(model: nn.Module, x: Tensor, seed: int = 0) -> fp.DirichletRanks:
    sets = ChannelSets(model, x)
    random = torch.Generator().manual_seed(seed)
    phi = {name: torch.rand(size, generator=random) + 0.1 for name, size in sets.sizes.items()}
    return fp.DirichletRanks(phi, sets.names, x)


def masked_outputs(model: nn.Module, ranks: fp.DirichletRanks, counts: Any, x: Tensor) -> Tensor:
    """By multiplying what comes out of each layer, or of the norm behind it, by zeros and ones."""
    norms = {}
    modules = dict(model.named_modules())
    for name, layers in ranks.layers.items():
        kept = torch.zeros(len(ranks[name])).index_fill(0, ranks[name][: counts[name]], 1.0)
        for layer in layers:
            norms[layer] = kept
    names = list(modules)
    handles = []
    for layer, kept in norms.items():
        after = names[names.index(layer) + 1] if names.index(layer) + 1 < len(names) else layer
        if layer.endswith(("conv1", "conv2", "conv3")):  # torchvision's bn1 belongs to conv1
            after = layer.replace("conv", "bn")
        module = (
            modules[after] if isinstance(modules.get(after), nn.BatchNorm2d) else modules[layer]
        )
        mask = kept.view(-1, *(1,) * (0 if isinstance(module, nn.Linear) else 2))
        handles.append(module.register_forward_hook(lambda m, a, out, mask=mask: out * mask))
    with torch.no_grad():
        outputs = model(x)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("name", ["vgg", "resnet", "wide_resnet", "mobilenet"])
@pytest.mark.parametrize("ratio", [0.5, 1e-9])
def test_removing_is_masking(name: str, ratio: float) -> None:
    networks = pytest.importorskip("tests.deploy.networks")
    model = networks.network(name)
    networks.calibrate(model)
    x = networks.images(5)
    ranks = random_ranks(model, x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    counts = ranks.counts(ratio=ratio)
    small = ranks.prune(model, ratio=ratio)
    assert all(same_bits(before[name], t) for name, t in model.state_dict().items())
    expected = masked_outputs(model, ranks, counts, x)
    with torch.no_grad():
        got = small(x)
    assert (expected - model(x)).abs().max() > 1e-2 * expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    for name, sizes in sizes_of(small, ranks).items():
        assert sizes == {counts[name]}
    if ratio < 0.1:
        return
    optimizer = torch.optim.SGD(small.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(small.train()(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def sizes_of(model: nn.Module, ranks: fp.DirichletRanks) -> dict[str, set[int]]:
    weights = {
        name: [model.get_submodule(each).weight for each in layers]
        for name, layers in ranks.layers.items()
    }
    return {name: {len(weight) for weight in each} for name, each in weights.items()}


class PreActivation(nn.Module):
    """A wide residual network: norms read the stream, and a channel of it is one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, stream: Any = 1.0, inner: tuple[Any, Any] = (1.0, 1.0)) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            y = F.relu(self.norms[i](x)) * stream
            y = F.relu(self.norms[i + 1](self.convs[i](y))) * inner[i // 2]
            x = x + self.convs[i + 1](y)
        return self.head((F.relu(self.norms[4](x)) * stream).mean((2, 3)))


def test_the_stream_of_a_wide_residual_network_loses_channels() -> None:
    torch.manual_seed(0)
    model = PreActivation().eval()
    for norm in model.norms:
        for tensor in (norm.weight, norm.bias, norm.running_var, norm.running_mean):
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(4, 3, 8, 8)
    ranks = fp.dirichlet(model, [(x, torch.arange(4) % 3)], F.cross_entropy, lr=0.05)
    assert ranks.layers == {
        "stem": ("stem", "convs.1", "convs.3"), "convs.0": ("convs.0",), "convs.2": ("convs.2",)
    }  # fmt: skip
    keep = {"stem": 4, "convs.0": 3, "convs.2": 5}
    masks = [torch.zeros(6, 1, 1).index_fill(0, ranks[n][:k], 1.0) for n, k in keep.items()]
    small = ranks.prune(model, keep=keep)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x, masks[0], tuple(masks[1:])))
    assert (
        small.stem.out_channels == 4 == small.norms[0].num_features == small.norms[4].num_features
    )
    assert (small.convs[2].in_channels, small.convs[2].out_channels) == (4, 5)


def test_channels_that_emit_a_constant_go_even_before_zero_padding() -> None:
    """A sigmoid of 0 is 0.5, which no bias can replace at the border; masking is behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 2, 3, padding=1)
    )
    x = torch.randn(2, 1, 5, 5)
    small = random_ranks(model, x).prune(model, keep={"0": 2})
    assert small[0].out_channels == 2
    order = random_ranks(model, x)["0"]
    with torch.no_grad():
        kept = torch.zeros(6, 1, 1).index_fill(0, order[:2], 1.0)
        torch.testing.assert_close(small(x), model[2](model[1](model[0](x)) * kept))


def test_modes_flags_and_gradients_go_along() -> None:
    model = two_layers().train()
    model.c.eval()
    model.a.bias.requires_grad_(False)
    model(EXAMPLE).sum().backward()
    ranks = fp.DirichletRanks({"a": A, "b": B}, example_input=EXAMPLE)
    small = ranks.prune(model, keep={"a": 2, "b": 3})
    assert (small.a.training, small.c.training, model.a.training) == (True, False, True)
    assert not small.a.bias.requires_grad and small.a.weight.requires_grad
    assert torch.equal(small.a.weight, model.a.weight[[1, 2]])
    assert torch.equal(small.b.weight, model.b.weight[:3][:, [1, 2]])
    assert all(p.shape == (5, 4)[: p.dim()] for p in (model.b.weight, model.b.bias))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give exactly one of keep, ratio, mass, .* got none"),
        ({"ratio": 0.5, "mass": 0.5}, ValueError, "exactly one of .*, got ratio, mass"),
        ({"ratio": 0.0}, ValueError, r"ratio must be a number above 0 and at most 1, got 0\.0"),
        ({"ratio": 1.5}, ValueError, "ratio must be a number above 0 and at most 1"),
        ({"mass": True}, ValueError, "mass must be a number above 0 and at most 1, got True"),
        ({"flops": -1}, ValueError, "flops must be a number above 0, got -1"),
        ({"parameters": math.inf}, ValueError, "parameters must be a number above 0, got inf"),
        ({"milliseconds": "1"}, ValueError, "milliseconds must be a number above 0, got '1'"),
        ({"keep": 3}, TypeError, "keep must be a mapping of layer name to count, got int"),
        ({"keep": {"c": 1}}, ValueError, "keep has 'c', which is no ranked layer; .* a, b"),
        ({"keep": {"b": 6}}, ValueError, r"keep\['b'\] must be an integer from 1 to 5, got 6"),
        ({"keep": {"b": 0}}, ValueError, r"keep\['b'\] must be an integer from 1 to 5, got 0"),
        ({"keep": {"b": 2.0}}, ValueError, r"keep\['b'\] must be an integer"),
    ],
)
def test_wrong_budgets(
    ranks: fp.DirichletRanks, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call in (ranks.counts, ranks.prune):
        with pytest.raises(error, match=message):
            call(two_layers(), EXAMPLE, **options)


def test_a_coupled_layer_is_named_by_its_first() -> None:
    ranks = fp.DirichletRanks({"stem": A}, {"stem": ("stem", "conv2")})
    with pytest.raises(ValueError, match="'conv2', whose channels are those of 'stem'; use that"):
        ranks.counts(keep={"conv2": 1})


def test_what_a_budget_of_the_model_needs(ranks: fp.DirichletRanks) -> None:
    with pytest.raises(ValueError, match=r"flops depend on the model; use counts\(model, flops="):
        ranks.counts(flops=0.5)
    with pytest.raises(ValueError, match="hold no example_input; give one"):
        ranks.prune(two_layers(), ratio=0.5)


def test_ranks_of_another_model(ranks: fp.DirichletRanks) -> None:
    other = two_layers()
    other.b, other.c = nn.Linear(4, 7), nn.Linear(7, 2)
    with pytest.raises(ValueError, match=r"of another model: they have 5 channels of b, .* has 7"):
        ranks.prune(other, EXAMPLE, ratio=0.5)
    with pytest.raises(ValueError, match="of another model: they have 4 channels of a"):
        ranks.prune(other[2:], torch.randn(2, 4), ratio=0.5)
    pruned = ranks.prune(two_layers(), EXAMPLE, ratio=0.5)
    with pytest.raises(ValueError, match="of another model"):
        ranks.prune(pruned, EXAMPLE, ratio=0.5)
