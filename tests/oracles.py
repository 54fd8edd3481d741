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


def sparse_attention(
    query,
    key,
    value,
    block_mask=None,
    permutation=None,
    key_mask=None,
    compensate=None,
    scale=None,
    block_q=BLOCK,
    block_kv=BLOCK,
    dtype=torch.float64,
):
    """Everything at once, token by token in the input's order; returns output [B, H, N, D] and lse [B, H, N].

    A skipped block of `count` visible keys adds count * exp(q . mean(k) * scale) * mean(v) where `compensate[head]`.
    With dtype float32 it is the plain computation that a tolerance is derived from.
    """
    batch, heads, tokens, head_dim = query.shape
    group = heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    permutation = torch.arange(tokens).expand(heads, tokens) if permutation is None else permutation
    visible = torch.ones(batch, tokens, dtype=torch.bool) if key_mask is None else key_mask
    output, lse = (
        torch.empty(batch, heads, tokens, head_dim, dtype=dtype),
        torch.empty(batch, heads, tokens, dtype=dtype),
    )
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[b, h].to(dtype), key[b, h // group].to(dtype), value[b, h // group].to(dtype)
            position = permutation[h].argsort()
            row, column = position // block_q, position // block_kv
            kept = torch.ones(tokens, tokens, dtype=torch.bool)
            if block_mask is not None:
                kept = block_mask[h][row][:, column]
            logits = [(q @ k.T * scale).masked_fill(~kept | ~visible[b], -torch.inf)]
            values = [v]
            if compensate is not None and compensate[h] and block_mask is not None:
                for block in range(int(column.max()) + 1):
                    members = (column == block) & visible[b]
                    if members.any():
                        added = q @ k[members].mean(0) * scale + members.sum().to(dtype).log()
                        logits.append(added.masked_fill(block_mask[h][row, block], -torch.inf).unsqueeze(1))
                        values.append(v[members].mean(0, keepdim=True))
            logits = torch.cat(logits, 1)
            lse[b, h] = logits.logsumexp(1)
            output[b, h] = logits.softmax(1) @ torch.cat(values)
    return output, lse


def relative_error(x, reference):
    """L2 norm of the difference over the norm of the reference."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())
