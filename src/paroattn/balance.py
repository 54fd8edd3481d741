"""Which rank gets which heads, so that all are done at once: a plan knows what each head costs before anything runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paroattn.block_mask import block_count
from paroattn.errors import InputError
from paroattn.plan import Plan, call_shares

_FIXED = 16.0
"""What a row of blocks takes beside its kept blocks, in blocks of 8 bits: 14 to 26 by the times at densities 0.3 and
0.05 at two lengths of videos (lab/benchmarks/records/attention-h200.jsonl)."""
_SIXTEEN_BITS = 1.7
"""What a block takes in 16 bits, in blocks of 8 bits (the same record)."""


class Load(NamedTuple):
    """How evenly attention is spread over ranks, weighted by how often each layer is called in each step bucket.

    Attributes:
        slowest: time of the slowest rank of each call over the mean, 1 at best: ranks wait for each other in each call.
        shares: of all costs, by rank.
    """

    slowest: float
    shares: tuple[float, ...]


def head_costs(plan: Plan) -> Tensor:
    """What each head takes in a call, in kept 8-bit blocks per row of blocks, float64 [step buckets, layers, heads]."""
    columns = block_count(plan.grid.tokens, plan.block_kv)
    kept = plan.densities() * columns
    # Means stand for the blocks that are skipped, 64 to a block of them.
    kept += plan.compensate * (columns / 64)
    in_8_bits = torch.tensor([precision.qk in ("int8", "int4") for precision in plan.precisions])
    factor = torch.where(in_8_bits, 1.0, _SIXTEEN_BITS)[plan.precision_index.long()]
    return kept * factor + _FIXED


def balanced_heads(plan: Plan, ranks: int) -> Tensor:
    """Heads in the order in which ranks take them, as many each, int64 [step buckets, layers, heads].

    The costliest head goes to the rank with the least to do, then pairs change places while that helps the rank with
    the most. In all step buckets a rank has as many heads of each precision, and in the same places.

    Raises:
        InputError: heads that cannot be shared evenly.

    Example:
        >>> balanced_heads(plan, 4)[0, 0].view(4, -1)  # doctest: +SKIP
    """
    check_ranks(plan.model.heads, ranks)
    costs = head_costs(plan)
    shares = call_shares(plan.bucket_edges, plan.usage)
    found = torch.empty(costs.shape, dtype=torch.int64)
    for layer in range(plan.model.layers):
        kinds = plan.precision_index[layer].tolist()
        room = None
        if len(set(kinds)) > 1:
            whole = _spread((costs[:, layer] * shares[:, layer, None]).sum(0).tolist(), ranks, [0] * len(kinds), None)
            room = [[sum(kinds[head] == kind for head in own) for kind in range(max(kinds) + 1)] for own in whole]
        for bucket in range(plan.buckets):
            own = _spread(costs[bucket, layer].tolist(), ranks, kinds if room else [0] * len(kinds), room)
            found[bucket, layer] = torch.tensor([head for heads in own for head in heads])
    return found


def load_of(plan: Plan, heads: Tensor, ranks: int) -> Load:
    """How even ranks are that take `heads` [step buckets, layers, heads] in their order, as many each."""
    shares = call_shares(plan.bucket_edges, plan.usage)
    by_rank = head_costs(plan).gather(-1, heads).unflatten(-1, (ranks, -1)).sum(-1) * shares.unsqueeze(-1)
    total = float(by_rank.sum())
    slowest = float(by_rank.amax(-1).sum()) * ranks / total
    return Load(slowest, tuple((by_rank.sum((0, 1)) / total).tolist()))


def heads_in_order(plan: Plan) -> Tensor:
    """The model's own order of heads, as `balanced_heads` has it."""
    return torch.arange(plan.model.heads).expand(plan.mask_index.shape)


def check_ranks(heads: int, ranks: int) -> None:
    """Raise `InputError` unless ranks can have as many heads each."""
    if ranks < 1 or heads % ranks:
        raise InputError(f"ranks is {ranks}; expected a number that divides the {heads} heads of the model")


def _spread(costs: list[float], ranks: int, kinds: list[int], room: list[list[int]] | None) -> list[list[int]]:
    """The heads of each rank, by kind and number; `room` says how many of each kind it takes, None: as many in all."""
    left = [list(own) for own in room] if room else [[len(costs) // ranks] for _ in range(ranks)]
    loads = [0.0] * ranks
    own: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(costs)), key=lambda head: (-costs[head], head)):
        rank = min((rank for rank in range(ranks) if left[rank][kinds[head]]), key=lambda rank: loads[rank])
        own[rank].append(head)
        left[rank][kinds[head]] -= 1
        loads[rank] += costs[head]
    while True:
        most = max(range(ranks), key=lambda rank: loads[rank])
        best, swap = loads[most] * (1 - 1e-9), None
        for rank in range(ranks):
            for mine in own[most] if rank != most else ():
                for other in own[rank]:
                    moved = costs[mine] - costs[other]
                    worse = max(loads[most] - moved, loads[rank] + moved)
                    if kinds[mine] == kinds[other] and moved > 0 and worse < best:
                        best, swap = worse, (rank, mine, other)
        if swap is None:
            return [sorted(heads, key=lambda head: (kinds[head], head)) for heads in own]
        rank, mine, other = swap
        own[most][own[most].index(mine)], own[rank][own[rank].index(other)] = other, mine
        loads[most] -= costs[mine] - costs[other]
        loads[rank] += costs[mine] - costs[other]
