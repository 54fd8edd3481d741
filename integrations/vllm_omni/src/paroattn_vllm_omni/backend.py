"""paroattn as one of vLLM-Omni's attention backends, which imports this module by its path when it builds a model."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available
from vllm_omni.platforms import current_omni_platform

from paroattn.grid import TokenGrid
from paroattn.runner import Dense
from paroattn.serving import heads_of_rank
from paroattn_vllm_omni import BACKEND_NAME
from paroattn_vllm_omni.models import Building
from paroattn_vllm_omni.settings import plan_path, served_plan, tally


class ParoAttentionBackend(AttentionBackend):
    """Attention by a plan, under the name that it takes over."""

    accept_output_buffer: bool = True
    supported_platforms = ("cuda",)

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return True

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return ParoAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type:
        raise NotImplementedError  # vLLM-Omni's own, as of the backend whose name it takes

    @staticmethod
    def get_builder_cls() -> type:
        raise NotImplementedError

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return list(range(1, 129))


class ParoAttentionImpl(AttentionImpl):
    """One attention layer: as planned where a plan says how, with vLLM-Omni's default backend elsewhere.

    Raises:
        InputError: there is no plan, or the model is split over processes in a way that a plan cannot follow.
        PlanError: the layer is of a model that the plan was not made for.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        default = current_omni_platform.get_diffusion_attn_backend_cls(
            selected_backend=None,
            head_size=head_size,
            allow_trtllm_default=False,  # which takes no masks
        )
        self._dense = resolve_name(default).get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
            **extra_impl_args,
        )
        config = get_current_diffusion_config_or_none()
        self._building = building(config)
        self._num_heads = num_heads
        self._softmax_scale = softmax_scale
        self._ulysses_degree = getattr(config.parallel_config, "ulysses_degree", 1)
        self._tensor_rank = get_tensor_model_parallel_rank()
        heads = num_heads * get_tensor_model_parallel_world_size()
        layer = self._building.layer(prefix, heads, head_size)
        self._layer = layer or 0
        self._refusal = None
        if layer is None:
            self._refusal = "vLLM-Omni names none of the plan's layers"
        elif causal:
            self._refusal = "its attention is causal"
        elif num_kv_heads not in (None, num_heads):
            self._refusal = f"its {num_heads} heads share {num_kv_heads} heads of keys and values"
        elif qkv_layout is not None and qkv_layout.upper() != "BSND":
            self._refusal = f"its tensors are {qkv_layout}, not BSND"

    @torch.compiler.disable
    def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, N, H, D], under Ulysses all tokens and the heads of this rank.
            attn_metadata: vLLM-Omni's, with the token grid.
        """
        answer = self._planned(query, key, value, attn_metadata)
        if isinstance(answer, Dense):
            tally.count(answer.reason)
            return self._dense.forward_cuda(query, key, value, attn_metadata)
        tally.count(None)
        return answer

    def _planned(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor | Dense:
        if self._refusal is not None:
            return Dense(self._refusal)
        if self._building.missing:
            return Dense("the plan is for two transformers that take turns, and this model has one")
        layout = getattr(metadata, "video_layout", None)
        if layout is None or layout.latent_grid is None or layout.prefix_len is None:
            return Dense("vLLM-Omni published no token grid with the call")
        if layout.video_spans or metadata.full_attn_spans is not None or metadata.query_ranges is not None:
            return Dense("some of its tokens see others than the rest")
        if layout.prefix_len or metadata.joint_query is not None:
            return Dense("there are tokens before its video, and the plans of this model have none")
        context: Any = get_forward_context() if is_forward_context_available() else None
        level = getattr(context, "denoise_timestep", None)
        if level is None:
            return Dense("vLLM-Omni published no noise level of the step")
        request_in_progress.at(context.denoise_step_idx)
        frames, height, width = map(int, layout.latent_grid)
        grid = TokenGrid(frames, height, width)
        tokens, own = query.shape[1], grid.visual_tokens
        # What is appended so that ranks have equally many tokens is none of the video, masked or not.
        padding = tokens - own
        if padding > 0 and (padding, own) != (context.sp_padding_size, context.sp_original_seq_len):
            return Dense(f"there are {tokens} tokens; the video has {own}, and vLLM-Omni names no padding")
        mask = metadata.attn_mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != key.shape[:2]):
            return Dense("its mask is none of keys alone")
        ranks = self._ulysses_degree
        heads = heads_of_rank(
            self._num_heads,
            query.shape[2],
            tensor_rank=self._tensor_rank,
            sequence_rank=parallel_state.get_ulysses_parallel_rank() if ranks > 1 else 0,
            sequence_ranks=ranks,
        )
        if padding > 0:  # which is all that a mask can be about, by vLLM-Omni's contract
            query, key, value, mask = query[:, :own], key[:, :own], value[:, :own], None
        answer = self._building.served.attend(
            self._layer,
            query,
            key,
            value,
            heads=heads,
            grid=grid,
            level=float(level),
            key_mask=mask,
            scale=self._softmax_scale,
        )
        if padding > 0 and not isinstance(answer, Dense):
            answer = torch.cat((answer, answer.new_zeros(len(answer), padding, *answer.shape[2:])), 1)
        return answer


class RequestInProgress:
    """Notices that a request has ended by the steps of the next."""

    def __init__(self) -> None:
        self._step: int | None = None

    def at(self, step: int | None) -> None:
        """Take note of the denoising step of a call."""
        if step is not None and self._step is not None and step < self._step:
            tally.log_summary()
        self._step = step


request_in_progress = RequestInProgress()
_last_building: Building | None = None


def building(config: Any) -> Building:
    """The model that is being built: each has a configuration of its own, which it is built under."""
    global _last_building
    served = served_plan(plan_path(config))
    if _last_building is None or _last_building.config is not config:
        _last_building = Building(served, config)
    return _last_building
