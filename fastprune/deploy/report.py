"""What a compaction did, layer by layer."""

from typing import NamedTuple

ADVICE = (
    "Channels pruned by fp.optim.channel_groups emit 0, and all layers that make them are zero."
)


class LayerChange(NamedTuple):
    """Channels of one layer, and why zero ones among them stayed."""

    name: str
    before: int
    after: int
    stayed: str


class Compaction(NamedTuple):
    """The report of `fp.compact`; `print` it for a table."""

    layers: tuple[LayerChange, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        share = self.parameters_after / max(self.parameters_before, 1)
        lines = [
            f"{self.parameters_before:,} parameters, {self.parameters_after:,} after ({share:.1%})",
            f"{'layer':<{width}}  before   after",
        ]
        for layer in self.layers:
            lines.append(f"{layer.name:<{width}}  {layer.before:6}  {layer.after:6}")
            if layer.stayed:
                lines[-1] += f"  {layer.stayed}"
        if any(layer.stayed for layer in self.layers):
            lines.append(ADVICE)
        return "\n".join(lines)
