"""Loads the native libraries that were built, registers Triton, tells what serves each operator."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .schemas import NAMESPACE, SCHEMAS, WINNERS

_PACKAGE = Path(__file__).resolve().parent.parent
REFERENCE = "reference"
TRITON = "Triton"


def _load_library(name: str) -> bool:
    """A missing library is a build without it; a library that fails to load is said and skipped."""
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(
            f"fastprune: {path.name} does not load with torch {torch.__version__} ({error}); "
            "its operators run on the reference. Rebuild fastprune against this torch.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _host_module() -> Any | None:
    try:
        return importlib.import_module(f"{_PACKAGE.name}._host")
    except ImportError:
        return None


def _register_triton() -> None:
    """The operators that Triton serves on a GPU; it is imported by the first that is called."""
    gpu = torch.version.cuda is not None or torch.version.hip is not None
    if not gpu or importlib.util.find_spec("triton") is None:
        return
    for name, winners in WINNERS.items():
        if winners.get("CUDA") == TRITON:
            torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", _triton_function(name))


def _triton_function(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        kernels = importlib.import_module(f"{__package__}.triton_kernels")
        return getattr(kernels, name)(*arguments)

    return call


HAS_CPU_LIBRARY = _load_library("_cpu")
HAS_CUDA_LIBRARY = torch.version.cuda is not None and _load_library("_cuda")
_register_triton()


def implementation(operator: str, device: str) -> str:
    """What the dispatcher runs for an operator on "CPU" or "CUDA"."""
    native = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", device)
    return WINNERS[operator][device] if native else REFERENCE


@dataclass(frozen=True)
class BuildInfo:
    """Which implementation serves each operator, and how the native parts were built."""

    torch_version: str
    cpu_library: bool
    cuda_library: bool
    operators: dict[str, dict[str, str]]
    host: dict[str, str]

    @property
    def reference_only(self) -> bool:
        return not (self.cpu_library or self.cuda_library)

    def __str__(self) -> str:
        lines = [f"torch {self.torch_version}"]
        if self.reference_only:
            lines.append("no native library: every operator runs on the plain-PyTorch reference")
        lines += [f"{key}: {value}" for key, value in self.host.items()]
        width = max(map(len, self.operators))
        lines.append(f"{'operator':<{width}}  {'CPU':<10}  CUDA")
        lines += [
            f"{name:<{width}}  {by_device['CPU']:<10}  {by_device['CUDA']}"
            for name, by_device in self.operators.items()
        ]
        return "\n".join(lines)


def build_info() -> BuildInfo:
    """The implementation behind each operator on each device, and the native build's facts."""
    host = _host_module()
    return BuildInfo(
        torch_version=torch.__version__,
        cpu_library=HAS_CPU_LIBRARY,
        cuda_library=HAS_CUDA_LIBRARY,
        operators={
            name: {device: implementation(name, device) for device in ("CPU", "CUDA")}
            for name in SCHEMAS
        },
        host={k: str(v) for k, v in host.build_info().items()} if host else {},
    )


class _ReferenceMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own signature

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            func = getattr(reference, func._opname)
        return func(*args, **(kwargs or {}))


def use_reference() -> AbstractContextManager[Any]:
    """Inside the `with` block every operator runs its plain-PyTorch reference (eager mode only)."""
    return _ReferenceMode()
