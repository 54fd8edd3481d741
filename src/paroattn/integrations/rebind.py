"""Rebinding a model's own attention processor, so that only the attention call itself is replaced.

Projections, norms, RoPE and the output split stay upstream's code: the processor's `__call__` runs the same code
object, with `dispatch_attention_fn` exchanged in a copy of its globals. Nothing global is changed or registered.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor


class Intercept(Protocol):
    """Takes the place of one layer's attention; tensors are [B, N, H, D], `dense` is the model's own attention."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dense: Callable[[], Tensor]
    ) -> Tensor: ...


class _Slot:
    """Rides in the processor's `_attention_backend`, the one value that it hands to its attention call."""

    def __init__(self, intercept: Intercept, chosen_backend: Any):
        self.intercept = intercept
        self.chosen_backend = chosen_backend


def rebind(processor: Any, intercept: Intercept) -> Any:
    """A copy of a diffusers attention processor whose attention call goes to `intercept`."""
    slot = _Slot(intercept, getattr(processor, "_attention_backend", None))
    rebound = copy.copy(processor)
    rebound.__class__ = _rebound_class(type(processor))  # type: ignore[arg-type]
    rebound.__dict__.pop("_attention_backend", None)
    rebound.__dict__["_paroattn_slot"] = slot
    return rebound


@functools.lru_cache
def _rebound_class(processor_class: Any) -> type:
    original: Any = processor_class.__call__
    if "dispatch_attention_fn" not in original.__code__.co_names:
        raise ValueError(f"attention processor {processor_class.__name__} does not call dispatch_attention_fn")
    # Without __name__, torch.compile cannot resolve these globals through the original module.
    namespace = {name: value for name, value in original.__globals__.items() if name != "__name__"}
    namespace["dispatch_attention_fn"] = _dispatch
    call = types.FunctionType(
        original.__code__,
        namespace,
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    call.__kwdefaults__ = original.__kwdefaults__
    members = {"__call__": call, "_attention_backend": property(_get_slot, _choose_backend)}
    return type(f"Paro{processor_class.__name__}", (processor_class,), members)


def _get_slot(processor: Any) -> _Slot:
    return processor.__dict__["_paroattn_slot"]


def _choose_backend(processor: Any, backend: Any) -> None:
    """`set_attention_backend` on an applied model: keeps the choice for calls that stay dense."""
    processor.__dict__["_paroattn_slot"].chosen_backend = backend


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: _Slot,
    parallel_config: Any = None,
) -> Tensor:
    if attn_mask is not None or is_causal or parallel_config is not None:
        raise ValueError(
            "self-attention was called with a mask, causal, or under context parallelism, which plans do not cover; "
            "call remove() on the handle to run the model without paroattn"
        )

    def dense() -> Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            attention_kwargs=attention_kwargs,
            backend=backend.chosen_backend,
        )

    return backend.intercept(query, key, value, scale=scale, dense=dense)
