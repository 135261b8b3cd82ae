"""Batches of examples, again for each epoch, and how many there are."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

EXAMPLES = 2  # in an input for tracing: one alone could lose its dimension


class Epochs:
    """What an iterable of batches gives, once for each `iter`.

    Examples are counted by the loader's dataset if that has a length, else by looking at each
    batch. An iterator gives its batches once, so they are held.
    """

    def __init__(self, loader: Iterable[Any], *, repeats: bool) -> None:
        if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
            raise TypeError(
                f"loader must be an iterable of batches, got {type(loader).__name__}; for a single "
                "batch pass [(input, target)]"
            )
        if isinstance(loader, Iterator):
            if repeats:
                raise ValueError(
                    "loader is an iterator, which gives its batches once, but epochs above 1 and "
                    "joint=False need them again; pass a list or a DataLoader"
                )
            loader = list(loader)
        self._loader = loader
        num_batches, num_examples = _length(loader), _length(getattr(loader, "dataset", None))
        if num_batches is None or num_examples is None:
            counts = [num_examples_of(batch) for batch in loader]
            num_batches = len(counts)
            num_examples = sum(counts) if num_examples is None else num_examples
        if not num_batches or not num_examples:
            raise ValueError("loader is empty; a used-up iterator gives nothing a second time")
        self.num_batches, self.num_examples = num_batches, num_examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def example_input(self) -> Any:
        """The input of some examples of the first batch."""
        batch = next(iter(self._loader))
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"loader must give pairs (input, target), got {type(batch).__name__}; for other "
                "batches pass forward= and example_input="
            )
        example = tree_map(lambda x: x[:EXAMPLES] if isinstance(x, Tensor) else x, batch[0])
        return example if isinstance(example, Tensor) else (example,)  # the model's one argument


def num_examples_of(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    sizes = [x.shape[0] for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        raise TypeError(
            f"a batch must hold tensors with a dimension of examples, got {batch!r:.80}"
        )
    return int(sizes[0])


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None
