"""Sparse models in files: without pickle, rebuilt from the architecture, re-planned elsewhere."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastprune as fp
from fastprune.deploy.sparse_model import EAGER, SPARSE
from fastprune.deploy.sparse_modules import SparseRegion

from .networks import images
from .sparse_networks import CONVERTIBLE, sparse_network, tiny

store = importlib.import_module("fastprune.deploy.sparse_store")
convert = importlib.import_module("fastprune.deploy.convert")
ENTRY = "fastprune.sparse"


def mixed(model: nn.Module) -> Any:
    """Sparse, but every third step in PyTorch."""
    names = fp.sparsify(model, images(), measure=False).choices["kernels"]
    kernels = {name: "dense" if i % 3 == 2 else "rows" for i, name in enumerate(names)}
    choices = {"kernels": kernels, "returned": SPARSE}
    return fp.sparsify(model, images(), choices=choices)


def programs(module: nn.Module) -> list[list[int]]:
    return [each.program for each in module.modules() if isinstance(each, SparseRegion)]


@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet_v3", "timm_preactivation"])
def test_a_file_gives_the_module_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sparse = mixed(sparse_network(name))
    fp.save_sparse(sparse, path)
    torch.manual_seed(9)
    fresh = CONVERTIBLE[name]().eval()  # other weights, no zeros
    before = {k: t.clone() for k, t in fresh.state_dict().items()}
    loaded = fp.load_sparse(fresh, path, images(count=1))
    assert torch.equal(loaded(images(3)), sparse(images(3)))
    assert loaded.choices == sparse.choices and programs(loaded) == programs(sparse)
    assert all(torch.equal(before[k], t) for k, t in fresh.state_dict().items())


def test_the_file_holds_packed_rows_under_the_layers_names(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = sparse_network("resnet", 0.95)
    sparse = fp.sparsify(model, images(), measure=False)
    kernels = {**sparse.choices["kernels"], "layer1.0.conv2": "rows", "conv1": "dense"}
    sparse = fp.sparsify(model, images(), choices={"kernels": kernels, "returned": SPARSE})
    fp.save_sparse(sparse, path)
    tensors = load_file(path)
    kept = int((model.layer1[0].conv2.weight != 0).sum())
    assert tensors["folded.layer1.0.conv2.values"].shape == (kept,)
    assert "folded.layer1.0.conv2.weight" not in tensors
    assert tensors["folded.conv1.weight"].shape == model.conv1.weight.shape
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[ENTRY])
    assert about["choices"] == sparse.choices


def save(path: Path, model: nn.Module, **changes: Any) -> None:
    sparse = mixed(model)
    sparse.choices.update(changes)
    fp.save_sparse(sparse, path)


@pytest.mark.parametrize("changes", [{"cpu": "m68k"}, {"threads": 99}])
def test_elsewhere_the_choices_are_made_anew(
    changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, measured = tmp_path / "model.safetensors", tiny(), []
    save(path, model, **changes)
    fp.load_sparse(tiny(1), path, images(), measure=False)
    assert measured == []

    def noted(*arguments: Any) -> Any:
        measured.append(1)
        return real(*arguments)

    real = convert.measure_steps
    monkeypatch.setattr(convert, "measure_steps", noted)
    monkeypatch.setattr(convert, "RIVALS", ())
    monkeypatch.setattr(convert.convert, "__defaults__", (None, ()))
    loaded = fp.load_sparse(tiny(1), path, images())
    assert measured == [1]
    torch.testing.assert_close(loaded(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)
    save(path, model)
    fp.load_sparse(tiny(1), path, images())
    assert measured == [1]  # the choices fit here


def test_a_dense_model_that_was_faster_is_saved_too(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", tiny()
    choices = {"kernels": {}, "returned": EAGER}
    fp.save_sparse(fp.sparsify(model, images(), choices=choices), path)
    loaded = fp.load_sparse(tiny(1), path, images())
    assert loaded.report().returned == EAGER
    torch.testing.assert_close(loaded(images(2)), model(images(2)))
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[ENTRY])
    about["choices"]["cpu"] = "m68k"
    save_file(load_file(path), path, {ENTRY: json.dumps(about)})
    elsewhere = fp.load_sparse(tiny(1), path, images(), measure=False)
    torch.testing.assert_close(elsewhere(images(2)), model(images(2)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- broken files


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fp.save_sparse(mixed(tiny()), path)
    wide = tiny()
    wide.head = nn.Linear(8, 6).eval()
    with pytest.raises(fp.FormatError, match=r"folded.head.weight .*\(6, 8\)|head.*8 weights"):
        fp.load_sparse(wide, path, images())
    with pytest.raises(fp.FormatError, match="does not fit the model"):
        fp.load_sparse(sparse_network("resnet"), path, images())
    small = nn.Sequential(tiny().stem).eval()
    with pytest.raises(fp.FormatError, match="does not fit the model"):
        fp.load_sparse(small, path, images())


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, r"no sparse model of format 1 \(found None\)"),
        ("{", "cannot be read"),
        ('{"format": 2}', r"format 1 \(found 2\)"),
        ('{"format": 1}', "choices"),
        ('{"format": 1, "choices": {"kernels": {"a": "fast"}}}', "a has the kernel 'fast'"),
    ],
)
def test_a_file_of_something_else_is_refused(
    about: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, None if about is None else {ENTRY: about})
    with pytest.raises(fp.FormatError, match=message):
        fp.load_sparse(tiny(), path, images())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(fp.FormatError, match="cannot be read"):
        fp.load_sparse(tiny(), path, images())
    fp.save_sparse(mixed(tiny()), path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("columns"))
    save_file({**tensors, name: tensors[name] + 10_000}, path, about)
    with pytest.raises(fp.FormatError, match="are damaged"):
        fp.load_sparse(tiny(), path, images())
    save_file({k: t for k, t in tensors.items() if k != name}, path, about)
    with pytest.raises(fp.FormatError, match="lacks a part of"):
        fp.load_sparse(tiny(), path, images())
    with pytest.raises(FileNotFoundError):
        fp.load_sparse(tiny(), tmp_path / "nothing", images())
    with pytest.raises(TypeError, match=r"must come from fp.sparsify"):
        fp.save_sparse(tiny(), path)  # type: ignore[arg-type]
