"""Attention operators of others that the operator is timed beside: PyTorch's own, and packages that are installed."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from paroattn.block_mask import BLOCK, BlockMask
from paroattn.errors import InputError

logger = logging.getLogger(__name__)
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """An operator of others.

    Attributes:
        method: its name in records.
        package: what has to be installed.
        block_q: queries per block of the masks it takes, or None where it takes none.
        prepare: makes the call from query, key, value [1, H, N, D] and a bool mask [H, q blocks, kv blocks] or None.
    """

    method: str
    package: str
    block_q: int | None
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor | None], Call]

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call | None:
        """The call, tried once; None, with a line in the log, where it is missing or does not take these inputs."""
        if importlib.util.find_spec(self.package) is None:
            return None
        try:
            call = self.prepare(query, key, value, mask)
            call()
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            logger.warning("%s is left out: %s", self.method, str(error).partition("\n")[0])
            return None
        return call


def sdpa(kernel: str | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Call:
    """PyTorch's dense attention by one of its kernels, named as in `torch.nn.attention.SDPBackend`, or its choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return scaled_dot_product_attention(query, key, value)

    return call


def flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
    """FlexAttention, compiled, with the mask's blocks as full blocks."""
    from torch.nn.attention import flex_attention as flex

    if mask is None:
        raise InputError("FlexAttention is timed with a mask")
    tokens = query.shape[2]
    block_q = BLOCK * -(-mask.shape[2] // mask.shape[1])
    flex_mask = BlockMask.from_dense(mask, tokens, block_q).to_flex(query.device)
    compiled: Callable[..., Any] = torch.compile(flex.flex_attention)
    # Its own choice of tiles for GPUs may be larger than the mask's blocks, which it then refuses.
    tiles = {"BLOCK_M": block_q, "BLOCK_N": BLOCK} if query.device.type == "cuda" else None
    return lambda: compiled(query, key, value, block_mask=flex_mask, kernel_options=tiles)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
    from flash_attn import flash_attn_func

    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return lambda: flash_attn_func(query, key, value).transpose(1, 2)


def _sage(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
    from sageattention import sageattn

    return lambda: sageattn(query, key, value, tensor_layout="HND")


def _sparge(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    if mask is None:
        raise InputError("SpargeAttn is timed with a mask")
    mask_id = mask.unsqueeze(0).to(torch.int8)
    return lambda: block_sparse_sage2_attn_cuda(query, key, value, mask_id=mask_id, tensor_layout="HND")


def _flashinfer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Call:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    if mask is None:
        raise InputError("FlashInfer is timed with a mask")
    heads, tokens, head_dim = query.shape[1:]
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(2**27, dtype=torch.uint8, device=query.device))
    sizes = []
    for blocks in mask.shape[1:]:
        size = BLOCK * -(-mask.shape[2] // blocks)
        own = torch.full((heads, blocks), size, dtype=torch.int32, device=query.device)
        own[:, -1] = tokens - size * (blocks - 1)
        sizes.append(own)
    wrapper.plan(mask, *sizes, heads, heads, head_dim, q_data_type=query.dtype)
    return lambda: wrapper.run(query[0], key[0], value[0]).unsqueeze(0)


GPU_PEERS = (
    Peer("sdpa flash", "torch", None, functools.partial(sdpa, "FLASH_ATTENTION")),
    Peer("sdpa cudnn", "torch", None, functools.partial(sdpa, "CUDNN_ATTENTION")),
    Peer("flash-attn", "flash_attn", None, _flash_attn),
    Peer("sageattention", "sageattention", None, _sage),
    Peer("flex", "torch", BLOCK, flex_attention),
    Peer("flashinfer", "flashinfer", BLOCK, _flashinfer),
    Peer("spargeattn", "spas_sage_attn", 2 * BLOCK, _sparge),
)
