"""Which kernels are chosen, and that the result is never slower than the dense model."""

import importlib
import itertools
import json
import random
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.deploy import measure, plan
from fastprune.deploy.capture import capture
from fastprune.deploy.convert import fastest
from fastprune.deploy.fold import fold
from fastprune.deploy.plan import DENSE, Costs, cheapest
from fastprune.deploy.sparse_model import COMPILED, EAGER, SPARSE
from fastprune.deploy.steps import Found, find_steps

from .networks import images
from .sparse_networks import sparse_network, tiny

convert = importlib.import_module("fastprune.deploy.convert")


def steps_of(model: nn.Module) -> tuple[Any, list[Found]]:
    graph = capture(model, (images(),))
    graph = fold(graph)
    return graph, list(find_steps(graph).values())


class Branches(nn.Module):
    """Two ways that meet, one gate, and an operation between regions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = self.b(y).sin()
        return self.pool(self.c(z + y)).flatten(1)


def price(found: list[Found], costs: Costs, inside: set[str]) -> float:
    """What an assignment costs, counted value by value."""
    owner = {node: step for step in found for node in step.nodes}
    sparse = {step for step in found if step.name in inside}
    for step in found:
        if step.step is None and owner.get(step.inputs[0]) in sparse:
            sparse.add(step)
    total = sum(
        min(costs.sparse[step.name].values()) if step in sparse else costs.dense[step.name]
        for step in found
        if step.step is not None
    )
    for value in dict.fromkeys(node for s in found for node in (*s.inputs, s.value)):
        made_inside = owner.get(value) in sparse
        readers = [owner.get(user) in sparse for user in value.users]
        if made_inside and not all(readers):
            total += costs.leave[value]
        if not made_inside and any(readers):
            total += costs.enter[value]
    return total


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_is_the_cheapest_of_all(seed: int) -> None:
    _, found = steps_of(Branches().eval() if seed % 2 else tiny(seed))
    pick = random.Random(seed)
    costs = Costs()
    for step in found:
        costs.dense[step.name] = pick.choice([0, 1, 2, 5, 9])
        costs.sparse[step.name] = {"rows": pick.randint(0, 9), "blocked_rows": pick.randint(0, 9)}
        for node in (step.value, *step.inputs):
            costs.leave.setdefault(node, pick.randint(0, 4))
            costs.enter.setdefault(node, pick.randint(0, 4))
    names = [step.name for step in found if step.step is not None]
    chosen = cheapest(found, costs)
    assert set(chosen) == set(names)
    inside = {name for name, kernel in chosen.items() if kernel != DENSE}
    prices = [
        price(found, costs, set(subset))
        for size in range(len(names) + 1)
        for subset in itertools.combinations(names, size)
    ]
    assert price(found, costs, inside) == min(prices)
    for name in inside:
        assert costs.sparse[name][chosen[name]] == min(costs.sparse[name].values())


def test_without_measuring_sparse_layers_are_chosen_and_dense_ones_left() -> None:
    sparse = fp.sparsify(sparse_network("wide_resnet", 0.95), images(), measure=False)
    kernels = sparse.choices["kernels"]
    assert kernels["layer4.0.conv2"] == "automatic"
    dense = fp.sparsify(sparse_network("wide_resnet", 0.0), images(), measure=False)
    assert set(dense.choices["kernels"].values()) == {DENSE}
    assert dense.report().regions == 0


# ---------------------------------------------------------------- measuring


def never_compile(*arguments: Any) -> Any:
    raise measure.CannotCompile("not in this test")


def test_measured_choices_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "compiled", never_compile)
    monkeypatch.setattr(convert, "SLOWER", 1e9)  # whatever this machine says
    model = sparse_network("resnet", 0.95)
    sparse = fp.sparsify(model, images(count=1), verify=True)
    report = sparse.report()
    names = [layer.name for layer in report.layers]
    assert names[:2] == ["conv1", "layer1.0.conv1"] and names[-1] == "fc"
    assert all(layer.ms > 0 and layer.dense_ms > 0 for layer in report.layers)
    for layer in report.layers:
        assert layer.kernel == sparse.choices["kernels"][layer.name]
        weight = model.get_submodule(layer.name).weight
        assert layer.sparsity == pytest.approx(float((weight == 0).double().mean()), abs=1e-6)
    assert set(report.whole_ms) == {SPARSE, EAGER}
    text = str(report)
    assert "layer1.0.conv1" in text and "dense ms" in text and "returned: sparse" in text
    assert "not timed against torch.compile: not in this test" in text
    again = fp.sparsify(model, images(count=1), choices=json.loads(json.dumps(sparse.choices)))
    assert torch.equal(again(images()), sparse(images()))


def test_choices_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    choices = fp.sparsify(model, images(), measure=False).choices

    def never(*arguments: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(convert, "measure_steps", never)
    monkeypatch.setattr(convert, "run_race", never)
    fp.sparsify(model, images(), choices=choices)
    with pytest.raises(AssertionError, match="measured"):
        fp.sparsify(model, images())


def test_borders_are_measured_for_every_value() -> None:
    graph, found = steps_of(tiny())
    costs = measure.measure_steps(graph, found, (images(),))
    for step in found:
        if step.step is None:
            continue
        assert costs.dense[step.name] > 0
        assert set(costs.sparse[step.name]) == set(plan.CANDIDATES)
        assert all(seconds >= 0 for seconds in costs.sparse[step.name].values())
        assert all(costs.leave[node] > 0 and costs.enter[node] > 0 for node in step.inputs)


# ---------------------------------------------------------------- never slower


@pytest.mark.parametrize(
    ("seconds", "returned"),
    [
        ({SPARSE: 1.0, EAGER: 2.0, COMPILED: 1.5}, SPARSE),
        ({SPARSE: 1.02, EAGER: 1.0}, SPARSE),
        ({SPARSE: 1.04, EAGER: 1.0, COMPILED: 2.0}, EAGER),
        ({SPARSE: 1.5, EAGER: 2.0, COMPILED: 1.0}, COMPILED),
        ({SPARSE: 1.0}, SPARSE),
    ],
)
def test_a_rival_is_returned_when_it_is_faster_by_more_than_3_percent(
    seconds: dict[str, float], returned: str
) -> None:
    assert fastest(seconds) == returned


@pytest.mark.parametrize("loser", [EAGER, COMPILED])
def test_a_sparse_model_that_loses_is_not_returned(
    loser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def fast(*arguments: Any) -> torch.Tensor:
        called.append(1)
        return model(*arguments)

    def measured(candidates: dict[str, Any]) -> dict[str, float]:
        return {name: 0.001 if name == loser else 0.002 for name in candidates}

    monkeypatch.setattr(convert, "compiled", lambda *arguments: fast)
    monkeypatch.setattr(convert, "measure_whole", measured)
    model, x = tiny(), images()
    with pytest.warns(UserWarning, match=f"the dense model \\({loser}\\) is returned.*2.00 ms"):
        sparse = fp.sparsify(model, x)
    assert sparse.choices["returned"] == sparse.report().returned == loser
    assert f"returned: {loser}" in str(sparse.report())
    called.clear()
    torch.testing.assert_close(sparse(x), model(x))
    assert bool(called) == (loser == COMPILED)
    assert not any("Region" in type(each).__name__ for each in sparse.modules())


def test_the_rivals_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "compiled", never_compile)
    assert set(fp.sparsify(tiny(), images(), rivals=()).report().whole_ms) == {SPARSE}
    with pytest.raises(ValueError, match="rivals must be among"):
        fp.sparsify(tiny(), images(), rivals=("tensorrt",))


def test_the_whole_is_timed_in_turns() -> None:
    order = []

    def call(name: str, seconds: float) -> Any:
        return lambda: (order.append(name), time.sleep(seconds))

    times = measure.measure_whole({"a": call("a", 0.002), "b": call("b", 0.02)})
    assert 0.002 <= times["a"] < 0.02 <= times["b"]
    assert order[:6] == ["a", "b", "a", "b", "b", "a"]  # once untimed, then back and forth


def test_compiling_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(torch, "compile", lambda function: lambda *arguments: time.sleep(20))
    start = time.perf_counter()
    with pytest.raises(measure.CannotCompile, match="more than 0 s"):
        measure.compiled(tiny(), (images(),))
    assert time.perf_counter() - start < 10
    time.sleep(0.3)  # no alarm is left behind
    failing: Any = lambda function: lambda *arguments: 1 / 0  # noqa: E731
    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(measure.CannotCompile, match="division by zero"):
        measure.compiled(tiny(), (images(),))


def test_without_a_compiler_or_outside_the_main_thread_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []

    def attempt() -> None:
        try:
            measure.compiled(tiny(), (images(),))
        except measure.CannotCompile as reason:
            said.append(str(reason))

    worker = threading.Thread(target=attempt)
    worker.start()
    worker.join()
    monkeypatch.setattr(measure.shutil, "which", lambda name: None)
    attempt()
    assert said[0].endswith("in the main thread") and said[1] == "there is no C++ compiler"


def test_a_compiled_rival_is_timed() -> None:
    """The real one, on a model that compiles in seconds."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    function = measure.compiled(model, (images(),))
    torch.testing.assert_close(function(images()), model(images()), rtol=1e-4, atol=1e-5)
