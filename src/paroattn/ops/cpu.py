"""The CPU backend: block-sparse attention in C++ (csrc/), registered with torch as one operator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.quantize import PQuantization, Precision

FORMATS = frozenset(("exact", "bf16", "int8", "int4"))
P_QUANTIZATION = PQuantization(granularity="row")
CAPABILITY_VARIABLE = "PAROATTN_CPU_CAPABILITY"
_prologue_times: ContextVar[list[float] | None] = ContextVar("prologue_times", default=None)

_missing = None
try:
    import paroattn.ops._cpu as _cpu
except ImportError as error:
    _missing = f"its compiled part is missing ({error}); install a C++17 compiler (g++ >= 11) and paroattn again"


def describe() -> str:
    """The instructions in use and the number of threads."""
    return f"{capability()}, {torch.get_num_threads()} threads"


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return _missing


def capability() -> str:
    """The instructions in use: the best of "avx512_bf16", "avx512_vnni", "avx2" and "baseline" that this CPU has.

    The environment variable `PAROATTN_CPU_CAPABILITY` asks for a lesser one.

    Raises:
        ValueError: the variable names something unknown or beyond this CPU.
    """
    usable = usable_capabilities()
    wanted = os.environ.get(CAPABILITY_VARIABLE, usable[-1])
    if wanted not in usable:
        raise ValueError(f"{CAPABILITY_VARIABLE} is {wanted!r}; this CPU has {', '.join(usable)}")
    return wanted


def usable_capabilities() -> tuple[str, ...]:
    """The instructions that this CPU and this build have, best last."""
    return _cpu.CAPABILITIES[: _cpu.CAPABILITIES.index(_cpu.best_capability()) + 1]


def unsupported(
    device: torch.device | None,
    dtype: torch.dtype | None,
    precisions: Sequence[Precision],
    block_shape: tuple[int, int],
) -> str | None:
    """What of a call this backend does not do, or None."""
    if device is not None and device.type != "cpu":
        return f"the tensors are on {device}; it takes tensors on the CPU"
    if block_shape[0] % BLOCK or block_shape[1] % BLOCK:
        return f"block_mask has blocks of {block_shape[0]} x {block_shape[1]}; it takes multiples of {BLOCK}"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    permutation: Tensor | None,
    block_mask: BlockMask | None,
    precisions: Sequence[Precision],
    compensate: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of validated inputs; see `paroattn.attention` and `paroattn.ops.reference.attend`."""
    arguments = kernel_arguments(query, key, value, permutation, block_mask, precisions, compensate, key_mask, scale)
    return torch.ops.paroattn.cpu_attention(*arguments)


def kernel_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    block_mask: BlockMask | None,
    precisions: Sequence[Precision],
    compensate: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Any, ...]:
    """A call in the types that operators may take: the arguments of `cpu_attention`."""
    mask_bits, block_shape = None, [BLOCK, BLOCK]
    if block_mask is not None:
        mask_bits, block_shape = block_mask.bits, [block_mask.block_q, block_mask.block_kv]
    qk = ",".join(_kernel_format(precision.qk, query.dtype) for precision in precisions)
    pv = ",".join(_kernel_format(precision.pv, query.dtype) for precision in precisions)
    tensors = (_with_adjacent_channels(x.detach()) for x in (query, key, value))
    return (*tensors, permutation, mask_bits, block_shape, compensate, key_mask, qk, pv, scale)


def _kernel_format(number_format: str, dtype: torch.dtype) -> str:
    """The kernel's name of a format: exact products of bfloat16 input are bfloat16 products with float32 sums.

    Mean tokens of skipped blocks are rounded to bfloat16 then, too.
    """
    return "bf16" if number_format == "exact" and dtype == torch.bfloat16 else number_format


def _with_adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("paroattn::cpu_attention", mutates_args=(), device_types="cpu")
def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    mask_bits: Tensor | None,
    block_shape: list[int],
    compensate: Tensor | None,
    key_mask: Tensor | None,
    qk: str,
    pv: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention in HND layout: output like query and lse [B, H, N].

    permutation [H, N]; mask_bits uint8 [H, q blocks, bytes] in blocks of block_shape; compensate bool [H]; key_mask
    bool [B, N]; qk and pv are the formats of the heads, separated by commas.
    """
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    _, prologue_seconds = run_kernel(
        output, lse, query, key, value, permutation, mask_bits, block_shape, compensate, key_mask, qk, pv, scale
    )
    times = _prologue_times.get()
    if times is not None:
        times.append(prologue_seconds)
    return output, lse


@cpu_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@contextmanager
def prologue_times() -> Iterator[list[float]]:
    """Collect the seconds until k and v were packed of every call inside the `with` block; empty for other backends."""
    times: list[float] = []
    token = _prologue_times.set(times)
    try:
        yield times
    finally:
        _prologue_times.reset(token)


def run_kernel(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    mask_bits: Tensor | None,
    block_shape: list[int],
    compensate: Tensor | None,
    key_mask: Tensor | None,
    qk: str,
    pv: str,
    scale: float,
) -> tuple[int, float]:
    """Fill output and lse; returns how many pairs of blocks were computed and the seconds until k and v were packed."""
    return _cpu.attend(
        query,
        key,
        value,
        output,
        lse,
        None if permutation is None else permutation.to(torch.int32).contiguous(),
        None if mask_bits is None else mask_bits.contiguous(),
        block_shape[0],
        block_shape[1],
        None if compensate is None else compensate.view(torch.uint8).contiguous(),
        None if key_mask is None else key_mask.view(torch.uint8).contiguous(),
        qk.split(","),
        pv.split(","),
        scale,
        capability(),
        torch.get_num_threads(),
    )
