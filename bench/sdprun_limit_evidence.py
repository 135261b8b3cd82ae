"""SDprun against its theory: on singular quadratics it ends at directional pruning's solution."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprune.optim import SDprun

from .experiment import Fact

GROUPS, SIZE, RANK = 4, 3, 3
LR, MU, THRESHOLD = 0.2, 0.75, 1.2
STEPS = (10_000, 100_000)
MOST_DISTANCE, LEAST_GAIN = 3e-4, 8.0
BOUNDARY = 0.05
COUNT = 20


class Quadratic(NamedTuple):
    """(w - center)' H (w - center) / 2, and where directional pruning should end."""

    hessian: Tensor
    center: Tensor
    start: Tensor
    pruned: Tensor


def draw(random: torch.Generator) -> Quadratic | None:
    """None if a group is so close to being zero, or to not being it, that rounding would decide."""
    n = GROUPS * SIZE
    vectors = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64)).Q
    steep, flat = vectors[:, :RANK], vectors[:, RANK:]
    values = 0.5 + 1.5 * torch.rand(RANK, generator=random, dtype=torch.float64)
    center, start = torch.randn(2, n, generator=random, dtype=torch.float64) / 2
    projector = flat @ flat.T
    reached = center + projector @ (start - center)  # by gradient descent
    pruned, force = constrained_solution(projector, reached)
    zero = pruned.norm(dim=1) < 1e-6
    near = torch.where(
        zero, force.norm(dim=1) > (1 - BOUNDARY) * THRESHOLD,
        pruned.norm(dim=1) < BOUNDARY * THRESHOLD,
    )  # fmt: skip
    if bool(near.any()):
        return None
    return Quadratic(steep @ (values[:, None] * steep.T), center, start, pruned)


def constrained_solution(projector: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """min |w - reached|^2 / 2 + G sum |w_g| over w - reached in the flat space, by its dual.

    The dual variable of a group is a force of at most G; w = reached - P force.
    """
    force = torch.zeros(GROUPS, SIZE, dtype=torch.float64)
    ahead, momentum = force, 1.0
    for _ in range(20_000):
        solution = reached - projector @ ahead.flatten()
        candidate = ahead + solution.view(GROUPS, SIZE)
        candidate = candidate * (THRESHOLD / candidate.norm(dim=1, keepdim=True)).clamp(max=1)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = candidate + (momentum - 1) / following * (candidate - force)
        force, momentum = candidate, following
    return (reached - projector @ force.flatten()).view(GROUPS, SIZE), force


def run_quadratics(quadratics: list[Quadratic], steps: int) -> tuple[Tensor, Tensor]:
    """All of them as one parameter; distances and zero groups after that many steps."""
    hessian = torch.stack([q.hessian for q in quadratics])
    center = torch.stack([q.center for q in quadratics])
    start = torch.stack([q.start for q in quadratics]).view(-1, SIZE)
    weight = nn.Parameter(start.clone())
    c = THRESHOLD / (LR ** (0.5 + MU) * steps**MU)
    optimizer = SDprun([{"params": [weight], "prune": True}], LR, c=c, mu=MU, min_groups=0)
    for _ in range(steps):
        offset = weight.detach().view(len(quadratics), -1) - center
        weight.grad = (hessian @ offset[..., None]).view_as(weight)
        optimizer.step()
    found = weight.detach().view(len(quadratics), GROUPS, SIZE)
    expected = torch.stack([q.pruned for q in quadratics])
    return (found - expected).flatten(1).norm(dim=1), (found == 0).all(2)


def measure() -> list[Fact]:
    random = torch.Generator().manual_seed(0)
    quadratics: list[Quadratic] = []
    drawn = 0
    while len(quadratics) < COUNT:
        drawn += 1
        if (quadratic := draw(random)) is not None:
            quadratics.append(quadratic)
    expected_zero = torch.stack([q.pruned.norm(dim=1) < 1e-6 for q in quadratics])
    distances = []
    for steps in STEPS:
        distance, zero = run_quadratics(quadratics, steps)
        distances.append(distance)
        if not torch.equal(zero, expected_zero):
            raise AssertionError(f"other groups are zero after {steps} steps than in the limit")
    gain = distances[0] / distances[1]
    if float(distances[1].max()) > MOST_DISTANCE or float(gain.min()) < LEAST_GAIN:
        raise AssertionError(f"distances {distances[1].tolist()}, gains {gain.tolist()}")
    subject = f"{COUNT} quadratics of rank {RANK} in {GROUPS * SIZE} dimensions"
    return [
        (subject, "drawn, to have them off the boundary", drawn, ""),
        (subject, f"zero groups, as in the limit, of {expected_zero.numel()}",
         int(expected_zero.sum()), ""),
        (subject, f"largest distance to the limit after {STEPS[1]} steps",
         float(distances[1].max()), ""),
        (subject, "least gain from ten times the steps", float(gain.min()), "x"),
    ]  # fmt: skip
