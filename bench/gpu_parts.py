"""What runs on the GPU inside a stage of gpu_check: `python -m bench.gpu_parts operators`.

Every part compares with the reference on the CPU and raises AssertionError where it differs. Facts
for the result file are printed as `RESULT {json}` lines.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastprune as fp
from fastprune.ops import reference

DEVICE = "cuda"
OPS = torch.ops.fastprune
SCORES = ("value", "magnitude", "saliency")


def result(**facts: Any) -> None:
    print("RESULT " + json.dumps(facts), flush=True)


@dataclass(frozen=True)
class Problem:
    """Arguments of the selection operators, on the CPU."""

    name: str
    values: list[Tensor]
    gradients: list[Tensor]
    num_kept: Tensor
    score: str


def problems(large: bool = False) -> Iterator[Problem]:
    """Odd sizes, layouts, dtypes, ties and specials, global and per tensor."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1,), (3,), (0,), (127,), (4097,), (33, 7, 3, 3)]
    sizes += [(1 << 20,), (2049, 513)] if large else []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for score in SCORES:
            for kind in ("normal", "ties", "special"):
                values = [_filled(s, dtype, kind, generator) for s in sizes]
                pairs = [_filled(s, dtype, "normal", generator) for s in sizes]
                pairs = [p.to(memory_format=_format(v)) for p, v in zip(pairs, values, strict=True)]
                counts = [v.numel() // 10 for v in values]
                name = f"{kind} {score} {str(dtype)[6:]}"
                gradients = pairs if score == "saliency" else []
                for k in (0, sum(counts), sum(v.numel() for v in values)):
                    yield Problem(f"{name} k={k}", values, gradients, torch.tensor(k), score)
                yield Problem(f"{name} layers", values, gradients, torch.tensor(counts), score)


def _filled(
    shape: Sequence[int], dtype: torch.dtype, kind: str, generator: torch.Generator
) -> Tensor:
    tensor = torch.randn(shape, generator=generator).to(dtype)
    if kind == "ties":
        tensor = (tensor * 2).round() / 2  # a handful of values, -0.0 among them
    if kind == "special" and tensor.numel() > 8:
        tensor.view(-1)[:5] = torch.tensor([math.inf, -math.inf, 1e-40, -0.0, 0.0]).to(dtype)
    return tensor.to(memory_format=_format(tensor))


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def same(got: Tensor, expected: Tensor) -> bool:
    got = got.cpu()
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and torch.allclose(got.double(), expected.double(), rtol=0, atol=0, equal_nan=True)
    )


def compare(problem: Problem, implementation: Any) -> None:
    """One problem through `select_threshold` and `select_masks` of an implementation."""
    p = problem
    expected = reference.select_threshold(p.values, p.gradients, p.num_kept, p.score)
    right = reference.select_masks(p.values, p.gradients, expected[0], expected[2], p.score)
    values, gradients = ([t.to(DEVICE) for t in list_] for list_ in (p.values, p.gradients))
    got = implementation.select_threshold(values, gradients, p.num_kept.to(DEVICE), p.score)
    for name, a, b in zip(fp.ops.Selection._fields, got, expected, strict=True):
        assert same(a, b), f"{p.name}: {name} is {a.tolist()}, expected {b.tolist()}"
    masks = implementation.select_masks(values, gradients, got[0], got[2], p.score)
    for i, (a, b) in enumerate(zip(masks, right, strict=True)):
        assert same(a, b), f"{p.name}: mask {i} differs in {int((a.cpu() != b).sum())} elements"


def compare_blocks(implementation: Any) -> None:
    for score in SCORES:
        for block in ((16, 1), (3, 2), (1, 4)):
            values = [torch.randn(s) for s in ((33, 7, 3, 3), (17, 5), (64, 16))]
            gradients = [torch.randn_like(v) for v in values] if score == "saliency" else []
            expected = reference.block_scores(values, gradients, score, block)
            got = implementation.block_scores(
                [v.to(DEVICE) for v in values], [g.to(DEVICE) for g in gradients], score, block
            )
            equal = all(same(a, b) for a, b in zip(got, expected, strict=True))
            assert equal, f"block_scores {score} {block} differs"


def compare_all(implementation: Any, names: Sequence[str], large: bool) -> None:
    count = 0
    for problem in problems(large):
        compare(problem, implementation)
        count += 1
    if "block_scores" in names:
        compare_blocks(implementation)
    torch.cuda.synchronize()
    result(problems=count, operators=sorted(names))


def operators() -> None:
    """Every operator the dispatcher serves on CUDA against the reference; small, for sanitizers."""
    served = {n: by["CUDA"] for n, by in fp.build_info().operators.items()}
    result(served=served)
    assert "reference" not in served.values(), f"the CUDA library does not serve all: {served}"
    compare_all(OPS, list(served), large=False)


def triton() -> None:
    """The Triton twins against the reference on the GPU."""
    assert not os.environ.get("TRITON_INTERPRET"), "TRITON_INTERPRET is set: this is no GPU run"
    from fastprune.ops import triton_kernels

    compare_all(triton_kernels, triton_kernels.__all__, large=True)


def _graph_calls(
    values: list[Tensor], gradients: list[Tensor]
) -> dict[str, Callable[[], list[Tensor]]]:
    total = sum(v.numel() for v in values)
    k = torch.tensor(total // 10, device=DEVICE)
    counts = torch.tensor([v.numel() // 10 for v in values], device=DEVICE)

    def threshold(count: Tensor) -> list[Tensor]:
        return list(OPS.select_threshold(values, gradients, count, "saliency"))

    def masks() -> list[Tensor]:
        chosen = OPS.select_threshold(values, gradients, k, "saliency")
        return list(OPS.select_masks(values, gradients, chosen[0], chosen[2], "saliency"))

    return {
        "select_threshold": lambda: threshold(k),
        "select_threshold layers": lambda: threshold(counts),
        "select_masks": masks,
        "block_scores": lambda: list(
            OPS.block_scores(values[-2:], gradients[-2:], "saliency", [16, 1])
        ),
        "public global_topk_masks": lambda: fp.global_topk_masks(
            values, k, score="saliency", gradients=gradients
        ),
    }


def graphs() -> None:
    """A replay on new inputs equals an eager call; operators never make the host wait."""
    shapes = [(127,), (4097,), (64, 33, 3, 3), (256, 128)]
    values = [torch.randn(s, device=DEVICE) for s in shapes]
    gradients = [torch.randn(s, device=DEVICE) for s in shapes]
    for name, call in _graph_calls(values, gradients).items():
        no_sync(name, call)
        graph, outputs = captured(call)
        for _ in range(3):
            for tensor in [*values, *gradients]:
                tensor.normal_()
            graph.replay()
            replayed = [o.clone() for o in outputs]
            for i, (a, b) in enumerate(zip(replayed, call(), strict=True)):
                assert same(a, b.cpu()), f"{name}: output {i} of the replay differs from eager"
        result(captured=name)


def no_sync(name: str, call: Callable[[], Any]) -> None:
    call()  # the first call may load kernels
    if name.startswith("public"):
        return  # outside capture it reads the flag that says NaN
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


PARTS = {part.__name__: part for part in (operators, triton, graphs)}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"expected one of {', '.join(PARTS)}")
    PARTS[sys.argv[1]]()
