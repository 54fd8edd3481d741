"""Accumulates statistics from attention calls of a running model; queries, keys and values are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count, text_blocks
from paroattn.calibration.skip_cost import LEVELS, skip_costs
from paroattn.calibration.statistics import OrderCriterion, block_sums, order_metrics, probability_blocks
from paroattn.grid import TokenGrid
from paroattn.order import token_order


class OrderScores:
    """Mean order metrics per layer, head and candidate order.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        order_names: the candidates.
        criterion: thresholds of the metrics.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        grid: TokenGrid,
        order_names: tuple[str, ...],
        criterion: OrderCriterion,
        row_share: float,
        seed: int,
    ):
        self.criterion = criterion
        self._orders = [token_order(name, grid) for name in order_names]
        self._totals = torch.zeros(2, layers, heads, len(order_names), dtype=torch.float64)
        self._calls = torch.zeros(layers, dtype=torch.float64)
        self._row_blocks = _drawn_rows(block_count(grid.tokens, BLOCK), row_share, seed)

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Take one attention call: query, key [B, N, H, D] in the model's order."""
        for q, k in zip(query.float().cpu(), key.float().cpu(), strict=True):
            for head in range(query.shape[2]):
                for number, order in enumerate(self._orders):
                    metrics = order_metrics(q[:, head], k[:, head], order, scale, self.criterion, self._row_blocks)
                    self._totals[:, layer, head, number] += torch.tensor(metrics, dtype=torch.float64)
            self._calls[layer] += 1

    def means(self) -> tuple[Tensor, Tensor]:
        """M_sparse and M_quant, each float64 [layers, heads, orders]."""
        sparse, incoherence = self._totals / self._calls.view(1, -1, 1, 1)
        return sparse, incoherence


