"""The definition of paroattn's attention, in plain PyTorch: every other backend is tested against this file.

It walks over heads and over rows of blocks, gathers the kept blocks of keys and values, and computes them with the
quantisation that kernels do. It is meant to be read; memory stays small because one row of blocks is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.quantize import (
    PQuantization,
    Precision,
    is_integer,
    quantize_channels,
    quantize_probabilities,
    quantize_tokens,
)

FORMATS = frozenset(("exact", "bf16", "int8", "int4"))


def describe() -> str:
    """What it runs on."""
    return "plain PyTorch"


def unavailable() -> None:
    """It runs everywhere."""


def unsupported(device: torch.device | None, block_shape: tuple[int, int], compensate: bool) -> None:
    """It does everything."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    permutation: Tensor | None,
    block_mask: BlockMask | None,
    precisions: Sequence[Precision],
    compensate: Sequence[bool],
    key_mask: Tensor | None,
    scale: float,
    p_quantization: PQuantization = PQuantization(),
) -> tuple[Tensor, Tensor]:
    """Attention of validated inputs; see `paroattn.attention`.

    Args:
        query: [B, H, N, D]; key, value: [B, H_kv, N, D].
        permutation: [H, N] or None; block_mask with H heads or None for all blocks; key_mask bool [B, N] or None.
        precisions, compensate: one per head.
        p_quantization: how integer P is scaled; backends declare theirs, so that this file can be their oracle.

    Returns:
        output [B, H, N, D] in query's dtype and lse [B, H, N] float32.
    """
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    blocks = None if block_mask is None else block_mask.to_dense()
    block_q, block_kv = (BLOCK, BLOCK) if block_mask is None else (block_mask.block_q, block_mask.block_kv)
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, tokens, device=query.device)
    for head in range(heads):
        order = torch.arange(tokens, device=query.device) if permutation is None else permutation[head].long()
        q, k, v = (x[:, h].float()[:, order] for x, h in ((query, head), (key, head // group), (value, head // group)))
        valid = torch.ones_like(k[..., 0], dtype=torch.bool) if key_mask is None else key_mask[:, order]
        reordered, reordered_lse = _attend_head(
            q,
            k,
            v,
            valid,
            None if blocks is None else blocks[head],
            (block_q, block_kv),
            precisions[head],
            compensate[head],
            scale,
            p_quantization,
        )
        output[:, head, order] = reordered.to(query.dtype)
        lse[:, head, order] = reordered_lse
    return output, lse


def _attend_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    blocks: Tensor | None,
    block_shape: tuple[int, int],
    precision: Precision,
    compensate: bool,
    scale: float,
    p_quantization: PQuantization,
) -> tuple[Tensor, Tensor]:
    """One head over its reordered sequence: q, k, v [B, N, D] float32, valid [B, N]; returns output and lse [B, N]."""
    block_q, block_kv = block_shape
    tokens = q.shape[1]
    shift = torch.zeros_like(q[..., 0])  # what subtracting the mean of k takes from a row's logits
    if is_integer(precision.qk):
        k_mean = k.mean(1, keepdim=True)
        shift = (q @ k_mean.mT).squeeze(-1) * scale
        k = k - k_mean
    q_int, k_int = quantize_tokens(q, precision.qk), quantize_tokens(k, precision.qk)
    v_mean = torch.zeros_like(v[:, :1])
    if is_integer(precision.pv):
        v_mean = v.mean(1, keepdim=True)
        v = v - v_mean  # the rows of P sum to 1: the output gets the mean back
    v_int = quantize_channels(v, precision.pv)

    def in_blocks(x: Tensor) -> Tensor:  # [B, N, ...] -> [B, kv blocks, block_kv, ...]
        padding = (0, 0) * (x.ndim - 2) + (0, -tokens % block_kv)
        return pad(x, padding).unflatten(1, (-1, block_kv))

    k_values, k_scales, v_values = in_blocks(k_int.values), in_blocks(k_int.scale), in_blocks(v_int.values)
    valid_blocks = in_blocks(valid)
    if compensate:
        count = valid_blocks.sum(-1, keepdim=True)  # [B, kv blocks, 1]
        mean_k = (in_blocks(k) * valid_blocks.unsqueeze(-1)).sum(2) / count.clamp(min=1)
        mean_v = (in_blocks(v) * valid_blocks.unsqueeze(-1)).sum(2) / count.clamp(min=1)

    output, lse = torch.empty_like(q), torch.empty_like(shift)
    for row, start in enumerate(range(0, tokens, block_q)):
        rows = slice(start, min(start + block_q, tokens))
        kept = torch.ones_like(valid_blocks[0, :, 0]) if blocks is None else blocks[row]
        integer_logits = q_int.values[:, rows] @ k_values[:, kept].flatten(1, 2).mT
        logits = integer_logits * (q_int.scale[:, rows] * scale) * k_scales[:, kept].flatten(1, 2).mT
        logits = logits.masked_fill(~valid_blocks[:, kept].flatten(1, 2).unsqueeze(1), -torch.inf)
        logits = logits.unflatten(-1, (-1, block_kv))  # [B, rows, kept blocks, block_kv]

        # Online softmax: each block sees the row maximum of the blocks up to it, and P is rounded relative to that.
        running_max = logits.amax(-1).cummax(-1).values.clamp(min=torch.finfo(torch.float32).min)
        row_max = running_max[..., -1:]
        if compensate:
            mean_logits = q[:, rows] @ mean_k[:, ~kept].mT * scale + count[:, ~kept].mT.log()
            row_max = torch.cat((row_max, mean_logits), -1).amax(-1, keepdim=True)
        p = (logits - running_max.unsqueeze(-1)).exp()
        weight = (running_max - row_max).exp()
        total = (p.sum(-1) * weight).sum(-1, keepdim=True)  # of P before rounding

        p_int = quantize_probabilities(p, precision.pv, p_quantization)
        weighted = p_int.values * (p_int.scale * weight.unsqueeze(-1))
        summed = weighted.flatten(2) @ v_values[:, kept].flatten(1, 2) * v_int.scale
        if compensate:
            mean_p = (mean_logits - row_max).exp()
            total = total + mean_p.sum(-1, keepdim=True)
            summed = summed + mean_p @ mean_v[:, ~kept]
        # total is 0 where key_mask hides every kept key
        output[:, rows] = torch.where(total == 0, 0, summed / total + v_mean)
        lse[:, rows] = (total.log() + row_max).squeeze(-1) + shift[:, rows]
    return output, lse
