"""From a pruned model to a small and fast one."""

from .compact import compact
from .report import Compaction, LayerChange

__all__ = ["Compaction", "LayerChange", "compact"]
