"""The definition of paroattn's attention, in plain PyTorch: every other backend is tested against this file.

It walks over heads and over rows of blocks, gathers the kept blocks of keys and values, and computes them with the
quantisation that kernels do. Where skipped blocks are compensated, each is one mean token, and blocks of mean tokens
follow the kept blocks. It is meant to be read; memory stays small because one row of blocks is held at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.ops.inputs import AttentionInputs, CallKind
from paroattn.quantize import (
    NumberFormat,
    PQuantization,
    Precision,
    is_integer,
    is_scaled,
    quantize_channels,
    quantize_probabilities,
    quantize_tokens,
    rotate_channels,
)

FORMATS = frozenset(("exact", "bf16", "int8", "int4", "fp8"))
repeater = None


def describe() -> str:
    """What it runs on."""
    return "plain PyTorch"


def unavailable() -> None:
    """It runs everywhere."""


def unsupported(kind: CallKind) -> str | None:
    """What of a kind of call it does not do, or None."""
    if any(precision.qk == "fp8" for precision in kind.precisions):
        return "query and key are multiplied in int8, int4 or floating point of 16 bits and more, not in fp8"
    return None


def attend(inputs: AttentionInputs, p_quantization: PQuantization = PQuantization()) -> tuple[Tensor, Tensor]:
    """Attention of checked inputs; see `paroattn.attention`.

    Args:
        inputs: on any device.
        p_quantization: how integer P is scaled; backends declare theirs, so that this file can be their oracle.

    Returns:
        output [B, H, N, D] in query's dtype and lse [B, H, N] float32.
    """
    query, key, value, permutation = inputs.query, inputs.key, inputs.value, inputs.permutation
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    blocks = None if inputs.block_mask is None else inputs.block_mask.to_dense()
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, tokens, device=query.device, dtype=torch.float32)
    for head in range(heads):
        order = torch.arange(tokens, device=query.device) if permutation is None else permutation[head].long()
        q, k, v = (x[:, h].float()[:, order] for x, h in ((query, head), (key, head // group), (value, head // group)))
        valid = torch.ones_like(k[..., 0], dtype=torch.bool) if inputs.key_mask is None else inputs.key_mask[:, order]
        reordered, reordered_lse = _attend_head(
            q,
            k,
            v,
            valid,
            None if blocks is None else blocks[head],
            inputs.block_shape,
            inputs.precisions[head],
            inputs.compensate is not None and bool(inputs.compensate[head]),
            inputs.scale,
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
    if precision.qk == "int4":
        q, k = rotate_channels(q), rotate_channels(k)
    v_mean = torch.zeros_like(v[:, :1])
    if is_scaled(precision.pv):
        v_mean = v.mean(1, keepdim=True)
        v = v - v_mean  # the rows of P sum to 1: the output gets the mean back
    q_int, k_int, v_int = (
        quantize_tokens(q, precision.qk),
        quantize_tokens(k, precision.qk),
        quantize_channels(v, precision.pv),
    )

    # Columns of the attention map, in blocks: the tokens, then, one for each of their blocks, the mean tokens.
    columns = [_in_blocks(x, block_kv) for x in (k_int.values, k_int.scale, v_int.values * v_int.scale, valid.float())]
    kv_blocks, mean_blocks = columns[0].shape[1], 0
    if compensate:
        means = [_in_blocks(x, block_kv) for x in _mean_tokens(k, v, valid, block_kv, precision, v_int.scale)]
        columns = [torch.cat(both, 1) for both in zip(columns, means, strict=True)]
        mean_blocks = means[0].shape[1]
    k_values, k_scales, v_values, counts = columns  # a column stands for `counts` tokens; none hides it

    output, lse = torch.empty_like(v), torch.empty_like(shift)
    for row, start in enumerate(range(0, tokens, block_q)):
        rows = slice(start, min(start + block_q, tokens))
        kept = torch.ones_like(counts[0, :kv_blocks, 0], dtype=torch.bool) if blocks is None else blocks[row]
        skipped = _in_blocks(~kept.unsqueeze(0), block_kv)[:, :mean_blocks]  # mean tokens that stand in
        visited = torch.cat((kept, torch.ones_like(skipped[0, :, 0])))
        count = torch.cat((counts[:, :kv_blocks][:, kept], counts[:, kv_blocks:] * skipped), 1).unsqueeze(1)

        integer_logits = q_int.values[:, rows] @ k_values[:, visited].flatten(1, 2).mT
        logits = integer_logits * (q_int.scale[:, rows] * scale) * k_scales[:, visited].flatten(1, 2).mT
        logits = logits.unflatten(-1, (-1, block_kv)) + count.log()  # [B, rows, visited blocks, block_kv]
        logits = logits.masked_fill(count == 0, -torch.inf)

        # Online softmax: each block sees the row maximum of the blocks up to it, and P is rounded relative to that.
        running_max = logits.amax(-1).cummax(-1).values.clamp(min=torch.finfo(torch.float32).min)
        row_max = running_max[..., -1:]
        p = (logits - running_max.unsqueeze(-1)).exp()
        weight = (running_max - row_max).exp()
        total = (p.sum(-1) * weight).sum(-1, keepdim=True)  # of P before rounding

        p_tokens, p_means = p.split((p.shape[2] - mean_blocks, mean_blocks), 2)
        p_int = (
            quantize_probabilities(p_tokens, precision.pv, p_quantization),
            quantize_probabilities(p_means, _mean_format(precision.pv), p_quantization),
        )
        rounded = torch.cat([part.values * part.scale for part in p_int], 2) * weight.unsqueeze(-1)
        summed = rounded.flatten(2) @ v_values[:, visited].flatten(1, 2)
        # total is 0 where key_mask hides every kept key
        output[:, rows] = torch.where(total == 0, 0, summed / total + v_mean)
        lse[:, rows] = (total.log() + row_max).squeeze(-1) + shift[:, rows]
    return output, lse


def _mean_tokens(
    k: Tensor, v: Tensor, valid: Tensor, block_kv: int, precision: Precision, v_scale: Tensor
) -> tuple[Tensor, ...]:
    """The mean of each block's valid tokens: rounded keys, their scales, rounded values, how many tokens each is of.

    Mean values are smaller than values: beside the channels' scales they get one per group of mean tokens.
    """
    count = _in_blocks(valid.float(), block_kv).sum(2)  # [B, kv blocks]
    k_mean, v_mean = (
        _in_blocks(x.masked_fill(~valid.unsqueeze(-1), 0), block_kv).sum(2) / count.clamp(min=1).unsqueeze(-1)
        for x in (k, v)
    )
    k_int = quantize_tokens(k_mean, _mean_format(precision.qk))
    v_int = quantize_tokens(v_mean / v_scale, _mean_format(precision.pv))
    return k_int.values, k_int.scale, v_int.values * v_int.scale * v_scale, count


def _mean_format(number_format: NumberFormat) -> NumberFormat:
    """Mean tokens are few and each stands for many: 4 bits would cost accuracy for nothing."""
    return "int8" if number_format == "int4" else number_format


def _in_blocks(x: Tensor, block_kv: int) -> Tensor:
    """Columns [B, N, ...] as [B, blocks, block_kv, ...], padded with zeros."""
    padding = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % block_kv)
    return pad(x, padding).unflatten(1, (-1, block_kv))
