"""diffusers' parallelism: which tokens and heads a rank has, and plans of the split for models that come without one.

Under context parallelism (Ulysses) a transformer's tokens are split over ranks, which exchange them for heads around
attention. Under tensor parallelism each rank has all tokens of its heads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from paroattn.errors import InputError
from paroattn.integrations.descriptors import attention_modules, describe, known_class
from paroattn.integrations.rebind import is_rebound
from paroattn.ops.exchange import Part


@dataclass(frozen=True)
class Sharing:
    """How ranks share a transformer.

    Attributes:
        rank, ranks: of this process, and their number.
        group: name of the process group whose ranks exchange tokens for heads; None under tensor parallelism.
        is_own: the model's own processors do not exchange.
        splits, text: as `ModelDescriptor` has them.
    """

    rank: int
    ranks: int
    group: str | None = None
    is_own: bool = False
    splits: str | None = None
    text: str | None = None

    def parts(self, visual_tokens: int, text_tokens: int, tokens: int) -> tuple[Part, ...]:
        """The parts of the sequence of a forward call, from those of a layer's call of this rank."""
        if self.splits == "all":
            return (Part(self._split(visual_tokens + text_tokens)),)
        visual = Part(self._split(visual_tokens))
        if self.splits == "visual":
            text = Part((tokens - visual.counts[self.rank],) * self.ranks, is_whole=True)
        else:
            text = Part(self._split(text_tokens))
        if not text.tokens:
            return (visual,)
        return (text, visual) if self.text == "prefix" else (visual, text)

    def _split(self, tokens: int) -> tuple[int, ...]:
        """As diffusers does it: the first ranks have one token more where they cannot have as many each."""
        least, more = divmod(tokens, self.ranks)
        return tuple(least + (rank < more) for rank in range(self.ranks))


def sharing_of(transformer: nn.Module) -> Sharing | None:
    """How ranks share a transformer now, None if they do not.

    Raises:
        InputError: ring attention, or a model whose tokens are split in a way that paroattn does not know.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    tensor = getattr(config, "tensor_parallel_config", None)
    if tensor is not None:
        return Sharing(tensor._mesh.get_local_rank(), tensor._mesh.size())
    context = config.context_parallel_config
    if context.ring_degree > 1:
        raise InputError(
            f"ring_degree is {context.ring_degree}; expected 1: each head has an order of its own over the whole "
            f"sequence, of which a rank has to have all tokens. Use ulysses_degree={context.ring_degree}."
        )
    descriptor = describe(transformer)
    if descriptor.splits is None:
        raise InputError(
            f"paroattn does not know how context parallelism splits the tokens of {type(transformer).__name__}; "
            "apply without enable_parallelism (docs/parallel.md lists the models)"
        )
    mesh = context._ulysses_mesh
    is_own = known_class(transformer) in _PLANS
    group = mesh.get_group().group_name
    return Sharing(mesh.get_local_rank(), mesh.size(), group, is_own, descriptor.splits, descriptor.text)


def check_agreement(sharing: Sharing, described: str) -> None:
    """Raise `InputError` unless all ranks of a group were given the same; called by all of them."""
    group = None if sharing.group is None else dist.distributed_c10d._resolve_process_group(sharing.group)  # type: ignore[arg-type]
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, hashlib.sha256(described.encode()).hexdigest(), group=group)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise InputError(
            f"ranks {', '.join(others)} have another plan or other settings than rank 0; apply the same on all ranks"
        )


def cp_plan(transformer: nn.Module) -> dict[str, Any]:
    """How context parallelism splits a model's tokens, for `enable_parallelism`: the class's own, or paroattn's.

    CogVideoX, HunyuanVideo, HunyuanVideo 1.5, Mochi and Stable Diffusion 3 have none in diffusers. In paroattn's,
    visual tokens are split and every rank has all text tokens, of any number. The attention of these models does not
    exchange tokens by itself: apply a plan or a precision before they run, which raise otherwise.

    Args:
        transformer: of a diffusers pipeline.

    Raises:
        InputError: a class that has no plan, or a kind of it that cannot be split.

    Example:
        >>> config = ContextParallelConfig(ulysses_degree=2)  # doctest: +SKIP
        >>> split = paroattn.cp_plan(pipe.transformer)  # doctest: +SKIP
        >>> pipe.transformer.enable_parallelism(config=config, cp_plan=split)  # doctest: +SKIP
    """
    own: dict[str, Any] | None = getattr(transformer, "_cp_plan", None)
    name = known_class(transformer)
    if own is not None:
        return own
    if name not in _PLANS:
        raise InputError(f"there is no plan of context parallelism for {name}; there is for {', '.join(_PLANS)}")
    if getattr(transformer.config, "image_condition_type", None) == "token_replace":
        raise InputError(f"{name} with image_condition_type token_replace treats the first frame apart: not split")
    transformer.register_forward_pre_hook(_refuse_own_attention)
    return _PLANS[name]


def _refuse_own_attention(transformer: nn.Module, _: object) -> None:
    config = getattr(transformer, "_parallel_config", None)
    if config is not None and not all(is_rebound(module.processor) for module in attention_modules(transformer)):
        raise InputError(
            f"the tokens of {type(transformer).__name__} are split over ranks, and its own attention does not exchange "
            "them: apply a plan, or precision='exact' for the model's own output"
        )


def _visual_split(first: str, **rotary: Any) -> dict[str, Any]:
    split = {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
    return {first: split, "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3), **rotary}


def _outputs(dimensions: int) -> dict[int, ContextParallelInput]:
    """Cosines and sines that a module returns, [N, ...]."""
    return {i: ContextParallelInput(split_dim=0, expected_dims=dimensions, split_output=True) for i in (0, 1)}


_TABLE = ContextParallelInput(split_dim=0, expected_dims=2)
_FIRST = "transformer_blocks.0"
_PLANS: dict[str, dict[str, Any]] = {
    "CogVideoXTransformer3DModel": {"": {"image_rotary_emb": [_TABLE, _TABLE]}, **_visual_split(_FIRST)},
    "HunyuanVideoTransformer3DModel": _visual_split(_FIRST, rope=_outputs(2)),
    "HunyuanVideo15Transformer3DModel": _visual_split(_FIRST, rope=_outputs(2)),
    "MochiTransformer3DModel": _visual_split(_FIRST, rope=_outputs(3)),
    "SD3Transformer2DModel": _visual_split(_FIRST),
}
