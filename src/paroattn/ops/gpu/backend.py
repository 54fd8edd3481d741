"""The Triton backend: block-sparse attention on NVIDIA and AMD GPUs, registered with torch as one operator.

On Hopper, a kernel in CUDA takes part (hopper.py). The kernels are imported with the first call (launch.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK
from paroattn.ops.gpu import device, hopper
from paroattn.ops.inputs import (
    FLAT_SCHEMA,
    AttentionInputs,
    CallKind,
    Repeat,
    from_flat,
    is_traced,
    with_adjacent_channels,
)
from paroattn.ops.opaque import opaque
from paroattn.quantize import PQuantization

FORMATS = frozenset(("exact", "bf16", "int8", "fp8"))
P_QUANTIZATION = PQuantization(granularity="row", steps=127)
BLOCKS_Q = (64, 128)


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


def attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attention of checked inputs; see `paroattn.attention` and `paroattn.ops.reference.attend`."""
    if is_traced(inputs.query):
        return triton_attention(*inputs.looked_up().flat())
    return _attend(inputs.readable())


def _attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    device.check_device(inputs.query)
    from paroattn.ops.gpu import launch
    from paroattn.ops.gpu.pack import Call

    query = inputs.query
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    launch.run(output, lse, Call(inputs))
    return output, lse


def repeater(inputs: AttentionInputs) -> Repeat | None:
    """What makes the launches of a call again with other tensors; None if they were not written down."""
    from paroattn.ops.gpu import launch
    from paroattn.ops.gpu.pack import Call
    from paroattn.ops.gpu.recording import ALIGNED

    if inputs.bucket is None or not _is_read_as_it_is(inputs):
        return None
    call = Call(inputs)
    recording = launch.recordings.get(call.kind(torch.empty_like(call.query)))
    if recording is None:
        return None

    def repeat(*given: Tensor | None) -> Tensor | None:
        query, key, value, bucket, key_mask, orders, order_index, masks, mask_index, compensate = given
        assert query is not None
        assert bucket is not None
        tensors = [x for x in given if x is not None]
        if is_traced(query) or bucket.dtype != torch.int64 or any(x.data_ptr() % ALIGNED for x in tensors):
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return None
        with device.on_device_of(query):
            output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
            tables = (orders, order_index, masks, mask_index, bucket, compensate if masks is not None else None)
            recording.replay((query, key, value, output, lse, *tables, key_mask), query.device)
        return output

    return repeat


def _is_read_as_it_is(inputs: AttentionInputs) -> bool:
    """Whether kernels read the tensors that a planned call brings, not others that are made of them."""
    masks = None if inputs.block_mask is None else inputs.block_mask.bits
    whole = (inputs.permutation, inputs.order_index, masks, inputs.mask_index, inputs.compensate, inputs.key_mask)
    integers = (inputs.permutation, inputs.order_index, inputs.mask_index)
    return (
        all(x is with_adjacent_channels(x) for x in (inputs.query, inputs.key, inputs.value))
        and all(x is None or x.is_contiguous() for x in whole)
        and all(x is None or x.dtype == torch.int32 for x in integers)
    )


triton_attention = opaque(
    f"triton_attention({FLAT_SCHEMA}) -> (Tensor, Tensor)",
    lambda *flat: _attend(from_flat(*flat)),
    lambda query, *_: (torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)),
)
