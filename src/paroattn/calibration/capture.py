"""Accumulates statistics from attention calls of a running model; queries and keys are not kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration.statistics import OrderCriterion, block_sums, order_metrics
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
        rows = block_count(grid.tokens, BLOCK)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(rows, generator=generator)[: max(1, round(rows * row_share))]
        self._row_blocks = drawn.sort().values

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
