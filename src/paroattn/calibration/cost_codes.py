"""Costs of blocks in a byte each: only their ranks within a head matter, and a large model has billions of them.

A code is a logarithm relative to the largest cost of the head's first sample: from 20 octaves below it to 12 above, in
eighths. 0 is no cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_OCTAVE = 8
MOST = 254
_CODE_OF_TOP = 160


def decoded(codes: Tensor, tops: Tensor) -> Tensor:
    """The costs of codes, float32 like codes, uint8 [2, heads, q blocks, kv blocks]; tops: float32 [heads]."""
    return torch.where(codes > 0, ((codes.float() - _CODE_OF_TOP) / CODES_PER_OCTAVE).exp2() * _of_heads(tops), 0)


def with_added(codes: Tensor, costs: Tensor, tops: Tensor) -> Tensor:
    """The codes of heads, uint8 [2, heads, q blocks, kv blocks], once costs of that shape, on any device, are added.

    Args:
        tops: float32 [heads], the largest costs of first samples; zeros are replaced by those of `costs`.
    """
    is_first = not bool(tops.any())
    tops.copy_(torch.where(tops > 0, tops, costs.amax((0, 2, 3)).cpu()))
    there = tops.to(costs.device)
    if not is_first:
        costs = costs + decoded(codes.to(costs.device), there)
    found = _CODE_OF_TOP + CODES_PER_OCTAVE * (costs / _of_heads(there)).log2()
    return found.round_().clamp_(0, MOST).to(torch.uint8)


def _of_heads(tops: Tensor) -> Tensor:
    return torch.where(tops > 0, tops, 1.0).view(-1, 1, 1)
