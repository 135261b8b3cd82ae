"""Every operator of the library: schema, specification, shapes. Nothing is implemented here.

An operator is stated in one place and in one order: schema, default kernel (the plain-PyTorch
reference, which serves every device), fake kernel. Native libraries and Triton only add kernels for
their device, and `WINNERS` says which one a device uses when it is there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

NAMESPACE = "fastprune"

# Selections are piecewise constant in their inputs and optimizer steps are not differentiated:
# operators that `DERIVATIVES` does not name have none, so autograd falls through them.
SCHEMAS = {
    "select_threshold": (
        "(Tensor[] values, Tensor[] gradients, Tensor num_kept, str score) -> "
        "(Tensor threshold, Tensor num_ties, Tensor tie_end, Tensor non_finite)"
    ),
    "select_masks": (
        "(Tensor[] values, Tensor[] gradients, Tensor threshold, Tensor tie_end, str score) -> "
        "Tensor[]"
    ),
    "block_scores": (
        "(Tensor[] values, Tensor[] gradients, str score, SymInt[2] block) -> Tensor[]"
    ),
    "gsm_update_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] momenta, Tensor(c!)[] copies, Tensor[] gradients, "
        "Tensor[] gates, Tensor threshold, Tensor tie_end, SymInt[] positions, Tensor settings, "
        "int[] rows, SymInt[2] block, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    ),
    "sdprun_threshold_": ("(Tensor(a!) progress, Tensor settings, Tensor? found_inf=None) -> ()"),
    "sdprun_update_": (
        "(Tensor(a!)[] accumulators, Tensor(b!)[] momenta, Tensor(c!)[] weights, "
        "Tensor(d!) norms, Tensor[] gradients, Tensor progress, Tensor settings, int[] rows, "
        "SymInt[] first_groups, int[] column_groups, Tensor? grad_scale=None, "
        "Tensor? found_inf=None, bool guard=False) -> ()"
    ),
    "sdprun_guard_": (
        "(Tensor(a!)[] weights, Tensor[] accumulators, Tensor norms, Tensor progress, "
        "Tensor settings, int[] rows, SymInt[] first_groups, int[] column_groups, "
        "SymInt[] layer_firsts, SymInt[] layer_sizes, Tensor? found_inf=None) -> ()"
    ),
    "gsm_step_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] momenta, Tensor(c!)[] copies, Tensor[] gradients, "
        "Tensor num_kept, SymInt[] positions, Tensor settings, int[] rows, "
        "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    ),
    "masked_sgd_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] momenta, Tensor(c!)[] copies, Tensor[] gradients, "
        "Tensor[] masks, Tensor settings, int[] rows, Tensor? grad_scale=None, "
        "Tensor? found_inf=None) -> ()"
    ),
    "aswl_step_": (
        "(Tensor(a!)[] parameters, Tensor(b!)[] dense, Tensor(c!)[] momenta, Tensor(d!) attention, "
        "Tensor(e!) tie_end, Tensor(f!) multiplier, Tensor[] gradients, Tensor settings, "
        "int[] layers, int[] roles, bool keep_ties=False, Tensor? grad_scale=None, "
        "Tensor? found_inf=None) -> ()"
    ),
    "dirichlet_kl": (
        "(Tensor concentration, Tensor offsets, Tensor prior) -> (Tensor kl, Tensor gradient)"
    ),
    "dirichlet_sample": (
        "(Tensor concentration, Tensor offsets, SymInt num_samples, SymInt seed, SymInt offset) -> "
        "(Tensor samples, Tensor log_derivatives)"
    ),
    "dirichlet_sample_backward": (
        "(Tensor grad, Tensor samples, Tensor log_derivatives, Tensor offsets) -> Tensor"
    ),
    "channel_switch": "(Tensor input, Tensor scale) -> Tensor",
    "channel_switch_backward": "(Tensor grad, Tensor input, Tensor scale) -> (Tensor, Tensor)",
    "sparse_network": ("(Tensor[] inputs, Tensor[] weights, int[] program, int key) -> Tensor[]"),
    "sparse_profile": ("(Tensor[] inputs, Tensor[] weights, int[] program, int key) -> Tensor"),
    "sparse_release": "(Tensor place, int key) -> ()",
}

# The kernel that serves an operator where its library is built; the reference serves the rest.
WINNERS = {
    "select_threshold": {"CPU": "C++", "CUDA": "CUDA C++"},
    "select_masks": {"CPU": "C++", "CUDA": "CUDA C++"},
    "block_scores": {"CPU": "C++", "CUDA": "CUDA C++"},
    "gsm_update_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "sdprun_threshold_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "sdprun_update_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "sdprun_guard_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "gsm_step_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "masked_sgd_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "aswl_step_": {"CPU": "C++", "CUDA": "CUDA C++"},
    "dirichlet_kl": {"CPU": "C++", "CUDA": "CUDA C++"},
    "dirichlet_sample": {"CPU": "C++", "CUDA": "CUDA C++"},
    "dirichlet_sample_backward": {"CPU": "C++", "CUDA": "CUDA C++"},
    "channel_switch": {"CPU": "C++", "CUDA": "Triton"},
    "channel_switch_backward": {"CPU": "C++", "CUDA": "Triton"},
    "sparse_network": {"CPU": "C++"},
    "sparse_profile": {"CPU": "C++"},
    "sparse_release": {"CPU": "C++"},
}


def _select_threshold_fake(
    values: Sequence[Tensor], gradients: Sequence[Tensor], num_kept: Tensor, score: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    double = any(v.dtype == torch.float64 for v in values)
    threshold = num_kept.new_empty(num_kept.shape, dtype=torch.float64 if double else torch.float32)
    non_finite = num_kept.new_empty((), dtype=torch.int32)
    return threshold, torch.empty_like(num_kept), torch.empty_like(num_kept), non_finite


def _select_masks_fake(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    threshold: Tensor,
    tie_end: Tensor,
    score: str,
) -> list[Tensor]:
    return [torch.empty_like(v, dtype=torch.bool) for v in values]


def _block_scores_fake(
    values: Sequence[Tensor], gradients: Sequence[Tensor], score: str, block: Sequence[int]
) -> list[Tensor]:
    outputs, inputs = block
    return [
        v.new_empty(
            (-(-v.shape[0] // outputs), -(-v.shape[1] // inputs), *v.shape[2:]),
            dtype=torch.float64 if v.dtype == torch.float64 else torch.float32,
        )
        for v in values
    ]


def _in_place_fake(*arguments: Any, **options: Any) -> None:
    """Nothing but the arguments changes, and their shapes do not."""


def _sparse_profile_fake(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], program: Sequence[int], key: int
) -> Tensor:
    num_steps = len(reference.sparse.steps(program))
    return torch.empty(num_steps, dtype=torch.float64)


def _dirichlet_kl_fake(
    concentration: Tensor, offsets: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    kl = concentration.new_empty(offsets.numel() - 1)
    return kl, concentration.new_empty(concentration.shape)


def _dirichlet_sample_fake(
    concentration: Tensor, offsets: Tensor, num_samples: int, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    samples = concentration.new_empty(num_samples, concentration.numel())
    return samples, torch.empty_like(samples)


def _dirichlet_sample_backward_fake(
    grad: Tensor, samples: Tensor, log_derivatives: Tensor, offsets: Tensor
) -> Tensor:
    return samples.new_empty(samples.shape[1])


def _channel_switch_fake(input: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(input)


def _channel_switch_backward_fake(
    grad: Tensor, input: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), scale.new_empty(scale.shape)


FAKES: dict[str, Callable[..., Any]] = {
    "select_threshold": _select_threshold_fake,
    "select_masks": _select_masks_fake,
    "block_scores": _block_scores_fake,
    "gsm_update_": _in_place_fake,
    "sdprun_threshold_": _in_place_fake,
    "sdprun_update_": _in_place_fake,
    "sdprun_guard_": _in_place_fake,
    "gsm_step_": _in_place_fake,
    "masked_sgd_": _in_place_fake,
    "sparse_network": reference.sparse_network,  # no shape in it depends on a value
    "sparse_profile": _sparse_profile_fake,
    "sparse_release": _in_place_fake,
    "aswl_step_": _in_place_fake,
    "dirichlet_kl": _dirichlet_kl_fake,
    "dirichlet_sample": _dirichlet_sample_fake,
    "dirichlet_sample_backward": _dirichlet_sample_backward_fake,
    "channel_switch": _channel_switch_fake,
    "channel_switch_backward": _channel_switch_backward_fake,
}


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _check_first_order(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call it without create_graph=True")


def _save_dirichlet_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[1])


def _dirichlet_kl_derivative(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    _check_first_order("dirichlet_kl")
    gradient, offsets = ctx.saved_tensors
    each = grad.repeat_interleave(offsets.diff(), output_size=gradient.numel())
    return each * gradient, None, None


def _save_dirichlet_sample(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, inputs[1])


def _dirichlet_sample_derivative(
    ctx: Any, grad: Tensor, _: Tensor
) -> tuple[Tensor, None, None, None, None]:
    _check_first_order("dirichlet_sample")
    gradient = torch.ops.fastprune.dirichlet_sample_backward(grad, *ctx.saved_tensors)
    return gradient, None, None, None, None


def _channel_switch_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    input, scale = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return torch.ops.fastprune.channel_switch(grad, scale), None
    return torch.ops.fastprune.channel_switch_backward(grad, input, scale)  # type: ignore[no-any-return]


def _channel_switch_backward_derivative(
    ctx: Any, grad_of_input: Tensor, grad_of_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both results are linear in each of grad, input and scale."""
    ops = torch.ops.fastprune
    grad, input, scale = ctx.saved_tensors
    switched, to_scale = ops.channel_switch_backward(grad_of_input, grad, scale)
    to_grad = switched + ops.channel_switch(input, grad_of_scale)
    return to_grad, ops.channel_switch(grad, grad_of_scale), to_scale


# How an operator is differentiated: what the forward saves, and the backward formula.
DERIVATIVES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "dirichlet_kl": (_save_dirichlet_kl, _dirichlet_kl_derivative),
    "dirichlet_sample": (_save_dirichlet_sample, _dirichlet_sample_derivative),
    "channel_switch": (_save_inputs, _channel_switch_derivative),
    "channel_switch_backward": (_save_inputs, _channel_switch_backward_derivative),
}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        default = torch.no_grad()(getattr(reference, name))
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", default)
        torch.library.register_fake(qualified, FAKES[name])
        if name in DERIVATIVES:
            setup, backward = DERIVATIVES[name]
            torch.library.register_autograd(qualified, backward, setup_context=setup)
        else:
            _AUTOGRAD.impl(name, torch.library.fallthrough_kernel, "Autograd")


_AUTOGRAD = torch.library.Library(NAMESPACE, "FRAGMENT")
_register()
