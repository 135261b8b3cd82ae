"""Zero channels go, outputs stay."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fastprune as fp
from fastprune.optim import GSM, channel_groups

from .networks import NETWORKS, images, network, relative_error, zero_channels, zero_rows


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def file_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


# ---------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", NETWORKS)
def test_coupled_zero_channels_all_go(name: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model, x = network(name), images()
    zero_channels(model, x)
    before = copy.deepcopy(model.state_dict())
    small, report = fp.compact(model, x, return_report=True)

    assert relative_error(model, small, images(1, 8)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(),
                                                 strict=True))  # fmt: skip
    assert not any(layer.stayed for layer in report.layers), str(report)
    removed = size(model) - size(small)
    assert (report.parameters_before, report.parameters_after) == (size(model), size(small))
    assert removed > 0.2 * size(model)
    assert file_size(model) - file_size(small) >= 4 * removed
    for group in channel_groups(small, x):  # nothing that is zero is left
        if group["prune"]:
            (dim, _), (_, weight) = group["channel_dims"][0], group["params"][0]
            assert weight.detach().movedim(dim, 0).flatten(1).any(1).all()

    expected = small(images()).detach()
    exported = torch.export.export(small, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected)
    path = tmp_path / "small.onnx"
    torch.onnx.export(exported, (), str(path), dynamo=True, verbose=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_rows_go_where_their_constant_can(name: str) -> None:
    model, x = network(name), images()
    zero_rows(model, x)
    small, report = fp.compact(model, x, return_report=True)
    assert relative_error(model, small, images(1, 8)) < 1e-5
    assert size(small) < 0.95 * size(model)
    stayed = " ".join(layer.stayed for layer in report.layers)
    if name == "vit":
        assert "cat joins it with a tensor whose channels are not known" in stayed
    elif name != "mobilenet":  # all of its dense layers are 1x1
        assert "they emit a constant, cut off by the zero padding of" in stayed
        assert "channel_groups" in str(report)


# ---------------------------------------------------------------- single layers


class Net(nn.Module):
    """conv, norm, an activation, a reader; the first layer's channels are what is cut."""

    def __init__(self, first: nn.Module, norm: nn.Module, act: nn.Module, *rest: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.act = first, norm, act
        self.rest = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.act(self.norm(self.first(x))))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics far from the initial ones."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.2, 1.5)
    return model.eval()


def head(channels: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(channels, 5)]


X2 = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
X1, X3 = X2.flatten(2)[..., :12], X2.unflatten(3, (2, 3))
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "unpadded conv": (lambda: Net(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3),
        *head(48)), X2, 6),
    "no bias, no norm": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 3, 2, bias=False),
        *head(27)), X2, 6),
    "running mean": (lambda: Net(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(),
        nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3), *head(48)), X2, 6),
    "padded conv": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1),
        *head(48)), X2, 8),
    "padding same": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding="same"),
        *head(48)), X2, 8),
    "circular padding": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1, padding_mode="circular"), *head(48)), X2, 6),
    "padded, but zero after the activation": (lambda: Net(
        nn.Conv2d(4, 8, 3, bias=False), nn.Identity(), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1),
        *head(48)), X2, 6),
    "flatten": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.MaxPool2d(2), *head(32)), X2, 6),
    "pooling": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), *head(8)),
        X2, 6),
    "padded average": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2, padding=1),
        *head(72)), X2, 8),
    "1d": (lambda: Net(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU6(), nn.Conv1d(8, 3, 2), *head(27)), X1, 6),
    "3d": (lambda: Net(
        nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8), nn.ELU(), nn.Conv3d(8, 3, 1), *head(30)), X3, 6),
    "transposed": (lambda: Net(
        nn.ConvTranspose2d(4, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3),
        *head(300)), X2, 6),
    "into transposed": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2),
        *head(75)), X2, 8),
    "into transposed, zero": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.Identity(), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2),
        *head(75)), X2, 6),
    "instance norm": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 3, 2),
        *head(27)), X2, 8),
    "norm without statistics": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(8, 3, 2), *head(27)), X2, 8),
    "grouped": (lambda: Net(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 2, groups=2), *head(54)), X2, 6),
    "grouped transposed": (lambda: Net(
        nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 2, groups=2), *head(294)), X2, 6),
    "depthwise": (lambda: Net(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 3, 1), *head(48)), X2, 6),
    "depthwise, two outputs each": (lambda: Net(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 3, 1), *head(48)), X2, 6),
    "depthwise transposed": (lambda: Net(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Softplus(),
        nn.ConvTranspose2d(8, 16, 2, stride=2, groups=8), nn.Identity(), *head(2304)), X2, 8),
    "group norm": (lambda: Net(
        nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 2), *head(27)), X2, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_goes_and_what_stays(case: str) -> None:
    build, x, kept = CASES[case]
    torch.manual_seed(0)
    model = settled(build(), x)
    with torch.no_grad():
        dim = 1 if isinstance(model.first, nn.ConvTranspose2d) else 0
        rows = model.first.weight.unflatten(0, (model.first.groups, -1)).movedim(dim + 1, 1)
        per_group = rows.shape[1]
        for channel in (1, 6):
            rows[channel // per_group, channel % per_group] = 0
        if model.first.bias is not None:
            model.first.bias[[1, 6]] = -0.5 if isinstance(model.norm, nn.Identity) else 1.5
    small, report = fp.compact(model, (x,), return_report=True)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    assert relative_error(model, small, fresh) < 1e-5
    assert report.layers[0] == ("first", 8, kept, report.layers[0].stayed)
    assert bool(report.layers[0].stayed) == (kept == 8)
    first = small.first
    assert first.out_channels == kept == first(fresh).shape[1]
    assert repr(copy.deepcopy(small)) == repr(small)


def test_groups_of_a_convolution_stay_equally_large() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2),
                          nn.Flatten(), nn.Linear(216, 3)).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[[0, 1, 2, 5]] = 0
    small, report = fp.compact(model, X2, return_report=True)
    assert small[0].out_channels == 6 == small[2].in_channels
    assert report.layers[0].stayed == (
        "2 zero stay: the groups of a grouped convolution stay equally large"
    )
    assert relative_error(model, small, X2) < 1e-5


