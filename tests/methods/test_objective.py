"""Scoring leaves a model, its gradients and the generators bit for bit as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.methods.objective import Objective, undisturbed

from .networks import NETWORKS, network, same_bits

METHODS: dict[str, Callable[..., fp.MaskSet]] = {
    "prospr": fp.prospr,
    "finite_difference": lambda *a, **k: fp.prospr(*a, mode="finite_difference", **k),
    "snip": fp.snip,
    "iter_snip": lambda *a, **k: fp.iter_snip(*a, rounds=3, **k),
    "force": lambda *a, **k: fp.force(*a, rounds=3, **k),
    "grasp": fp.grasp,
}


class Snapshot:
    """All of a model that somebody could notice, and copies of the tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = self._parts()
        self.copies = [x.detach().clone() for x in self._tensors()]
        self.gradients = [p.grad for p in model.parameters()]
        self.gradient_copies = [g if g is None else g.clone() for g in self.gradients]
        self.trained = [p.requires_grad for p in model.parameters()]
        self.generator = torch.get_rng_state()

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _parts(self) -> list[Any]:
        """Identities of attributes, parameters, buffers and hooks in their order; modes."""
        return [
            [(name, id(x) if isinstance(x, Tensor) else repr(x)) for name, x in part.items()]
            for module in self.model.modules()
            for part in (
                {k: v for k, v in vars(module).items() if k != "_modules"},
                module._parameters,
                module._buffers,
                module._forward_hooks,
            )
        ]

    def check(self) -> None:
        assert self._parts() == self.parts
        assert all(map(same_bits, self._tensors(), self.copies))
        for p, held, copy in zip(
            self.model.parameters(), self.gradients, self.gradient_copies, strict=True
        ):
            assert p.grad is held
            assert held is None or same_bits(held, copy)
        assert [p.requires_grad for p in self.model.parameters()] == self.trained
        assert torch.equal(torch.get_rng_state(), self.generator)


def used(name: str) -> tuple[nn.Module, Any, Any]:
    """A model in the middle of its life: gradients, statistics, a hook, one part in eval mode."""
    model, batches, loss_fn = network(name, torch.float32)
    loss_fn(model(batches[0][0]), batches[0][1]).backward()
    next(model.parameters()).grad = None
    last = list(model.modules())[-1]
    last.eval()
    last.register_forward_hook(lambda module, arguments, output: None)
    return model, batches, loss_fn


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(name: str, method: str) -> None:
    model, batches, loss_fn = used(name)
    before = Snapshot(model)
    METHODS[method](model, batches, loss_fn, 0.5, min_kept_per_layer=1)
    before.check()


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv3d"])
def test_synflow_and_channels_leave_it_too(name: str) -> None:
    model, batches, loss_fn = used(name)
    before = Snapshot(model)
    fp.synflow(model, batches[0][0], 0.5, rounds=3, min_kept_per_layer=1)
    fp.prospr(model, batches, loss_fn, 0.5, granularity="channel", min_kept_per_layer=1)
    before.check()
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.parametrize("where", ["model", "loss", "batches"])
def test_an_error_or_ctrl_c_leaves_it_too(
    error: type[BaseException], after: int, where: str
) -> None:
    model, batches, loss_fn = used("cnn")
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise error

    def failing_loss(output: Tensor, target: Tensor) -> Tensor:
        if where == "loss":
            fail()
        return loss_fn(output, target)

    def failing_batches() -> Any:
        for batch in [*batches, *batches]:
            yield batch
            if where == "batches":
                fail()

    if where == "model":
        model[3].register_forward_pre_hook(lambda module, arguments: fail())
    before = Snapshot(model)
    with pytest.raises(error):
        fp.prospr(model, failing_batches(), failing_loss, 0.5, steps=6)
    before.check()


def test_a_model_that_changes_itself_is_put_back() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.seen += 1
            self.last = x
            with torch.no_grad():
                self.linear.weight.clamp_(-0.1, 0.1)
            return self.linear(x - self.mean)

    torch.manual_seed(0)
    model, batches = Restless(), [(torch.randn(5, 4), torch.arange(5) % 3)]
    before = Snapshot(model)
    fp.prospr(model, batches, F.cross_entropy, 0.5)
    before.check()
    assert not hasattr(model, "last")


def test_an_interrupt_between_two_replacements_is_put_back() -> None:
    model = nn.Linear(3, 2)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        model._parameters["weight"] = nn.Parameter(torch.ones(2, 3))
        model.eval()
        raise KeyboardInterrupt
    before.check()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode: Any) -> None:
    model, batches, loss_fn = network("mlp")
    with mode():
        masks = fp.prospr(model, batches, loss_fn, 0.5)
    assert masks == fp.prospr(model, batches, loss_fn, 0.5)


def test_passes_of_one_step_are_one_function() -> None:
    model, batches, loss_fn = network("gpt")
    objective = Objective(model, batches, loss_fn)
    losses = [objective.loss(objective.start, step) for step in (0, 1, 2, 1, 0)]
    assert losses[0] == losses[4] and losses[1] == losses[3]
    same_batch = Objective(model, batches[:1], loss_fn)
    assert same_batch.loss(same_batch.start, 0) != same_batch.loss(same_batch.start, 1)  # dropout


def test_hessian_product_of_a_quadratic() -> None:
    """loss = w A w / 2, so H v = A v; differences of a quadratic are exact but for roundoff."""
    a = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def forward(net: Any, batch: Tensor) -> Tensor:
        return (net.weight @ batch @ net.weight.T).sum() / 2

    objective = Objective(model, [a], None, forward)
    v = {"weight": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}
    expected = v["weight"] @ a
    product = objective.hessian_product(objective.start, v, 0)["weight"]
    assert torch.allclose(product, expected, rtol=1e-14)
    near = objective.difference_product(objective.start, v, 0, 0.1)["weight"]
    assert torch.allclose(near, expected, rtol=1e-6)


def test_a_linear_loss_has_no_curvature() -> None:
    model = nn.Linear(3, 2)
    objective = Objective(model, [(torch.ones(1, 3), None)], lambda out, _: out.sum())
    product = objective.hessian_product(objective.start, objective.start, 0)
    assert not any(x.any() for x in product.values())


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_a_model_on_any_device_with_batches_on_the_cpu(device: torch.device, mode: Any) -> None:
    options: dict[str, Any] = {"mode": mode, "inner_lr": 0.1}
    model, batches, loss_fn = network("gpt")
    model.eval()  # dropout draws other numbers on other devices
    expected = fp.scores("prospr", model, batches, loss_fn, **options)
    model.to(device)
    largest = max(float(score.abs().max()) for score in expected.values())
    for name, score in fp.scores("prospr", model, batches, loss_fn, **options).items():
        assert score.device.type == device.type
        assert float((score.cpu() - expected[name]).abs().max()) <= 1e-9 * largest

    model.train()
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    generator = state()
    masks = fp.prospr(model, batches, loss_fn, 0.7, **options)
    assert torch.equal(state(), generator)
    assert masks == fp.prospr(model, batches, loss_fn, 0.7, **options)
    masks.apply(model)
