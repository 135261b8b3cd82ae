"""Whole models after `fp.sparsify`: their outputs, what is left alone, what is refused."""

import copy
import gc
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fastprune as fp
from fastprune.deploy.sparse_model import COMPILED, EAGER, SPARSE
from fastprune.deploy.sparse_modules import SparseRegion

from .networks import images
from .sparse_networks import CONVERTIBLE, sparse_network, tiny, zero_weights

TOLERANCE = 1e-4  # of the largest output
KERNELS = ("automatic", "rows", "blocked_rows", "generated")


def converted(model: nn.Module, kernels: Any = "rows", example: Tensor | None = None) -> nn.Module:
    """Every understood step with this kernel, or with what a function of its name says."""
    x = images(count=2) if example is None else example
    names = fp.sparsify(model, x, measure=False).choices["kernels"]
    choose = kernels if callable(kernels) else lambda name: kernels
    choices = {"kernels": {name: choose(name) for name in names}, "returned": SPARSE}
    return fp.sparsify(model, x, choices=choices)


def error(model: nn.Module, sparse: nn.Module, x: Tensor) -> float:
    expected = model(x)
    if len(x) > 1:
        spread = (expected - expected.mean(0)).abs().max() / expected.abs().max()
        assert spread > 0.01  # outputs that ignore the input would hide everything
    return float((sparse(x) - expected).abs().max() / expected.abs().max())


