"""Dirichlet pruning: channels ranked by a variational posterior over switches, in one epoch."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..progress import Progress
from .dirichlet_ranks import DirichletRanks
from .epochs import Epochs, num_examples_of
from .objective import Call, Forward, LossFn, undisturbed
from .posterior import LEAST, Posterior, SwitchedLoss, of_mean_outputs, repeated
from .ranks import is_first
from .removal import ChannelSets
from .switches import Switches

Estimator = Literal["point", "sampled"]
# Draws of a small start are so noisy that useless channels gain from being raised, which makes
# them quieter: the order turns around.
START: dict[Estimator, float] = {"point": 1.0, "sampled": 10.0}
NOTES = 100  # times that loss and KL are read, which waits for an accelerator


def dirichlet(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    *,
    estimator: Estimator = "point",
    prior: float = 1.0,
    scale: float | None = None,
    kl_weight: float | None = None,
    epochs: int = 1,
    lr: float = 0.01,
    placement: str = "auto",
    samples: int = 1,
    seed: int = 0,
    example_input: Any = None,
    start: float | None = None,
    joint: bool = True,
    forward: Forward | None = None,
    progress: bool = True,
) -> DirichletRanks:
    """Ranks the channels of each layer by how much of the layer's switch the data gives them.

    A layer's switch multiplies its channels by numbers that sum to one. Its posterior is a
    Dirichlet distribution whose concentrations Adam fits, in `epochs` passes over the data, to the
    loss plus `kl_weight` times the KL divergence from the prior. Meanwhile the model is frozen and
    in evaluation mode, and it is left as it was: weights, buffers, gradients, mode, random state.
    Layers that are added together share a switch; channels that cannot be removed, such as the
    model's output, have none.

    Args:
        loader: an iterable of (input, target) batches. An iterator, which gives them only once, is
            held in memory and serves one epoch.
        loss_fn: loss_fn(output, target), a mean over examples; or None with
            `forward(model, batch)`, which returns the loss for anything else.
        estimator: "point" puts the posterior's mean into the network; "sampled" a draw for each
            example, with pathwise gradients.
        prior: the concentration of every channel in the prior.
        scale: what switches are multiplied by; by default the layer's number of channels, so that
            they are 1 on average. The paper's is 1.
        kl_weight: by default 1 / the number of training examples, those of `loader.dataset` or of
            the batches. Where that makes the KL larger than the loss, as with a network that knows
            its training data by heart, a smaller one leaves more of the order to the data.
        placement: "auto" switches behind the norm that follows a layer, or behind a layer without
            norm; "layer" always right behind the layer.
        samples: draws for each example, whose outputs are averaged ("sampled").
        seed: of the draws.
        example_input: a tensor that the model takes, or a tuple of its arguments, to trace it with;
            by default the first two inputs of the first batch. The ranks hold it.
        start: the first concentration of all channels; by default 1 ("point") or 10 ("sampled").
        joint: train all switches at once, or each for `epochs` with the others off.
        progress: show a bar with loss and KL on a terminal.
    """
    check_settings(estimator, prior, scale, kl_weight, epochs, lr, samples, start)
    if samples > 1 and (forward is not None or estimator == "point"):
        raise ValueError(
            f"samples must be 1 with forward= and with estimator='point', got {samples}: it is "
            "outputs of drawn switches that are averaged"
        )
    with undisturbed(model):
        model.eval()
        data = Epochs(loader, repeats=epochs > 1 or not joint)
        example = data.example_input() if example_input is None else example_input
        sets = ChannelSets(model, example)
        if not sets.layers:
            raise ValueError(f"{type(model).__name__} has no channels that can be removed")
        call = Call(model, loss_fn and of_mean_outputs(loss_fn, samples), forward)
        loss_of = SwitchedLoss(call, Switches(model, sets.layers, placement=placement))
        weight = 1 / data.num_examples if kl_weight is None else kl_weight
        begin = START[estimator] if start is None else start
        runs = [sets.sizes] if joint else [{name: size} for name, size in sets.sizes.items()]
        concentration: dict[str, Tensor] = {}
        total = len(runs) * epochs * data.num_batches
        draws = Draws(samples, seed, count()) if estimator == "sampled" else None
        with Progress("Dirichlet pruning", total, shown=progress and is_first()) as bar:
            for sizes in runs:
                posterior = Posterior(sizes, begin, prior, scale, call.device)
                batches = chain.from_iterable(repeat(data, epochs))
                for step, (loss, kl) in enumerate(
                    fit(posterior, loss_of, batches, weight, lr, draws)
                ):
                    if step % max(1, total // NOTES) == 0:
                        note = f"loss {loss.item():.4f}, KL {kl.item():.4g}"
                    bar.advance(note)
                concentration |= posterior.by_layer(posterior.concentration().detach())
    _check_finite(concentration, lr)
    return DirichletRanks(concentration, sets.names, tree_map(_on_cpu, example))


def fit(
    posterior: Posterior,
    loss_of: SwitchedLoss,
    batches: Iterable[Any],
    kl_weight: float,
    lr: float,
    draws: "Draws | None",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the posterior; gives loss and KL of each step. Without draws it uses the means."""
    optimizer = torch.optim.Adam([posterior.theta], lr)
    for batch in batches:
        phi = posterior.concentration()
        if draws is None:
            loss = loss_of(posterior.means(phi), batch)
        else:
            number = num_examples_of(batch) * draws.each
            scales = posterior.draws(phi, number, draws.seed, next(draws.offsets))
            loss = loss_of(scales, repeated(batch, draws.each))
        kl = posterior.kl(phi)
        optimizer.zero_grad()
        (loss + kl_weight * kl).backward()
        posterior.average_gradient()
        optimizer.step()
        yield loss.detach(), kl.detach()


class Draws(NamedTuple):
    """Of the switches: so many for each example, by a seed and the next offset."""

    each: int
    seed: int
    offsets: Iterator[int]


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _check_finite(concentration: Mapping[str, Tensor], lr: float) -> None:
    for name, values in concentration.items():
        if not values.isfinite().all():
            raise ValueError(
                f"the concentrations of {name} are no longer finite; look for NaN in the data and "
                f"in the loss, or take a smaller lr than {lr}"
            )


def check_settings(
    estimator: str,
    prior: float,
    scale: float | None,
    kl_weight: float | None,
    epochs: int,
    lr: float,
    samples: int,
    start: float | None,
) -> None:
    if estimator not in START:
        raise ValueError(f"estimator must be 'point' or 'sampled', got {estimator!r}")
    for name, number in (("epochs", epochs), ("samples", samples)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    for name, value in (("prior", prior), ("scale", scale), ("lr", lr)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}")
    if kl_weight is not None and not 0 <= kl_weight < float("inf"):
        raise ValueError(f"kl_weight must be a finite number of at least 0, got {kl_weight}")
    if start is not None and not LEAST < start < float("inf"):
        raise ValueError(f"start must be a number above {LEAST}, got {start}")
