"""The cases every back end of the selection must agree on, and what they must agree with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCORES = ("value", "magnitude", "saliency")
SHAPES: tuple[Shape, ...] = ((0,), (1,), (3,), (127,), (4097,), (16, 8, 3, 3), (5, 0, 2), ())
BIG: tuple[Shape, ...] = ((700, 1000), (3,), (128, 64, 5, 5), (0,), (300_007,))

# Fills a list of tensors: (shapes, generator) -> float64 tensors; the dtype comes after.
Content = Callable[[Sequence[Shape], torch.Generator], list[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one selection."""

    values: list[Tensor]
    gradients: list[Tensor] | None
    num_kept: Any  # int or 0-d tensor; a list or 1-d tensor in a segmented selection
    score: str
    block: tuple[int, int]
    segmented: bool

    @property
    def keywords(self) -> dict[str, Any]:
        return {"score": self.score, "gradients": self.gradients}


@dataclass(frozen=True)
class Case:
    """Data from which `build` makes the arguments on a device, the same ones each time."""

    label: str
    content: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]  # one per tensor, repeated as needed
    kept: float | int  # a float is a fraction of all, a negative integer counts from all
    score: str = "value"
    layout: str = "contiguous"
    block: tuple[int, int] = (1, 1)
    segmented: bool = False
    device_count: bool = False
    seed: int = 0
    gradient_dtypes: tuple[torch.dtype, ...] = ()  # where they are not those of the values

    def build(self, device: torch.device) -> Inputs:
        random = torch.Generator().manual_seed(self.seed)
        values = self._tensors(CONTENTS[self.content], random, device, self.dtypes)
        gradients = None
        if self.score == "saliency":
            # Never zero, since infinity times zero is NaN, which no selection accepts.
            dtypes = self.gradient_dtypes or self.dtypes
            gradients = self._tensors(nonzero_gradients, random, device, dtypes)
        sizes = [_num_blocks(shape, self.block) for shape in self.shapes]
        return Inputs(
            values,
            gradients,
            self._count(sizes, device),
            self.score,
            self.block,
            self.segmented,
        )

    def _tensors(
        self,
        content: Content,
        random: torch.Generator,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
    ) -> list[Tensor]:
        layout = LAYOUTS[self.layout]
        return [
            layout(t.to(dtypes[i % len(dtypes)]).to(device))
            for i, t in enumerate(content(self.shapes, random))
        ]

    def _count(self, sizes: list[int], device: torch.device) -> Any:
        if not self.segmented:
            count = self._resolve(sum(sizes))
            return torch.tensor(count, device=device) if self.device_count else count
        counts = [self._resolve(size) for size in sizes]
        if self.device_count:
            return torch.tensor(counts, dtype=torch.int64, device=device)
        return [max(count, 0) for count in counts]

    def _resolve(self, size: int) -> int:
        if isinstance(self.kept, float):
            return round(self.kept * size)
        if self.device_count:  # out of range on purpose: the device clamps
            return self.kept if self.kept < 0 else size + self.kept
        return self.kept if self.kept >= 0 else max(size + self.kept + 1, 0)


def _num_blocks(shape: Shape, block: tuple[int, int]) -> int:
    if block == (1, 1):
        return int(np.prod(shape, dtype=np.int64))
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return rows * columns * int(np.prod(shape[2:], dtype=np.int64))


