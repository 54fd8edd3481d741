"""Block statistics of attention maps (paper, sections 4.1 and 4.2), one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from paroattn.block_mask import BLOCK, block_count
from paroattn.errors import InputError
from paroattn.order import inverse_order

_CHUNK_ENTRIES = 2**20  # entries of P held at once, so that a chunk stays in the processor's cache
_GPU_CHUNK_ENTRIES = 2**26  # the same on a GPU, which large chunks keep busy


@dataclass(frozen=True)
class OrderCriterion:
    """Parameters of the paper's choice of a token order.

    Attributes:
        alpha: weight of sparsity against incoherence, in [0, 1].
        epsilon: entries of P below this count as small. None stands for `relative_epsilon` / N: the paper's 1e-3 is
            the mean of P at N = 1,000 but 18 times the mean at N = 17,776, so a value relative to 1 / N serves every
            length.
        relative_epsilon: see epsilon.
        sigma: a block is sparse when at least this share of its entries is small, in (0, 1].
    """

    alpha: float = 0.5
    epsilon: float | None = None
    relative_epsilon: float = 1.0
    sigma: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is {self.alpha}; expected a number from 0 to 1")
        if not 0 < self.sigma <= 1:
            raise InputError(f"sigma is {self.sigma}; expected a number above 0, up to 1")
        if self.relative_epsilon <= 0 or (self.epsilon is not None and self.epsilon <= 0):
            raise InputError("epsilon and relative_epsilon must be above 0")

    def epsilon_for(self, tokens: int) -> float:
        return self.relative_epsilon / tokens if self.epsilon is None else self.epsilon


def probability_blocks(
    q: Tensor, k: Tensor, order: Tensor, scale: float, row_blocks: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of one head's attention map P in a given order, cut into blocks.

    Args:
        q, k: [N, D] in the model's order, taken as float32.
        order: gather index [N].
        scale: factor of the logits.
        row_blocks: which rows of blocks; default all.

    Yields:
        rows int64 [c] and P [c, 64, kv blocks, 64]; entries beyond the sequence are zero.
    """
    tokens = len(order)
    rows_needed, columns = block_count(tokens, BLOCK), block_count(tokens, BLOCK)
    if row_blocks is None:
        row_blocks = torch.arange(rows_needed)
    q, k = q.float()[order], k.float()[order]
    for rows in row_blocks.split(max(1, _chunk_entries(q.device) // (BLOCK * tokens))):
        index = (rows.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten()
        p = (q[index.clamp(max=tokens - 1)] @ k.mT * scale).softmax(-1)
        p[index >= tokens] = 0
        p = pad(p, (0, columns * BLOCK - tokens))
        yield rows, p.view(len(rows), BLOCK, columns, BLOCK)


def _chunk_entries(device: torch.device) -> int:
    return _CHUNK_ENTRIES if device.type == "cpu" else _GPU_CHUNK_ENTRIES


def block_areas(tokens: int) -> Tensor:
    """Number of entries in each block [q blocks, kv blocks]; the last row and column may be partial."""
    sizes = torch.full((block_count(tokens, BLOCK),), float(BLOCK), dtype=torch.float32)
    sizes[-1] = tokens - BLOCK * (len(sizes) - 1)
    return sizes.outer(sizes)


def order_metrics(
    q: Tensor, k: Tensor, order: Tensor, scale: float, criterion: OrderCriterion, row_blocks: Tensor | None = None
) -> tuple[float, float]:
    """Share of sparse blocks (M_sparse) and mean incoherence (M_quant) of one head in one order.

    Args: as `probability_blocks`.

    Returns:
        M_sparse in [0, 1], higher is better, and M_quant >= 1, lower is better.
    """
    tokens = len(order)
    areas, epsilon = block_areas(tokens).to(q.device), criterion.epsilon_for(tokens)
    sparse = incoherence = blocks = 0.0
    for rows, p in probability_blocks(q, k, order, scale, row_blocks):
        area = areas[rows]
        small_share = 1 - (p >= epsilon).sum((1, 3)) / area
        mean = p.sum((1, 3)) / area
        ratio = torch.where(mean > 0, p.amax((1, 3)) / mean, 1.0)
        sparse += float((small_share >= criterion.sigma).sum())
        incoherence += float(ratio.double().sum())
        blocks += area.numel()
    return sparse / blocks, incoherence / blocks


def block_sums(q: Tensor, k: Tensor, orders: Sequence[Tensor], scale: float) -> Tensor:
    """Sum of P in each block, of one head in several orders at once.

    P is computed once, in the model's order; multiplying it with the 0/1 assignment of tokens to kv blocks adds up its
    columns in every order, and rows are then added to their q blocks.

    Args:
        q, k: [N, D] in the model's order, taken as float32.
        orders: gather indices [N].
        scale: factor of the logits.

    Returns:
        float32 [orders, q blocks, kv blocks]; each row of blocks sums to its number of tokens.
    """
    tokens, blocks = len(q), block_count(len(q), BLOCK)
    q, k = q.float(), k.float()
    block_of = torch.stack([inverse_order(order) // BLOCK for order in orders]).to(q.device)  # [orders, N]
    assignment = one_hot(block_of, blocks).transpose(0, 1).flatten(1).to(q.dtype)  # [N, orders * blocks]
    sums = torch.zeros(len(orders), blocks, blocks, device=q.device, dtype=torch.float32)
    for rows in torch.arange(tokens, device=q.device).split(max(1, _chunk_entries(q.device) // tokens)):
        p = (q[rows] @ k.mT * scale).softmax(-1)
        columns = (p @ assignment).unflatten(1, (len(orders), blocks))
        for number in range(len(orders)):
            sums[number].index_add_(0, block_of[number, rows], columns[:, number])
    return sums.cpu()
