"""A call on a GPU: for the heads of each precision the prologue (pack.py), then one of the two forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paroattn.ops.gpu import forward, hopper, pack
from paroattn.ops.gpu.configs import OVERRIDES
from paroattn.ops.gpu.device import INTERPRETED, on_device_of
from paroattn.ops.gpu.pack import Call, Heads, Lists, Packed
from paroattn.ops.gpu.recording import ALIGNED, Recording

recordings: dict[tuple[Any, ...], Recording] = {}
"""Of the kinds of calls seen."""
_MOST_RECORDINGS = 256


def run(output: Tensor, lse: Tensor, call: Call, count_visits: bool = False) -> list[Tensor]:
    """Fill output, like the call's query with channels side by side in memory, and lse, float32 [B, H, N].

    Returns:
        With `count_visits`, which only Triton's forward can do, how many kv blocks each program attended: int32
        [B, heads, programs] per precision.
    """
    if output.numel() == 0:
        return []
    with on_device_of(call.query):
        tensors = call.tensors(output, lse)
        if INTERPRETED or count_visits or OVERRIDES or any(x is not None and x.data_ptr() % ALIGNED for x in tensors):
            return _run(output, lse, call, count_visits)
        kind = call.kind(output)
        recording = recordings.get(kind)
        if recording is not None:
            recording.replay(tensors, output.device)
            return []
        call.recording = Recording(tensors)
        _run(output, lse, call, count_visits)
        call.recording.finish()
        if len(recordings) >= _MOST_RECORDINGS:
            recordings.clear()
        recordings[kind] = call.recording
    return []


def _run(output: Tensor, lse: Tensor, call: Call, count_visits: bool) -> list[Tensor]:
    visits: list[Tensor] = []
    scaled = any({"int8", "fp8"} & {*formats} for formats in call.formats)
    partial = pack.partial_statistics(call) if scaled else None
    for formats in dict.fromkeys(call.formats):
        numbers = tuple(head for head, own in enumerate(call.formats) if own == formats)
        on_hopper = not count_visits and pack.on_hopper(call, *formats, output)
        heads = pack.heads_of(call, numbers, *formats, on_hopper)
        packed, lists = pack.pack(call, heads, partial), pack.kept_lists(call, heads)
        if on_hopper:
            _forward_on_hopper(call, heads, packed, lists, output, lse)
        else:
            visits += _forward(call, heads, packed, lists, output, lse, count_visits)
    return visits


def _forward(
    call: Call, heads: Heads, packed: Packed, lists: Lists | None, output: Tensor, lse: Tensor, count_visits: bool
) -> list[Tensor]:
    packs = call.batch * heads.slots
    visited = call.new(packs, heads.q_blocks, dtype=torch.int32) if count_visits else None
    call.launch(
        forward.attention_forward,
        (packs * heads.q_blocks,),
        packed.queries,
        packed.keys,
        packed.values,
        output,
        lse,
        heads.numbers,
        call.order,
        call.order_index,
        packed.q_factor,
        packed.lse_shift,
        packed.k_scale if heads.qk == "int8" else None,
        packed.v_mean,
        packed.v_scale,
        packed.bias,
        *((None,) * 4 if lists is None else (lists.slots, lists.rows, lists.counts, lists.indices)),
        call.compensate,
        None if call.compensate is None else call.mask,
        None if call.compensate is None else call.mask_index,
        None if call.compensate is None else call.bucket,
        packed.mean_keys,
        packed.mean_k_scale,
        packed.mean_values,
        packed.mean_v_scale,
        packed.mean_bias,
        visited,
        *output.stride()[:3],
        0 if call.mask is None else call.mask.stride(0),
        call.batch,
        call.heads,
        call.group,
        call.tokens,
        heads.slots,
        heads.q_blocks,
        heads.parts,
        call.kv_blocks,
        call.mean_blocks,
        0 if call.mask is None else call.mask.shape[2],
        HEAD_DIM=call.head_dim,
        D=call.width,
        BLOCK_Q=heads.block_q,
        QK=heads.qk,
        PV=heads.pv,
        WIDTH=heads.config.width,
        SWAPPED=heads.config.swapped,
        ASM=heads.config.asm and not INTERPRETED,
        NUM_STAGES=heads.config.num_stages,
        **heads.config.options,
    )
    return [] if visited is None else [visited.view(call.batch, heads.slots, heads.q_blocks)]


def _forward_on_hopper(
    call: Call, heads: Heads, packed: Packed, lists: Lists | None, output: Tensor, lse: Tensor
) -> None:
    programs = call.batch * heads.slots * heads.q_blocks
    launch = hopper.launcher(output.device.index, call.width, heads.pv, output.dtype, programs)
    given = {
        "output": output,
        "q": packed.queries,
        "records": packed.keys,
        "lse": lse,
        "heads": heads.numbers,
        "order": call.order,
        "order_index": call.order_index,
        "q_factor": packed.q_factor,
        "lse_shift": packed.lse_shift,
        "v_mean": packed.v_mean,
        "v_scale": packed.v_scale,
        "bias": packed.bias,
        "slots": None if lists is None else lists.slots,
        "rows": None if lists is None else lists.rows,
        "counts": None if lists is None else lists.counts,
        "indices": pack.all_blocks(call.kv_blocks, output.device) if lists is None else lists.indices,
        "compensate": call.compensate,
        "mask": call.mask,
        "mask_index": call.mask_index,
        "bucket": call.bucket,
        "mean_records": packed.mean_keys,
        "mean_v_scale": packed.mean_v_scale,
        "mean_bias": packed.mean_bias,
        "stride_ob": output.stride(0),
        "stride_oh": output.stride(1),
        "stride_on": output.stride(2),
        "stride_mask": 0 if call.mask is None else call.mask.stride(0),
        "batch": call.batch,
        "n_heads": call.heads,
        "group": call.group,
        "tokens": call.tokens,
        "n_slots": heads.slots,
        "q_blocks": heads.q_blocks,
        "parts": heads.parts,
        "kv_blocks": call.kv_blocks,
        "mean_blocks": call.mean_blocks,
        "mask_bytes": 0 if call.mask is None else call.mask.shape[2],
        "head_dim": call.head_dim,
    }
    (call.recording or Recording(())).cuda(launch, hopper.Arguments, given)
