"""Sparse models in safetensors files: packed rows and the choices, without pickle."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from ..ops.reference.sparse import dense_rows
from .capture import Uncapturable, capture
from .convert import convert
from .fold import FOLDED, fold
from .measure import using_threads
from .sparse_model import SparseModel, check_choices, cpu_name
from .sparse_modules import SparseRegion, check_rows
from .sparse_report import Sparsification
from .sparsify import check_model, sparsify

ENTRY, FORMAT = "fastprune.sparse", 1


class FormatError(ValueError):
    """A file that does not hold what it should."""


def save_sparse(module: SparseModel, path: str | os.PathLike[str]) -> None:
    """Writes a module of `fp.sparsify` with its choices; `fp.load_sparse` reads it."""
    if not isinstance(module, SparseModel):
        raise TypeError(f"module must come from fp.sparsify, got {type(module).__name__}")
    tensors = network_tensors(module.network)
    about = {"format": FORMAT, "choices": module.choices}
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, Path(path), {ENTRY: json.dumps(about)})


def load_sparse(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    threads: int | None = None,
    measure: bool = True,
) -> SparseModel:
    """The module of a file, rebuilt from the original architecture.

    The weights of `model` are not looked at. The saved choices hold on the type of CPU and for the
    number of threads they were made for; elsewhere `measure` finds new ones, and without it the
    sparsities alone decide.
    """
    arguments = check_model(model, example_input)
    tensors, choices = read(Path(path))
    with using_threads(threads):
        here = (cpu_name(), torch.get_num_threads())
        fit = (choices.get("cpu"), choices.get("threads")) == here
        kept = choices if fit else None
        if not any(name.startswith(FOLDED) for name in tensors):
            dense = copy.deepcopy(model)
            fill(dense, tensors)
            if kept is None:
                return sparsify(dense, example_input, threads=threads, measure=measure)
            report = Sparsification((), 0, 0, {}, kept["returned"], torch.get_num_threads(), ())
            return SparseModel(dense.to(memory_format=torch.channels_last), kept, report)  # type: ignore[call-overload]
        try:
            graph = capture(model, arguments)
        except Uncapturable as reason:
            raise ValueError(f"the file is of another architecture: {reason}") from reason
        graph = fold(graph)
        fill(graph, tensors)
        return convert(graph, graph, arguments, measure and kept is None, kept)


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Under names that do not depend on how the network was cut into regions."""
    tensors: dict[str, Tensor] = {}
    prefixes = []
    for path, region in network.named_modules():
        if isinstance(region, SparseRegion):
            prefixes.append(f"{path}.")
            for name, layer in zip(region.layer_names, region.children(), strict=True):
                for kind, tensor in layer.named_buffers():
                    tensors[f"{FOLDED}{name}.{kind}"] = tensor
    rest = network.state_dict().items()
    tensors.update((k, t) for k, t in rest if not k.startswith(tuple(prefixes)))
    return tensors


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read as a safetensors file: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise FormatError(
            f"{path} is no sparse model of format {FORMAT} (found {found!r}); write it by "
            "fp.save_sparse of this version"
        )
    try:
        check_choices(about["choices"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from error
    return tensors, about["choices"]


def fill(model: nn.Module | GraphModule, tensors: dict[str, Tensor]) -> None:
    """Loads a file's tensors into a model of the same architecture."""
    left, state = dict(tensors), {}
    for name, own in model.state_dict().items():
        base = name.removesuffix(".weight")
        if name not in left and f"{base}.values" in left:
            state[name] = dense_weight(base, left, own.shape)
        elif name in left and left[name].shape == own.shape:
            state[name] = left.pop(name)
        else:
            given = tuple(left[name].shape) if name in left else "nothing"
            raise FormatError(
                f"the file does not fit the model: {name} has shape {tuple(own.shape)}, the file "
                f"holds {given}; pass the architecture that the file was made of"
            )
    if left:
        raise FormatError(f"the file does not fit the model: the model has no {min(left)}")
    model.load_state_dict(state)


def dense_weight(base: str, left: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Takes the rows of a layer out of `left`."""
    rows = {
        name: left.get(f"{base}.{name}") for name in ("values", "columns", "row_starts", "bias")
    }
    num_columns = shape[1:].numel()
    if any(tensor is None for tensor in rows.values()):
        raise FormatError(f"the file lacks a part of {base}")
    try:
        check_rows(f"{base}.", rows, num_columns, shape[0])
    except ValueError as error:
        raise FormatError(str(error)) from error
    for name in ("values", "columns", "row_starts"):
        del left[f"{base}.{name}"]
    dense = dense_rows(rows["values"], rows["columns"], rows["row_starts"], num_columns)  # type: ignore[arg-type]
    return dense.view(shape)
