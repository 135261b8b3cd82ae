"""Equal bits: of two results, and of processes with other instruction sets and thread counts."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
MACHINES = [("baseline", "1"), ("avx2", "2"), ("avx512", "1"), ("avx512", "2")]
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """Floats as integers: -0.0 differs from +0.0, and every NaN is one and the same."""
    if not t.is_floating_point():
        return t.detach()
    return t.detach().masked_fill(t.isnan(), torch.nan).contiguous().view(WORDS[t.itemsize])


def flat(results: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in results.items():
        for tensor in value if isinstance(value, list) else [value]:
            yield name, tensor


def assert_same(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for (name, a), (_, b) in zip(flat(ours), flat(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride(), name
        assert torch.equal(bits(a.cpu()), bits(b.cpu())), name


def print_digest(results: Iterable[Mapping[str, Any]]) -> None:
    """One number for what every case gives, with as many threads as THREADS says."""
    torch.set_num_threads(int(os.environ["THREADS"]))
    found = hashlib.sha256()
    for result in results:
        for _, tensor in flat(result):
            found.update(bits(tensor).numpy().tobytes())
    print(found.hexdigest())


def assert_machines_agree(module: str) -> None:
    """`python -m module` prints a digest; a process each, since instructions are chosen once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, "FASTPRUNE_ISA": isa, "THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa, threads in MACHINES
    ]
    found = [process.communicate()[0].strip() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    digests = dict(zip(MACHINES, found, strict=True))
    assert len(set(found)) == 1 and all(len(digest) == 64 for digest in found), digests
