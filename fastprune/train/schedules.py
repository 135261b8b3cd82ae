"""Learning rates over a training of known length; each takes the optimizer and its steps."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR


def two_drops(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A tenth from 60% of the steps on, a hundredth from 80%."""
    return MultiStepLR(optimizer, [steps * 6 // 10, steps * 8 // 10])


def flat_then_linear(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Constant for half of the steps, then linear to 1% at nine tenths of them."""

    def rate(step: int) -> float:
        done = step / steps
        return 1.0 if done < 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)

    return LambdaLR(optimizer, rate)
