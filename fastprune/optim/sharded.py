"""One selection over parameters whose rows are spread over processes (FSDP2, DTensor).

Given the same full gradients every number is that of a single process: counts are integers, and
positions are those of the full parameters. One selection costs, for float32 scores, three
all-reduces of 4,096 int64 counts a pool and one all-gather of an int64 per parameter; float64
needs six all-reduces. It passes over the local shards once per all-reduce and twice for the ties,
in plain tensor operations on pieces of bounded size; nothing is concatenated and no value is read
back.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.reference.select import element_scores, order_keys
from ..ops.select import PoolChoice, num_blocks

DIGIT_BITS = 12
PIECE = 1 << 22  # elements that are looked at together: bounds the memory for their keys
BEHIND = torch.iinfo(torch.int64).max


class Shard(NamedTuple):
    """What of a parameter this process holds: a range of its rows, or all of it."""

    shape: torch.Size  # of the full parameter
    first_row: int = 0
    group: Any = None  # the processes that share the rows; None: each holds the whole

    @property
    def offset(self) -> int:
        """Elements of the full parameter before the local ones."""
        return self.first_row * prod(self.shape[1:])


def is_sharded(tensor: Tensor) -> bool:
    # Asked without importing torch.distributed.tensor, which takes most of a second.
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process; a plain tensor is there as a whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_gradient(parameter: Tensor) -> Tensor:
    """The gradient's local part, which must be of the same rows as the parameter's."""
    gradient = parameter.grad
    assert gradient is not None
    if is_sharded(parameter):
        expected = parameter.placements  # type: ignore[attr-defined]
        if not is_sharded(gradient) or gradient.placements != expected:  # type: ignore[attr-defined]
            raise ValueError(
                f"the gradient of a sharded parameter must have its placement {expected}, got "
                f"{getattr(gradient, 'placements', 'a plain tensor')}; use gradient.redistribute()"
            )
    return local(gradient)


def shard_of(parameter: Tensor, name: str = "a parameter") -> Shard:
    """Where the local rows of a pruned parameter stand in the whole."""
    if not is_sharded(parameter):
        return Shard(parameter.shape)
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    split = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return Shard(parameter.shape)
    from torch.distributed.tensor import Shard as RowShard

    placement = placements[split[0]]
    if len(split) > 1 or type(placement) is not RowShard or placement.dim != 0:
        raise ValueError(
            f"{name} has placements {tuple(placements)}, but pruned parameters must be "
            "sharded along dimension 0 over one mesh dimension (Shard(0), the others Replicate); "
            "use fully_shard's default placement, or put it into a group with prune=False"
        )
    ranks = mesh.size(split[0])
    _, first_row = RowShard.local_shard_size_and_offset(
        parameter.shape[0], ranks, mesh.get_local_rank(split[0])
    )
    return Shard(parameter.shape, first_row, mesh.get_group(split[0]))


def check_not_flat(name: str, parameter: Tensor) -> None:
    """FSDP1 leaves flat pieces whose rows, and so positions and dimensions, are gone."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} is a flat shard of FullyShardedDataParallel (FSDP1), which cannot be pruned; "
            "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_pool(pool: Sequence[tuple[str, Tensor]], block: tuple[int, int]) -> None:
    """Pruned parameters can be chosen among together; same answer, or error, on every process."""
    first: tuple[str, list[int]] | None = None
    for name, parameter in pool:
        shard = shard_of(parameter, name)
        if shard.group is None:
            continue
        ranks = dist.get_process_group_ranks(shard.group)
        first = first or (name, ranks)
        if ranks != first[1]:
            raise ValueError(
                f"{name} is sharded over ranks {ranks} but {first[0]} over {first[1]}; weights "
                "are chosen over one mesh: shard all pruned ones over it, or use two optimizers"
            )
        rows, outputs = parameter.shape[0], block[0]
        per_rank = -(-rows // len(ranks))
        if per_rank % outputs and per_rank < rows:
            raise ValueError(
                f"{name} has {rows} rows, {per_rank} on each of {len(ranks)} ranks, so blocks of "
                f"{outputs} rows (block={block}) would be cut; choose a block whose first number "
                f"divides {per_rank}, or fewer ranks"
            )


def select_pool_sharded(
    weights: list[Tensor],
    gradients: list[Tensor],
    num_kept: Tensor,
    block: tuple[int, int],
    shards: Sequence[Shard],
    score: str = "saliency",
) -> PoolChoice:
    """`select_pool` over shards: the choice as a rule, or as one bool per block of local rows."""
    if block == (1, 1):
        positions = _positions([s.shape.numel() for s in shards], [s.offset for s in shards])
        return PoolChoice(
            *select_sharded(weights, gradients, num_kept, positions, shards, score), None
        )
    sums = torch.ops.fastprune.block_scores(weights, gradients, score, block)
    before = [num_blocks((s.first_row, *s.shape[1:]), block) for s in shards]
    positions = _positions([num_blocks(s.shape, block) for s in shards], before)
    threshold, tie_end = select_sharded(sums, [], num_kept, positions, shards, "magnitude")
    gates = _masks(sums, threshold, tie_end, positions)
    return PoolChoice(threshold, tie_end, gates)


def magnitude_masks(
    weights: list[Tensor], num_kept: Tensor, block: tuple[int, int], shards: Sequence[Shard]
) -> list[Tensor]:
    """The local rows of the masks of the largest magnitudes, one bool per weight."""
    _raise_on_nan(weights, shards)
    choice = select_pool_sharded(weights, [], num_kept, block, shards, "magnitude")
    if choice.gates is None:
        positions = _positions([s.shape.numel() for s in shards], [s.offset for s in shards])
        return _masks(weights, choice.threshold, choice.tie_end, positions)
    return [
        gate.repeat_interleave(block[0], 0)[: weight.shape[0]]
        .repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        .contiguous()
        for gate, weight in zip(choice.gates, weights, strict=True)
    ]


def _raise_on_nan(weights: list[Tensor], shards: Sequence[Shard]) -> None:
    seen = torch.stack([w.isnan().any() for w in weights]).any().to(torch.int32)
    dist.all_reduce(
        seen, dist.ReduceOp.MAX, group=next(s.group for s in shards if s.group is not None)
    )
    if seen.item():
        raise ValueError("weights must not be NaN, but at least one is; did a step diverge?")


def whole(piece: Tensor, parameter: Tensor) -> Tensor:
    """The full tensor, on every process, of one whose local rows are those of the parameter."""
    if not is_sharded(parameter):
        return piece
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        piece.to(torch.uint8).contiguous(),  # not every back end gathers bools
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )
    full: Tensor = sharded.full_tensor().bool()
    return full


