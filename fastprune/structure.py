"""Which parameters of a model can be pruned."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import UninitializedParameter

WEIGHT = ("weight",)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# MultiheadAttention's out_proj is a Linear and found as such.
PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: WEIGHT,
    nn.Conv2d: WEIGHT,
    nn.Conv3d: WEIGHT,
    nn.ConvTranspose1d: WEIGHT,
    nn.ConvTranspose2d: WEIGHT,
    nn.ConvTranspose3d: WEIGHT,
    nn.Linear: WEIGHT,
    nn.MultiheadAttention: ATTENTION,
}
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of every convolution, linear and attention layer, by parameter name.

    Layers are recognised by their type, so embeddings, position tables, norms and biases stay out.
    A weight shared by several layers appears once, under its first name; one shared with an
    embedding (a language model's output layer) stays out, since it is a table too. The order is
    that of `model.named_parameters()`: it decides ties of a global selection.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, EMBEDDINGS)}
    prunable = {id(p) for p in _layer_weights(model)} - tables
    return {name: p for name, p in model.named_parameters() if id(p) in prunable}


def _layer_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for kind, names in PRUNABLE.items():
            if isinstance(module, kind):
                for name in names:
                    if name in own:
                        yield _initialized(f"{path}.{name}".lstrip("."), own[name])
                    else:
                        _check_absent(f"{path}.{name}".lstrip("."), module, name)


def _initialized(name: str, parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(
            f"{name} has no shape yet; run one batch through the lazy model before pruning it"
        )
    return parameter


def _check_absent(name: str, module: nn.Module, attribute: str) -> None:
    """A weight computed from other parameters would be rebuilt from them, zeros and all."""
    if getattr(module, attribute, None) is not None:
        raise ValueError(
            f"{name} is computed from other parameters (weight norm, a parametrization, "
            "torch.nn.utils.prune), so zeros written into it would not last; remove that first, "
            "e.g. by torch.nn.utils.parametrize.remove_parametrizations or prune.remove"
        )
