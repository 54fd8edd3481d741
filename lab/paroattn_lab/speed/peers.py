"""Attention operators of others that the operator is timed beside: PyTorch's own, and packages that are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from paroattn.block_mask import BlockMask, block_count

logger = logging.getLogger(__name__)
Call = Callable[[], Tensor]
Blocks = tuple[int, int]  # queries and keys per block of a mask


@dataclass(frozen=True)
class Peer:
    """An operator of others.

    Attributes:
        method: its name in records.
        package: what has to be installed.
        prepare: makes the call from query, key, value [B, H, N, D] and, where it takes masks, a bool mask
            [H, q blocks, kv blocks] and the tokens per block.
        blocks: tokens per block of the masks that it takes, as (queries, keys), the shapes with the largest first;
            none where it takes no masks.
        precision: number formats of its products.
    """

    method: str
    package: str
    prepare: Callable[..., Call]
    blocks: tuple[Blocks, ...] = ()
    precision: str = "bf16"

    def takes(self, blocks: Blocks) -> bool:
        """Whether masks of such blocks can be written in blocks of its own."""
        return self._own(blocks) is not None

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, blocks: Blocks) -> Call | None:
        """The call, tried once; None, with a line in the log, where it is missing or does not take these inputs."""
        if not _is_installed(self.package):
            return None
        own = self._own(blocks)
        masked = () if mask is None or own is None else (refined(mask, blocks, own, query.shape[2]), own)
        try:
            call = self.prepare(query, key, value, *masked)
            call()
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            logger.warning("%s is left out: %s", self.method, str(error).partition("\n")[0])
            return None
        return call

    def _own(self, blocks: Blocks) -> Blocks | None:
        fitting = (own for own in self.blocks if all(size % part == 0 for size, part in zip(blocks, own, strict=True)))
        return next(fitting, None)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what holds it is missing
        return False


def refined(mask: Tensor, blocks: Blocks, parts: Blocks, tokens: int) -> Tensor:
    """The same mask [H, q blocks, kv blocks] in smaller blocks, whose sizes divide those of the blocks."""
    for dim, (size, part) in enumerate(zip(blocks, parts, strict=True), start=1):
        mask = mask.repeat_interleave(size // part, dim).narrow(dim, 0, block_count(tokens, part))
    return mask.contiguous()


def sdpa(kernel: str | None, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """PyTorch's dense attention by one of its kernels, named as in `torch.nn.attention.SDPBackend`, or its choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> Tensor:
        if kernel is None:
            return scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return scaled_dot_product_attention(query, key, value)

    return call


def flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, blocks: Blocks) -> Call:
    """FlexAttention, compiled, with the mask's blocks as full blocks."""
    from torch.nn.attention import flex_attention as flex

    flex_mask = BlockMask.from_dense(mask, query.shape[2], *blocks).to_flex(query.device)
    compiled: Callable[..., Any] = torch.compile(flex.flex_attention)
    # Its own choice of tiles for GPUs may be larger than the mask's blocks, which it then refuses.
    tiles = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1]} if query.device.type == "cuda" else None
    return lambda: compiled(query, key, value, block_mask=flex_mask, kernel_options=tiles)