def mlp(dead: int = 5, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(),
                          nn.Linear(8, 3)).to(dtype)  # fmt: skip
    with torch.no_grad():
        model[0].weight[:dead] = 0
        model[0].bias[:dead] = 0
    return model


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("multiple", "kept"), [(1, 7), (2, 8), (4, 8), (8, 8), (100, 12)])
def test_kept_channels_are_rounded_up(multiple: int, kept: int) -> None:
    model = mlp()
    small, report = fp.compact(model, X, multiple_of=multiple, return_report=True)
    assert (small[0].out_features, small[2].out_features) == (kept, 8)
    assert (f"multiple_of={multiple}" in str(report)) == (multiple > 1)
    assert relative_error(model, small, X) < 1e-5


def test_a_dead_layer_keeps_one_channel_and_says_so() -> None:
    model = mlp(12)
    small, report = fp.compact(model, X, return_report=True)
    assert small[0].out_features == 1
    assert report.layers[0].stayed == "1 zero stay: a layer keeps at least one channel"
    torch.testing.assert_close(small(X), model(X))


def test_channels_that_no_layer_reads_go() -> None:
    model = mlp(0)
    with torch.no_grad():
        model[2].weight[:, 3] = 0
    assert fp.compact(model, X)[0].out_features == 11


def test_channels_that_a_grouped_transposed_layer_ignores_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Sigmoid(), nn.ConvTranspose2d(8, 6, 2, groups=2))
    with torch.no_grad():
        model[0].weight[[1, 6]] = 0
        model[2].weight[[1, 6]] = 0
    small = fp.compact(model, X2)
    assert small[0].out_channels == 6 == small[2].in_channels
    assert relative_error(model, small, X2) < 1e-5


def test_constants_are_followed_through_several_layers() -> None:
    """Rows that read only constants emit one too."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[:5] = 0.7
        model[2].weight[2, 5:] = 0
    small = fp.compact(model, X)
    assert (small[0].out_features, small[2].out_features) == (7, 7)
    assert relative_error(model, small, X) < 1e-5


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x).relu()).relu()))


def test_what_is_used_twice_is_left_alone() -> None:
    twice, tied = Shared(), Shared()
    tied.c = nn.Linear(4, 4)
    tied.c.weight = tied.a.weight
    for model in (twice, tied):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[1] = 0
        small, report = fp.compact(model, X, return_report=True)
        assert size(small) == size(model)
        assert "is used more than once" in str(report)


class Written(nn.Module):
    """Overwrites a part of what a layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :3].add_(x.sum(1, keepdim=True))
        return self.b(y.relu())


class Viewed(Written):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.flatten(1).sigmoid_()
        return self.b(y)


