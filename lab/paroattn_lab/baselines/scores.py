"""Scores of blocks from the query and key of one call: what dynamic rules expect of each block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from paroattn.block_mask import BLOCK, block_count

LEAST_SIMILARITY = 0.5
"""A block is judged by its mean when the cosine similarity of its tokens to the mean is at least this, on average."""

_UNPREDICTABLE = 2.0  # above all other scores, which are shares


def mean_similarity(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention between the means of blocks (SpargeAttn).

    A block's score is the share of its row that the block and all smaller ones of the row hold. Keeping the scores
    above a threshold is thus SpargeAttn's choice: in each row the fewest blocks that hold a given share.

    Where the tokens of a block of queries or keys are unlike each other, the mean does not tell what to skip.
    SpargeAttn keeps such rows and columns whole and leaves the columns out of the softmax. Here they come before all
    other blocks; when the density does not suffice for all of them, those with the largest scores are kept.

    Args:
        q, k: [N, D] float32, in the order of the mask.
        scale: factor of the logits.

    Returns:
        float64 [q blocks, kv blocks].
    """
    q_mean, q_similarity = _means(q)
    k_mean, k_similarity = _means(k)
    logits = (q_mean @ k_mean.mT * scale).double()
    unlike_k = (k_similarity < LEAST_SIMILARITY).unsqueeze(0)
    unpredictable = (q_similarity < LEAST_SIMILARITY).unsqueeze(1) | unlike_k
    judged = _share_from_below(logits.masked_fill(unlike_k, -torch.inf).softmax(-1))
    return torch.where(unpredictable, _UNPREDICTABLE + _share_from_below(logits.softmax(-1)), judged)


def _means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each block [blocks, D], and the mean cosine similarity of its tokens to it [blocks]; x [N, D]."""
    blocks = pad(x, (0, 0, 0, -len(x) % BLOCK)).unflatten(0, (-1, BLOCK))
    count = torch.full((len(blocks),), float(BLOCK), device=x.device)
    count[-1] = len(x) - BLOCK * (len(blocks) - 1)
    mean = blocks.sum(1) / count.unsqueeze(1)
    return mean, cosine_similarity(blocks, mean.unsqueeze(1), dim=-1).sum(1) / count


def _share_from_below(p: Tensor) -> Tensor:
    """For each entry the sum of those of its row that are not larger."""
    ascending, index = p.sort(-1)
    return torch.empty_like(p).scatter_(-1, index, ascending.cumsum(-1))


def vertical_slash(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The columns and diagonals that matter to the last 64 queries (MInference).

    Every row of blocks is expected to attend like the last queries: to the same keys, or to keys at the same distance.
    A block's score is what either of the two expects in it, the larger one: a threshold keeps all important columns
    and all important diagonals. MInference is causal; attention here is not, so a distance counts to both sides.

    Args:
        q, k: [N, D] float32, in the order of the mask.
        scale: factor of the logits.

    Returns:
        float64 [q blocks, kv blocks], share of a query's attention.
    """
    tokens, blocks = len(q), block_count(len(q), BLOCK)
    token = torch.arange(tokens, device=q.device)
    p = (q[-BLOCK:] @ k.mT * scale).double().softmax(-1)  # [64, N], fewer for a short sequence
    vertical = pad(p.mean(0), (0, blocks * BLOCK - tokens)).view(blocks, BLOCK).sum(1)

    distance = (token[-BLOCK:].unsqueeze(1) - token).abs().flatten()
    at_distance = torch.zeros(tokens, dtype=p.dtype, device=q.device).index_add_(0, distance, p.flatten())
    at_distance = pad(at_distance / distance.bincount(), (0, blocks * BLOCK - tokens)).view(blocks, BLOCK)
    # Of the pairs at the distance 64 d + r, the part 1 - r / 64 lies d blocks from the diagonal and the rest d + 1.
    beyond = torch.arange(BLOCK, device=q.device) / BLOCK
    slash = (at_distance * (1 - beyond)).sum(1)
    slash[0] += slash[0] - at_distance[0, 0]  # a diagonal block has both sides
    slash[1:] += (at_distance * beyond).sum(1)[:-1]

    block = torch.arange(blocks, device=q.device)
    by_distance = slash[(block.unsqueeze(1) - block).abs()]
    by_column = vertical.expand_as(by_distance)
    # The smaller one decides among the many blocks of a column or diagonal with equal scores.
    return torch.maximum(by_column, by_distance) + 1e-6 * torch.minimum(by_column, by_distance)
