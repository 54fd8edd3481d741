"""The Triton backend: block-sparse attention on NVIDIA and AMD GPUs, registered with torch as one operator.

On Hopper, a kernel in CUDA takes part (`hopper`). The kernels are imported with the first call (`triton_launch`). With
TRITON_INTERPRET=1 in the environment, they run in Triton's interpreter on CPU tensors, which is slow and meant for
tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.ops import hopper
from paroattn.ops.triton_configs import FP8_TARGETS, TARGETS, target_of
from paroattn.quantize import PQuantization, Precision

FORMATS = frozenset(("exact", "bf16", "int8", "fp8"))
P_QUANTIZATION = PQuantization(granularity="row", steps=127)
BLOCKS_Q = (64, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding that the prologue applies to query and key.

    Attributes:
        cos, sin: float32 [N, D / 2], of each token (in the input's order) and pair of channels; 1 and 0 leave a token,
            such as one of text, as it is.
        pairs: "interleaved" turns channels 2 i and 2 i + 1, "halves" channels i and i + D / 2.
    """

    cos: Tensor
    sin: Tensor
    pairs: Literal["interleaved", "halves"]


def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` gets it"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it needs Triton 3.6 or newer; {triton.__version__} is installed"
    return None


_missing = _why_missing()


def describe() -> str:
    """The version of Triton, the GPU and, on Hopper, whether its own kernel is used."""
    import triton

    if INTERPRETED:
        return f"Triton {triton.__version__}, interpreted"
    found = f"Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if target_of(torch.device("cuda")) != "sm90":
        return found
    missing = hopper.unavailable()
    return f"{found}, {'CUDA for int8' if missing is None else f'without CUDA for int8 ({missing})'}"


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return _missing


def unsupported(
    device: torch.device | None,
    dtype: torch.dtype | None,
    precisions: Sequence[Precision],
    block_shape: tuple[int, int],
) -> str | None:
    """What of a call this backend does not do, or None."""
    if block_shape[0] not in BLOCKS_Q or block_shape[1] != BLOCK:
        return f"block_mask has blocks of {block_shape[0]} x {block_shape[1]}; it takes 64 x 64 and 128 x 64"
    target = None
    if device is not None:
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            return (
                f"the tensors are on {device}; it takes tensors on {'the CPU, interpreted' if INTERPRETED else 'a GPU'}"
            )
        target = "sm90" if INTERPRETED else _constant_target(device)
        if target is None:
            return f"it has no configuration for this GPU; it has {', '.join(TARGETS)}"
    for precision in precisions:
        formats = (precision.qk, precision.pv)
        if precision.qk == "fp8":
            return "it multiplies query and key in int8 or 16 bits, not in fp8"
        if precision.pv == "fp8" and target is not None and target not in FP8_TARGETS:
            return f"fp8 needs one of {', '.join(FP8_TARGETS)}; this GPU is {target}"
        if "exact" in formats and dtype == torch.float32:
            return "it has no float32 products for precision 'exact'; use 16-bit tensors or precision 'bf16'"
        if INTERPRETED and ("bf16" in formats or ("exact" in formats and dtype == torch.bfloat16)):
            return "Triton's interpreter does not multiply bfloat16"
    return None


@torch.compiler.assume_constant_result
def _constant_target(device: torch.device) -> str | None:
    return target_of(device)


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
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of validated inputs; see `paroattn.attention` and `paroattn.ops.reference.attend`.

    rotary: applied to query and key first, if given.
    """
    query, key, value = (_with_adjacent_channels(x.detach()) for x in (query, key, value))
    return torch.ops.paroattn.triton_attention(
        query,
        key,
        value,
        None if permutation is None else permutation.to(torch.int32),
        None if block_mask is None else block_mask.bits,
        BLOCK if block_mask is None else block_mask.block_q,
        compensate,
        key_mask,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
        "" if rotary is None else rotary.pairs,
        ",".join(_kernel_format(precision.qk, query.dtype) for precision in precisions),
        ",".join(_kernel_format(precision.pv, query.dtype) for precision in precisions),
        scale,
    )


def _kernel_format(number_format: str, dtype: torch.dtype) -> str:
    """The kernels' name of a format: exact products of 16-bit input are 16-bit products with float32 sums."""
    if number_format == "exact":
        return "fp16" if dtype == torch.float16 else "bf16"
    return number_format


def _with_adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("paroattn::triton_attention", mutates_args=())
def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    permutation: Tensor | None,
    mask_bits: Tensor | None,
    block_q: int,
    compensate: Tensor | None,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary: str,
    qk: str,
    pv: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention in HND layout: output like query and lse [B, H, N].

    permutation int32 [H, N]; mask_bits uint8 [H, q blocks, bytes] in blocks of block_q x 64; compensate bool [H];
    key_mask bool [B, N]; cos, sin float32 [N, D / 2] with rotary "interleaved" or "halves", or "" for none; qk and pv
    are the formats of the heads, "fp16", "bf16", "int8" and for pv "fp8", separated by commas.
    """
    check_device(query)
    from paroattn.ops import triton_launch

    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    triton_launch.run(
        output,
        lse,
        query,
        key,
        value,
        permutation,
        mask_bits,
        block_q,
        compensate,
        key_mask,
        cos,
        sin,
        rotary,
        qk.split(","),
        pv.split(","),
        scale,
    )
    return output, lse


@triton_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def check_device(x: Tensor) -> None:
    """Raise `ValueError` where kernels cannot run on a tensor."""
    reason = unavailable() or unsupported(x.device, None, (), (BLOCK, BLOCK))
    if reason:
        raise ValueError(f"backend 'triton' cannot do this: {reason}")


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """While it is entered, kernels are launched where `x` is."""
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(x.device)


def target_here(device: torch.device) -> str:
    """The table's target for a device that `check_device` has accepted."""
    target = "sm90" if INTERPRETED else target_of(device)
    if target is None:
        raise ValueError(f"backend 'triton' has no configuration for {torch.cuda.get_device_name(device)}")
    return target