class Chunked(Written):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x).chunk(2, 1)
        return self.b(torch.cat([z, y], 1))


class Stated(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(-1, 6))


class Spread(Written):
    """One channel becomes six by broadcasting over a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(4, 1), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale)


@pytest.mark.parametrize(("kind", "reason"), [
    (Written, "slice"), (Viewed, "overwritten by sigmoid_"),
    (Spread, "whose channels are not known"), (Chunked, "chunk"),
    (Stated, "writes out the number of channels"),
])  # fmt: skip
def test_what_cannot_be_proved_stays(kind: type[nn.Module], reason: str) -> None:
    model = kind()
    with torch.no_grad():
        model.a.weight[-1], model.a.bias[-1] = 0, 0.5
    small, report = fp.compact(model, X, return_report=True)
    assert size(small) == size(model) and reason in str(report)
    torch.testing.assert_close(small(X), model(X))


class Gated(nn.Module):
    """A squeeze-and-excitation gate and a scale of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = (
            nn.Conv2d(4, 8, 3),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
        )
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.head(
            x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True))).sigmoid() * self.scale
        )


def test_gates_and_scales_lose_the_same_channels() -> None:
    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        model.conv.weight[:3], model.conv.bias[:3] = 0, 0
    small = fp.compact(model, X2)
    assert [small.conv.out_channels, small.excite.out_channels, len(small.scale)] == [5, 5, 5]
    assert relative_error(model, small, X2 + 1) < 1e-5


def test_a_second_compaction_finds_nothing() -> None:
    model = network("resnet")
    zero_channels(model, images())
    small = fp.compact(model, images())
    assert size(fp.compact(small, images())) == size(small)


def test_memory_format_and_settings_of_the_model_stay() -> None:
    model = network("mobilenet").to(memory_format=torch.channels_last)
    zero_channels(model, images())
    model.train().features[0].eval()
    model.features[1].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    small = fp.compact(model, images())
    assert modes == [m.training for m in model.modules()] == [m.training for m in small.modules()]
    for (name, old), new in zip(model.named_parameters(), small.parameters(), strict=True):
        assert new.requires_grad == old.requires_grad, name
        assert new.dim() != 4 or new.is_contiguous(memory_format=torch.channels_last), name