def select_sharded(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    num_kept: Tensor,
    positions: Sequence[int],
    shards: Sequence[Shard],
    score: str,
) -> tuple[Tensor, Tensor]:
    """Threshold and tie end of the `num_kept` best scores (none negative) of all shards together.

    `positions` are those of the local parts in the whole pool. The threshold is the same on every
    process. The tie end is right for the local parts, where it is the first tie that is not kept:
    so it needs no further exchange.
    """
    pools = [0] * len(values)
    threshold, tie_end = select_pools_sharded(
        values, gradients, num_kept[None], positions, shards, score, pools
    )
    return threshold[0], tie_end[0]


def select_pools_sharded(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    num_kept: Tensor,
    positions: Sequence[int],
    shards: Sequence[Shard],
    score: str,
    pools: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`select_sharded` in several pools at once, each with its own count, by as many messages.

    `pools` says which one a tensor belongs to; those of a pool are neighbours.
    """
    group = next(s.group for s in shards if s.group is not None)
    rank = dist.get_rank(group)
    # What every process holds is counted by the first one.
    counted = [i for i, s in enumerate(shards) if s.group is not None or rank == 0]
    double = any(v.dtype == torch.float64 for v in values)
    nan_key = torch.iinfo(torch.int64 if double else torch.int32).max

    def keys_of(i: int) -> Iterator[Tensor]:
        return _pieces(values, gradients, i, score, double)

    key = torch.zeros_like(num_kept)
    remaining = num_kept.clamp(min=1)
    for shift, bits in _digits(nan_key.bit_length()):
        # The last column: keys that begin otherwise.
        counts = num_kept.new_zeros(len(num_kept), 2**DIGIT_BITS + 1)
        for i in counted:
            for keys in keys_of(i):
                digits = keys >> shift
                inside = (digits >> bits) == key[pools[i]]
                bins = torch.where(inside, digits & (2**bits - 1), 2**DIGIT_BITS)
                counts[pools[i]].scatter_add_(0, bins, torch.ones_like(bins))
        counts = counts[:, :-1].contiguous()
        dist.all_reduce(counts, group=group)
        if shift + bits == nan_key.bit_length():  # a pool can be smaller than what is asked
            total = counts.sum(1)
            remaining = remaining.minimum(total)
        at_least = counts.flip(1).cumsum(1).flip(1)
        digit = ((at_least >= remaining[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        remaining = remaining - (at_least - counts).gather(1, digit)[:, 0]
        key = (key << bits) | digit[:, 0]
    # Nothing exceeds NaN in this order, so keeping nothing is a threshold of NaN.
    nothing = (num_kept <= 0) | (total <= 0)
    key = torch.where(nothing, nan_key, key)
    num_ties = torch.where(nothing, 0, remaining)
    threshold = key.view(torch.float64) if double else key.to(torch.int32).view(torch.float32)

    ties = [torch.stack([(keys == key[pool]).sum() for keys in keys_of(i)])
            for i, pool in enumerate(pools)]  # fmt: skip
    before = _ties_before(torch.stack([t.sum() for t in ties]), shards, group, pools)
    ends = torch.full_like(num_kept, BEHIND)
    for i, pool in enumerate(pools):
        kept = num_ties[pool] - before[i]
        end = _first_dropped(keys_of(i), key[pool], ties[i], kept, positions[i])
        ends[pool] = ends[pool].minimum(end)
    return threshold, ends


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """Shift and width of each digit of a key, from the top."""
    while bits:
        width = min(DIGIT_BITS, bits)
        bits -= width
        yield bits, width


def _pieces(
    values: Sequence[Tensor], gradients: Sequence[Tensor], i: int, score: str, double: bool
) -> Iterator[Tensor]:
    """Order keys of one tensor in row-major order, a bounded number at a time."""
    pieces = values[i].detach().reshape(-1).split(PIECE)
    others = gradients[i].reshape(-1).split(PIECE) if gradients else [None] * len(pieces)
    for value, gradient in zip(pieces, others, strict=True):
        scores = element_scores(value, gradient, score)
        yield order_keys(scores.double() if double else scores)


def _ties_before(ties: Tensor, shards: Sequence[Shard], group: Any, pools: Sequence[int]) -> Tensor:
    """Ties of its pool before each local part; (parameter, rank) is the order of positions."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = ties.clone()
    for i, shard in enumerate(shards):
        if shard.group is None and rank != 0:
            mine[i] = 0
    gathered = ties.new_empty(ranks * len(shards))
    dist.all_gather_into_tensor(gathered, mine, group=group)
    in_order = gathered.view(ranks, -1).t().reshape(-1)
    before = (in_order.cumsum(0) - in_order).view(-1, ranks)
    columns = [0 if shard.group is None else rank for shard in shards]
    found = torch.stack([row[column] for row, column in zip(before, columns, strict=True)])
    starts = [pools.index(pool) for pool in pools]
    return found - before[starts, 0]


def _first_dropped(
    pieces: Iterator[Tensor], key: Tensor, ties: Tensor, kept: Tensor, position: int
) -> Tensor:
    """Position of a tensor's first tie after `kept` of them; BEHIND everything if there is none."""
    seen = ties.cumsum(0) - ties
    size = 0
    before = torch.zeros_like(key)
    for i, keys in enumerate(pieces):
        before = before + (((keys == key).cumsum(0) + seen[i]) <= kept.clamp(min=0)).sum()
        size += keys.numel()
    return torch.where(before < size, before + position, BEHIND)


def _positions(sizes: Sequence[int], offsets: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) + offset for i, offset in enumerate(offsets)]


def _masks(
    values: Sequence[Tensor], threshold: Tensor, tie_end: Tensor, positions: Sequence[int]
) -> list[Tensor]:
    select = torch.ops.fastprune.select_masks
    return [
        select([v.detach()], [], threshold, (tie_end - position).clamp(min=0), "magnitude")[0]
        for v, position in zip(values, positions, strict=True)
    ]
