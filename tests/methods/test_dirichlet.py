"""Dirichlet ranking: against a plain implementation, what it finds, and what it leaves alone."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp

from .networks import same_bits

BATCHES, SIZE = 6, 8


class Block(nn.Module):
    """A residual block, a hidden layer and an output, that a test can switch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv1, self.norm1 = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, stream: Any = 1.0, inner: Any = 1.0, hidden: Any = 1.0) -> Tensor:
        def s(switch: Any) -> Any:
            return switch[..., None, None] if isinstance(switch, Tensor) else switch

        x = F.relu(self.norm0(self.stem(x)) * s(stream))
        y = F.relu(self.norm1(self.conv1(x)) * s(inner))
        x = F.relu(x + self.norm2(self.conv2(y)) * s(stream))
        return self.head(self.drop(F.relu(self.hidden(x.mean((2, 3)))) * hidden))


SETS = {"stem": ("stem", "conv2"), "conv1": ("conv1",), "hidden": ("hidden",)}
SIZES = {"stem": 5, "conv1": 4, "hidden": 6}


def network(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    model = Block()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.5)
    return model


def batches(count: int = BATCHES, size: int = SIZE, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 2, 4, 4, generator=random)
    return list(zip(x, torch.randint(3, (count, size), generator=random), strict=True))


# ---------------------------------------------------------------- against a plain implementation


def kl(phi: Tensor, a: float) -> Tensor:
    total, n = phi.sum(), len(phi)
    return (
        torch.lgamma(total) - math.lgamma(n * a) - torch.lgamma(phi).sum() + n * math.lgamma(a)
        + ((phi - a) * (torch.digamma(phi) - torch.digamma(total))).sum()
    )  # fmt: skip


