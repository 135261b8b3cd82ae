"""SparseConv2d and SparseLinear on their own."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastprune as fp
from fastprune.deploy import sparse_modules


def pruned_conv(sparsity: float = 0.8, seed: int = 0, **options: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 10, **{"kernel_size": 3, **options}).requires_grad_(False)
    conv.weight *= torch.rand_like(conv.weight) >= sparsity
    return conv


CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"kernel_size": (1, 5), "padding": (0, 2), "bias": False},
    {"groups": 2, "dilation": 2, "padding": 3},
]


@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("kernel", sparse_modules.KERNELS)
def test_a_convolution_equals_its_dense_one(options: Any, kernel: str) -> None:
    conv = pruned_conv(**options)
    sparse = fp.SparseConv2d.from_dense(conv, kernel=kernel)
    assert torch.equal(sparse.weight(), conv.weight)
    for shape in [(1, 6, 11, 13), (5, 6, 9, 9), (17, 6, 12, 10)]:
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), conv(x), rtol=1e-4, atol=1e-5)
    assert f"kernel={kernel}" in str(sparse)
    assert sparse.sparsity == float((conv.weight == 0).double().mean())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_equals_its_dense_one(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5, bias).requires_grad_(False)
    linear.weight[linear.weight < 0.1] = 0
    sparse = fp.SparseLinear.from_dense(linear)
    assert torch.equal(sparse.weight(), linear.weight)
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), linear(x), rtol=1e-4, atol=1e-5)


def test_a_new_layer_is_all_zero() -> None:
    layer = fp.SparseConv2d(3, 4, 3, padding=1)
    assert layer.sparsity == 1 and not layer(torch.randn(2, 3, 5, 5)).any()
    assert not fp.SparseLinear(3, 4)(torch.randn(2, 3)).any()


def test_packed_rows_are_saved_without_pickle_and_loaded(tmp_path: Path) -> None:
    sparse = fp.SparseConv2d.from_dense(pruned_conv())
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    other = fp.SparseConv2d.from_dense(pruned_conv(0.2, seed=1))
    x = torch.randn(2, 6, 8, 8)
    assert not torch.equal(other(x), sparse(x))
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == {"values", "columns", "row_starts", "bias"}
    other.load_state_dict(state)
    assert torch.equal(other(x), sparse(x))
    nested = nn.Sequential(fp.SparseConv2d(6, 10, 3), nn.ReLU())
    nested.load_state_dict(nn.Sequential(sparse, nn.ReLU()).state_dict())
    assert torch.equal(nested(x), sparse(x).relu())


def damaged(name: str, change: Any) -> dict[str, Tensor]:
    state = fp.SparseConv2d.from_dense(pruned_conv()).state_dict()
    state[name] = change(state[name].clone())
    return state


def put(tensor: Tensor, index: int, value: int) -> Tensor:
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("columns", lambda t: put(t, 3, 54)),
        ("columns", lambda t: put(t, 0, -1)),
        ("columns", lambda t: put(t, 1, int(t[0]))),
        ("columns", lambda t: t.long()),
        ("columns", lambda t: t[:-1]),
        ("row_starts", lambda t: put(t, 1, 10**6)),
        ("row_starts", lambda t: put(t, 0, 1)),
        ("row_starts", lambda t: t[:-1]),
        ("values", lambda t: t.double()),
        ("values", lambda t: t[:-1]),
        ("bias", lambda t: t[:-1]),
    ],
)
def test_damaged_rows_are_refused_and_change_nothing(name: str, change: Any) -> None:
    layer = fp.SparseConv2d.from_dense(pruned_conv(0.5, seed=2))
    x = torch.randn(1, 6, 5, 5)
    before = layer(x)
    with pytest.raises(ValueError, match=r"are not the rows of a layer|are damaged"):
        layer.load_state_dict(damaged(name, change))
    assert torch.equal(layer(x), before)


def test_rows_of_another_layer_and_missing_ones_are_refused() -> None:
    layer = fp.SparseConv2d(6, 9, 3)
    with pytest.raises(ValueError, match="9 outputs of 54 weights"):
        layer.load_state_dict(fp.SparseConv2d.from_dense(pruned_conv()).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"values": torch.empty(0)})


def test_a_copy_has_a_network_of_its_own_and_a_dropped_one_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sparse = fp.SparseConv2d.from_dense(pruned_conv())
    twin = copy.deepcopy(sparse)
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(twin(x), sparse(x)) and twin.lease.key != sparse.lease.key
    released: list[int] = []
    lease = sparse_modules.Lease.__new__(sparse_modules.Lease)
    monkeypatch.setattr(sparse_modules, "release", released.append)
    lease.__init__()  # type: ignore[misc]
    key = lease.key
    del lease
    gc.collect()
    assert released == [key]


def test_loading_takes_another_key_so_that_nothing_stale_is_used() -> None:
    sparse = fp.SparseConv2d.from_dense(pruned_conv())
    before = sparse.lease.key
    sparse.load_state_dict(sparse.state_dict())
    assert sparse.lease.key != before


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_layers_are_exported_and_compiled_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    conv = fp.SparseConv2d.from_dense(pruned_conv())
    layer, x = (conv, torch.randn(2, 6, 8, 8)) if name == "conv" else (
        fp.SparseLinear.from_dense(nn.Linear(6, 4)), torch.randn(2, 3, 6))  # fmt: skip
    expected = layer(x).relu()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    program = torch.export.export(model, (x,))
    assert "fastprune.sparse_network" in str(program.graph)
    assert torch.equal(program.module()(x), expected)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fp.SparseConv2d.from_dense(nn.Linear(2, 2)), TypeError, "torch.nn.Conv2d, got"),
        (lambda: fp.SparseLinear.from_dense(nn.Conv2d(2, 2, 1)), TypeError, "nn.Linear, got"),
        (lambda: fp.SparseConv2d(2, 3, 1, kernel="fast"), ValueError, "kernel must be one of"),
        (lambda: fp.SparseConv2d(3, 4, 1, groups=2), ValueError, "divisible by groups"),
        (
            lambda: fp.SparseConv2d.from_dense(nn.Conv2d(2, 2, 3, padding_mode="circular")),
            ValueError,
            "padding_mode='circular'",
        ),
        (
            lambda: fp.SparseConv2d.from_dense(nn.Conv2d(2, 2, 1).double()),
            ValueError,
            "float32 weights on the CPU, got torch.float64",
        ),
        (
            lambda: fp.SparseLinear(7, 5)(torch.randn(3, 6)),
            ValueError,
            r"\[..., 7\], got \(3, 6\)",
        ),
        (lambda: fp.SparseLinear(7, 5)(torch.tensor(1.0)), ValueError, r"\[..., 7\], got \(\)"),
        (lambda: fp.SparseConv2d(2, 3, 1)([1, 2]), TypeError, "takes tensors, got list"),
        (
            lambda: fp.SparseConv2d(2, 3, 1)(torch.randn(1, 3, 4, 4)),
            ValueError,
            r"SparseConv2d expected a tensor of shape \[N, 2, H, W\], got \(1, 3, 4, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
