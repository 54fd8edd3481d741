"""Rebinding a model's own attention processor, so that only the attention call itself is replaced.

Projections, norms and the output split stay upstream's code: the processor's `__call__` is compiled once more from its
source with the call of attention redirected to the processor itself, and calls of rotary embeddings to what computes
the same faster. Nothing global is changed or registered, and what a layer needs rides on its processor, so that
pipelines and threads do not meet.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from paroattn.errors import InputError
from paroattn.integrations.rotary import rotated
from paroattn.ops.exchange import Exchange


class AttentionCall(NamedTuple):
    """A call of a layer's attention that was intercepted.

    Attributes:
        query, key, value: [B, N, H, D]; logits are scaled by 1 / sqrt(D), another factor is in the queries.
        key_mask: bool [B, N], False for keys to ignore, or None.
        dense: computes it with the model's own attention, [B, N, H, D].
        refusal: why nothing else can compute it, or None.
        with_text: puts the rows of so many text tokens, which have masks of their own, into an output; None where they
            have none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    dense: Callable[[], Tensor]
    refusal: str | None
    with_text: Callable[[Tensor, int], Tensor] | None = None

    @property
    def attends_to_itself(self) -> bool:
        """False for cross-attention of the same processor (an IP-adapter's)."""
        return self.key.shape[1] == self.query.shape[1]


Intercept = Callable[[AttentionCall], Tensor]
"""Takes the place of one layer's attention: the output, [B, N, H, D]."""


ExchangeOf = Callable[[int], Exchange | None]
"""How a call of a layer with so many tokens exchanges them with other ranks, or None."""


class CallShape(NamedTuple):
    """How a model calls attention.

    Attributes:
        text_first: text tokens stand before the visual ones.
        text_asks: they are queries, too. Where they are keys only, an intercept gets zeros as their queries.
        pair_masks: masks are [B, 1 or H, N, N]; one row of a visual token says what is hidden from all of them.
        text_masks: such masks are added, 0 for what is seen, and have rows of their own for text.
    """

    text_first: bool = False
    text_asks: bool = True
    pair_masks: bool = False
    text_masks: bool = False


_INTERCEPT, _SHAPE, _EXCHANGE = "_paroattn_intercept", "_paroattn_shape", "_paroattn_exchange_of"


def no_exchange(tokens: int) -> None:
    """An `ExchangeOf` of a model that one process has."""


def rebind(
    processor: Any, intercept: Intercept, shape: CallShape = CallShape(), exchange_of: ExchangeOf = no_exchange
) -> Any:
    """A copy of a diffusers attention processor whose attention call goes to `intercept`.

    Exchanges are made around it: it sees all tokens of this rank's heads.
    """
    rebound = copy.copy(processor)
    processor_class: Any = type(processor)
    rebound.__class__ = _rebound_class(processor_class)
    setattr(rebound, _INTERCEPT, intercept)
    setattr(rebound, _SHAPE, shape)
    setattr(rebound, _EXCHANGE, exchange_of)
    return rebound


def released(rebound: Any, own: Any) -> Any:
    """The processor of a rebound one: `own`, from which it was made, or a copy with what was set on it since."""
    attributes = {name: value for name, value in vars(rebound).items() if name not in (_INTERCEPT, _SHAPE, _EXCHANGE)}
    before = vars(own)
    if attributes.keys() == before.keys() and all(before[name] is value for name, value in attributes.items()):
        return own
    changed = copy.copy(own)
    vars(changed).clear()
    vars(changed).update(attributes)
    return changed


def is_rebound(processor: Any) -> bool:
    return isinstance(processor, _Redirected)


def refuse_copies(self: Any, protocol: Any) -> Any:
    """A method `__reduce_ex__` of what belongs to one pipeline."""
    raise InputError(
        "a pipeline that paroattn is applied to cannot be copied or pickled; call remove() on its handle first, and "
        "apply to the copy"
    )


