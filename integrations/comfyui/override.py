"""One forward call of a diffusion model: its attention calls as ComfyUI makes them, and what becomes of each.

All that belongs to the call is here and travels in its own `transformer_options`, so that conditional and unconditional
passes may run on two devices in two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn import TokenGrid
from paroattn.runner import Dense, Runner

OVERRIDE = "optimized_attention_override"
"""The key of `transformer_options` under which ComfyUI looks for attention to run instead of its own."""

Attend = Callable[..., Tensor]
"""An attention function of ComfyUI."""
Override = Callable[..., Tensor]
"""`override(func, *args, **kwargs)`: runs instead of `func(*args, **kwargs)`, which is dense attention."""
Replacement = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""A patch that runs instead of a block."""


@dataclass(frozen=True)
class Planned:
    """The operators of a call and the step bucket they read, a 0-dim int64 tensor at a fixed address."""

    runner: Runner
    bucket: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """A call as ComfyUI's attention functions take it.

    q, k, v are [B, N, heads * D], or with skip_reshape [B, heads, N, D]; the result is [B, N, heads * D], or with
    skip_output_reshape [B, heads, N, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    others: dict[str, Any]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **others: Any,
    ) -> AttentionCall:
        """The call with these arguments; `attn_precision` is about sums, which are float32 in paroattn anyway."""
        return cls(q, k, v, heads, mask, skip_reshape, skip_output_reshape, others)

    def run(self, layer: int, planned: Planned, grid: TokenGrid, masks_are_padding: bool) -> Tensor | Dense:
        """Attend as a layer's plan says, or say why not."""
        if self.q.shape != self.k.shape or self.k.shape != self.v.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (self.q, self.k, self.v))
            return Dense(f"query, key and value are {shapes}: this is no self-attention over all tokens")
        q, k, v = (self._tokens_first(x) for x in (self.q, self.k, self.v))
        if q.shape[1] != grid.tokens:
            return Dense(
                f"there are {q.shape[1]:,} tokens; the latent gives grid {grid}: reference frames or other tokens "
                "stand beside them, or a part was taken out"
            )
        if torch.is_grad_enabled() and q.requires_grad:
            return Dense("gradients are asked for, and a plan is for inference")
        if self.others.get("low_precision_attention") is False:
            return Dense("the model keeps this call from attention in low precision")
        key_mask = None if self.mask is None else _key_mask(self.mask, q.shape[0], q.shape[1], masks_are_padding)
        if isinstance(key_mask, Dense):
            return key_mask
        dtype = q.dtype
        working = working_dtype(dtype, q.device)
        q, k, v = (x.to(working) if x.dtype == dtype else x for x in (q, k, v))
        output = planned.runner.call(
            layer, q, k, v, bucket=planned.bucket, key_mask=key_mask, scale=self.others.get("scale")
        )
        if isinstance(output, Dense):
            return output
        output = output.to(dtype)
        return output.transpose(1, 2) if self.skip_output_reshape else output.flatten(2)

    def _tokens_first(self, x: Tensor) -> Tensor:
        """The tensor as [B, N, H, D]."""
        return x.transpose(1, 2) if self.skip_reshape else x.unflatten(2, (self.heads, -1))


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What attention runs in: kernels for accelerators take 16 bits, so that float32 is rounded for them."""
    return torch.bfloat16 if dtype == torch.float32 and device.type != "cpu" else dtype


def _key_mask(mask: Tensor, batch: int, tokens: int, masks_are_padding: bool) -> Tensor | Dense:
    """A mask as bool [B, N], False for keys to ignore; `Dense` if it says more than which keys those are.

    Args:
        mask: bool, or added to the logits; [..., 1, N] if it is about keys.
        batch, tokens: B and N.
        masks_are_padding: that a mask which is added holds nothing but 0 and the lowest number. To look would be to
            wait for the device.
    """
    if mask.shape[-2:] != (1, tokens) or mask[..., 0, 0].numel() not in (1, batch):
        return Dense(f"mask is {list(mask.shape)}: it is about pairs of tokens, not about keys")
    if mask.dtype != torch.bool and not masks_are_padding:
        return Dense("the text's mask holds weights, not only which tokens are padding")
    visible = mask if mask.dtype == torch.bool else mask > -1
    return visible.reshape(-1, tokens).expand(batch, tokens)


class Forward:
    """A forward call in progress, which is also its attention override.

    Args:
        planned: what runs its blocks, or `Dense` for all of them.
        grid: of its tokens.
        masks_are_padding: see `_key_mask`.
        count: called with the reason of each call of a block, None for one that ran as planned.
    """

    def __init__(
        self, planned: Planned | Dense, grid: TokenGrid, masks_are_padding: bool, count: Callable[[str | None], None]
    ):
        self._planned = planned
        self._grid = grid
        self._masks_are_padding = masks_are_padding
        self._count = count
        self._previous: Override | None = None
        self.layer: int | None = None  # of the block that runs, until it calls attention
        self.calls = 0

    def options(self, options: dict[str, Any], blocks: list[tuple[str, int]]) -> dict[str, Any]:
        """The call's `transformer_options` with this as override and with blocks that say which layer they are.

        What was there before is kept: an override gets the calls that stay dense, a replacement of a block runs in it.
        ComfyUI does not say in all models and versions which block runs, and in VACE it says so for two at once.

        Args:
            options: of the call; they are not changed.
            blocks: name and number of each layer's block.
        """
        self._previous = options.get(OVERRIDE)
        replacements = options.get("patches_replace", {})
        blocks_replaced = dict(replacements.get("dit", {}))
        for layer, name in enumerate(blocks):
            blocks_replaced[name] = _Marked(self, layer, blocks_replaced.get(name))
        return {**options, OVERRIDE: self, "patches_replace": {**replacements, "dit": blocks_replaced}}

    @torch.compiler.disable
    def __call__(self, func: Attend, *args: Any, **kwargs: Any) -> Tensor:
        """Run an attention call, arguments as of ComfyUI's attention functions."""
        # Only the first call of a block is its self-attention: cross-attention may have as many keys as queries.
        layer, self.layer = self.layer, None
        if layer is not None:
            self.calls += 1
            output: Tensor | Dense = (
                self._planned if isinstance(self._planned, Dense) else self._run(layer, args, kwargs)
            )
            self._count(output.reason if isinstance(output, Dense) else None)
            if not isinstance(output, Dense):
                return output
        if self._previous is not None:
            return self._previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _run(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Dense:
        assert not isinstance(self._planned, Dense)
        return AttentionCall.of(*args, **kwargs).run(layer, self._planned, self._grid, self._masks_are_padding)


class _Marked:
    """Runs a block, or what replaces it, with its layer noted in the forward call."""

    def __init__(self, forward: Forward, layer: int, previous: Replacement | None):
        self._forward = forward
        self._layer = layer
        self._previous = previous

    @torch.compiler.disable(recursive=False)
    def __call__(self, arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        self._forward.layer = self._layer
        try:
            if self._previous is not None:
                return self._previous(arguments, extra)
            return extra["original_block"](arguments)
        finally:
            self._forward.layer = None