def _each(fill: Callable[[int, torch.Generator], Tensor]) -> Content:
    """A content made as one flat tensor over the whole list, so that order spans tensors."""

    def content(shapes: Sequence[Shape], random: torch.Generator) -> list[Tensor]:
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        flat = fill(sum(sizes), random).double()
        return [part.reshape(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]

    return content


def _normal(n: int, random: torch.Generator) -> Tensor:
    return torch.randn(n, generator=random)


def _choice(n: int, random: torch.Generator, of: Sequence[float]) -> Tensor:
    table = torch.tensor(of, dtype=torch.float64)
    return table[torch.randint(len(of), (n,), generator=random)]


def _spoilt(n: int, random: torch.Generator, share: float, value: float) -> Tensor:
    """Normal numbers, a share of them replaced by one value."""
    flat = _normal(n, random)
    return flat.masked_fill(torch.rand(n, generator=random) < share, value)


def _one_huge(n: int, random: torch.Generator) -> Tensor:
    flat = _normal(n, random).mul(1e-3)
    if n:
        flat[n // 2] = 60_000.0
    return flat


def _exponents(n: int, random: torch.Generator) -> Tensor:
    sign = _choice(n, random, (-1.0, 1.0))
    return sign * torch.rand(n, generator=random, dtype=torch.float64).mul(250).sub(140).exp2()


def _periodic(n: int, random: torch.Generator) -> Tensor:
    """Large only at multiples of 64: a sample with a regular stride sees too many or none."""
    flat = _normal(n, random).mul(1e-3)
    flat[::64] += 100
    return flat


def _late_mass(shapes: Sequence[Shape], random: torch.Generator) -> list[Tensor]:
    """Every large score is in the last tensor that has elements."""
    tensors = _each(lambda n, r: _normal(n, r).mul(1e-6))(shapes, random)
    last = max(i for i, t in enumerate(tensors) if t.numel())
    tensors[last] *= 1e8
    return tensors


nonzero_gradients = _each(lambda n, r: _choice(n, r, (-2.0, -0.37, 0.011, 0.5, 1.0, 3.0)))

CONTENTS: dict[str, Content] = {
    "normal": _each(_normal),
    "ties": _each(lambda n, r: torch.randint(-3, 4, (n,), generator=r)),
    "equal": _each(lambda n, r: torch.full((n,), 0.25)),
    "zero": _each(lambda n, r: torch.zeros(n)),
    "signed zeros": _each(lambda n, r: _choice(n, r, (0.0, -0.0, 0.0, -0.0, 1.0, -1.0))),
    "denormal": _each(lambda n, r: torch.randint(-40, 41, (n,), generator=r).double() * 6e-8),
    "denormal fp32": _each(lambda n, r: torch.randint(-40, 41, (n,), generator=r).double() * 1e-44),
    "one huge": _each(_one_huge),
    "infinities": _each(lambda n, r: _choice(n, r, (torch.inf, -torch.inf, 1.5, -2.0, 0.0))),
    "ascending": _each(lambda n, r: torch.linspace(-4, 4, n)),
    "descending": _each(lambda n, r: torch.linspace(4, -4, n)),
    "30% one value": _each(lambda n, r: _spoilt(n, r, 0.3, 1.25)),
    "60% zero": _each(lambda n, r: _spoilt(n, r, 0.6, 0.0)),
    "negative": _each(lambda n, r: -_normal(n, r).abs() - 1),
    "exponents": _each(_exponents),
    "periodic": _each(_periodic),
    "mass in one tensor": _late_mass,
}


def _sliced(t: Tensor) -> Tensor:
    """Every other element of a tensor twice as long in its last dimension."""
    if not t.dim():
        return t
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7.0)
    wide[..., ::2] = t
    return wide[..., ::2]


def _offset(t: Tensor) -> Tensor:
    """Starts one element into its storage, so that vectors of it are not aligned."""
    return torch.cat([t.new_full((1,), 9.0), t.reshape(-1)])[1:].view(t.shape)


def _permuted(t: Tensor) -> Tensor:
    """The same values with the dimensions reversed in memory."""
    reverse = tuple(reversed(range(t.dim())))
    return t.permute(reverse).contiguous().permute(reverse)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _five_dims(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 4, 2).contiguous().permute(0, 2, 4, 1, 3) if t.dim() == 5 else t


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() >= 2 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": _channels_last,
    "five dims": _five_dims,
    "transposed": _transposed,
    "reversed": _permuted,
    "sliced": _sliced,
    "offset": _offset,
    "requires grad": lambda t: t.requires_grad_(),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
}

