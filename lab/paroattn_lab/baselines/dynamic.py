"""Rules that make masks from query and key in every attention call, attached to a pipeline like a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BLOCK, block_count
from paroattn.errors import InputError, PlanError
from paroattn.grid import TokenGrid
from paroattn.integrations.observe import ObservedCall, observe
from paroattn.integrations.pipeline import Pipeline
from paroattn.keep import check_density
from paroattn.ops import attention
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import CallKind
from paroattn.order import token_order
from paroattn.quantize import Precision
from paroattn_lab.baselines.masks import baseline_mask
from paroattn_lab.baselines.scores import mean_similarity, vertical_slash

Rule = Callable[[Tensor, Tensor, float], Tensor]
"""From q, k [N, D] of one head and the scale of the logits to scores [q blocks, kv blocks]."""

_RULES: dict[str, Rule] = {
    "mean similarity": mean_similarity,
    "mean similarity + orders": mean_similarity,
    "vertical-slash": vertical_slash,
}
DYNAMIC_BASELINES = tuple(_RULES)
_WITH_ORDERS = "mean similarity + orders"


def apply_dynamic(
    pipe: Any, name: str, density: float, *, orders: Tensor | None = None, backend: str = "auto"
) -> DynamicHandle:
    """Let a pipeline's transformer attend with masks made in every call, until the handle is removed.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows.
        name: one of `DYNAMIC_BASELINES`: "mean similarity" (SpargeAttn, see `scores.mean_similarity`), the same with
            each head's tokens reordered, or "vertical-slash" (MInference, see `scores.vertical_slash`).
        density: kept blocks over all blocks, text blocks counted, in (0, 1]; met to the nearest block in every head,
            call and sample.
        orders: int64 [layers, heads, N], gather indices with text tokens last, for "mean similarity + orders".
        backend: of the operator, "auto" or a name.

    Returns:
        A handle with `remove()` and the measured `density`; also a context manager.

    Raises:
        InputError: an unknown name, model class or backend; density outside (0, 1]; orders missing, not taken or of
            another model.
        PlanError: while generating, a density below what text blocks and one block per row need, or orders for
            another number of tokens.

    Example:
        >>> with apply_dynamic(pipe, "mean similarity", 0.3) as handle:  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
        >>> handle.density  # doctest: +SKIP
        0.3
    """
    if name not in _RULES:
        raise InputError(f"baseline {name!r} is unknown; expected one of {', '.join(map(repr, DYNAMIC_BASELINES))}")
    check_density(density)
    choose_backend(backend, CallKind([Precision()]))
    identity = Pipeline(pipe).identity
    if (orders is None) == (name == _WITH_ORDERS):
        raise InputError(f"orders are for {_WITH_ORDERS!r}, which needs them; got name {name!r}, orders {orders}")
    if orders is not None and (orders.ndim != 3 or orders.shape[:2] != (identity.layers, identity.heads)):
        raise InputError(
            f"orders have shape {list(orders.shape)}; expected [layers, heads, N], here [{identity.layers}, "
            f"{identity.heads}, N]"
        )
    return DynamicHandle(pipe, _RULES[name], density, orders, backend)


class DynamicHandle:
    """What `apply_dynamic` returns; `remove()` restores the pipeline."""

    def __init__(self, pipe: Any, rule: Rule, density: float, orders: Tensor | None, backend: str):
        self._rule = rule
        self._wanted = density
        self._orders = orders
        self._backend = backend
        self._kept = self._blocks = 0
        self._observation = observe(pipe, self._attend)

    @property
    def density(self) -> float:
        """Kept blocks over all blocks in all calls so far; NaN before the first."""
        return self._kept / self._blocks if self._blocks else math.nan

    def remove(self) -> None:
        """Restore the pipeline's own attention, bitwise."""
        self._observation.remove()

    def __enter__(self) -> DynamicHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _attend(self, call: ObservedCall) -> Tensor:
        grid, query = call.grid, call.query
        if self._orders is None:
            order = token_order("FHW", grid)  # the model's own, but for text before visual tokens
            order = order.expand(call.heads, -1)
        elif self._orders.shape[-1] != query.shape[1]:
            raise PlanError(
                f"orders are for {self._orders.shape[-1]:,} tokens; the model produced {grid}. "
                "Give the orders of that grid."
            )
        else:
            order = self._orders[call.layer]
        order = order.to(query.device)
        outputs = []
        for number, sample in enumerate(zip(query, call.key, call.value, strict=True)):
            q, k, v = (x.unsqueeze(0) for x in sample)
            mask = self._masks(q[0], k[0], order, call.scale, grid)
            outputs.append(
                attention(
                    q,
                    k,
                    v,
                    permutation=order,
                    block_mask=mask,
                    key_mask=None if call.key_mask is None else call.key_mask[number : number + 1],
                    scale=call.scale,
                    tensor_layout="NHD",
                    backend=self._backend,
                )
            )
        return torch.cat(outputs)

    def _masks(self, q: Tensor, k: Tensor, orders: Tensor, scale: float, grid: TokenGrid) -> Tensor:
        """Bool [H, q blocks, kv blocks] of one sample q [N, H, D], k [N, H_kv, D]."""
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        masks = []
        for head in range(heads):
            # Blocks that touch text are kept whatever their score, so rules look at visual tokens only.
            visual = orders[head, : grid.visual_tokens]
            scores = self._rule(q[visual, head].float(), k[visual, head // group].float(), scale).cpu()
            missing = block_count(grid.tokens, BLOCK) - len(scores)
            masks.append(baseline_mask(pad(scores, (0, missing, 0, missing)), self._wanted, grid))
        kept = torch.stack(masks)
        self._kept += int(kept.sum())
        self._blocks += kept.numel()
        return kept
