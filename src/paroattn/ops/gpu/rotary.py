"""Rotary position embedding in one pass over a query or key, where eager PyTorch takes eight."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paroattn.ops.gpu import device

_TILE = 2048  # channels that a program turns at a time
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Rotation(NamedTuple):
    """What turns pairs of channels (a, b): into a * cos[0] - b * sin[0] and b * cos[1] + a * sin[1].

    Attributes:
        pairs: "interleaved" pairs channels 2 i and 2 i + 1, "halves" channels i and i + D / 2.
        cos, sin: float32 [1 or B, N, D / 2], for the first channels of the pairs and for the second ones.
    """

    pairs: Literal["interleaved", "halves"]
    cos: tuple[Tensor, Tensor]
    sin: tuple[Tensor, Tensor]


def takes(x: Tensor, rotation: Rotation) -> bool:
    """Whether `rotate` does this: x [B, N, H, D] where kernels run, and tables that fit it."""
    batch, tokens, _, channels = x.shape
    shapes = ((1, tokens, channels // 2), (batch, tokens, channels // 2))
    return (
        channels % 2 == 0
        and x.stride(-1) == 1
        and x.dtype in _DTYPES
        and all(
            tuple(table.shape) in shapes and table.dtype == torch.float32 and table.device == x.device
            for table in (*rotation.cos, *rotation.sin)
        )
    )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x [B, N, H, D] in float32; the result has its dtype and strides."""
    batch, tokens, heads, channels = x.shape
    output = torch.empty_like(x)
    width = triton.next_power_of_2(channels)
    rows = rows_of(width)
    tables = [*rotation.cos, *rotation.sin]
    strides = [stride for table in tables for stride in (table.stride(0) if len(table) > 1 else 0, *table.stride()[1:])]
    with device.on_device_of(x):
        rotate_rows[(triton.cdiv(tokens, rows), batch)](
            x, output, *tables, *x.stride()[:3], *output.stride()[:3], *strides, tokens, heads,
            ROWS=rows, CHANNELS=channels, WIDTH=width, INTERLEAVED=rotation.pairs == "interleaved",
        )  # fmt: skip
    return output


def rows_of(width: int) -> int:
    """Tokens that a program turns, of heads padded to a width."""
    return max(1, min(64, _TILE // width))


@triton.jit
def _load_table(ptr, b, token, pair, mask, stride_b, stride_n, stride_p):
    """Rows [ROWS, PAIRS] of a table."""
    start = ptr + b.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_n
    return tl.load(start + pair[None, :] * stride_p, mask=mask, other=0.0)


@triton.jit
def rotate_rows(
    x_ptr, out_ptr, first_cos_ptr, second_cos_ptr, first_sin_ptr, second_sin_ptr,
    stride_xb, stride_xn, stride_xh, stride_ob, stride_on, stride_oh,
    fc_b, fc_n, fc_p, sc_b, sc_n, sc_p, fs_b, fs_n, fs_p, ss_b, ss_n, ss_p,
    tokens, heads,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A program turns all heads of ROWS tokens, for which it reads the tables once."""
    PAIRS: tl.constexpr = WIDTH // 2
    HALF: tl.constexpr = CHANNELS // 2
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1)
    pair, channel = tl.arange(0, PAIRS), tl.arange(0, WIDTH)
    valid = (token < tokens)[:, None]
    mask = valid & (pair < HALF)[None, :]
    first_cos = _load_table(first_cos_ptr, b, token, pair, mask, fc_b, fc_n, fc_p)
    second_cos = _load_table(second_cos_ptr, b, token, pair, mask, sc_b, sc_n, sc_p)
    first_sin = _load_table(first_sin_ptr, b, token, pair, mask, fs_b, fs_n, fs_p)
    second_sin = _load_table(second_sin_ptr, b, token, pair, mask, ss_b, ss_n, ss_p)
    source = x_ptr + b.to(tl.int64) * stride_xb + token.to(tl.int64)[:, None] * stride_xn
    target = out_ptr + b.to(tl.int64) * stride_ob + token.to(tl.int64)[:, None] * stride_on
    for _ in range(heads):
        if INTERLEAVED:
            whole = valid & (channel < CHANNELS)[None, :]
            x = tl.load(source + channel[None, :], mask=whole, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
            turned = tl.interleave(first * first_cos - second * first_sin, second * second_cos + first * second_sin)
            tl.store(target + channel[None, :], turned.to(out_ptr.dtype.element_ty), mask=whole)
        else:
            first = tl.load(source + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            second = tl.load(source + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            turned = first * first_cos - second * first_sin
            tl.store(target + pair[None, :], turned.to(out_ptr.dtype.element_ty), mask=mask)
            turned = second * second_cos + first * second_sin
            tl.store(target + HALF + pair[None, :], turned.to(out_ptr.dtype.element_ty), mask=mask)
        source += stride_xh
        target += stride_oh