def _flash_attn(module: str, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """FlashAttention 2 or 3 on tensors of a dtype; making them of the given ones is part of the call."""
    attend = importlib.import_module(module).flash_attn_func
    tensors = _tokens_first(query, key, value)
    return lambda: attend(*(x.to(dtype) for x in tensors)).transpose(1, 2)


def _flash_attn_4(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, blocks: Blocks | None = None
) -> Call:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    query, key, value = _tokens_first(query, key, value)
    kept = None
    if mask is not None and blocks is not None:
        lists = BlockMask.from_dense(mask, query.shape[1], *blocks).kv_lists()
        numbers, columns = (x.unsqueeze(0).expand(len(query), *x.shape) for x in lists)
        # Blocks that are masked in part come first; there are none.
        kept = BlockSparseTensorsTorch(torch.zeros_like(numbers), columns[..., :1], numbers, columns, block_size=blocks)

    def call() -> Tensor:
        return flash_attn_func(query, key, value, block_sparse_tensors=kept)[0].transpose(1, 2)

    return call


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Call:
    from sageattention import sageattn

    return lambda: sageattn(query, key, value, tensor_layout="HND")


def _sparge(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, blocks: Blocks) -> Call:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    own = (64, 128) if torch.cuda.get_device_capability() == (9, 0) else (128, 64)
    mask_id = refined(mask, blocks, own, query.shape[2]).unsqueeze(0).to(torch.int8)
    return lambda: block_sparse_sage2_attn_cuda(query, key, value, mask_id=mask_id, tensor_layout="HND")


def _flashinfer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, blocks: Blocks) -> Call:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    tokens, head_dim = query.shape[2:]
    mask = mask.repeat(len(query), 1, 1)  # it has no batch: heads of all are heads to it
    heads = len(mask)
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(2**27, dtype=torch.uint8, device=query.device))
    sizes = [_block_sizes(tokens, size, query.device).repeat(heads, 1) for size in blocks]
    wrapper.plan(mask, *sizes, heads, heads, head_dim, q_data_type=query.dtype)
    return lambda: wrapper.run(*(x.flatten(0, 1) for x in (query, key, value))).view_as(query)


def _fastvideo(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, blocks: Blocks) -> Call:
    from fastvideo_kernel import block_sparse_attn_from_indices

    tokens = query.shape[2]
    lists = BlockMask.from_dense(mask, tokens, *blocks).kv_lists()
    query, key, value = (pad(x, (0, 0, 0, -tokens % blocks[0])) for x in (query, key, value))
    numbers, columns = (x.unsqueeze(0).repeat(len(query), *(1,) * x.ndim) for x in lists)
    sizes = _block_sizes(tokens, blocks[1], query.device)
    return lambda: block_sparse_attn_from_indices(query, key, value, columns, numbers, sizes)[0][:, :, :tokens]


def _comfy(query: Tensor, key: Tensor, value: Tensor) -> Call:
    from comfy_kitchen import int8_attention

    return lambda: int8_attention(query, key, value)


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _block_sizes(tokens: int, size: int, device: torch.device) -> Tensor:
    """Tokens in each block, int32."""
    sizes = torch.full((block_count(tokens, size),), size, dtype=torch.int32, device=device)
    sizes[-1] = tokens - size * (len(sizes) - 1)
    return sizes


_ANY = ((128, 128), (128, 64), (64, 64))
GPU_PEERS = (
    Peer("sdpa flash", "torch", functools.partial(sdpa, "FLASH_ATTENTION")),
    Peer("sdpa cudnn", "torch", functools.partial(sdpa, "CUDNN_ATTENTION")),
    Peer("flash-attn", "flash_attn_2_cuda", functools.partial(_flash_attn, "flash_attn", torch.bfloat16)),
    Peer("flash-attn-3", "fa3_fwd", functools.partial(_flash_attn, "fa3_fwd_interface", torch.bfloat16)),
    Peer(
        "flash-attn-3",
        "fa3_fwd",
        functools.partial(_flash_attn, "fa3_fwd_interface", torch.float8_e4m3fn),
        precision="fp8",
    ),
    Peer("flash-attn-4", "flash_attn.cute", _flash_attn_4),
    Peer("sageattention", "sageattention", _sage),
    Peer("comfy-kitchen", "comfy_kitchen", _comfy, precision="int8"),
    Peer("flex", "torch", flex_attention, _ANY),
    Peer("flash-attn-4", "flash_attn.cute", _flash_attn_4, _ANY),
    Peer("flashinfer", "flashinfer", _flashinfer, _ANY),
    Peer("spargeattn", "spas_sage_attn", _sparge, ((128, 128),)),
    Peer("fastvideo", "fastvideo_kernel", _fastvideo, ((64, 64),)),
)
