"""Ulysses: the ranks of a group exchange tokens for heads, attend to whole sequences, and exchange back.

Before, a rank has all heads of its tokens; between, all tokens of its heads. Parts of a sequence that were split apart,
text and visual tokens, are sent apart, so that they arrive in the model's order. The idea is DeepSpeed's (arXiv
2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paroattn.errors import InputError
from paroattn.ops.opaque import opaque


class Part(NamedTuple):
    """Tokens that follow each other in a sequence.

    Attributes:
        counts: how many each rank has.
        is_whole: every rank has all of them, not a share.
    """

    counts: tuple[int, ...]
    is_whole: bool = False

    @property
    def tokens(self) -> int:
        return self.counts[0] if self.is_whole else sum(self.counts)


class Exchange(NamedTuple):
    """An exchange that a layer makes in a call.

    Attributes:
        heads: int64 [H], numbers of the heads in the order in which ranks take them, as many each; None: in their own.
        parts: of the sequence, in its order.
        group: name of the process group.
        rank: of this process in it.
    """

    heads: Tensor | None
    parts: tuple[Part, ...]
    group: str
    rank: int

    @property
    def ranks(self) -> int:
        return len(self.parts[0].counts)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors [B, N of this rank, H, D] as [B, N, H of this rank, D]."""
        for name, x in (("query", query), ("key", key)):
            expected = sum(part.counts[self.rank] for part in self.parts), query.shape[2]
            if tuple(x.shape[1:3]) != expected:
                raise InputError(
                    f"{name} of rank {self.rank} has {x.shape[1]:,} tokens and {x.shape[2]} heads; expected "
                    f"{expected[0]:,} and {expected[1]}: this model's tokens are not split as paroattn knows it"
                )
        function = to_heads if torch.compiler.is_compiling() else _to_heads
        return function(query, key, value, self._order(query), *self._as_lists, self.group)

    def to_tokens(self, output: Tensor) -> Tensor:
        """An output [B, N, H of this rank, D] as [B, N of this rank, H, D]."""
        function = to_tokens if torch.compiler.is_compiling() else _to_tokens
        heads = self._order(output, self.ranks)
        return function(output, heads, *self._as_lists, self.group, self.rank)

    def whole_mask(self, mask: Tensor) -> Tensor:
        """A mask of keys [B, 1, 1, N of this rank] as [B, 1, 1, N]; one of all keys is returned as it is."""
        if mask.shape[-1] == sum(part.tokens for part in self.parts):
            return mask
        # Sent like a head of one channel to each rank.
        given = mask[:, 0, 0, :, None, None].to(torch.int8).expand(-1, -1, self.ranks, -1)
        whole, *_ = self._replace(heads=None).to_heads(given, given[..., :0], given[..., :0])
        return whole.flatten(1)[:, None, None].bool()

    def _order(self, x: Tensor, times: int = 1) -> Tensor:
        return torch.arange(x.shape[2] * times, device=x.device) if self.heads is None else self.heads

    @property
    def _as_lists(self) -> tuple[list[int], list[bool]]:
        return [count for part in self.parts for count in part.counts], [part.is_whole for part in self.parts]


def _parts_of(counts: Sequence[int], is_whole: Sequence[bool]) -> Iterator[Part]:
    ranks = len(counts) // len(is_whole)
    for number, whole in enumerate(is_whole):
        yield Part(tuple(counts[number * ranks : (number + 1) * ranks]), whole)


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, counts: list[int], is_whole: list[bool], group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parts, held = list(_parts_of(counts, is_whole)), len(heads) // ranks
    own_heads = heads[rank * held : (rank + 1) * held]
    results, sending = [], []
    for x in (query, key, value):
        batch, _, _, channels = x.shape
        whole = x.new_empty(sum(part.tokens for part in parts), batch, held, channels)
        given, received = 0, 0
        for part in parts:
            count = part.counts[rank]
            own, place = x.narrow(1, given, count), whole.narrow(0, received, part.tokens)
            if part.is_whole:
                place.copy_(own.index_select(2, own_heads).transpose(0, 1))
            elif x.numel():
                sent = _packed(own, heads, ranks)
                sizes, as_many = list(part.counts), [count] * ranks
                sending.append(dist.all_to_all_single(place, sent, sizes, as_many, group=group, async_op=True))
            given, received = given + count, received + part.tokens
        results.append(whole.transpose(0, 1))
    for work in sending:
        work.wait()
    return results[0], results[1], results[2]


