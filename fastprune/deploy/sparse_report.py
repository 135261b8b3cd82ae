"""What `fp.sparsify` chose, layer by layer, and what it measured."""

from collections.abc import Mapping
from typing import NamedTuple


class LayerKernel(NamedTuple):
    """The kernel of one layer; milliseconds are None where nothing was measured."""

    name: str
    sparsity: float
    kernel: str
    ms: float | None
    dense_ms: float | None


class Sparsification(NamedTuple):
    """The report of `fp.sparsify`; `print` it for a table."""

    layers: tuple[LayerKernel, ...]
    others: int  # steps without weights in sparse regions
    regions: int
    whole_ms: Mapping[str, float]  # of the sparse model and its rivals
    returned: str
    threads: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  sparsity  {'kernel':<12}  {'ms':>8}  {'dense ms':>8}  ratio"]
        for name, sparsity, kernel, ms, dense_ms in self.layers:
            ratio = f"{dense_ms / ms:5.2f}" if ms and dense_ms else f"{'-':>5}"
            numbers = "  ".join(f"{'-' if x is None else f'{x:.3f}':>8}" for x in (ms, dense_ms))
            lines.append(f"{name:<{width}}  {sparsity:8.1%}  {kernel:<12}  {numbers}  {ratio}")
        sparse = sum(layer.kernel != "dense" for layer in self.layers)
        lines.append(
            f"{sparse} of {len(self.layers)} layers and {self.others} other steps run in "
            f"{self.regions} sparse regions, threads: {self.threads}"
        )
        if self.whole_ms:
            times = [f"{name} {ms:.2f} ms" for name, ms in self.whole_ms.items()]
            lines.append(f"whole model: {', '.join(times)}; returned: {self.returned}")
        return "\n".join([*lines, *self.notes])