class TwoInputs(nn.Module):
    """Two tensors in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.c((self.a(x) + 2 * self.b(y)).relu()), "first": x}


def test_several_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[:2] = 0
            layer.bias[:2] = torch.tensor([0.5, -0.5])
    small = fp.compact(model, (X, X[:, :3]))
    assert (small.a.out_features, small.b.out_features, small.c.in_features) == (4, 4, 4)
    y = torch.randn(6, 3)
    torch.testing.assert_close(small(X, y), model(X, y))


# ---------------------------------------------------------------- with an optimizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "gsm": lambda p: GSM(p, 0.05, momentum=0.9, sparsity=0.8),
    "gsm, a count": lambda p: GSM(p, 0.05, momentum=0.9, num_kept=500),
    "gsm, a schedule": lambda p: GSM(p, 0.05, sparsity=lambda step: 0.1 * min(step, 8)),
}


def train(model: nn.Module, optimizer: Any, steps: range, zero: Callable[[], None]) -> None:
    for i in steps:
        x = images(i, 6).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(x), torch.arange(6)).backward()
        optimizer.step()
        zero()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_masked_model(kind: str) -> None:
    torch.manual_seed(0)
    large = network("vgg").double()
    large.classifier[2].p = 0.0  # or the two would drop different units
    optimizer = OPTIMIZERS[kind](fp.optim.prunable_groups(large))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(large, optimizer, range(3), scheduler.step)
    zero_channels(large, images().double())
    masks = {name: p != 0 for name, p in large.named_parameters()}
    small, other, schedule = copy.deepcopy((large, optimizer, scheduler))
    parts = {id(p) for p in small.parameters()}

    assert fp.compact(small.train(), images().double(), other) is small
    assert small.training and size(small) < 0.6 * size(large)
    held = [p for group in other.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()} != parts
    assert set(other.state) == set(held)

    def mask() -> None:
        scheduler.step()
        with torch.no_grad():
            for name, parameter in large.named_parameters():
                parameter.mul_(masks[name])

    train(large, optimizer, range(3, 8), mask)
    train(small, other, range(3, 8), schedule.step)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.01
    cut = fp.compact(large.eval(), images().double())
    for name, expected in cut.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected, rtol=1e-7, atol=1e-9)
    if isinstance(other, GSM):
        assert other.num_kept() == optimizer.num_kept()
        if kind != "gsm, a schedule":
            pickle.loads(pickle.dumps(other)).num_kept()


def test_gradients_and_16_bit_masters_are_cut_alike() -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = GSM(model.named_parameters(), 0.1, sparsity=0.5)
    for _ in range(2):
        model(X.bfloat16()).square().sum().backward()
        optimizer.step()
    old = model[0].weight
    gradient, state = old.grad.clone(), copy.deepcopy(optimizer.state[old])
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[:5] = 0
    fp.compact(model, X.bfloat16(), optimizer)
    weight = model[0].weight
    assert torch.equal(weight.grad, gradient[5:])
    for key, value in optimizer.state[weight].items():
        assert torch.equal(value, state[key][5:]) and value.dtype == torch.float32
    optimizer.step()


def test_with_an_optimizer_constants_stay() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].bias[:5] = 0.5
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _, report = fp.compact(model, X, optimizer, return_report=True)
    assert report.layers[0].after == 12 and "training goes on" in report.layers[0].stayed
    assert fp.compact(model, X)[0].out_features == 7


# ---------------------------------------------------------------- what is refused


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class TrainingHead(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.a.weight[1])
        nn.init.zeros_(self.a.bias[1:2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + self.head(y) if self.training else self.b(y)


class Noisy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.rand_like(x)


def pruned_by_torch() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 3)
    return model


def parametrized() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fp.compact("model", X), TypeError, "model must be a torch.nn.Module, got str"),
    (lambda: fp.compact(mlp(), None), TypeError, "example_input must be a tensor.*got NoneType"),
    (lambda: fp.compact(mlp(), ()), TypeError, "example_input must be a tensor"),
    (lambda: fp.compact(mlp(), X[:, :3]), ValueError, "torch.export cannot trace Sequential"),
    (lambda: fp.compact(Branching(), X), ValueError, "does not branch on tensor values"),
    (lambda: fp.compact(Noisy(), X), RuntimeError, "gives other outputs.*random numbers"),
    (lambda: fp.compact(mlp(), X, multiple_of=0), ValueError, "multiple_of must be a positive"),
    (lambda: fp.compact(mlp(), X, multiple_of=True), ValueError, "multiple_of must be a positive"),
    (lambda: fp.compact(mlp(), X, 3), TypeError, "optimizer must be a torch.optim.Optimizer"),
    (lambda: fp.compact(mlp(), X, torch.optim.SGD(mlp().parameters())), ValueError, "none of them"),
    (lambda: with_optimizer(torch.optim.LBFGS), ValueError, "LBFGS keeps its state"),
    (lambda: with_optimizer(lambda p: GSM(p, 0.1, sparsity=0.5, block=(2, 1)), 2), ValueError,
     "GSM chooses blocks"),
    (lambda: with_optimizer(torch.optim.SGD, model=TrainingHead()), ValueError,
     "head.weight is not used in evaluation"),
    (lambda: fp.compact(pruned_by_torch(), X), ValueError, "prune.remove"),
    (lambda: fp.compact(parametrized(), X), ValueError, "0 has a parametrization"),
    (lambda: fp.compact(nn.Sequential(nn.LazyLinear(3)), X), ValueError, "has no shape yet"),
]  # fmt: skip


def with_optimizer(
    kind: Callable[[Any], torch.optim.Optimizer], dims: int = 1, model: nn.Module | None = None
) -> None:
    model = mlp() if model is None else model
    fp.compact(model, X, kind([p for p in model.parameters() if p.dim() >= dims]))


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_input_says_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [*model.parameters(), *states]


@pytest.mark.parametrize("what", ["hook", "state", "outputs"])
def test_a_refusal_changes_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight[:5], model[0].bias[:5] = 0, 0
    match what:
        case "hook":
            fp.mask_gradients(model, fp.MaskSet.of(model))
        case "state":
            optimizer.state[model[2].weight]["rows"] = torch.ones(8)
        case "outputs":
            module = importlib.import_module("fastprune.deploy.compact")
            monkeypatch.setattr(module, "same", lambda *_: False)
    before = snapshot(model, optimizer)
    values = [t.detach().clone() for t in before]
    with pytest.raises((ValueError, RuntimeError),
                       match=r"gradient hook|'rows' of 2\.weight|other outputs"):  # fmt: skip
        fp.compact(model, X, optimizer)
    after = snapshot(model, optimizer)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))
    assert model[0].out_features == 12
