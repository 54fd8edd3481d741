"""Independent oracles in float64, written without any of paroattn's code."""

import torch

BLOCK = 64
_ROWS = 2048  # that are looked at at once


def dense_attention(query, key, value, scale=None):
    """Plain softmax attention [B, H, N, D], grouped queries repeated; returns output and lse [B, H, N]."""
    return sparse_attention(query, key, value, scale=scale)


def masked_attention(query, key, value, block_mask, permutation, scale=None, block_q=BLOCK, block_kv=BLOCK):
    """Output where token i sees token j when the blocks of their positions in the reordered sequence are kept."""
    settings = {"scale": scale, "block_q": block_q, "block_kv": block_kv}
    return sparse_attention(query, key, value, block_mask, permutation, **settings)[0]


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

    block_mask: bool [H, q blocks, kv blocks]; permutation: gather index [H, N]. A skipped block of `count` visible keys
    adds count * exp(q . mean(k) * scale) * mean(v) where `compensate[head]`. With dtype float32 it is the plain
    computation that a tolerance is derived from.
    """
    batch, heads, tokens, head_dim = query.shape
    device, group = query.device, heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    visible = torch.ones(batch, tokens, dtype=torch.bool, device=device) if key_mask is None else key_mask
    output = torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device=device)
    lse = torch.empty(batch, heads, tokens, dtype=dtype, device=device)
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[b, h].to(dtype), key[b, h // group].to(dtype), value[b, h // group].to(dtype)
            position = torch.arange(tokens, device=device) if permutation is None else permutation[h].argsort()
            column = position // block_kv
            means = compensate is not None and compensate[h] and block_mask is not None
            if means:
                members = [(column == block) & visible[b] for block in range(int(column.max()) + 1)]
                count = torch.stack([own.sum() for own in members])
                mean_k, mean_v = (
                    torch.stack([x[own].mean(0) if own.any() else torch.zeros_like(x[0]) for own in members])
                    for x in (k, v)
                )
            for start in range(0, tokens, _ROWS):
                rows = slice(start, start + _ROWS)
                logits, values = (q[rows] @ k.T * scale).masked_fill(~visible[b], -torch.inf), v
                if block_mask is not None:
                    kept = block_mask[h][position[rows] // block_q]  # [rows, kv blocks]
                    logits = logits.masked_fill(~kept[:, column], -torch.inf)
                if means:
                    added = (q[rows] @ mean_k.T * scale + count.to(dtype).log()).masked_fill(kept, -torch.inf)
                    logits, values = torch.cat((logits, added), 1), torch.cat((v, mean_v))
                lse[b, h, rows] = logits.logsumexp(1)
                output[b, h, rows] = logits.softmax(1) @ values
    return output, lse


def rotated(x, angle, pairs):
    """Rotary position embedding of x [..., N, D] by angle [N, D / 2], pairs "interleaved" or "halves", in float64."""
    split, stack = ((-1, 2), -1) if pairs == "interleaved" else ((2, -1), -2)
    first, second = x.double().unflatten(-1, split).unbind(stack)
    cos, sin = angle.double().cos(), angle.double().sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), stack).flatten(-2)


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


def skip_costs(q, k, v, order, scale, rows, block_q, rounding):
    """What skipping each block of a head changes in the output's given rows of each block of queries, L2 norm.

    rows: int64 [r] of each block_q queries. Returns norms [2, q blocks, kv blocks], of blocks that are dropped or
    approximated by their means, and by how much they may be off where each entry of P is off by a share of `rounding`.
    """
    q, k, v = (x[order].double() for x in (q, k, v))
    blocks, of_rows = k.split(BLOCK), v.split(BLOCK)
    p = (q @ k.mT * scale).softmax(-1).split(BLOCK, 1)
    lse = (q @ k.mT * scale).logsumexp(-1)
    output = sum(part @ values for part, values in zip(p, of_rows, strict=True))
    # An entry of P moves what its block takes from the output by its value's distance from the output, and the output.
    spreads = [
        (part * (values.unsqueeze(0) - output.unsqueeze(1)).norm(dim=-1)).sum(1)
        for part, values in zip(p, of_rows, strict=True)
    ]
    moved = rounding / (1 - rounding) * sum(spreads)
    norms, bounds = [], []
    looked_at = torch.zeros(-(-len(q) // block_q), block_q, dtype=torch.bool)
    looked_at[:, rows] = True
    looked_at = looked_at.flatten()[: len(q)]
    for part, keys, values, spread in zip(p, blocks, of_rows, spreads, strict=True):
        share = part.sum(1)
        surrogate = len(keys) * (q @ keys.mean(0) * scale - lse).exp()
        change = part @ values - share.unsqueeze(1) * output
        residual = change - surrogate.unsqueeze(1) * (values.mean(0) - output)
        bound = rounding * spread + (1 + rounding) * share * moved
        columns = [change.norm(dim=1), residual.norm(dim=1), bound, bound + surrogate * moved]
        in_blocks = [torch.stack([x.norm() for x in (c * looked_at).split(block_q)]) for c in columns]
        norms.append(torch.stack(in_blocks[:2]))
        bounds.append(torch.stack(in_blocks[2:]))
    return torch.stack(norms, -1), torch.stack(bounds, -1)


def relative_error(x, reference):
    """L2 norm of the difference over the norm of the reference."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())