def by_hand(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    names: list[str],
    start: float,
    *,
    prior: float = 1.0,
    scale: float | None = None,
    kl_weight: float = 1 / (BATCHES * SIZE),
    epochs: int = 1,
    lr: float = 0.01,
    samples: int = 0,
    seed: int = 0,
    first_offset: int = 0,
) -> dict[str, Tensor]:
    """Every switch is a multiplication of an activation, every derivative autograd's."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    begin = math.log(math.expm1(start - 1e-3))
    theta = {name: torch.full((SIZES[name],), begin, requires_grad=True) for name in names}
    optimizer = torch.optim.Adam(theta.values(), lr)
    offsets = torch.tensor([0, *(SIZES[name] for name in names)]).cumsum(0)
    arguments = dict(zip(SIZES, ("stream", "inner", "hidden"), strict=True))
    for step, (x, y) in enumerate(data * epochs):
        phi = {name: F.softplus(value) + 1e-3 for name, value in theta.items()}
        if samples:
            joined = torch.cat(list(phi.values()))
            key = (seed, first_offset + step)
            drawn = fp.ops.dirichlet_sample(joined, offsets, len(x) * samples, *key)
            parts = drawn.split([len(p) for p in phi.values()], 1)
            switches = dict(zip(phi, parts, strict=True))
        else:
            switches = {name: p / p.sum() for name, p in phi.items()}
        scaled = {
            arguments[n]: s * (SIZES[n] if scale is None else scale) for n, s in switches.items()
        }
        rows = [model(x[i : i + 1].expand(max(samples, 1), -1, -1, -1), **_rows(scaled, i, samples))
                for i in range(len(x))]  # fmt: skip
        loss = F.cross_entropy(torch.stack([row.mean(0) for row in rows]), y)
        optimizer.zero_grad()
        (loss + kl_weight * sum(kl(p, prior) for p in phi.values())).backward()
        optimizer.step()
    return {name: (F.softplus(value) + 1e-3).detach().double() for name, value in theta.items()}


def _rows(scaled: dict[str, Tensor], example: int, samples: int) -> dict[str, Tensor]:
    own = slice(example * samples, (example + 1) * samples)
    return {n: s[own] if samples else s for n, s in scaled.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 1.0, "prior": 0.3, "lr": 0.05},
        {"epochs": 2, "start": 3, "prior": 2},
        {"kl_weight": 0.0},
        {"kl_weight": 0.5},
        {"samples": 1},
        {"samples": 3, "seed": 7, "start": 4.0, "epochs": 2},
    ],
    ids=str,
)
def test_it_is_the_plain_implementation(options: dict[str, Any]) -> None:
    model, data = network(), batches()
    estimator = "sampled" if options.get("samples") else "point"
    found = fp.dirichlet(model, data, F.cross_entropy, estimator=estimator, **options)
    assert found.layers == SETS
    start = options.pop("start", 10.0 if estimator == "sampled" else 1.0)
    expected = by_hand(model, data, list(SIZES), start, **options)
    for name, phi in expected.items():
        assert (phi - start).abs().max() > 0.003
        torch.testing.assert_close(found.concentration[name], phi, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("samples", [0, 1])
def test_layer_by_layer_the_others_are_off(samples: int) -> None:
    """Draws of one layer are not those of another."""
    model, data = network(), batches()
    start = 10.0 if samples else 1.0
    options: dict[str, Any] = {"epochs": 2, "lr": 0.05}
    kind = {"estimator": "sampled" if samples else "point", **options}
    found = fp.dirichlet(model, data, F.cross_entropy, joint=False, **kind)
    joint = fp.dirichlet(model, data, F.cross_entropy, **kind)
    for number, name in enumerate(SIZES):
        options["first_offset"] = 2 * BATCHES * number
        (expected,) = by_hand(model, data, [name], start, samples=samples, **options).values()
        torch.testing.assert_close(found.concentration[name], expected, rtol=2e-4, atol=2e-5)
        assert (found.concentration[name] - joint.concentration[name]).abs().max() > 1e-3


def test_the_kl_is_in_the_loss() -> None:
    model, data = network(), batches()
    runs = [
        fp.dirichlet(model, data, F.cross_entropy, kl_weight=weight, prior=0.5, epochs=5)
        for weight in (0.02, 0.04)
    ]
    change = [(runs[0].concentration[n] - runs[1].concentration[n]).abs().max() for n in SIZES]
    assert min(change) > 1e-3
    only = fp.dirichlet(model, data, F.cross_entropy, kl_weight=1e4, prior=2.0, epochs=20, lr=0.05)
    for phi in only.concentration.values():
        torch.testing.assert_close(phi, torch.full_like(phi, 2.0), rtol=0.02, atol=0)


def test_the_kl_is_divided_by_the_number_of_examples() -> None:
    model, data = network(), batches(5, 4)
    expected = fp.dirichlet(model, data, F.cross_entropy, kl_weight=1 / 20)
    assert expected != fp.dirichlet(model, data, F.cross_entropy, kl_weight=1 / 19)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for each in (data, iter(data), loader, Stream(data)):
        assert fp.dirichlet(model, each, F.cross_entropy) == expected
    # A loader may leave some of its dataset out; the posterior is that of the whole.
    rest = TensorDataset(torch.cat([x, x]), torch.cat([y, y]))
    half = DataLoader(rest, batch_size=4, sampler=range(20))
    twice = fp.dirichlet(model, data, F.cross_entropy, kl_weight=1 / 40)
    assert fp.dirichlet(model, half, F.cross_entropy) == twice


class Stream:
    """Can be read again and again, but has no length."""

    def __init__(self, data: list[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


class Bar:
    """In place of the progress bar."""

    def __init__(self, title: str, total: int, unit: str = "", shown: bool = True) -> None:
        self.total, self.shown, self.notes = total, shown, list[str]()
        bars.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, note: str = "") -> None:
        self.notes.append(note)


bars: list[Bar] = []


@pytest.mark.parametrize("joint", [True, False])
def test_the_bar_shows_loss_and_kl(monkeypatch: pytest.MonkeyPatch, joint: bool) -> None:
    monkeypatch.setattr("fastprune.methods.dirichlet.Progress", Bar)
    model, data = network(), batches()
    losses: list[float] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        losses.append(loss.item())
        return loss

    fp.dirichlet(model, data, loss_fn, epochs=2, joint=joint, prior=2.0)
    bar, runs = bars.pop(), 1 if joint else 3
    assert bar.shown and bar.total == len(bar.notes) == len(losses) == runs * 2 * BATCHES
    divergence = sum(kl(torch.ones(n), 2.0).item() for n in SIZES.values())
    shown = f"loss {losses[0]:.4f}, KL {divergence:.4g}" if joint else f"loss {losses[0]:.4f}, KL"
    assert bar.notes[0].startswith(shown)
    assert [note.split(",")[0] for note in bar.notes] == [f"loss {loss:.4f}" for loss in losses]
    fp.dirichlet(model, data, loss_fn, progress=False)
    assert not bars.pop().shown


# ---------------------------------------------------------------- what it finds


def planted(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], set[int]]:
    """32 hidden units of which the output reads 8; 60 batches of what it says itself."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    relevant = torch.randperm(32)[:8]
    with torch.no_grad():
        read = torch.zeros(32).index_fill(0, relevant, 4.0)
        model[2].weight.mul_(read)
        x = torch.randn(60 * 32, 16)
        y = model(x).argmax(1)
    return model, list(zip(x.split(32), y.split(32), strict=True)), set(relevant.tolist())


