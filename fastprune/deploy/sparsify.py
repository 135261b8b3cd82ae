"""Turns a pruned model into one that skips its zeros on the CPU."""

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..channels.trace import checked_arguments
from .capture import Uncapturable, capture
from .compact import random_like, same
from .convert import RIVALS, convert
from .fold import fold
from .measure import using_threads
from .sparse_model import EAGER, SPARSE, Choices, SparseModel, check_choices, make_choices
from .sparse_report import Sparsification

BATCHES = (1, 2, 3)  # that `verify` tries


def sparsify(
    model: nn.Module,
    example_input: Any,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    measure: bool = True,
    verify: bool = False,
    choices: Choices | None = None,
    rivals: Collection[str] = RIVALS,
) -> SparseModel:
    """A module with the outputs of `model` that skips its zero weights, for inference on the CPU.

    Batch norms are folded into convolutions; bias, residual additions and activations are fused;
    what is understood runs in sparse regions with a layout of their own, everything else in PyTorch
    between them. Any batch and input size works afterwards. The model is not changed.

    With `measure` every layer's kernels and its dense form are timed on `example_input` with
    `threads` threads (torch.get_num_threads() if None) and the fastest mix is kept; then the whole
    is timed against the dense model, eager and compiled, and the dense one is returned, with a
    warning, if the sparse one is more than 3% slower. `module.report()` explains the choice.
    `rivals` can leave one of the two out. `choices` takes `module.choices` of an earlier conversion
    and measures nothing. The sparse module's outputs are compared with the model's on
    `example_input`, with `verify` on random inputs and batch sizes too.
    """
    arguments = check_model(model, example_input)
    if dtype != "float32":
        raise ValueError(f"dtype must be 'float32', the only one there is so far, got {dtype!r}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise TypeError(f"threads must be an integer or None, got {type(threads).__name__}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not set(rivals) <= set(RIVALS):
        raise ValueError(f"rivals must be among {list(RIVALS)}, got {list(rivals)}")
    if choices is not None:
        check_choices(choices)
    with using_threads(threads):
        dense = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            graph = capture(model, arguments)
        except Uncapturable as reason:
            return left_whole(dense, str(reason))
        graph = fold(graph)
        result = convert(graph, dense, arguments, measure, choices, rivals)
        if result.choices["returned"] != SPARSE:
            return result
        check_outputs(model, result, [arguments])
        if verify:
            check_outputs(model, result, more_inputs(model, arguments))
    return result


def check_model(model: Any, example_input: Any) -> tuple[Any, ...]:
    arguments = checked_arguments(model, example_input)
    training = [name or "the model" for name, each in model.named_modules() if each.training]
    if training:
        raise ValueError(
            f"{training[0]} is in training mode, in which batch norms and dropout do not compute "
            "what inference does; call model.eval() first"
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    for name, tensor in [*named, *(("example_input", x) for x in leaves)]:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}; sparse inference runs on the CPU: pass "
                "model.cpu() and a CPU example_input"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype}; sparse inference computes in float32: pass "
                "model.float() and a float32 example_input"
            )
    return arguments


def left_whole(dense: nn.Module, reason: str) -> SparseModel:
    """For a model whose code cannot be taken apart."""
    note = f"the dense model is returned: {reason}"
    warnings.warn(f"fp.sparsify: {note}", stacklevel=3)
    report = Sparsification((), 0, 0, {}, EAGER, torch.get_num_threads(), (note,))
    return SparseModel(dense, make_choices({}, EAGER), report)


@torch.no_grad()
def check_outputs(model: nn.Module, result: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> None:
    """The last word: a graph is a proof only as far as the model's code says what it does."""
    for arguments in inputs:
        expected, got = tree_leaves(model(*arguments)), tree_leaves(result(*arguments))
        for theirs, ours in zip(expected, got, strict=True):
            if isinstance(theirs, Tensor) and not same(theirs, ours):
                raise RuntimeError(
                    "the sparse model gives other outputs than the model, which may draw random "
                    "numbers or hold NaN in evaluation; nothing was changed"
                )


@torch.no_grad()
def more_inputs(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Random ones, in the batch sizes that the model takes."""
    yield tree_map(random_like, arguments)
    for batch in BATCHES:
        inputs = tree_map(lambda x, n=batch: random_like(of_batch(x, n)), arguments)
        try:
            model(*inputs)
        except Exception:  # a model for one batch size
            continue
        yield inputs


def of_batch(x: Any, batch: int) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    return x[:1].expand(batch, *x.shape[1:])