class _Redirected:
    """What rebound processor classes get besides their own: the targets of the redirected calls."""

    _paroattn_intercept: Intercept
    _paroattn_shape: CallShape
    _paroattn_exchange_of: ExchangeOf

    __reduce_ex__ = refuse_copies
    _paroattn_rotated = staticmethod(rotated)

    def _paroattn_dispatch(
        self,
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
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """In place of `dispatch_attention_fn`, tensors [B, N, H, D]."""
        exchange = self._paroattn_exchange(query, key)

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config if exchange is None else None,
            )

        return self._paroattn_exchanged(query, key, value, attn_mask, is_causal, scale, attend, exchange)

    def _paroattn_sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of `torch.nn.functional.scaled_dot_product_attention`, tensors [B, H, N, D]."""

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            tensors = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            output = F.scaled_dot_product_attention(
                *tensors, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return output.transpose(1, 2)

        tensors = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        exchange = self._paroattn_exchange(*tensors[:2])
        return self._paroattn_exchanged(*tensors, attn_mask, is_causal, scale, attend, exchange).transpose(1, 2)

    def _paroattn_exchange(self, query: Tensor, key: Tensor) -> Exchange | None:
        """The exchange of a call, none of cross-attention."""
        tokens = query.shape[1]
        return self._paroattn_exchange_of(tokens) if key.shape[1] == tokens else None

    def _paroattn_exchanged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        exchange: Exchange | None,
    ) -> Tensor:
        """The intercept's output of a redirected call, within the exchange if there is one; tensors [B, N, H, D]."""
        own_mask = attn_mask
        if isinstance(attn_mask, Tensor) and attn_mask.ndim == 2:  # [B, N], as PyTorch's own attention does not take it
            attn_mask = attn_mask[:, None, None]
        if exchange is None:
            dense = functools.partial(attend, query, key, value, own_mask)
            return self._paroattn_attend(query, key, value, attn_mask, is_causal, scale, dense)
        if isinstance(attn_mask, Tensor):
            attn_mask = exchange.whole_mask(_mask_of_keys(attn_mask, key, self._paroattn_shape))
        query, key, value = exchange.to_heads(query, key, value)
        dense = functools.partial(attend, query, key, value, attn_mask)
        return exchange.to_tokens(self._paroattn_attend(query, key, value, attn_mask, is_causal, scale, dense))

    def _paroattn_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """The intercept's output of a redirected call, tensors [B, N, H, D]."""
        shape, visual = self._paroattn_shape, query.shape[1]
        if shape.text_asks:
            return self._paroattn_intercept(_call_of(query, key, value, attn_mask, is_causal, scale, dense, shape))
        text = key.shape[1] - visual
        if text <= 0:  # text attends to itself
            return dense()
        around = (0, 0, 0, 0, text, 0) if shape.text_first else (0, 0, 0, 0, 0, text)

        def padded() -> Tensor:
            return F.pad(dense(), around)

        call = _call_of(F.pad(query, around), key, value, attn_mask, is_causal, scale, padded, shape)
        return self._paroattn_intercept(call).narrow(1, text if shape.text_first else 0, visual)


def _call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dense: Callable[[], Tensor],
    shape: CallShape,
) -> AttentionCall:
    """A redirected call as an intercept gets it; tensors [B, N, H, D]."""
    whole_mask, with_text = attn_mask, None
    if isinstance(attn_mask, Tensor):
        attn_mask = _mask_of_keys(attn_mask, key, shape)
    if scale is not None and scale != query.shape[-1] ** -0.5:  # Lumina's grows with the image
        query = query * (scale * query.shape[-1] ** 0.5)
    refusal = _refusal_of(attn_mask, is_causal, key)
    key_mask = None if refusal or attn_mask is None else attn_mask[:, 0, 0].expand(key.shape[:2])
    query, key, value = _as_autocast(query, key, value)
    if shape.text_masks and key_mask is not None and whole_mask is not None:
        with_text = functools.partial(_with_text, query, key, value, whole_mask, shape.text_first)
    return AttentionCall(query, key, value, key_mask, dense, refusal, with_text)


def _mask_of_keys(mask: Tensor, key: Tensor, shape: CallShape) -> Tensor:
    """What a visual token's row of a mask says, where masks are of pairs; others as they are."""
    if not shape.pair_masks or mask.shape[-2] != key.shape[1]:
        return mask
    row = mask[:, :1, -1 if shape.text_first else 0].unsqueeze(2)
    return row == 0 if shape.text_masks else row