def regions(module: nn.Module) -> list[SparseRegion]:
    return [each for each in module.modules() if isinstance(each, SparseRegion)]


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_network_gives_the_same(name: str) -> None:
    model = sparse_network(name)
    sparse = converted(model)
    assert error(model, sparse, images(seed=1, count=3)) < TOLERANCE
    planned = fp.sparsify(model, images(count=1), measure=False)
    assert error(model, planned, images(seed=2, count=2)) < TOLERANCE


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_any_batch_and_size_works_after_conversion(name: str) -> None:
    model = sparse_network(name)
    sparse = converted(model, "automatic", images(count=1))
    for seed, shape in enumerate([(3, 3, 64, 48), (17, 3, 33, 47), (1, 3, 65, 37)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert error(model, sparse, x) < TOLERANCE, shape
    x = images(count=2).contiguous(memory_format=torch.channels_last)
    assert error(model, sparse, x) < TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_same(kernel: str) -> None:
    model = sparse_network("resnet")
    assert error(model, converted(model, kernel), images(seed=3)) < TOLERANCE


def test_without_native_kernels_the_reference_serves() -> None:
    model = sparse_network("mobilenet_v3")
    sparse = converted(model)
    with fp.use_reference():
        assert error(model, sparse, images(seed=3)) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet_v3", "timm_preactivation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_mix_of_dense_and_sparse_steps_gives_the_same(name: str, seed: int) -> None:
    model = sparse_network(name)
    pick = random.Random(seed)
    mixed = converted(model, lambda step: pick.choice(["dense", "rows", "automatic"]))
    assert len(regions(mixed)) > 3
    assert error(model, mixed, images(seed=4, count=3)) < TOLERANCE


@pytest.mark.parametrize(
    "name", sorted(CONVERTIBLE.keys() - {"vgg", "timm_vgg", "timm_same_padding"})
)
def test_a_network_that_is_understood_is_one_region(name: str) -> None:
    sparse = converted(sparse_network(name))
    (region,) = regions(sparse)
    called = [node for node in sparse.network.graph.nodes if node.op.startswith("call")]
    assert [node.op for node in called] == ["call_module", "call_function"]  # and its one result
    kinds = region.program[::18]
    assert len(kinds) == len(region.names) > 10


def test_the_linear_layers_of_a_transformer_run_in_regions() -> None:
    model = sparse_network("vit")
    sparse = converted(model)
    linear = [name for name in sparse.choices["kernels"] if "mlp" in name or "attn" in name]
    assert len(linear) == 8  # of two blocks
    assert error(model, sparse, images(seed=1, count=3)) < TOLERANCE


def test_vgg_leaves_for_its_adaptive_pool_only() -> None:
    assert len(regions(converted(sparse_network("vgg")))) == 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_all_zero_fully_dense_and_with_one_weight(kernel: str) -> None:
    model = tiny(sparsity=0.0)
    with torch.no_grad():
        model.body.weight.zero_()
    assert error(model, converted(model, kernel), images()) < TOLERANCE
    with torch.no_grad():
        model.body.weight[3, 2, 1, 0] = 2.0
    assert error(model, converted(model, kernel), images()) < TOLERANCE


def test_several_inputs_and_outputs_and_a_nested_result() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor, y: Tensor, factor: float = 2.0) -> dict[str, Any]:
            total = F.relu(self.a(x) + self.b(y))
            return {"total": total, "both": (x, total * factor)}

    model = Two().eval()
    x, y = images(), images(1)
    sparse = fp.sparsify(model, (x, y), measure=False, verify=True)
    sparse = fp.sparsify(
        model,
        (x, y),
        choices={
            "kernels": dict.fromkeys(sparse.choices["kernels"], "rows"),
            "returned": SPARSE,
        },
    )
    assert regions(sparse)
    got, expected = sparse(x, y), model(x, y)
    torch.testing.assert_close(got["total"], expected["total"])
    torch.testing.assert_close(got["both"], expected["both"])
    torch.testing.assert_close(sparse(x, y, 3.0)["both"][1], model(x, y, 3.0)["both"][1])


def test_a_model_that_returns_its_input_and_one_that_is_a_layer() -> None:
    x = images()
    assert torch.equal(fp.sparsify(nn.Identity().eval(), x, measure=False)(x), x)
    conv = nn.Conv2d(3, 4, 3, padding="same").eval()
    torch.testing.assert_close(converted(conv)(x), conv(x))
    assert regions(converted(conv))
    linear = nn.Linear(7, 5).eval()
    y = torch.randn(6, 7)
    torch.testing.assert_close(converted(linear, example=y)(y), linear(y))


# ---------------------------------------------------------------- what the model's code does


class Overwriting(nn.Module):
    """`forward` is given by each test; three layers that fit behind each other."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def late_reader(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.relu(y)  # y is overwritten, so b reads what z is
    return m.b(y) + z


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.a(x))
    y += m.b(y)
    kept = y * 1
    y = m.relu(y)
    return y + kept


def by_function(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu(y, inplace=True)
    y.add_(1)
    F.relu_(y)
    return m.b(y)


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    view = y.transpose(2, 3)
    y.mul_(3)
    return m.b(view)


def by_index(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 7.0
    return m.b(y)


@pytest.mark.parametrize("body", [late_reader, twice, by_function])
def test_overwritten_tensors_are_followed(body: Any) -> None:
    model = Overwriting(body).eval()
    sparse = converted(model)
    assert regions(sparse)
    assert error(model, sparse, images(seed=1)) < TOLERANCE


@pytest.mark.parametrize("body", [through_a_view, by_index])
def test_what_cannot_be_followed_stays_dense_and_that_is_said(body: Any) -> None:
    model = Overwriting(body).eval()
    with pytest.warns(UserWarning, match="the dense model is returned"):
        sparse = fp.sparsify(model, images(), measure=False)
    assert error(model, sparse, images(seed=1)) < TOLERANCE
    assert "the dense model is returned: " in str(sparse.report())


def test_a_module_that_branches_on_sizes_is_left_whole() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.shape[2] > 20 else x * 2

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branching(), nn.Conv2d(8, 4, 3)).eval()
    sparse = converted(model)
    assert len(regions(sparse)) == 2
    for size in (32, 18):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_may_have_any_name() -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Sequential())
    model.add_module("a_b", nn.Sequential())
    model.a.add_module("b_c", nn.Conv2d(3, 4, 1))
    model.a_b.add_module("c", nn.Conv2d(4, 5, 3))
    model.add_module("names", nn.Conv2d(5, 6, 1))
    model.eval()
    sparse = converted(model)
    assert set(sparse.choices["kernels"]) == {"a.b_c", "a_b.c", "names"}
    assert error(model, sparse, images(seed=1)) < TOLERANCE
    assert sum("row_starts" in key for key in sparse.state_dict()) == 3


def test_what_has_no_batch_stays_outside_and_arguments_may_come_by_keyword() -> None:
    """With one image in the example a constant looks like another image."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
            self.offset = nn.Parameter(torch.randn(1, 3, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.offset.tanh()
            x = F.relu(input=self.b(input=x))
            return self.b(x)

    model = Offset().eval()
    sparse = converted(model, example=images(count=1))
    assert regions(sparse)
    assert error(model, sparse, images(seed=1, count=3)) < TOLERANCE


def test_a_module_left_whole_that_overwrites_its_input() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x) * (2 if x.shape[0] > 1 else 3)

    class Outer(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            self.a, self.b, self.inner = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Inner()
            self.late = late

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.inner(y)
            return self.b(y) + z if self.late else self.b(z)

    early = Outer(False).eval()
    assert regions(converted(early))
    assert error(early, converted(early), images(seed=1)) < TOLERANCE
    late = Outer(True).eval()
    with pytest.warns(UserWarning, match="inner may write into a, which is read later"):
        sparse = fp.sparsify(late, images(), measure=False)
    assert error(late, sparse, images(seed=1)) < TOLERANCE


def test_a_layer_called_twice_a_tied_weight_and_a_hook() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)
            self.hooked = nn.Conv2d(3, 3, 1)
            self.hooked.register_forward_hook(lambda module, args, out: out + 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y = self.hooked(self.conv(y))
            return F.conv2d(y, self.conv.weight)

    torch.manual_seed(0)
    model = Shared()
    for i in range(3):
        model(images(i) * 3 + 1)
    model.eval()
    sparse = converted(model)
    assert set(sparse.choices["kernels"]) == {"conv", "conv_2", "conv_3"}
    torch.testing.assert_close(sparse(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


def test_a_gate_of_one_pixel_is_known_by_where_it_comes_from_not_by_its_shape() -> None:
    """On a small example every image is one pixel; on a larger one only the gate is."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            gate = self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
            return gate * x + x

    model = Gated().eval()
    sparse = converted(model, example=torch.randn(1, 3, 2, 2))
    assert len(regions(sparse)) == 1
    x = torch.randn(2, 3, 31, 20)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the module that is returned


def test_the_given_model_is_not_changed_and_shares_nothing() -> None:
    model = tiny()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    sparse = converted(model, lambda name: "dense" if name == "body" else "rows")
    expected = sparse(images())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    assert torch.equal(sparse(images()), expected)


def test_a_copy_and_an_unpickled_one_work_on_their_own(tmp_path: Path) -> None:
    sparse = converted(tiny(), lambda name: "dense" if name == "body" else "rows")
    expected = sparse(images())
    twin = copy.deepcopy(sparse)
    torch.save(sparse, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    keys = {region.lease.key for each in (sparse, twin, loaded) for region in regions(each)}
    assert len(keys) == 3 * len(regions(sparse))
    del sparse
    gc.collect()
    assert torch.equal(twin(images()), expected)
    assert torch.equal(loaded(images()), expected)


def test_a_state_dict_of_other_weights_is_used_at_once() -> None:
    one, other = tiny(0), tiny(1, sparsity=0.4)
    sparse, source = converted(one), converted(other)
    sparse(images())
    sparse.load_state_dict(source.state_dict())
    assert error(other, sparse, images()) < TOLERANCE
    assert sparse.state_dict().keys() == source.state_dict().keys()
    assert any(key.endswith("row_starts") for key in sparse.state_dict())


def test_no_growth_over_10_000_inferences_and_over_many_modules() -> None:
    model, x = tiny(), torch.randn(1, 3, 8, 8)
    sparse = converted(model, example=x)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    inputs = [torch.randn(n, 3, h, w) for n, h, w in [(1, 8, 8), (2, 8, 8), (1, 9, 7), (3, 5, 5)]]
    for i in range(500):
        sparse(inputs[i % 4])
    before = resident()
    for i in range(10_000):
        sparse(inputs[i % 4])
    assert resident() - before < 8e6
    big = torch.randn(1, 3, 64, 64)
    for _ in range(3):
        copy.deepcopy(sparse)(big)
    before = resident()
    for _ in range(100):
        copy.deepcopy(sparse)(big)  # each prepares a network, and frees it
    assert resident() - before < 8e6


@pytest.mark.parametrize("batch", [1, 4])
def test_the_module_can_be_exported_and_compiled(batch: int) -> None:
    torch.compiler.reset()
    model, x = tiny(), images(count=batch)
    sparse = converted(model, lambda name: "dense" if name == "body" else "rows")
    assert len(regions(sparse)) == 2
    program = torch.export.export(sparse, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("fastprune.sparse_network.default") == 2
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_exported_with_a_dynamic_batch() -> None:
    model = tiny()
    shapes = {"arguments": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(converted(model), (images(),), dynamic_shapes=shapes)
    for count in (2, 7):
        x = images(seed=count, count=count)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_choices_are_json_and_reproduce_the_module() -> None:
    model = sparse_network("resnet")
    first = fp.sparsify(model, images(), measure=False)
    choices = json.loads(json.dumps(first.choices))
    again = fp.sparsify(model, images(), choices=choices)
    assert again.choices == first.choices
    assert [r.program for r in regions(again)] == [r.program for r in regions(first)]
    some = {"kernels": {"fc": "dense", "no such layer": "rows"}, "returned": SPARSE}
    assert fp.sparsify(model, images(), choices=some).choices["kernels"]["fc"] == "dense"


@pytest.mark.parametrize("returned", [EAGER, COMPILED])
def test_choices_may_say_that_the_dense_model_is_best(
    returned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: (compiled.append(1), forward)[1])
    model = tiny()
    choices = {"kernels": {}, "returned": returned}
    sparse = fp.sparsify(model, images(), choices=choices)
    assert not regions(sparse)
    assert error(model, sparse, images(1)) < TOLERANCE
    assert compiled == [1] * (returned == COMPILED)
    assert torch.equal(copy.deepcopy(sparse).network.head.weight, model.head.weight)


# ---------------------------------------------------------------- what is refused


def test_training_mode_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"the model is in training mode.*call model\.eval\(\)"):
        fp.sparsify(model.train(), images())
    model.eval().norm.train()
    with pytest.raises(ValueError, match=r"norm is in training mode"):
        fp.sparsify(model, images())
    sparse = fp.sparsify(model.eval(), images(), measure=False)
    with pytest.raises(ValueError, match="for inference"):
        sparse.train()
    assert sparse.eval() is sparse


def test_inputs_that_do_not_fit_are_refused() -> None:
    sparse = converted(tiny())
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \(2, 4, 8, 8\)"):
        sparse(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \(3, 8, 8\)"):
        sparse(torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"float32, got torch.float64; pass x.float"):
        sparse(torch.randn(2, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"on the CPU, got a tensor on meta; pass x.cpu"):
        sparse(torch.randn(2, 3, 8, 8, device="meta"))


def test_a_gpu_tensor_is_refused(device: torch.device) -> None:
    sparse, x = converted(tiny()), images().to(device)
    if device.type == "cpu":
        assert sparse(x).shape == (4, 5)
        return
    with pytest.raises(ValueError, match="on the CPU, got a tensor on cuda"):
        sparse(x)
    with pytest.raises(ValueError, match="is on cuda"):
        fp.sparsify(tiny().to(device), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: (m.double(), x.double()), r"stem.weight is torch.float64.*model.float\(\)"),
        (lambda m, x: (m, x.half()), "example_input is torch.float16"),
        (lambda m, x: (m.to("meta"), x), r"stem.weight is on meta.*model.cpu\(\)"),
        (lambda m, x: (m, x.to("meta")), "example_input is on meta"),
    ],
)
def test_other_types_and_devices_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.sparsify(*change(tiny(), images()), measure=False)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "bfloat16"}, ValueError, "dtype must be 'float32'"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"threads": "2"}, TypeError, "threads must be an integer"),
        ({"choices": 3}, TypeError, "choices must be the `choices`"),
        ({"choices": {"kernels": {"a": "fast"}}}, ValueError, "a has the kernel 'fast'"),
        ({"choices": {"kernels": {}, "returned": "x"}}, ValueError, "'returned' is 'x'"),
    ],
)
def test_wrong_arguments_are_named(options: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fp.sparsify(tiny(), images(), **options)


def test_models_and_examples_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fp.sparsify(lambda x: x, images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        fp.sparsify(tiny(), [1, 2])
    hooked = tiny()
    prune.l1_unstructured(hooked.body, "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        fp.sparsify(hooked, images())


def test_a_model_that_draws_random_numbers_is_found_out() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.randn_like(x)

    with pytest.raises(RuntimeError, match="gives other outputs"):
        fp.sparsify(Noisy().eval(), images(), measure=False)


def test_verify_tries_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is different only for inputs other than the example."""
    model, example = tiny(), images(count=2)
    right = converted(model)
    wrong = converted(tiny(5))
    wrong_for_others = nn.Module()
    wrong_for_others.choices = right.choices
    wrong_for_others.forward = lambda x: (right if torch.equal(x, example) else wrong)(x)
    module = importlib.import_module("fastprune.deploy.sparsify")  # of the function's name
    monkeypatch.setattr(module, "convert", lambda *args: wrong_for_others)
    assert fp.sparsify(model, example) is wrong_for_others
    with pytest.raises(RuntimeError, match="gives other outputs"):
        fp.sparsify(model, example, verify=True)


def test_threads_are_put_back(threads: None) -> None:
    torch.set_num_threads(1)
    sparse = fp.sparsify(tiny(), images(), measure=False, threads=2)
    assert torch.get_num_threads() == 1 and sparse.choices["threads"] == 2
    with pytest.raises(ValueError):
        fp.sparsify(tiny().train(), images(), threads=2)
    assert torch.get_num_threads() == 1


def test_zero_weights_zeroes(sparsity: float = 0.75) -> None:
    model = tiny(sparsity=0.0)
    zero_weights(model, sparsity)
    assert abs(float((model.body.weight == 0).float().mean()) - sparsity) < 0.08
