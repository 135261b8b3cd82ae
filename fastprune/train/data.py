"""Data small enough to come with a package."""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_TRAIN = 1_400  # leaves 397 of the 1,797 digits for the test


class Digits(NamedTuple):
    """Images are [N, 1, 8, 8] in [0, 1]; labels are int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Those to train on, each once, in an order that comes from the seed."""
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_labels), generator=random).split(size)
        return [(self.train_images[part], self.train_labels[part]) for part in order]


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's handwritten digits, 1,400 to train on and 397 to test; no download."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(pixels).to(torch.float32).div(16).reshape(-1, 1, 8, 8)[order]
    targets = torch.from_numpy(labels).to(torch.int64)[order]
    return Digits(images[:NUM_TRAIN], targets[:NUM_TRAIN], images[NUM_TRAIN:], targets[NUM_TRAIN:])
