"""Where switches stand: outputs and gradients of explicit products, and what the folds cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastprune.methods.removal import ChannelSets
from fastprune.methods.switches import Switches


class Block(nn.Module):
    """Pre-activation or not; conv2 and the shortcut are added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.bn3(self.shortcut(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12))
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 25, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5),
    )  # fmt: skip


def without_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 25, 7), nn.ReLU(), nn.Linear(7, 5),
    )  # fmt: skip


class Sequences(nn.Module):
    """Linear layers whose channels are the last of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 9)
        self.second = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1, 2)))).sum(1)


NETWORKS = [with_norms, without_norms, ResNet, Sequences]


def network(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(tensor, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().requires_grad_(False)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def drawn(switches: Switches, count: int | None = None) -> dict[str, Tensor]:
    """Leaves between 0 and 2, with zeros; `count` for as many examples."""
    random = torch.Generator().manual_seed(2)
    scales = {}
    for name, size in switches.sizes.items():
        shape = (size,) if count is None else (count, size)
        scale = torch.rand(shape, generator=random, dtype=torch.float64) * 2
        scale[..., 1] = 0
        scales[name] = scale.requires_grad_()
    return scales


@contextmanager
def multiplied(model: nn.Module, at: dict[str, Tensor]) -> Iterator[None]:
    """The outputs of modules times their factors, by torch's own product."""

    def times(scale: Tensor, sequences: bool) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if sequences:
                return output * (scale if scale.dim() == 1 else scale[:, None])
            return output * scale.view(*scale.shape, *[1] * (output.dim() - 2))

        return hook

    sequences = isinstance(model, Sequences)
    handles = [
        model.get_submodule(name).register_forward_hook(times(scale, sequences))
        for name, scale in at.items()
    ]
    yield
    for handle in handles:
        handle.remove()


