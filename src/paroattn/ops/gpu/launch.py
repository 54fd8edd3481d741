"""A call on a GPU: for the heads of each precision the prologue (pack.py), then one of the two forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.ops.gpu import forward, hopper, pack
from paroattn.ops.gpu.device import INTERPRETED, on_device_of
from paroattn.ops.gpu.pack import Call, Heads, Lists, Packed


def run(output: Tensor, lse: Tensor, call: Call, count_visits: bool = False) -> list[Tensor]:
    """Fill output, like the call's query with channels side by side in memory, and lse, float32 [B, H, N].

    Returns:
        With `count_visits`, which only Triton's forward can do, how many kv blocks each program attended: int32
        [B, heads, programs] per precision.
    """
    visits: list[Tensor] = []
    if output.numel() == 0:
        return visits
    with on_device_of(call.query):
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
    forward.attention_forward[(packs * heads.q_blocks,)](
        packed.queries,
        packed.keys,
        packed.values,
        output,
        lse,
        heads.numbers,
        call.order,
        packed.q_factor,
        packed.lse_shift,
        packed.k_scale if heads.qk == "int8" else None,
        packed.v_mean,
        packed.v_scale,
        packed.bias,
        *((None,) * 4 if lists is None else (lists.slots, lists.rows, lists.counts, lists.indices)),
        call.compensate,
        None if call.compensate is None else call.mask,
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
    hopper.launch(
        call.width,
        heads.pv,
        call.batch * heads.slots * heads.q_blocks,
        output,
        q=packed.queries,
        records=packed.keys,
        lse=lse,
        heads=heads.numbers,
        order=call.order,
        q_factor=packed.q_factor,
        lse_shift=packed.lse_shift,
        v_mean=packed.v_mean,
        v_scale=packed.v_scale,
        bias=packed.bias,
        slots=None if lists is None else lists.slots,
        rows=None if lists is None else lists.rows,
        counts=None if lists is None else lists.counts,
        indices=pack.all_blocks(call) if lists is None else lists.indices,
        compensate=call.compensate,
        mask=call.mask,
        mean_records=packed.mean_keys,
        mean_v_scale=packed.mean_v_scale,
        mean_bias=packed.mean_bias,
        stride_ob=output.stride(0),
        stride_oh=output.stride(1),
        stride_on=output.stride(2),
        stride_mask=0 if call.mask is None else call.mask.stride(0),
        batch=call.batch,
        n_heads=call.heads,
        group=call.group,
        tokens=call.tokens,
        n_slots=heads.slots,
        q_blocks=heads.q_blocks,
        parts=heads.parts,
        kv_blocks=call.kv_blocks,
        mean_blocks=call.mean_blocks,
        mask_bytes=0 if call.mask is None else call.mask.shape[2],
        head_dim=call.head_dim,
    )