LAYOUT_SHAPES: tuple[Shape, ...] = ((7, 5, 3, 3), (13,), (6, 11), (2, 3, 4, 5, 6), (1, 9, 1, 2), ())
BLOCK_SHAPES: tuple[Shape, ...] = ((16, 8, 3, 3), (17, 5), (1, 1), (6, 0), (33, 7, 2))


def _all_cases() -> Iterator[Case]:
    """Contents by dtypes with a host and a device count; then one family per difficulty."""
    small = [name for name in CONTENTS if name not in ("periodic", "mass in one tensor")]
    counts: list[float | int] = [0.1, 0.5, 1, -2, 0.9, 0.03]
    for i, name in enumerate(small):
        for j, dtype in enumerate(DTYPES):
            for on_device in (False, True):
                score = SCORES[(i + j + on_device) % 3]
                if on_device:
                    kept: float | int = (0.25, 0.7, 0.1)[(i + j) % 3]
                else:
                    kept = counts[(i + 2 * j) % len(counts)]
                label = f"{name}-{_short(dtype)}-{score}-{'device' if on_device else 'host'}"
                yield Case(
                    label, name, SHAPES, (dtype,), kept, score, device_count=on_device, seed=i
                )
    for score in SCORES:
        for kept in (0, 1, -2, -1):
            yield Case(f"k={kept}-{score}", "ties", SHAPES, DTYPES[:1], kept, score)
        for kept in (-5, 7):
            label = f"device k={kept}-{score}"
            yield Case(label, "ties", SHAPES, DTYPES[:1], kept, score, device_count=True)
    for i, layout in enumerate(LAYOUTS):
        for j in range(2):
            dtype, score = DTYPES[(i + 2 * j) % 4], SCORES[(i + j) % 3]
            label = f"{layout}-{_short(dtype)}-{score}"
            content = ("ties", "normal")[j]
            yield Case(label, content, LAYOUT_SHAPES, (dtype,), 0.4, score, layout, seed=i)
    for i, block in enumerate([(4, 1), (1, 4), (16, 1), (3, 2), (64, 64), (2, 8)]):
        for j, layout in enumerate(("contiguous", "reversed", "channels last")):
            dtype, score = DTYPES[(i + j) % 4], SCORES[(i + j) % 3]
            label = f"block {block[0]}x{block[1]}-{layout}-{_short(dtype)}-{score}"
            content = ("normal", "ties", "30% one value")[(i + j) % 3]
            yield Case(label, content, BLOCK_SHAPES, (dtype,), 0.3, score, layout, block, seed=i)
    for i, (kept, on_device) in enumerate(
        [(0.2, False), (0, False), (-1, False), (0.6, True), (-4, True), (3, True)]
    ):
        for block in ((1, 1), (4, 2)):
            shapes = SHAPES if block == (1, 1) else BLOCK_SHAPES
            label = f"segmented {'device ' * on_device}k={kept}-block {block[0]}x{block[1]}"
            yield Case(
                label,
                "ties",
                shapes,
                (DTYPES[i % 4],),
                kept,
                SCORES[i % 3],
                block=block,
                segmented=True,
                device_count=on_device,
            )
    big = ["normal", "ascending", "descending", "30% one value", "60% zero", "equal", "ties"]
    big += ["periodic", "mass in one tensor", "exponents", "one huge"]
    for i, name in enumerate(big):
        for j, kept in enumerate((0.1, 0.002, 0.7)):
            if j and name in ("exponents", "one huge", "equal", "ties"):
                continue
            score, dtype = SCORES[(i + j) % 3], DTYPES[(0, 0, 2, 1)[(i + j) % 4]]
            label = f"1.2M {name}-k={kept}-{_short(dtype)}-{score}"
            yield Case(label, name, BIG, (dtype,), kept, score, seed=i)
    half = (torch.float32, torch.bfloat16, torch.float16)
    for score in SCORES:
        yield Case(f"mixed 16 and 32 bit-{score}", "normal", SHAPES, half, 0.3, score)
    for layout in ("contiguous", "channels last"):
        label, shapes = f"16-bit gradients-{layout}", ((33, 16, 3, 3), (5, 7, 1, 1), (1, 1, 3, 5))
        for block in ((1, 1), (4, 3)):
            yield Case(
                f"{label}-{block}",
                "normal",
                shapes,
                DTYPES[:1],
                0.3,
                "saliency",
                layout,
                block,
                gradient_dtypes=(torch.bfloat16, torch.float32, torch.float16),
            )
    yield Case("segmented mixed", "ties", SHAPES, half, 0.3, segmented=True)
    yield Case("1.2M segmented", "normal", BIG, DTYPES[:1], 0.1, "magnitude", segmented=True)
    for score in SCORES:
        yield Case(f"empty tensors-{score}", "normal", ((0,), (3, 0)), DTYPES[:1], 0, score)
        yield Case(f"empty list-{score}", "normal", (), DTYPES[:1], 0, score)
    yield Case("empty tensors segmented", "normal", ((0,), (3, 0)), DTYPES[:1], 0, segmented=True)
    yield Case("empty list segmented", "normal", (), DTYPES[:1], 0, segmented=True)


