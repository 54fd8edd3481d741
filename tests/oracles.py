"""Independent oracles in float64, written without any of paroattn's code."""

import torch

BLOCK = 64


def dense_attention(query, key, value, scale=None):
    """Plain softmax attention [B, H, N, D] in float64, grouped queries repeated; returns output and lse [B, H, N]."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def masked_attention(query, key, value, block_mask, permutation, scale=None, block_q=BLOCK, block_kv=BLOCK):
    """Attention in which token i sees token j when the blocks of their positions in the reordered sequence are kept.

    block_mask: bool [H, q blocks, kv blocks]; permutation: gather index [H, N].
    """
    heads, tokens = query.shape[1:3]
    visible = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        position = torch.empty(tokens, dtype=torch.long)
        position[permutation[head]] = torch.arange(tokens)
        visible[head] = block_mask[head][position // block_q][:, position // block_kv]
    query, key, value = query.double(), key.double(), value.double()
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def block_sums(q, k, order, scale=None):
    """Sums of the blocks of softmax(q k^T) with rows and columns in the given order, float64, entry by entry."""
    q, k = q.double(), k.double()
    p = (q @ k.T * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    p = p[order][:, order]
    blocks = -(-len(order) // BLOCK)
    sums = torch.zeros(blocks, blocks, dtype=torch.float64)
    for row in range(blocks):
        for column in range(blocks):
            sums[row, column] = p[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK].sum()
    return sums
