"""Accumulates statistics from attention calls of a running model; queries, keys and values are not kept.

Statistics of blocks cover the visual tokens. Blocks that touch text are always computed, and their number may differ
from prompt to prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count, text_blocks, visual_blocks
from paroattn.calibration.cost_codes import with_added
from paroattn.calibration.costs import LEVELS, SkipCosts
from paroattn.calibration.kernels import KernelsFor, reference_everywhere
from paroattn.calibration.statistics import OrderCriterion, order_metrics, probability_blocks
from paroattn.grid import TokenGrid
from paroattn.integrations.observe import ObservedCall
from paroattn.order import token_order

_FEWEST_ROWS = 8  # of blocks, where a share of them is looked at


class Accumulator:
    """What is added up over attention calls, as tensors that can be saved and put back."""

    _accumulated: tuple[str, ...] = ()  # names of the attributes that are added to; some may be None

    def state(self) -> dict[str, Tensor]:
        """Everything that was added up so far, without a copy."""
        return {name: tensor for name in self._accumulated if (tensor := getattr(self, name)) is not None}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of an accumulator that was made with the same arguments."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)


class OrderScores(Accumulator):
    """Mean order metrics per layer, head and candidate order.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        order_names: the candidates.
        criterion: thresholds of the metrics.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`.
    """

    _accumulated = ("_totals", "_samples")

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
        self._order_names = order_names
        self._totals = torch.zeros(2, layers, heads, len(order_names), dtype=torch.float64)
        self._samples = torch.zeros(layers, dtype=torch.float64)
        self._row_blocks = _drawn_rows(grid, BLOCK, row_share, seed)

    def add(self, call: ObservedCall) -> None:
        """Take one attention call."""
        for sample in call.samples():
            for head in range(call.heads):
                q, k, _ = sample.head(head)
                for number, name in enumerate(self._order_names):
                    order = order_of(name, sample.grid)
                    metrics = order_metrics(q, k, order, call.scale, self.criterion, self._row_blocks)
                    self._totals[:, call.layer, head, number] += torch.tensor(metrics, dtype=torch.float64)
            self._samples[call.layer] += 1

    def means(self) -> tuple[Tensor, Tensor]:
        """M_sparse and M_quant, each float64 [layers, heads, orders]."""
        sparse, incoherence = self._totals / self._samples.view(1, -1, 1, 1)
        return sparse, incoherence


class BlockSums(Accumulator):
    """Mean block sums per step bucket, layer and head, for one or more choices of the heads' orders.

    Args:
        buckets: number of step buckets.
        choices: (order names, uint8 [layers, heads] index into them), one per choice.
        grid: the token grid.
        kernels_for: what computes on a device.
    """

    _accumulated = ("_sums", "_samples")

    def __init__(
        self,
        buckets: int,
        choices: Sequence[tuple[tuple[str, ...], Tensor]],
        grid: TokenGrid,
        kernels_for: KernelsFor = reference_everywhere,
    ):
        blocks = block_count(grid.tokens, BLOCK)
        layers, heads = choices[0][1].shape
        self._visual = (..., *visual_blocks(grid))
        self._choices = choices
        self._kernels_for = kernels_for
        self._sums = torch.zeros(len(choices), buckets, layers, heads, blocks, blocks, dtype=torch.float32)
        self._samples = torch.zeros(buckets, layers, dtype=torch.float32)

    def add(self, bucket: int, call: ObservedCall) -> None:
        """Take one attention call."""
        layer = call.layer
        block_sums = self._kernels_for(call.query.device).block_sums
        for sample in call.samples():
            for head in range(call.heads):
                q, k, _ = sample.head(head)
                orders = [order_of(names[int(index[layer, head])], sample.grid) for names, index in self._choices]
                sums = block_sums(q, k, orders, call.scale)
                self._sums[:, bucket, layer, head][self._visual] += sums[self._visual]
            self._samples[bucket, layer] += 1

    def means(self) -> Tensor:
        """Mean block sums [choices, buckets, layers, heads, q blocks, kv blocks]; zero where nothing was captured."""
        return self._sums / self._samples.clamp(min=1).view(*self._samples.shape, 1, 1, 1)


class OrderErrors(Accumulator):
    """Errors of the attention output when blocks are skipped, per layer, head and candidate order.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        order_names: the candidates.
        block_q: queries per block, 64 or 128.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`.
        levels: densities at which errors are compared.
        kernels_for: what computes on a device.
    """

    _accumulated = ("_errors",)

    def __init__(
        self,
        layers: int,
        heads: int,
        grid: TokenGrid,
        order_names: tuple[str, ...],
        block_q: int,
        row_share: float,
        seed: int,
        levels: Sequence[float] = LEVELS,
        kernels_for: KernelsFor = reference_everywhere,
    ):
        self.order_names = order_names
        self._levels = levels
        self._kernels_for = kernels_for
        self._block_q = block_q
        self._q_blocks = _drawn_rows(grid, block_q, row_share, seed)
        self._rows_of_blocks = block_count(grid.tokens, block_q)
        self._errors = torch.zeros(layers, heads, len(order_names), len(levels), dtype=torch.float64)

    def add(self, call: ObservedCall) -> None:
        """Take one attention call."""
        skip_costs = self._kernels_for(call.query.device).skip_costs
        for sample in call.samples():
            required = text_blocks(sample.grid, self._block_q)
            settings = {"block_q": self._block_q, "q_blocks": self._q_blocks, "levels": self._levels}
            orders = [order_of(name, sample.grid, call.query.device) for name in self.order_names]
            heads = [head for head in range(call.heads) for _ in orders]
            given = (*sample.heads(), orders * call.heads, call.scale, required)
            # A skipped block is dropped or approximated, whichever is better.
            errors = [
                found.errors.amin(0) / max(found.norm, 1e-30) for found in skip_costs(*given, heads=heads, **settings)
            ]
            self._errors[call.layer] += torch.stack(errors).unflatten(0, (call.heads, -1))

    @property
    def work(self) -> float:
        """What a call takes over its attention: outputs and costs, then errors of both ways, at rows in each order."""
        share = len(self._q_blocks) / self._rows_of_blocks
        return len(self.order_names) * share * 2 * (1 + max(self._levels))

    def choose(self) -> Tensor:
        """The order of each head, uint8 [layers, heads]: the least geometric mean of its errors over the levels.

        Layers that were never looked at get the order that most heads have.
        """
        best = self._errors.clamp(min=1e-30).log().mean(-1).argmin(-1)
        seen = self._errors.flatten(1).any(1)
        if bool(seen.any()):
            best[~seen] = best[seen].flatten().mode().values
        return best.to(torch.uint8)


class StepChange(Accumulator):
    """How much the heads' attention maps change from one denoising step to the next.

    Args:
        layers, heads: of the model.
        grid: its token grid.
        row_share: share of the rows of blocks that is looked at, drawn once from `seed`; at 0 only which layers are
            called is known, and no change is measured.
    """

    def __init__(self, layers: int, heads: int, grid: TokenGrid, row_share: float, seed: int):
        self._rows = _drawn_rows(grid, BLOCK, row_share, seed)
        self._columns = visual_blocks(grid)[1]
        self._shape = (layers, heads, len(self._rows), block_count(grid.tokens, BLOCK))
        self._sums: dict[int, Tensor] = {}
        self._calls: dict[int, set[int]] = {}

    def add(self, call: ObservedCall) -> None:
        """Take one attention call."""
        sums = self._sums.setdefault(call.step, torch.zeros(self._shape, dtype=torch.float32))
        self._calls.setdefault(call.step, set()).add(call.layer)
        for sample in call.samples() if len(self._rows) else ():
            order = torch.arange(sample.grid.tokens)
            for head in range(call.heads):
                q, k, _ = sample.head(head)
                for rows, p in probability_blocks(q, k, order, call.scale, self._rows):
                    places = torch.searchsorted(self._rows, rows)
                    sums[call.layer, head, places, self._columns] += p.sum((1, 3))[:, self._columns].cpu()

    def state(self) -> dict[str, Tensor]:
        called = torch.tensor([(step, layer) for step, layers in self._calls.items() for layer in sorted(layers)])
        return {"calls": called.view(-1, 2), **{str(step): sums for step, sums in self._sums.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {int(name): tensor.clone() for name, tensor in state.items() if name != "calls"}
        self._calls = {step: set() for step in self._sums}
        for step, layer in state["calls"].tolist():
            self._calls[step].add(layer)

    def changes(self) -> list[float]:
        """Mean relative L2 change of the block sums from each step to the next; one fewer than there are steps.

        It is infinite where other layers begin to be called, which is where a second transformer takes over.
        """
        found = []
        for before, after in pairwise(sorted(self._sums)):
            if self._calls[before] != self._calls[after]:
                found.append(float("inf"))
                continue
            layers = sorted(self._calls[before])
            old, new = self._sums[before][layers].flatten(2), self._sums[after][layers].flatten(2)
            found.append(float(((new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-30)).mean()))
        return found


class BlockCosts(Accumulator):
    """Mean costs and errors of skipping blocks per step bucket, layer and head, in the heads' orders.

    Only ranks of costs within a head matter, and a large model has billions of them: they are kept in a byte each,
    or in bfloat16 where many samples are added up.

    Args:
        buckets: number of step buckets.
        order_names: distinct orders.
        order_index: uint8 [layers, heads] into them.
        grid: the token grid.
        block_q: queries per block, 64 or 128.
        block_sums: also keep the block sums of P.
        row_share: share of a block's rows that stand for it in its costs.
        error_share: share of the rows of blocks in which errors are measured.
        in_bytes: keep costs as codes.
        seed: of the rows that are drawn.
        kernels_for: what computes on a device.
        new_zeros: makes the tensor of costs, of a shape and dtype.
    """

    _accumulated = ("_block_sums", "_costs", "_tops", "_errors", "_norms", "_samples")

    def __init__(
        self,
        buckets: int,
        order_names: tuple[str, ...],
        order_index: Tensor,
        grid: TokenGrid,
        block_q: int = BLOCK,
        *,
        block_sums: bool = False,
        row_share: float = 1.0,
        error_share: float = 1.0,
        in_bytes: bool = False,
        seed: int = 0,
        kernels_for: KernelsFor = reference_everywhere,
        new_zeros: Callable[[tuple[int, ...], torch.dtype], Tensor] = lambda shape, dtype: torch.zeros(
            shape, dtype=dtype
        ),
    ):
        self._rows = _rows_of_a_block(block_q, row_share, seed)
        self._error_blocks = _drawn_rows(grid, block_q, error_share, seed)
        self._all_errors = row_share == error_share == 1
        # Those that are looked at stand for the others.
        self._error_scale = max(1, visual_blocks(grid, block_q)[0].stop) / len(self._error_blocks)
        heads = (buckets, *order_index.shape)
        blocks = (*heads, block_count(grid.tokens, block_q), block_count(grid.tokens, BLOCK))
        self._names = [[order_names[index] for index in layer] for layer in order_index.tolist()]
        self._visual = (..., *visual_blocks(grid, block_q))
        self._block_q = block_q
        self._kernels_for = kernels_for
        self._block_sums = torch.zeros(blocks, dtype=torch.float32) if block_sums else None
        self._costs = new_zeros((2, *blocks), torch.uint8 if in_bytes else torch.bfloat16)
        self._tops = torch.zeros(heads, dtype=torch.float32) if in_bytes else None
        self._errors = torch.zeros(2, *heads, len(LEVELS), dtype=torch.float64)
        self._norms = torch.zeros(heads, dtype=torch.float64)
        self._samples = torch.zeros(heads[:2], dtype=torch.float32)

    def add(self, bucket: int, call: ObservedCall) -> None:
        """Take one attention call."""
        skip_costs = self._kernels_for(call.query.device).skip_costs
        for sample in call.samples():
            orders = [order_of(name, sample.grid, call.query.device) for name in self._names[call.layer]]
            required = text_blocks(sample.grid, self._block_q)
            given = (*sample.heads(), orders, call.scale, required)
            if self._all_errors:
                costs = errors = skip_costs(*given, block_q=self._block_q)
                scale = 1.0
            else:
                costs = skip_costs(*given, block_q=self._block_q, rows=self._rows, levels=())
                errors = skip_costs(*given, block_q=self._block_q, q_blocks=self._error_blocks)
                scale = self._error_scale
            self._add(costs, bucket, call.layer)
            self._errors[:, bucket, call.layer] += scale * torch.stack([own.errors for own in errors], 1)
            self._norms[bucket, call.layer] += scale * torch.tensor([own.norm for own in errors], dtype=torch.float64)
            self._samples[bucket, call.layer] += 1

    def use_orders(self, layer: int, names: list[str]) -> None:
        """From now on the heads of a layer have these orders."""
        self._names[layer] = names

    def copy(self, bucket: int, to: int, layer: int) -> None:
        """Take what one bucket has of a layer for another one, too."""
        for tensor in self._of_buckets():
            tensor[to, layer] = tensor[bucket, layer]

    def clear(self, bucket: int, layer: int) -> None:
        """Forget what a bucket has of a layer."""
        for tensor in self._of_buckets():
            tensor[bucket, layer] = 0

    def _of_buckets(self) -> list[Tensor]:
        """All that is kept, each [buckets, layers, ...]."""
        both_ways = [tensor.transpose(0, 1).transpose(1, 2) for tensor in (self._errors, self._costs)]
        others = (self._norms, self._samples, self._tops, self._block_sums)
        return both_ways + [tensor for tensor in others if tensor is not None]

    def _add(self, found: Sequence[SkipCosts], bucket: int, layer: int) -> None:
        """Take block sums and costs of the heads of a layer."""
        if self._block_sums is not None:
            sums = torch.stack([head.block_sums[self._visual] for head in found])
            self._block_sums[bucket, layer][self._visual] += sums.cpu()
        kept = self._costs[:, bucket, layer][self._visual]
        costs = torch.stack([head.costs[self._visual] for head in found], 1)  # [2, heads, q blocks, kv blocks]
        if self._tops is None:
            kept += costs.cpu()
        else:
            kept.copy_(with_added(kept, costs, self._tops[bucket, layer]))

    def means(self) -> dict[str, Any]:
        """What `CostStatistics` has under these names: means per sample, and costs, which are left summed over them."""
        samples = self._samples.clamp(min=1).unsqueeze(-1)
        return {
            "block_sums": None if self._block_sums is None else self._block_sums / samples.view(*samples.shape, 1, 1),
            "costs": self._costs,
            "tops": self._tops,
            "errors": self._errors / samples.unsqueeze(-1),
            "norms": self._norms / samples,
            "samples": self._samples,
        }


def _drawn_rows(grid: TokenGrid, block_q: int, share: float, seed: int) -> Tensor:
    """`share` of the rows of visual blocks, at least `_FEWEST_ROWS` of them unless it is zero, ascending."""
    rows = max(1, visual_blocks(grid, block_q)[0].stop)
    count = max(_FEWEST_ROWS, round(rows * share)) if share else 0
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _rows_of_a_block(block_q: int, share: float, seed: int) -> Tensor:
    """One row of each of equal parts of a block, drawn from `seed`, ascending."""
    count = max(8, round(share * block_q))  # a power of two for the kernels
    part = block_q // count
    return torch.arange(count) * part + torch.randint(part, (count,), generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=256)
def order_of(name: str, grid: TokenGrid, device: torch.device = torch.device("cpu")) -> Tensor:
    """`token_order` on a device, kept: calls of one model ask for the same ones again and again."""
    return token_order(name, grid).to(device)
