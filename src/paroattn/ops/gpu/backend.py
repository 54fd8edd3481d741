"""The Triton backend: block-sparse attention on NVIDIA and AMD GPUs, registered with torch as one operator.

On Hopper, a kernel in CUDA takes part (hopper.py). The kernels are imported with the first call (launch.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK
from paroattn.ops.gpu import device, hopper
from paroattn.ops.inputs import FLAT_SCHEMA, AttentionInputs, CallKind, from_flat
from paroattn.quantize import PQuantization

FORMATS = frozenset(("exact", "bf16", "int8", "fp8"))
P_QUANTIZATION = PQuantization(granularity="row", steps=127)
BLOCKS_Q = (64, 128)


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


def describe() -> str:
    """The version of Triton, the GPU and, on Hopper, whether its own kernel is used."""
    import triton

    if device.INTERPRETED:
        return f"Triton {triton.__version__}, interpreted"
    found = f"Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if device.target_of(torch.device("cuda")) != "sm90":
        return found
    missing = hopper.unavailable()
    return f"{found}, {'CUDA for int8' if missing is None else f'without CUDA for int8 ({missing})'}"


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return device.unavailable()


def unsupported(kind: CallKind) -> str | None:
    """What of a kind of call this backend does not do, or None."""
    block_q, block_kv = kind.block_shape
    if block_q not in BLOCKS_Q or block_kv != BLOCK:
        return f"block_mask has blocks of {block_q} x {block_kv}; it takes 64 x 64 and 128 x 64"
    target = None
    if kind.device is not None:
        reason = device.unsupported(kind.device)
        if reason:
            return reason
        target = device.constant_target(kind.device)
    for precision in kind.precisions:
        formats = (precision.qk, precision.pv)
        if precision.qk == "fp8":
            return "it multiplies query and key in int8 or 16 bits, not in fp8"
        if precision.pv == "fp8" and target is not None and target not in device.FP8_TARGETS:
            return f"fp8 needs one of {', '.join(device.FP8_TARGETS)}; this GPU is {target}"
        if "exact" in formats and kind.dtype == torch.float32:
            return "it has no float32 products for precision 'exact'; use 16-bit tensors or precision 'bf16'"
        if device.INTERPRETED and ("bf16" in formats or ("exact" in formats and kind.dtype == torch.bfloat16)):
            return "Triton's interpreter does not multiply bfloat16"
    return None


def attend(inputs: AttentionInputs, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
    """Attention of checked inputs; see `paroattn.attention` and `paroattn.ops.reference.attend`.

    rotary: applied to query and key first, if given.
    """
    turned = (None, None, "") if rotary is None else (rotary.cos, rotary.sin, rotary.pairs)
    return torch.ops.paroattn.triton_attention(*inputs.flat(), *turned)


@torch.library.custom_op(
    "paroattn::triton_attention",
    mutates_args=(),
    schema=f"({FLAT_SCHEMA}, Tensor? cos, Tensor? sin, str pairs) -> (Tensor, Tensor)",
)
def triton_attention(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Attention of `AttentionInputs.flat` and the parts of a `Rotary`, pairs "" for none: output and lse [B, H, N]."""
    device.check_device(query)
    from paroattn.ops.gpu import launch
    from paroattn.ops.gpu.pack import Call

    *flat, cos, sin, pairs = others
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    launch.run(output, lse, Call(from_flat(query, *flat), cos, sin, pairs))
    return output, lse


@triton_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