@pytest.mark.parametrize(("estimator", "least"), [("point", 7.5), ("sampled", 7.0)])
def test_planted_relevance(estimator: Any, least: float) -> None:
    hits = []
    for seed in range(8):
        model, data, relevant = planted(seed)
        ranks = fp.dirichlet(model, data, F.cross_entropy, estimator=estimator, seed=seed)
        hits.append(len(relevant & set(ranks["0"][:8].tolist())))
    assert sum(hits) / 8 >= least


def test_a_small_start_of_scaled_draws_turns_the_order_around() -> None:
    """Why the start of "sampled" is 10: raising useless units makes them quieter."""
    hits = []
    for seed in range(4):
        model, data, relevant = planted(seed)
        ranks = fp.dirichlet(
            model, data, F.cross_entropy, estimator="sampled", start=0.3133, lr=0.05, seed=seed
        )
        hits.append(len(relevant & set(ranks["0"][:8].tolist())))
    assert sum(hits) / 4 < 7.5


def test_equal_seeds_equal_bits() -> None:
    model, data = network(), batches()

    def ranks(seed: int) -> fp.DirichletRanks:
        return fp.dirichlet(model, data, F.cross_entropy, estimator="sampled", seed=seed)

    first = ranks(3)
    torch.rand(5)
    assert first == ranks(3) != ranks(4)


def test_averaged_outputs_of_an_example_use_that_example_alone() -> None:
    model, data = network(), batches(1, 3)
    outputs: list[Tensor] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach().clone())
        return F.cross_entropy(output, target)

    def run(x: Tensor) -> Tensor:
        fp.dirichlet(model, [(x, data[0][1])], loss_fn, estimator="sampled", samples=2)
        return outputs.pop()

    x = data[0][0]
    first = run(x)
    assert first.shape == (3, 3)
    for example in range(3):
        other = x.clone()
        other[example] += 1
        changed = (run(other) != first).any(1)
        assert changed.tolist() == [i == example for i in range(3)]


def test_layers_without_choice_have_no_switch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 1), nn.Linear(1, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5),
        nn.Linear(5, 3),
    )  # fmt: skip
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    ranks = fp.dirichlet(model, [(x, y)], F.cross_entropy)
    assert list(ranks) == ["4"]
    with pytest.raises(ValueError, match="no channels that can be removed"):
        fp.dirichlet(model[:4], [(x, y)], F.cross_entropy)


@pytest.mark.parametrize("name", ["vgg", "resnet", "wide_resnet", "mobilenet", "densenet", "vit"])
@pytest.mark.parametrize("estimator", ["point", "sampled"])
def test_known_architectures(name: str, estimator: Any) -> None:
    networks = pytest.importorskip("tests.deploy.networks")
    model = networks.network(name)
    data = [(networks.images(i), torch.arange(4)) for i in range(3)]
    ranks = fp.dirichlet(model, data, F.cross_entropy, estimator=estimator, lr=0.05)
    assert len(ranks) >= 2
    start = {"point": 1.0, "sampled": 10.0}[estimator]
    for layer, order in ranks.items():
        assert order.sort().values.tolist() == list(range(len(order)))
        assert ranks.layers[layer][0] == layer
        assert (ranks.concentration[layer] != start).any()