def _short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}[
        str(dtype).removeprefix("torch.")
    ]


CASES = list(_all_cases())


def oracle_scores(inputs: Inputs) -> list[np.ndarray]:
    """What the selection chooses among, in numpy, row-major; block sums in the defined order."""
    scores = []
    for i, value in enumerate(inputs.values):
        x = _array(value)
        if inputs.gradients is not None:
            with np.errstate(over="ignore", under="ignore"):
                x = x * _array(inputs.gradients[i])
        x = x if inputs.score == "value" else np.abs(x)
        scores.append(x if inputs.block == (1, 1) else _block_sums(x, inputs.block))
    return scores


def oracle_masks(inputs: Inputs) -> list[np.ndarray]:
    """A stable sort by descending score: an independent answer to the same question."""
    scores = oracle_scores(inputs)
    segments = [[s] for s in scores] if inputs.segmented else [scores]
    counts = _numbers(inputs.num_kept)
    kept: list[np.ndarray] = []
    for segment, count in zip(segments, counts, strict=True):
        flat = np.concatenate([np.zeros(0), *(s.ravel() for s in segment)])  # float64 is exact
        order = np.lexsort((np.arange(flat.size), -flat))
        chosen = np.zeros(flat.size, dtype=bool)
        chosen[order[: min(max(count, 0), flat.size)]] = True
        ends = np.cumsum([s.size for s in segment])[:-1] if segment else []
        parts = np.split(chosen, ends) if segment else []
        kept += [part.reshape(s.shape) for part, s in zip(parts, segment, strict=True)]
    if inputs.block == (1, 1):
        return kept
    return [
        mask.repeat(inputs.block[0], 0)[: v.shape[0]].repeat(inputs.block[1], 1)[:, : v.shape[1]]
        for mask, v in zip(kept, inputs.values, strict=True)
    ]


def _array(t: Tensor) -> np.ndarray:
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    return t.detach().cpu().to(wide).numpy()


def _numbers(count: Any) -> list[int]:
    if isinstance(count, Tensor):
        count = count.tolist()
    return count if isinstance(count, list) else [count]


def _block_sums(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    outputs, inputs = block
    rows, columns = -(-x.shape[0] // outputs), -(-x.shape[1] // inputs)
    sums = np.zeros((rows, columns, *x.shape[2:]), dtype=x.dtype)
    for row, column in np.ndindex(rows, columns):
        tile = x[row * outputs : (row + 1) * outputs, column * inputs : (column + 1) * inputs]
        for j in range(tile.shape[1]):
            down = np.zeros(x.shape[2:], dtype=x.dtype)
            for i in range(tile.shape[0]):
                down = down + tile[i, j]
            sums[row, column] += down
    return sums
