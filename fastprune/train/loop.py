"""Train and evaluate a classifier whose data fits in memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..progress import Progress
from .data import Digits

BATCH = 64  # of the digits


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    scheduler: LRScheduler | None = None,
    title: str = "training",
) -> list[float]:
    """Minimises the cross entropy; the scheduler steps per batch. Returns each epoch's mean loss.

    The order of the batches comes from `seed` alone, and the last, smaller batch is used too.
    """
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    with Progress(title, epochs, "epochs") as progress:
        for _ in range(epochs):
            total = torch.zeros((), device=images.device)
            for batch in torch.randperm(len(labels), generator=order).split(batch_size):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                total += loss.detach() * len(batch)
            losses.append(total.item() / len(labels))
            progress.advance(f"loss {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """The fraction of right answers, in evaluation mode; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    model.train(was_training)
    return right / len(labels)


def train_on(
    digits: Digits,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler],
    *,
    epochs: int,
    seed: int,
    title: str,
) -> None:
    """The schedule is made from the optimizer and the number of steps."""
    steps = epochs * -(-len(digits.train_labels) // BATCH)
    train(
        model,
        optimizer,
        digits.train_images,
        digits.train_labels,
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        scheduler=schedule(optimizer, steps),
        title=title,
    )


def accuracy_on(digits: Digits, model: nn.Module) -> float:
    return accuracy(model, digits.test_images, digits.test_labels)
