"""Layers of sparse rows, and regions of such layers, as modules for inference on the CPU."""

import copy
import secrets
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.reference.sparse import FLATTEN, Kernel, Kind, Step, dense_rows, sparse_rows

KERNELS = {each.name.lower(): each for each in Kernel}


class Lease:
    """A key under which the operator keeps a prepared network; freed with this object.

    A copy is a lease of its own, so that copied and unpickled modules never share a network.
    """

    def __init__(self) -> None:
        self.key = secrets.randbits(62)
        weakref.finalize(self, release, self.key)

    def __reduce__(self) -> Any:
        return Lease, ()


def release(key: int) -> None:
    torch.ops.fastprune.sparse_release(torch.empty(0), key)


class Leased(nn.Module):
    """A module whose weights the operator prepares once."""

    def __init__(self) -> None:
        super().__init__()
        self.lease = Lease()
        self.register_load_state_dict_post_hook(renew)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.lease = Lease()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def renew(module: Any, keys: Any) -> None:
    """Other weights were loaded."""
    module.lease = Lease()


class InputShape(NamedTuple):
    """What a region expects of an input: [N, C, H, W] or [N, C], with so many channels."""

    rank: int
    channels: int


def check_input(x: Any, expected: InputShape, what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} takes tensors, got {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(
            f"{what} runs on the CPU, got a tensor on {x.device}; pass x.cpu(), or use the dense "
            "model on that device"
        )
    if x.dtype != torch.float32:
        raise ValueError(f"{what} computes in float32, got {x.dtype}; pass x.float()")
    if x.dim() != expected.rank or x.shape[1] != expected.channels:
        sizes = ("N", str(expected.channels), "H", "W")[: expected.rank]
        raise ValueError(
            f"{what} expected a tensor of shape [{', '.join(sizes)}], got {tuple(x.shape)}"
        )


class SparseRegion(Leased):
    """Steps that `sparse_network` runs in one call; takes and returns ordinary tensors."""

    def __init__(
        self,
        layers: Iterable[tuple[str, nn.Module]],
        program: Sequence[int],
        names: Sequence[str],
        input_shapes: Sequence[InputShape],
    ) -> None:
        """`names` has one for each step of the program, "" for an output."""
        super().__init__()
        self.names = list(names)
        self.layer_names = []
        for name, layer in layers:
            self.layer_names.append(name)
            own = name.replace(".", "_")
            while hasattr(self, own):  # a.b_c and a_b.c, or a name that every module has
                own += "_"
            self.add_module(own, layer)
        self.program = list(program)
        self.input_shapes = list(input_shapes)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        for x, expected in zip(inputs, self.input_shapes, strict=True):
            check_input(x, expected, "the sparse module")
        return torch.ops.fastprune.sparse_network(*self._arguments(inputs))  # type: ignore[no-any-return]

    def profile(self, *inputs: Tensor) -> list[float]:
        """The seconds of every step in one run."""
        return torch.ops.fastprune.sparse_profile(*self._arguments(inputs)).tolist()  # type: ignore[no-any-return]

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        weights = [t for layer in self._modules.values() for t in layer._buffers.values()]  # type: ignore[union-attr]
        return list(inputs), weights, self.program, self.lease.key

    def extra_repr(self) -> str:
        return f"{len(self.program) // len(Step._fields)} steps"


class SparseRows(Leased):
    """The packed rows of a layer, `values`, `columns`, `row_starts`, and its `bias`, as buffers."""

    values: Tensor
    columns: Tensor
    row_starts: Tensor
    bias: Tensor

    def __init__(self, num_rows: int, num_columns: int, kernel: str) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.num_columns = num_columns
        self.kernel = kernel
        self.register_buffer("values", torch.empty(0))
        self.register_buffer("columns", torch.empty(0, dtype=torch.int32))
        self.register_buffer("row_starts", torch.zeros(num_rows + 1, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(num_rows))

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the weight."""
        return 1 - self.values.numel() / max(1, self.bias.numel() * self.num_columns)

    def with_kernel(self, kernel: str) -> "SparseRows":
        """The same rows, sharing their memory."""
        twin = copy.deepcopy(self, {id(tensor): tensor for tensor in self._buffers.values()})
        twin.kernel = kernel
        return twin

    @torch.no_grad()
    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        check_weight(weight)
        self.values, self.columns, self.row_starts = sparse_rows(weight.detach().flatten(1))
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()

    def _weight(self) -> Tensor:
        return dense_rows(self.values, self.columns, self.row_starts, self.num_columns)

    def _run(self, x: Tensor, step: Step, flags: int) -> Tensor:
        program = [*step, *Step(Kind.OUTPUT, first=1, flags=flags)]
        weights = [self.values, self.columns, self.row_starts, self.bias]
        y: Tensor = torch.ops.fastprune.sparse_network([x], weights, program, self.lease.key)[0]
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """The number of values belongs to the weights that are loaded, not to the layer."""
        given = {name: state_dict.get(prefix + name) for name in self._buffers}
        if all(isinstance(t, Tensor) for t in given.values()):
            check_rows(prefix, given, self.num_columns, self.bias.numel())
            for name in ("values", "columns"):
                setattr(self, name, getattr(self, name).new_empty(given[name].numel()))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or weight.is_cuda:
        found = f"{weight.dtype} on {weight.device}" if isinstance(weight, Tensor) else weight
        raise ValueError(f"sparse layers hold float32 weights on the CPU, got {found}")


def check_rows(prefix: str, rows: dict[str, Any], num_columns: int, num_rows: int) -> None:
    """Native code follows these numbers without looking."""
    values, columns, starts, bias = (rows[n] for n in ("values", "columns", "row_starts", "bias"))
    shapes = values.shape == columns.shape == (values.numel(),) and bias.shape == (num_rows,)
    types = values.dtype == bias.dtype == torch.float32
    whole = columns.dtype == starts.dtype == torch.int32
    if not (shapes and types and whole and starts.shape == (num_rows + 1,)):
        raise ValueError(
            f"{prefix}values, columns, row_starts, bias are not the rows of a layer with "
            f"{num_rows} outputs of {num_columns} weights each"
        )
    inside = bool(((columns >= 0) & (columns < num_columns)).all())
    rise = bool((starts.diff() >= 0).all()) and starts[0] == 0 and starts[-1] == values.numel()
    firsts = torch.zeros(values.numel() + 1, dtype=torch.bool)
    if inside and rise:
        firsts[starts.long()] = True
        inside = bool(((columns.diff() > 0) | firsts[1:-1]).all())
    if not (inside and rise):
        raise ValueError(
            f"{prefix}columns or row_starts are damaged: columns must ascend within a row and lie "
            f"below {num_columns}, row_starts ascend from 0 to {values.numel()}"
        )


class SparseConv2d(SparseRows):
    """A Conv2d that skips its zeros: `SparseConv2d.from_dense(conv)(x)` equals `conv(x)`.

    For inference on the CPU in float32, with any batch and input size. A new one has only zeros;
    weights come by `from_dense` or `load_state_dict`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        kernel: str = "automatic",
    ) -> None:
        with torch.device("meta"):  # checks the arguments
            shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
            conv: Any = nn.Conv2d(*shape)
        super().__init__(out_channels, conv.weight[0].numel(), kernel)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, kernel: str = "automatic") -> "SparseConv2d":
        """With the weights of `conv`, of which the zeros are left out."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                "conv must pad with zeros by numbers, got "
                f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
            )
        sizes: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        shape = (conv.in_channels, conv.out_channels, *sizes, conv.groups)
        layer = cls(*shape, kernel=kernel)
        layer._pack(conv.weight, conv.bias)
        return layer

    @property
    def step(self) -> Step:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        numbers = [number for size in sizes for number in size]
        step = Step(*(Kind.CONV, 1, 0, -1, 0, *numbers, self.groups))
        return step._replace(kernel=int(KERNELS[self.kernel]))

    def weight(self) -> Tensor:
        """The weight as an ordinary tensor."""
        return self._weight().view((self.out_channels, -1, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, InputShape(4, self.in_channels), "SparseConv2d")
        return self._run(x, self.step, 0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, sparsity={self.sparsity:.3f}, kernel={self.kernel}"
        )


class SparseLinear(SparseRows):
    """A Linear that skips its zeros: `SparseLinear.from_dense(linear)(x)` equals `linear(x)`.

    For inference on the CPU in float32, on [..., in_features].
    """

    def __init__(self, in_features: int, out_features: int, *, kernel: str = "automatic") -> None:
        super().__init__(out_features, in_features, kernel)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, kernel: str = "automatic") -> "SparseLinear":
        """With the weights of `linear`, of which the zeros are left out."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, kernel=kernel)
        layer._pack(linear.weight, linear.bias)
        return layer

    @property
    def step(self) -> Step:
        return Step(Kind.LINEAR, 1, 0, weights=0, kernel=int(KERNELS[self.kernel]))

    def weight(self) -> Tensor:
        """The weight as an ordinary tensor."""
        return self._weight()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[-1] != self.in_features):
            raise ValueError(
                f"SparseLinear expected a tensor of shape [..., {self.in_features}], got "
                f"{tuple(x.shape)}"
            )
        rows = x.reshape(-1, self.in_features) if isinstance(x, Tensor) else x
        check_input(rows, InputShape(2, self.in_features), "SparseLinear")
        y: Tensor = self._run(rows, self.step, FLATTEN)
        return y.view((*x.shape[:-1], self.out_features))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, sparsity={self.sparsity:.3f}, "
            f"kernel={self.kernel}"
        )
