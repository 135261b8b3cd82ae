"""The module that `fp.sparsify` returns."""

import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .measure import channels_last
from .plan import AUTOMATIC, CANDIDATES, DENSE
from .sparse_report import Sparsification

SPARSE, EAGER, COMPILED = "sparse", "eager channels-last", "torch.compile"
Choices = Mapping[str, Any]


class SparseModel(nn.Module):
    """A model for inference on the CPU, made by `fp.sparsify`.

    `network` is a graph of sparse regions and of what PyTorch runs between them, or the dense model
    where that is faster. `choices` holds every decision in numbers and strings, for JSON.
    """

    def __init__(
        self,
        network: nn.Module,
        choices: Choices,
        report: Sparsification,
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.choices = dict(choices)
        self._report = report
        self._compiled = compiled
        self.eval()
        self.requires_grad_(False)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        for x in arguments:
            if isinstance(x, Tensor) and x.device.type != "cpu":
                raise ValueError(
                    f"a sparse model runs on the CPU, got a tensor on {x.device}; pass x.cpu()"
                )
        returned = self.choices["returned"]
        if returned == SPARSE:
            return self.network(*arguments, **options)
        if returned == COMPILED and not torch.compiler.is_compiling():
            if self._compiled is None:
                self._compiled = torch.compile(self.network.forward)
            return self._compiled(*channels_last(arguments), **options)
        return self.network(*channels_last(arguments), **options)

    def report(self) -> Sparsification:
        """The choice for every layer with what was measured; `print` it for a table."""
        return self._report

    def train(self, mode: bool = True) -> "SparseModel":
        if mode:
            raise ValueError(
                "a sparse model is for inference: train the model that it was made of, then call "
                "fp.sparsify again"
            )
        super().train(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


def check_choices(choices: Any) -> None:
    if not isinstance(choices, Mapping) or not isinstance(choices.get("kernels"), Mapping):
        raise TypeError("choices must be the `choices` of a module that fp.sparsify returned")
    known = {DENSE, AUTOMATIC, *CANDIDATES}
    for name, kernel in choices["kernels"].items():
        if kernel not in known:
            raise ValueError(f"choices: {name} has the kernel {kernel!r}, none of {sorted(known)}")
    if choices.get("returned") not in (SPARSE, EAGER, COMPILED):
        raise ValueError(f"choices: 'returned' is {choices.get('returned')!r}")


def make_choices(kernels: Mapping[str, str], returned: str) -> dict[str, Any]:
    """With where they were made: elsewhere something else may be best."""
    return {
        "kernels": dict(kernels),
        "returned": returned,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The type of CPU: its architecture, the instructions in use, and its model where known."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        text = ""
    model = re.findall(r"^(?:vendor_id|cpu family|model)\s*: (.*)$", text, re.M)
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *model])