class BlockSums:
    """Mean block sums per step bucket, layer and head, for one or more choices of the heads' orders.

    Args:
        buckets: number of step buckets.
        choices: (order names, uint8 [layers, heads] index into them), one per choice.
        grid: the token grid.
    """

    def __init__(self, buckets: int, choices: Sequence[tuple[tuple[str, ...], Tensor]], grid: TokenGrid):
        blocks = block_count(grid.tokens, BLOCK)
        layers, heads = choices[0][1].shape
        self._choices = [(index, [token_order(name, grid) for name in names]) for names, index in choices]
        self._sums = torch.zeros(len(choices), buckets, layers, heads, blocks, blocks)
        self._calls = torch.zeros(buckets, layers)

    def add(self, bucket: int, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Take one attention call: query, key [B, N, H, D] in the model's order."""
        for q, k in zip(query.float().cpu(), key.float().cpu(), strict=True):
            for head in range(query.shape[2]):
                orders = [table[int(index[layer, head])] for index, table in self._choices]
                self._sums[:, bucket, layer, head] += block_sums(q[:, head], k[:, head], orders, scale)
            self._calls[bucket, layer] += 1

    def means(self) -> Tensor:
        """Mean block sums [choices, buckets, layers, heads, q blocks, kv blocks]; NaN where nothing was captured."""
        return self._sums / self._calls.view(*self._calls.shape, 1, 1, 1)


class OrderErrors:
    """Errors of the attention output when blocks are skipped, per layer, head and candidate order.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        order_names: the candidates.
        block_q: queries per block, 64 or 128.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        grid: TokenGrid,
        order_names: tuple[str, ...],
        block_q: int,
        row_share: float,
        seed: int,
    ):
        self._orders = [token_order(name, grid) for name in order_names]
        self._required = text_blocks(grid, block_q)
        self._block_q = block_q
        self._q_blocks = _drawn_rows(block_count(grid.tokens, block_q), row_share, seed)
        self._errors = torch.zeros(layers, heads, len(order_names), len(LEVELS), dtype=torch.float64)

    def add(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Take one attention call: query, key, value [B, N, H, D] in the model's order."""
        measure = partial(
            skip_costs, scale=scale, required=self._required, block_q=self._block_q, q_blocks=self._q_blocks
        )

        def compare(head: int) -> None:
            for q, k, v in _samples(head, query, key, value):
                for number, order in enumerate(self._orders):
                    found = measure(q, k, v, order)
                    # A skipped block is dropped or approximated, whichever is better.
                    self._errors[layer, head, number] += found.errors.amin(0) / max(found.norm, 1e-30)

        _for_each_head(compare, query)

    def choose(self) -> Tensor:
        """The order of each head, uint8 [layers, heads]: the least geometric mean of its errors over `LEVELS`."""
        return self._errors.clamp(min=1e-30).log().mean(-1).argmin(-1).to(torch.uint8)


class StepChange:
    """How much the heads' attention maps change from one denoising step to the next.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`.
    """

    def __init__(self, layers: int, heads: int, grid: TokenGrid, row_share: float, seed: int):
        blocks = block_count(grid.tokens, BLOCK)
        self._rows = _drawn_rows(blocks, row_share, seed)
        self._shape = (layers, heads, len(self._rows), blocks)
        self._sums: dict[int, Tensor] = {}

    def add(self, step: int, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Take one attention call of a denoising step: query, key [B, N, H, D] in the model's order."""
        sums = self._sums.setdefault(step, torch.zeros(self._shape))
        order = torch.arange(query.shape[1])
        for q, k in zip(query.float().cpu(), key.float().cpu(), strict=True):
            for head in range(query.shape[2]):
                for rows, p in probability_blocks(q[:, head], k[:, head], order, scale, self._rows):
                    sums[layer, head, torch.searchsorted(self._rows, rows)] += p.sum((1, 3))

    def changes(self) -> list[float]:
        """Mean relative L2 change of the block sums from each step to the next; one fewer than there are steps."""
        steps = [self._sums[step] for step in sorted(self._sums)]
        found = []
        for before, after in pairwise(steps):
            difference = (after - before).flatten(2).norm(dim=-1) / before.flatten(2).norm(dim=-1)
            found.append(float(difference.mean()))
        return found


class BlockCosts:
    """Mean costs and errors of skipping blocks per step bucket, layer and head, in the heads' orders.

    Args:
        buckets: number of step buckets.
        order_names: distinct orders.
        order_index: uint8 [layers, heads] into them.
        grid: the token grid.
        block_q: queries per block, 64 or 128.
    """

    def __init__(
        self, buckets: int, order_names: tuple[str, ...], order_index: Tensor, grid: TokenGrid, block_q: int = BLOCK
    ):
        layers, heads = order_index.shape
        rows, columns = block_count(grid.tokens, block_q), block_count(grid.tokens, BLOCK)
        orders = [token_order(name, grid) for name in order_names]
        self._orders = [[orders[index] for index in layer] for layer in order_index.tolist()]
        self._required = text_blocks(grid, block_q)
        self._block_q = block_q
        self._block_sums = torch.zeros(buckets, layers, heads, rows, columns)
        self._costs = torch.zeros(2, buckets, layers, heads, rows, columns)
        self._errors = torch.zeros(2, buckets, layers, heads, len(LEVELS), dtype=torch.float64)
        self._norms = torch.zeros(buckets, layers, heads, dtype=torch.float64)
        self._calls = torch.zeros(buckets, layers)

    def add(self, bucket: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Take one attention call: query, key, value [B, N, H, D] in the model's order."""

        def add_head(head: int) -> None:
            order = self._orders[layer][head]
            for q, k, v in _samples(head, query, key, value):
                found = skip_costs(q, k, v, order, scale, self._required, block_q=self._block_q)
                self._block_sums[bucket, layer, head] += found.block_sums
                self._costs[:, bucket, layer, head] += found.costs
                self._errors[:, bucket, layer, head] += found.errors
                self._norms[bucket, layer, head] += found.norm

        _for_each_head(add_head, query)
        self._calls[bucket, layer] += len(query)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per call: block sums of P [buckets, layers, heads, q blocks, kv blocks], costs [2, ...] and errors
        [2, buckets, layers, heads, levels] as `SkipCosts` has them, norms [buckets, layers, heads].
        """
        calls = self._calls.unsqueeze(-1)
        per_block = calls.view(*calls.shape, 1, 1)
        return (
            self._block_sums / per_block,
            self._costs / per_block,
            self._errors / calls.unsqueeze(-1),
            self._norms / calls,
        )


def _samples(head: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """One head of tensors [B, N, H, D], sample by sample, as float32 [N, D]."""
    return zip(*(tensor[:, :, head].float() for tensor in tensors), strict=True)


def _for_each_head(task: Callable[[int], None], query: Tensor) -> None:
    """Call `task` with every head of query [B, N, H, D]; on a CPU one thread takes one head at a time.

    Many small operations in a row are faster so than each of them spread over all threads, above all when something
    else runs beside them.
    """
    threads = torch.get_num_threads()
    if query.device.type != "cpu" or threads == 1:
        for head in range(query.shape[2]):
            task(head)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(task, range(query.shape[2])))
    finally:
        torch.set_num_threads(threads)


def _drawn_rows(rows: int, share: float, seed: int) -> Tensor:
    """At least one and `share` of `rows` row numbers, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows, generator=generator)[: max(1, round(rows * share))].sort().values