def _with_text(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, text_first: bool, output: Tensor, text: int
) -> Tensor:
    """An output whose rows of so many text tokens are computed anew, with their own rows of a mask [B, 1, N, N]."""
    visual = query.shape[1] - text
    first = 0 if text_first else visual
    own, keys, values = (x.transpose(1, 2) for x in (query.narrow(1, first, text), key, value))
    grouped = own.shape[1] != keys.shape[1]
    rows = F.scaled_dot_product_attention(own, keys, values, mask.narrow(2, first, text), enable_gqa=grouped)
    rows, others = rows.transpose(1, 2), output.narrow(1, text if text_first else 0, visual)
    return torch.cat((rows, others) if text_first else (others, rows), 1)


def _refusal_of(attn_mask: Tensor | None, is_causal: bool, key: Tensor) -> str | None:
    """Why a call has to stay dense: a mask other than bool [B or 1, 1, 1, N], the same for all queries and heads."""
    if is_causal:
        return "attention is causal"
    if attn_mask is None:
        return None
    mask_of_keys = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool and attn_mask.ndim == 4
    if not mask_of_keys or attn_mask.shape[1:] != (1, 1, key.shape[1]):
        return "the attention mask hides more than keys"
    return None


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as autocast hands them to PyTorch's own attention; the same ones without autocast."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@functools.lru_cache
def _rebound_class(processor_class: type) -> type:
    call = _redirected_call(processor_class)
    return type(f"Paro{processor_class.__name__}", (_Redirected, processor_class), {"__call__": call})


def _redirected_call(processor_class: Any) -> types.FunctionType:
    """The class's `__call__`, compiled from its source with the calls of attention redirected to methods of `self`."""
    original, name = processor_class.__call__, processor_class.__name__
    if not isinstance(original, types.FunctionType):
        raise _refusal(name, "its __call__ is no plain function")
    # functools.wraps leaves __wrapped__; a decorator that does not is seen in the source below.
    if hasattr(original, "__wrapped__"):
        raise _refusal(name, "its __call__ is decorated")
    if original.__closure__:
        raise _refusal(name, f"its __call__ is a closure over {', '.join(original.__code__.co_freevars)}")
    try:
        lines, first_line = inspect.getsourcelines(original)
    except (OSError, TypeError):
        raise _refusal(name, "the source of its __call__ is not there") from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    (function,) = tree.body
    if not isinstance(function, ast.FunctionDef) or function.name != original.__code__.co_name:
        raise _refusal(name, "the source of its __call__ is that of something else")
    if function.decorator_list:
        raise _refusal(name, "its __call__ is decorated")
    redirect = _RedirectAttention()
    tree = ast.fix_missing_locations(redirect.visit(tree))
    if not redirect.redirected:
        raise _refusal(name, "it calls neither dispatch_attention_fn nor F.scaled_dot_product_attention")
    ast.increment_lineno(tree, first_line - 1)  # tracebacks show upstream's lines
    module = compile(tree, inspect.getsourcefile(original) or name, "exec")
    code = next(item for item in module.co_consts if isinstance(item, types.CodeType))
    call = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__)
    call.__kwdefaults__ = original.__kwdefaults__
    return call


def _refusal(processor_name: str, reason: str) -> InputError:
    return InputError(f"attention processor {processor_name} cannot be taken over: {reason}; set another processor")


_REDIRECTED = {
    "dispatch_attention_fn": _Redirected._paroattn_dispatch.__name__,
    "F.scaled_dot_product_attention": _Redirected._paroattn_sdpa.__name__,
}


_ROTARY = "apply_rotary_emb"  # the names of models' functions hold it


class _RedirectAttention(ast.NodeTransformer):
    def __init__(self) -> None:
        self.redirected = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = _REDIRECTED.get(ast.unparse(node.func))
        if method:
            self.redirected = True
            node.func = _method(method)
        elif isinstance(node.func, ast.Name) and _ROTARY in node.func.id and node.args:
            node.args.insert(0, node.func)
            node.func = _method("_paroattn_rotated")
        return node


def _method(name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())
