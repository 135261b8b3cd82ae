"""From a pruned model to a small and fast one."""

from .compact import compact
from .report import Compaction, LayerChange
from .sparse_model import SparseModel
from .sparse_modules import SparseConv2d, SparseLinear
from .sparse_report import LayerKernel, Sparsification
from .sparse_store import FormatError, load_sparse, save_sparse
from .sparsify import sparsify

__all__ = [
    "Compaction",
    "FormatError",
    "LayerChange",
    "LayerKernel",
    "SparseConv2d",
    "SparseLinear",
    "SparseModel",
    "Sparsification",
    "compact",
    "load_sparse",
    "save_sparse",
    "sparsify",
]
