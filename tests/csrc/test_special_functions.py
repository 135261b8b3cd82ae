"""The elementary and special functions that every kernel shares, against torch's in float64."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastprune.ops.reference.dirichlet import implicit_derivative, trigamma
from tests.ops.dirichlet_cases import KNOWN, QUOTED, excess

HERE = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]

pytestmark = pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="needs a C++ compiler")

# Beyond the powers of ten: where branches change, and the zeros of digamma and of the logarithm.
POSITIVE = torch.cat(
    [
        10 ** torch.linspace(-3, 5, 4001, dtype=torch.float64),
        torch.linspace(0.9, 2.1, 1201, dtype=torch.float64),
        torch.tensor([1.4616321449683623, 1.0, 2.0, 10.0, 1e8, 4e8], dtype=torch.float64),
    ]
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("special") / "special.so"
    source = HERE / "special_functions.cpp"
    command = [*COMPILER, *FLAGS, f"-I{HERE.parents[1] / 'csrc'}", source, "-o", output]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(output))


def values(library: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    """Of a function of one number, or of the pairs that are the rows of a matrix."""
    x = x.contiguous()
    y = x.new_full((len(x),), torch.nan)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, y))
    getattr(library, name)(*pointers, ctypes.c_int64(len(x)))
    return y


# The issue asks for 1e-6 of the value. Where the value itself is 0, which digamma is at 1.4616 and
# the logarithm of the gamma function at 1 and 2, no method has relative digits: 1e-14 absolute.
@pytest.mark.parametrize(
    ("name", "oracle"),
    [("log_gamma", torch.lgamma), ("digamma", torch.digamma), ("trigamma", trigamma)],
)
def test_special_functions(library: ctypes.CDLL, name: str, oracle: Any) -> None:
    found, expected = values(library, name, POSITIVE), oracle(POSITIVE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_excess_of_log_gamma_does_not_cancel(library: ctypes.CDLL) -> None:
    x = 10 ** torch.linspace(-3, 5, 301, dtype=torch.float64)
    for factor in (1 + 1e-5, 1 - 1e-3, 1.01, 0.5, 2.0, 4.0):
        pairs = torch.stack([x, x * factor], 1)
        found = values(library, "log_gamma_excess", pairs)
        torch.testing.assert_close(found, excess(pairs[:, 1], x), rtol=2e-9, atol=1e-17)
    far = torch.stack([x, x.flip(0)], 1)
    y = far[:, 1]
    plain = torch.lgamma(y) - torch.lgamma(x) - (y - x) * torch.digamma(x)
    torch.testing.assert_close(
        values(library, "log_gamma_excess", far), plain, rtol=1e-11, atol=1e-8
    )


@pytest.mark.parametrize(
    ("name", "oracle", "low", "high"),
    [
        ("log_of", torch.log, 1e-6, 5.0),
        ("exp_of", torch.exp, -707.0, 708.0),
        ("exp_of", torch.exp, -1.0, 1.0),
        ("expm1_of", torch.expm1, -2.0, 2.0),
    ],
)
def test_elementary_functions(
    library: ctypes.CDLL, name: str, oracle: Any, low: float, high: float
) -> None:
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    torch.testing.assert_close(values(library, name, x), oracle(x), rtol=1e-15, atol=1e-18)


def test_exponentials_leave_the_normal_numbers_for_0_and_infinity(library: ctypes.CDLL) -> None:
    x = torch.tensor([-torch.inf, -1e300, -709.0, 710.0, torch.inf, torch.nan], dtype=torch.float64)
    found = values(library, "exp_of", x).tolist()
    assert found[:5] == [0, 0, 0, torch.inf, torch.inf] and found[5] != found[5]


def test_cosine_of_turns(library: ctypes.CDLL) -> None:
    x = torch.linspace(0, 1, 40_001, dtype=torch.float64)[:-1]
    found = values(library, "cos_of_turns", x)
    # By numpy's wider type: near the zeros torch's argument 2 pi x is already rounded.
    angle = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1)) * x.numpy().astype(np.longdouble)
    expected = torch.from_numpy(np.cos(angle).astype(np.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-16)
    quarters = values(library, "cos_of_turns", torch.tensor([0, 0.25, 0.5, 0.75]).double())
    assert quarters.tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(
    library: ctypes.CDLL, counter: tuple[int, ...], key: int, words: tuple[int, ...]
) -> None:
    found = (ctypes.c_uint32 * 4)()
    library.philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(key), found)
    assert tuple(found) == words


def test_implicit_slopes(library: ctypes.CDLL) -> None:
    a = 1 + 10 ** torch.linspace(-4, 5, 61, dtype=torch.float64)
    normal = torch.linspace(-7, 7, 57, dtype=torch.float64)[:, None]
    d = a - 1 / 3
    log_z = d.log() + 3 * (1 + normal / (9 * d).sqrt()).clamp(min=1e-3).log()
    a = a.expand_as(log_z)
    found = values(library, "implicit_slope", torch.stack([a, log_z], 2).view(-1, 2)).view_as(a)
    torch.testing.assert_close(found, implicit_derivative(log_z, a), rtol=1e-7, atol=0)
    quoted = torch.tensor([q for q in QUOTED if q[0] >= 1], dtype=torch.float64)
    z = quoted[:, 1]
    slopes = values(library, "implicit_slope", torch.stack([quoted[:, 0], z.log()], 1))
    torch.testing.assert_close(z * slopes, quoted[:, 2], rtol=1e-7, atol=0)
