"""Repair by probes: what a few exact rows of a call miss says what all of its rows miss.

A map from outputs to what they miss is fitted to 64 rows that attend to all keys, and applied to every row. It belongs
to the call: no calibration can know it. The idea is SparsePR's (arXiv 2608.18484).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from paroattn.ops.gpu import device

PROBES = 64
_RIDGE = 0.5  # per probe, where outputs have variance 1 in every channel
_STEP = 2654435769  # the golden ratio's fraction, times 2^32


def probe_rows(count: int, device: torch.device) -> Tensor:
    """Which of `count` rows are probes, int64 [64]: everywhere alike, and in no step with the rows of a grid."""
    steps = (torch.arange(PROBES, device=device) * _STEP) % 2**32
    return (steps * count) >> 32


def repaired(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    count: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bring an output closer to attention over all keys, in place; returns it.

    With the probes' outputs o and what they miss, m = exact - o, as rows about their means: A = (o^T o + r I)^-1 o^T m,
    by the 64 x 64 system of its dual, each channel of o in units of its deviation. Every row becomes
    row + mean m + (row - mean o) A.

    Args:
        output: [B, H, N, D], of block-sparse attention in any precision.
        query: [B, H, N, D]; key, value: [B, H or H_kv, N, D].
        first, count: the rows that are approximated, from which probes are taken; others stay as they are. Fewer than
            twice the probes stay, too.
        key_mask: bool [B, N], False for keys to ignore, or None.
        scale: factor of the logits; default 1 / sqrt(D).
    """
    if count < 2 * PROBES:
        return output
    rest: dict[str, Any] = {"first": first, "count": count, "key_mask": key_mask}
    if device.unavailable() is None and device.unsupported(output.device) is None:
        from paroattn.ops.gpu import repair

        if repair.takes(output):
            factor = output.shape[-1] ** -0.5 if scale is None else scale
            return repair.repaired(output, query, key, value, scale=factor, ridge=_RIDGE * PROBES, step=_STEP, **rest)
    return by_definition(output, query, key, value, scale=scale, **rest)


def by_definition(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int,
    count: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`repaired` in plain PyTorch."""
    rows, probes = output.narrow(2, first, count), probe_rows(count, output.device)
    exact = scaled_dot_product_attention(
        query.narrow(2, first, count).index_select(2, probes),
        key,
        value,
        None if key_mask is None else key_mask[:, None, None],
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    found = rows.index_select(2, probes).float()
    missed = exact.float() - found
    mean_found, mean_missed = found.mean(2, keepdim=True), missed.mean(2, keepdim=True)
    centred = found - mean_found
    deviation = centred.square().mean(2, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    units = centred / deviation
    system = units @ units.mT
    system.diagonal(dim1=-2, dim2=-1).add_(_RIDGE * PROBES)
    # Positive definite by the ridge, so that nothing has to be looked at, for which a GPU would be waited for.
    factor, _ = torch.linalg.cholesky_ex(system)
    weights = (units / deviation).mT @ torch.cholesky_solve(missed - mean_missed, factor)  # [B, H, D, D]
    moved = mean_missed - mean_found @ weights
    rows += rows @ weights.to(rows.dtype)
    rows += moved.to(rows.dtype)
    return output
