"""The CPU backend: block-sparse attention in C++ (csrc/), registered with torch as one operator."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK
from paroattn.errors import InputError
from paroattn.ops.inputs import FLAT_SCHEMA, AttentionInputs, CallKind, from_flat, is_traced
from paroattn.ops.opaque import opaque
from paroattn.quantize import PQuantization, Precision

FORMATS = frozenset(("exact", "bf16", "int8", "int4"))
repeater = None
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
        InputError: the variable names something unknown or beyond this CPU.
    """
    usable = usable_capabilities()
    wanted = os.environ.get(CAPABILITY_VARIABLE, usable[-1])
    if wanted not in usable:
        raise InputError(f"{CAPABILITY_VARIABLE} is {wanted!r}; this CPU has {', '.join(usable)}")
    return wanted


@functools.lru_cache
def usable_capabilities() -> tuple[str, ...]:
    """The instructions that this CPU and this build have, best last."""
    return _cpu.CAPABILITIES[: _cpu.CAPABILITIES.index(_cpu.best_capability()) + 1]


def unsupported(kind: CallKind) -> str | None:
    """What of a kind of call this backend does not do, or None."""
    if kind.device is not None and kind.device.type != "cpu":
        return f"the tensors are on {kind.device}; it takes tensors on the CPU"
    block_q, block_kv = kind.block_shape
    if block_q % BLOCK or block_kv % BLOCK:
        return f"block_mask has blocks of {block_q} x {block_kv}; it takes multiples of {BLOCK}"
    return None


def attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attention of checked inputs; see `paroattn.attention` and `paroattn.ops.reference.attend`."""
    if is_traced(inputs.query):
        return cpu_attention(*inputs.flat())
    return _attend(inputs.readable())


def _attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    query = inputs.query
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32)
    _, prologue_seconds = run_kernel(output, lse, inputs)
    times = _prologue_times.get()
    if times is not None:
        times.append(prologue_seconds)
    return output, lse


cpu_attention = opaque(
    f"cpu_attention({FLAT_SCHEMA}) -> (Tensor, Tensor)",
    lambda *flat: _attend(from_flat(*flat)),
    lambda query, *_: (torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)),
)


@contextmanager
def prologue_times() -> Iterator[list[float]]:
    """Collect the seconds until k and v were packed of every call inside the `with` block; empty for other backends."""
    times: list[float] = []
    token = _prologue_times.set(times)
    try:
        yield times
    finally:
        _prologue_times.reset(token)


def run_kernel(output: Tensor, lse: Tensor, inputs: AttentionInputs) -> tuple[int, float]:
    """Fill output and lse; channels are side by side in memory, of inputs and output.

    Returns:
        How many pairs of blocks were computed and the seconds until k and v were packed.
    """
    permutation, mask, compensate, key_mask = inputs.permutation, inputs.block_mask, inputs.compensate, inputs.key_mask
    dtype = inputs.query.dtype
    return _cpu.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        output,
        lse,
        None if permutation is None else permutation.to(torch.int32).contiguous(),
        None if mask is None else mask.bits.contiguous(),
        *inputs.block_shape,
        None if compensate is None else compensate.view(torch.uint8).contiguous(),
        None if key_mask is None else key_mask.view(torch.uint8).contiguous(),
        *_kernel_formats(tuple(inputs.precisions), dtype),
        inputs.scale,
        capability(),
        torch.get_num_threads(),
    )


@functools.lru_cache
def _kernel_formats(precisions: tuple[Precision, ...], dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """The kernel's names of the heads' formats, of QK^T and of PV.

    Exact products of bfloat16 input are bfloat16 products with float32 sums. Mean tokens of skipped blocks are rounded
    to bfloat16 then, too.
    """
    exact = "bf16" if dtype == torch.bfloat16 else "exact"
    qk, pv = ([getattr(precision, part) for precision in precisions] for part in ("qk", "pv"))
    return [exact if name == "exact" else name for name in qk], [exact if name == "exact" else name for name in pv]
