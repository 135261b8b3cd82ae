"""Cases of the Dirichlet operators: beside torch.distributions, which takes a layer at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

import fastprune as fp

from .case import Case, WrongAnswerError

VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)  # its convolutions
TINY = (1, 5, 33)
NUM_SAMPLES = 64  # a batch with a draw for each example
PRIOR = 1.0

Operator = Callable[["Inputs", Tensor], Tensor]  # values of concentrations


@dataclass(frozen=True)
class Inputs:
    """Concentrations of all layers, a prior for each, and the gradient that their draws get."""

    concentration: Tensor
    offsets: Tensor
    sizes: tuple[int, ...]
    prior: Tensor
    gradient: Tensor

    def mean(self) -> Tensor:
        parts = self.concentration.double().split(self.sizes)
        return torch.cat([part / part.sum() for part in parts])


@dataclass(frozen=True)
class Answer:
    values: Tensor
    gradient: Tensor


def make_inputs(sizes: tuple[int, ...], device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    numbers = torch.rand(2, sum(sizes), generator=random, device=device)
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0)
    prior = torch.full((len(sizes),), PRIOR, device=device)
    return Inputs(0.5 + 3 * numbers[0], offsets, sizes, prior, numbers[1] - 0.5)


def with_gradient(operator: Operator, inputs: Inputs) -> Callable[[], Answer]:
    phi = inputs.concentration.clone().requires_grad_()

    def run() -> Answer:
        values = operator(inputs, phi)
        # Of draws, which are a matrix; divergences are summed.
        grad = inputs.gradient.expand_as(values) if values.dim() > 1 else torch.ones_like(values)
        return Answer(values.detach(), *torch.autograd.grad(values, phi, grad))

    return run


def our_kl(inputs: Inputs, phi: Tensor) -> Tensor:
    return fp.ops.dirichlet_kl(phi, inputs.offsets, inputs.prior)


def torch_kl(inputs: Inputs, phi: Tensor) -> Tensor:
    def divergence(part: Tensor) -> Tensor:
        q, p = Dirichlet(part, False), Dirichlet(torch.full_like(part, PRIOR), False)
        return kl_divergence(q, p)

    return torch.stack([divergence(part) for part in phi.split(inputs.sizes)])


def our_draws(inputs: Inputs, phi: Tensor) -> Tensor:
    return fp.ops.dirichlet_sample(phi, inputs.offsets, NUM_SAMPLES, 0, 0)


def torch_draws(inputs: Inputs, phi: Tensor) -> Tensor:
    draws = [Dirichlet(p, False).rsample((NUM_SAMPLES,)) for p in phi.split(inputs.sizes)]
    return torch.cat(draws, 1)


def expected_kl(inputs: Inputs) -> Answer:
    """The closed form in float64, its gradient by autograd."""
    phi = inputs.concentration.double().requires_grad_()

    def divergence(part: Tensor) -> Tensor:
        a = torch.full_like(part, PRIOR)
        logs = torch.lgamma(part.sum()) - torch.lgamma(a.sum())
        logs = logs - torch.lgamma(part).sum() + torch.lgamma(a).sum()
        return logs + ((part - a) * (part.digamma() - part.sum().digamma())).sum()

    kl = torch.stack([divergence(part) for part in phi.split(inputs.sizes)])
    return Answer(kl.detach(), *torch.autograd.grad(kl.sum(), phi))


def check_kl(expected: Answer, answer: Answer) -> None:
    for name in ("values", "gradient"):
        wanted, got = getattr(expected, name), getattr(answer, name).double()
        # Rivals subtract logarithms of thousands in float32.
        if ((got - wanted).abs() > 2e-3 * (1 + wanted.abs())).any():
            raise WrongAnswerError(f"the {name} of the divergence differ")


def expected_draws(inputs: Inputs) -> Answer:
    """The mean of the draws and the gradient of its product with the given gradient."""
    mean, parts = inputs.mean(), []
    layers = zip(*(t.split(inputs.sizes) for t in (inputs.concentration, mean)), strict=True)
    grads = inputs.gradient.double().split(inputs.sizes)
    for (phi, m), g in zip(layers, grads, strict=True):
        parts.append((g - (g * m).sum()) / phi.double().sum())
    return Answer(mean, NUM_SAMPLES * torch.cat(parts))


def check_draws(expected: Answer, answer: Answer) -> None:
    """Random numbers differ between candidates, so only what 64 draws tell about means."""
    wanted, got = expected.values, answer.values.double()
    if ((got.mean(0) - wanted).abs() > 1.5 * wanted).any() or (got < 0).any():
        raise WrongAnswerError("the mean of the draws differs")
    cosine = torch.cosine_similarity(expected.gradient, answer.gradient.double(), dim=0)
    if cosine < 0.9:
        raise WrongAnswerError(f"the gradient points elsewhere: cosine {float(cosine):.2f}")


def _case(operator: str, label: str, sizes: tuple[int, ...]) -> Case:
    elements, draws = sum(sizes), operator == "dirichlet_sample"
    return Case(
        name=f"{operator}/{label}/fp32",
        make=partial(make_inputs, sizes),
        function=partial(with_gradient, our_draws if draws else our_kl),
        rivals={"torch.distributions": partial(with_gradient, torch_draws if draws else torch_kl)},
        expect=expected_draws if draws else expected_kl,
        check=check_draws if draws else check_kl,
        reads=lambda inputs: [inputs.concentration],
        # Concentrations in and their gradients out; draws and their derivatives out and in again.
        bytes_moved=elements * 8 + (elements * NUM_SAMPLES * 16 if draws else 0),
        # Special functions as they are written: 16 points of two elementary functions for a draw.
        flops=elements * (NUM_SAMPLES * 1200 if draws else 400),
    )


def definitions() -> Iterator[Case]:
    for operator in ("dirichlet_kl", "dirichlet_sample"):
        for label, sizes in (("vgg16", VGG16), ("tiny", TINY)):
            yield _case(operator, label, sizes)