# ---------------------------------------------------------------- what it leaves alone


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    return [
        [id(t) for t in tensors],
        [t.detach().clone() for t in tensors],
        [None if g is None else (id(g), g.clone()) for g in grads],
        [p.requires_grad for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        torch.get_rng_state(),
    ]


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    for a, b in zip(before[1], after[1], strict=True):
        assert same_bits(a, b)
    for a, b in zip(before[2], after[2], strict=True):
        assert (a is None) == (b is None) and (
            a is None or (a[0] == b[0] and same_bits(a[1], b[1]))
        )
    assert torch.equal(before[6], after[6])
    assert [before[i] for i in (0, 3, 4, 5)] == [after[i] for i in (0, 3, 4, 5)]


def disturbed() -> Block:
    """In training, partly frozen, partly with gradients, one module in evaluation."""
    model = network().train()
    model.norm1.eval()
    F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    model.conv1.weight.requires_grad_(False)
    model.hidden.bias.grad = None
    return model


@pytest.mark.parametrize("estimator", ["point", "sampled"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(estimator: Any, context: Any) -> None:
    model = disturbed()
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    before = snapshot(model)
    with context():
        ranks = fp.dirichlet(model, loader, F.cross_entropy, estimator=estimator, samples=1)
    assert_unchanged(before, snapshot(model))
    assert all(not c.requires_grad for c in ranks.concentration.values())


@pytest.mark.parametrize("estimator", ["point", "sampled"])
@pytest.mark.parametrize("where", ["loss", "loader", "model", "first batch"])
def test_an_error_in_the_middle_leaves_it_as_it_was(estimator: Any, where: str) -> None:
    model = disturbed()
    calls = 0

    def failing(*_: Any) -> None:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == 3:
            raise InterruptedError("stop")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        failing() if where == "loss" else None
        return F.cross_entropy(output, target)

    class Loader(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                if where == "loader":
                    failing()
                yield batch

    if where == "model":
        model.head.register_forward_pre_hook(failing)
        calls = -1  # tracing calls it too
    data = Loader(batches())
    if where == "first batch":
        data[0] = (data[0][0][:, :1], data[0][1])
    before = snapshot(model)
    with pytest.raises((InterruptedError, ValueError), match=r"stop|cannot trace"):
        fp.dirichlet(model, data, loss_fn, estimator=estimator)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, data = network(), batches()
    expected = fp.dirichlet(model, data, F.cross_entropy)
    data = [(x.to(dtype), y) for x, y in data]
    found = fp.dirichlet(model.to(dtype), data, lambda a, b: F.cross_entropy(a.float(), b))
    tolerance = 1e-3 if dtype == torch.float64 else 0.2
    for name, phi in expected.concentration.items():
        torch.testing.assert_close(found.concentration[name], phi, rtol=tolerance, atol=0)


# ---------------------------------------------------------------- batches and arguments


@pytest.mark.parametrize("estimator", ["point", "sampled"])
def test_a_forward_takes_any_batch(estimator: Any) -> None:
    model, data = network(), batches()
    expected = fp.dirichlet(model, data, F.cross_entropy, estimator=estimator)
    held = [{"x": x, "y": y} for x, y in data]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    options: dict[str, Any] = {"forward": forward, "estimator": estimator}
    found = fp.dirichlet(model, held, None, example_input=data[0][0][:2], **options)
    assert found == expected
    with pytest.raises(TypeError, match="pass forward= and example_input="):
        fp.dirichlet(model, held, None, **options)


class Pair(nn.Module):
    """Takes one argument, a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner(pair[0] + pair[1])


def test_inputs_of_several_tensors_and_losses_that_are_modules() -> None:
    data = batches()
    expected = fp.dirichlet(network(), data, F.cross_entropy)
    pairs = [((x / 2, x / 2), y) for x, y in data]
    found = fp.dirichlet(Pair(), pairs, nn.CrossEntropyLoss())
    for name, phi in expected.concentration.items():
        assert torch.equal(found.concentration[f"inner.{name}"], phi)
    assert found.prune(Pair(), ratio=0.5).inner.head.out_features == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, "estimator must be 'point' or 'sampled', got 'mean'"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"epochs": 1.0}, "epochs must be a positive integer, got 1.0"),
        ({"samples": True}, "samples must be a positive integer, got True"),
        ({"samples": 2}, "samples must be 1 .* got 2"),
        ({"prior": 0.0}, "prior must be a positive number, got 0.0"),
        ({"scale": -1.0}, "scale must be a positive number, got -1.0"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"kl_weight": -0.1}, "kl_weight must be a finite number of at least 0, got -0.1"),
        ({"start": 0.001}, "start must be a number above 0.001, got 0.001"),
        ({"placement": "input"}, "placement.*'input'"),
        ({"forward": lambda model, batch: 0}, "either loss_fn"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.dirichlet(network(), batches(), F.cross_entropy, **options)


def test_wrong_loaders() -> None:
    model, data = network(), batches()
    with pytest.raises(TypeError, match="loader must be an iterable of batches, got Tensor"):
        fp.dirichlet(model, data[0][0], F.cross_entropy)
    with pytest.raises(TypeError, match="loader must be an iterable of batches, got int"):
        fp.dirichlet(model, 3, F.cross_entropy)
    with pytest.raises(ValueError, match="loader is empty"):
        fp.dirichlet(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match=r"loader is an iterator.* pass a list or a DataLoader"):
        fp.dirichlet(model, iter(data), F.cross_entropy, epochs=2)
    with pytest.raises(ValueError, match=r"loader is an iterator.*joint=False"):
        fp.dirichlet(model, iter(data), F.cross_entropy, joint=False)
    with pytest.raises(ValueError, match="no longer finite; look for NaN in the data"):
        fp.dirichlet(model, [(x * math.nan, y) for x, y in data], F.cross_entropy)