# For each network the modules behind which a switch stands, by the switch's name.
PLACES: dict[str, dict[str, dict[str, list[str]]]] = {
    "with_norms": {
        "auto": {"0": ["1"], "4": ["5"], "8": ["9"]},
        "layer": {"0": ["0"], "4": ["4"], "8": ["8"]},
    },
    "without_norms": {
        placement: {"0": ["0"], "3": ["3"], "6": ["6"]} for placement in ("auto", "layer")
    },
    "ResNet": {
        "auto": {
            "stem": ["norm"],
            "blocks.0.conv1": ["blocks.0.bn1"],
            "blocks.0.conv2": ["blocks.0.bn2", "blocks.0.bn3"],
            "blocks.1.conv1": ["blocks.1.bn1"],
            "blocks.1.conv2": ["blocks.1.bn2", "blocks.1.bn3"],
        },
        "layer": {
            "stem": ["stem"],
            "blocks.0.conv1": ["blocks.0.conv1"],
            "blocks.0.conv2": ["blocks.0.conv2", "blocks.0.shortcut"],
            "blocks.1.conv1": ["blocks.1.conv1"],
            "blocks.1.conv2": ["blocks.1.conv2", "blocks.1.shortcut"],
        },
    },
    "Sequences": {placement: {"first": ["first"]} for placement in ("auto", "layer")},
}


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("placement", ["auto", "layer"])
@pytest.mark.parametrize("make", NETWORKS)
def test_outputs_and_gradients_are_those_of_products(
    make: Any, placement: str, per_example: bool
) -> None:
    model, x = network(make), images()
    switches = Switches(model, ChannelSets(model, x).layers, placement=placement)
    places = PLACES[make.__name__][placement]
    assert switches.sizes.keys() == places.keys()
    scales = drawn(switches, len(x) if per_example else None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    output = switches.run(scales, x)
    grads = torch.autograd.grad(output.square().sum(), list(scales.values()))
    at = {module: scales[name] for name, modules in places.items() for module in modules}
    with multiplied(model, at):
        expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(scales.values()))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads, wanted)
    assert not torch.allclose(output, model(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(m._forward_hooks for m in model.modules())


def test_a_switch_behind_a_norm_is_one_behind_its_relu() -> None:
    model, x = network(with_norms), images()
    switches = Switches(model, ChannelSets(model, x).layers)
    scales = drawn(switches)
    with multiplied(model, {"2": scales["0"], "6": scales["4"], "10": scales["8"]}):
        expected = model(x)
    torch.testing.assert_close(switches.run(scales, x), expected)


def test_residual_channels_have_one_switch() -> None:
    """A zero there silences the channel of the sum, whatever adds to it."""
    model, x = network(ResNet), images()
    switches = Switches(model, ChannelSets(model, x).layers)
    scale = torch.ones(12, dtype=torch.float64)
    scale[[2, 7]] = 0
    seen: list[Tensor] = []
    handle = model.blocks.register_forward_hook(lambda m, a, output: seen.append(output))
    switches.run({"blocks.1.conv2": scale}, x)
    model(x)
    handle.remove()
    switched, plain = seen
    assert not switched[:, [2, 7]].any() and plain[:, [2, 7]].any()
    kept = scale.bool()
    torch.testing.assert_close(switched[:, kept], plain[:, kept])


# Norms in front of layers cannot take what the layers behind them make: densenet's, the ViT's.
@pytest.mark.parametrize(
    ("name", "folded", "places"),
    [("vgg", 4, 5), ("resnet", 12, 12), ("wide_resnet", 17, 17), ("mobilenet", 13, 13),
     ("densenet", 5, 10), ("vit", 0, 2)],
)  # fmt: skip
def test_folds_and_hooks_of_known_networks_agree(name: str, folded: int, places: int) -> None:
    from tests.deploy import networks  # needs timm and torchvision

    model, x = networks.network(name), networks.images()
    switches = Switches(model, ChannelSets(model, x).layers)
    scales = {each: scale.detach().float() for each, scale in drawn(switches).items()}
    for_each = {each: scale.expand(len(x), -1) for each, scale in scales.items()}
    with torch.no_grad():
        torch.testing.assert_close(switches.run(scales, x), switches.run(for_each, x))
    assert len(switches.tensors(scales)) == 2 * folded
    with switches.hooks(scales):
        assert sum(len(m._forward_hooks) for m in model.modules()) == places - folded


def test_switches_that_are_not_named_are_off() -> None:
    model, x = network(without_norms), images()
    switches = Switches(model, ChannelSets(model, x).layers)
    assert torch.equal(switches.run({}, x), model(x))
    ones = {name: torch.ones(size) for name, size in switches.sizes.items()}
    torch.testing.assert_close(switches.run(ones, x), model(x))


# ---------------------------------------------------------------- cost


SMALLEST = {"with_norms": 64 * 7, "ResNet": 64 * 12}  # elements of an activation of 64 examples


def large_operators(call: Any, elements: int) -> list[str]:
    """The operators that take or return a tensor of so many elements, in their order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        call()
    found = []
    for event in sorted(run.events(), key=lambda e: e.time_range.start):
        sizes = [torch.Size(s).numel() for s in event.input_shapes if s and isinstance(s[0], int)]
        if event.name.startswith(("aten::", "fastprune::")) and max(sizes, default=0) >= elements:
            found.append(event.name)
    return found


@pytest.mark.parametrize("make", [with_norms, ResNet])
def test_folded_switches_cost_no_pass_over_activations(make: Any) -> None:
    """The same operators on anything as large as the smallest activation, in the same order."""
    model, x = network(make).float(), images(64).float()
    switches = Switches(model, ChannelSets(model, x).layers)
    scales = {name: scale.detach().float() for name, scale in drawn(switches).items()}
    smallest = SMALLEST[make.__name__]
    assert max(tensor.numel() for tensor in switches.tensors(scales).values()) < smallest
    with torch.no_grad():
        plain = large_operators(lambda: model(x), smallest)
        folded = large_operators(lambda: switches.run(scales, x), smallest)
        each = {n: s.expand(64, -1) for n, s in scales.items()}
        hooked = large_operators(lambda: switches.run(each, x), smallest)
    assert plain and folded == plain
    # What would be seen: the same switches, but for each example its own.
    places = sum(len(modules) for modules in PLACES[make.__name__]["auto"].values())
    assert hooked.count("fastprune::channel_switch") == places
    assert len(hooked) > len(plain)


def test_the_gradient_reaches_a_folded_switch_through_the_norm() -> None:
    """No pass backward either but those that frozen layers behind the switch need."""
    model, x = network(with_norms).float(), images(64).float()
    switches = Switches(model, ChannelSets(model, x).layers)
    scales = {name: s.detach().float().requires_grad_() for name, s in drawn(switches).items()}
    loss = switches.run(scales, x).square().sum()
    operators = large_operators(loss.backward, SMALLEST["with_norms"])
    assert not any("mul" in name or "switch" in name or "sum" in name for name in operators)
    assert operators.count("aten::native_batch_norm_backward") == 3
    assert all(s.grad is not None and s.grad.any() for s in scales.values())


# ---------------------------------------------------------------- refusals


def test_a_norm_in_training_mode_is_refused() -> None:
    model, x = network(with_norms), images()
    switches = Switches(model, ChannelSets(model, x).layers)
    model[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode: call model.eval\(\)"):
        switches.run(drawn(switches), x)


def test_hooks_are_gone_after_an_error() -> None:
    model, x = network(without_norms), images()
    switches = Switches(model, ChannelSets(model, x).layers)
    with pytest.raises(RuntimeError):
        switches.run(drawn(switches), torch.randn(2, 4, 16, 16).double())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement must be 'auto' or 'layer', got 'behind'"):
        Switches(nn.Linear(2, 2), {}, placement="behind")
