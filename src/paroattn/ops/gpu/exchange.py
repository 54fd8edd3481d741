"""Tokens as they are sent between ranks, in one pass over them: heads change places in the copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paroattn.ops.gpu import device

_TILE = 4096  # channels that a program moves


def pack(x: Tensor, heads: Tensor, ranks: int) -> Tensor:
    """Tokens [B, n, H, D], D contiguous, as [ranks * n, B, H / ranks, D], heads in the order of `heads` [H]."""
    batch, count, number, channels = x.shape
    sent = torch.empty(ranks * count, batch, number // ranks, channels, dtype=x.dtype, device=x.device)
    _move(x, sent, heads, ranks, unpacks=False)
    return sent


def unpack(received: Tensor, heads: Tensor, ranks: int, place: Tensor) -> None:
    """The inverse of `pack`, into `place` [B, n, H, D]."""
    _move(place, received, heads, ranks, unpacks=True)


def _move(tokens: Tensor, packed: Tensor, heads: Tensor, ranks: int, unpacks: bool) -> None:
    batch, count, number, channels = tokens.shape
    width = triton.next_power_of_2(channels)
    rows = rows_of(width)
    with device.on_device_of(tokens):
        move_heads[(triton.cdiv(count, rows), number, batch)](
            tokens, packed, heads, *tokens.stride()[:3], count, batch, number // ranks,
            ROWS=rows, CHANNELS=channels, WIDTH=width, UNPACKS=unpacks,
        )  # fmt: skip


def rows_of(width: int) -> int:
    """Tokens that a program moves, of heads padded to a width."""
    return max(1, min(64, _TILE // width))


@triton.jit
def move_heads(
    tokens_ptr, packed_ptr, numbers_ptr, stride_b, stride_n, stride_h, count, batch, held,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, UNPACKS: tl.constexpr,
):  # fmt: skip
    """A program moves ROWS tokens of one head between tokens [B, n, H, D] and packed [ranks, n, B, held, D]."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, b = tl.program_id(1), tl.program_id(2)
    head = tl.load(numbers_ptr + place)
    channel = tl.arange(0, WIDTH)
    mask = (token < count)[:, None] & (channel < CHANNELS)[None, :]
    at_rank = (place // held).to(tl.int64) * count + token
    row = (at_rank * batch + b) * held + place % held
    packed = packed_ptr + row[:, None] * CHANNELS + channel[None, :]
    start = tokens_ptr + b.to(tl.int64) * stride_b + head * stride_h
    tokens = start + token.to(tl.int64)[:, None] * stride_n + channel[None, :]
    if UNPACKS:
        tl.store(tokens, tl.load(packed, mask=mask), mask=mask)
    else:
        tl.store(packed, tl.load(tokens, mask=mask), mask=mask)