def _to_tokens(
    output: Tensor, heads: Tensor, counts: list[int], is_whole: list[bool], group_name: str, rank: int
) -> Tensor:
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    ranks = dist.get_world_size(group)
    parts = list(_parts_of(counts, is_whole))
    batch, _, held, channels = output.shape
    by_token = output.transpose(0, 1).contiguous()
    result = output.new_empty(batch, sum(part.counts[rank] for part in parts), len(heads), channels)
    begin, places, sending = 0, 0, []
    for part in parts:
        count = part.counts[rank]
        sent = by_token.narrow(0, begin, part.tokens)
        received = output.new_empty(ranks * count, batch, held, channels)
        if part.is_whole:
            work = dist.all_gather_into_tensor(received, sent, group=group, async_op=True)
        else:
            as_many, sizes = [count] * ranks, list(part.counts)
            work = dist.all_to_all_single(received, sent, as_many, sizes, group=group, async_op=True)
        sending.append((work, received, result.narrow(1, places, count)))
        begin, places = begin + part.tokens, places + count
    for work, received, place in sending:
        work.wait()
        _unpack(received, heads, ranks, place)
    return result


def _packed(x: Tensor, heads: Tensor, ranks: int) -> Tensor:
    """Tokens [B, n, H, D] as they are sent: [ranks * n, B, H / ranks, D]."""
    if x.is_cuda:
        from paroattn.ops.gpu.exchange import pack

        return pack(x, heads, ranks)
    batch, count, number, channels = x.shape
    parted = x.index_select(2, heads).view(batch, count, ranks, number // ranks, channels)
    return parted.permute(2, 1, 0, 3, 4).flatten(0, 1)


def _unpack(received: Tensor, heads: Tensor, ranks: int, place: Tensor) -> None:
    """Put what came back, [ranks * n, B, H / ranks, D], into tokens [B, n, H, D]."""
    if received.is_cuda:
        from paroattn.ops.gpu.exchange import unpack

        unpack(received, heads, ranks, place)
        return
    parted = received.unflatten(0, (ranks, -1)).permute(2, 1, 0, 3, 4)
    place.index_copy_(2, heads, parted.flatten(2, 3))


def _fake_heads(
    query: Tensor, key: Tensor, value: Tensor, heads: Tensor, counts: list[int], is_whole: list[bool], group: str
) -> tuple[Tensor, ...]:
    parts = list(_parts_of(counts, is_whole))
    tokens, held = sum(part.tokens for part in parts), len(heads) // len(parts[0].counts)
    return tuple(x.new_empty(tokens, x.shape[0], held, x.shape[3]).transpose(0, 1) for x in (query, key, value))


def _fake_tokens(
    output: Tensor, heads: Tensor, counts: list[int], is_whole: list[bool], group: str, rank: int
) -> Tensor:
    tokens = sum(part.counts[rank] for part in _parts_of(counts, is_whole))
    return output.new_empty(output.shape[0], tokens, len(heads), output.shape[3])


to_heads = opaque(
    "to_heads(Tensor query, Tensor key, Tensor value, Tensor heads, int[] counts, bool[] is_whole, str group) "
    "-> (Tensor, Tensor, Tensor)",
    _to_heads,
    _fake_heads,
)
to_tokens = opaque(
    "to_tokens(Tensor output, Tensor heads, int[] counts, bool[] is_whole, str group, int rank) -> Tensor",
    _to_tokens,
    _fake_tokens,
)
