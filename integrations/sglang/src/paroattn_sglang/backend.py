"""paroattn as one of SGLang's attention backends. SGLang imports this module by its path, when it builds a model."""

from __future__ import annotations

import weakref
from pkgutil import resolve_name
from typing import Any

import torch
from sglang.multimodal_gen.runtime.distributed import parallel_state
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionBackend, AttentionImpl
from sglang.multimodal_gen.runtime.layers.attention.selector import (
    ComponentAttentionBackendNotAppliedError,
    get_component_attn_backend_context,
)
from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum, current_platform
from sglang.multimodal_gen.runtime.utils.precision import get_compute_dtype
from torch import Tensor

from paroattn.errors import InputError, PlanError
from paroattn.grid import TokenGrid
from paroattn.runner import Dense
from paroattn.serving import heads_of_rank
from paroattn_sglang import BACKEND_NAME
from paroattn_sglang.models import layer_count, model_of, patch_of, transformers
from paroattn_sglang.settings import plan_path, served_plan, server_args, tally


class PlanNotApplied(ComponentAttentionBackendNotAppliedError, PlanError):  # noqa: N818 - after SGLang's own
    """A plan does not fit the model. Of this class, since after others SGLang goes on with diffusers' own model."""


class ParoAttentionBackend(AttentionBackend):
    """Attention by a plan. It goes by the name whose place it takes, since SGLang asks for names."""

    accept_output_buffer: bool = True

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return list(range(1, 129))

    @staticmethod
    def get_enum() -> AttentionBackendEnum:
        return AttentionBackendEnum[BACKEND_NAME]

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return ParoAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type:
        raise NotImplementedError  # none, as of the backend whose place it takes

    @staticmethod
    def get_builder_cls() -> type:
        raise NotImplementedError


class ParoAttentionImpl(AttentionImpl):
    """One attention layer: as planned where a plan says how, with SGLang's default backend elsewhere.

    Raises:
        PlanNotApplied: the layer is of a model that the plan was not made for.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        arguments = {
            "num_heads": num_heads,
            "head_size": head_size,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "num_kv_heads": num_kv_heads,
            "prefix": prefix,
            **extra_impl_args,
        }
        default = current_platform.get_attn_backend_cls_str(None, head_size, get_compute_dtype())
        self._dense = resolve_name(default).get_impl_cls()(**arguments)
        path = plan_path(server_args())
        if path is None:  # SGLang remembers which class a name stands for
            raise PlanNotApplied("paroattn has no plan; name one as paroattn_plan in --attention-backend-config")
        self._served = served_plan(path)
        self._num_heads = num_heads
        self._softmax_scale = softmax_scale
        self._pipeline = server_args().pipeline_config
        self._refusal: str | None = "SGLang names none of the plan's layers"
        try:
            layer = self._layer_of(prefix, num_heads, head_size)
        except InputError as error:
            raise PlanNotApplied(str(error)) from error
        if layer is None:
            return
        self._layer, self._refusal = layer, None
        if causal:
            self._refusal = "its attention is causal"
        elif num_kv_heads not in (None, num_heads):
            self._refusal = f"its {num_heads} heads share {num_kv_heads} heads of keys and values"

    def _layer_of(self, prefix: str, heads: int, head_dim: int) -> int | None:
        """Number of the layer in the plan, or None if the plan is not about it."""
        component = getattr(get_component_attn_backend_context(), "component_name", None)
        if component not in (None, "transformer", "transformer_2"):
            return None  # a text encoder's layers may have names like a transformer's
        config = self._pipeline.dit_config
        model = model_of(self._served.plan.model.class_name, config)
        number = model.layer(prefix)
        if number is None:
            return None
        layers, count = layer_count(config), transformers(config)
        if component is None and count == 2:
            raise InputError("SGLang does not say which of two transformers it builds; paroattn has to know")
        self._served.check(
            layers=layers * count,
            heads=heads * parallel_state.get_tp_world_size(),
            head_dim=head_dim,
            text=model.text,
        )
        return number + layers * (component == "transformer_2")

    @torch.compiler.disable
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """Attend.

        Args:
            query, key, value: [B, N, H, D], under Ulysses all tokens and the heads of this rank.
            attn_metadata: for the dense backend. SGLang itself computes calls with a mask, and does not bring them.
        """
        answer = self._planned(query, key, value)
        if isinstance(answer, Dense):
            self._served.tally.count(answer.reason)
            return self._dense.forward(query, key, value, attn_metadata)
        self._served.tally.count(None)
        return answer

    def forward_varlen(self, query: Tensor, key: Tensor, value: Tensor, **lengths: Any) -> Tensor:
        """Attend in sequences that are packed into one, [N, H, D] in all: always dense."""
        self._served.tally.count("its call packs several sequences into one")
        return self._dense.forward_varlen(query, key, value, **lengths)

    def _planned(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | Dense:
        if self._refusal is not None:
            return Dense(self._refusal)
        context = get_forward_context_or_none()
        batch = None if context is None else context.forward_batch
        if batch is None:
            return Dense("SGLang published no request, and with it neither size nor noise level")
        shape = batch.raw_latent_shape
        if shape is None or len(shape) != 5:
            return Dense("SGLang published no latents of frames, height and width")
        ranks = parallel_state.get_ulysses_parallel_world_size()
        if ranks > 1 and self._served.plan.grid.text_tokens:
            # Each rank brings a part of the text beside its part of the video, and pads neither.
            return Dense(f"{ranks} ranks share a sequence with text tokens, which stand between visual ones then")
        level = level_in_progress.of(context, batch, self._pipeline)
        if isinstance(level, Dense):
            return level
        heads = heads_of_rank(
            self._num_heads,
            query.shape[2],
            tensor_rank=parallel_state.get_tp_rank(),
            sequence_rank=parallel_state.get_ulysses_parallel_rank(),
            sequence_ranks=ranks,
        )
        patch = patch_of(self._pipeline.dit_config)
        frames, height, width = (max(1, int(side) // size) for side, size in zip(shape[2:], patch, strict=True))
        return self._served.attend(
            self._layer,
            query,
            key,
            value,
            heads=heads,
            grid=TokenGrid(frames, height, width),
            level=level,
            scale=self._softmax_scale,
        )


class LevelInProgress:
    """The noise level of the forward pass in progress: one object for the calls of all its layers."""

    def __init__(self) -> None:
        self._context: weakref.ref | None = None
        self._batch: weakref.ref | None = None
        self._level: Tensor | float | Dense = Dense("")

    def of(self, context: Any, batch: Any, pipeline: Any) -> Tensor | float | Dense:
        """SGLang makes a new context for each forward pass; the rest as `level_of`."""
        if self._context is None or self._context() is not context:
            self._context = weakref.ref(context)
            self._level = level_of(context.current_timestep, batch, pipeline)
            if self._batch is None or self._batch() is not batch:  # the one before has ended
                self._batch = weakref.ref(batch)
                tally.log_summary()
        return self._level


level_in_progress = LevelInProgress()


def level_of(step: Any, batch: Any, pipeline: Any) -> Tensor | float | Dense:
    """The noise level of a denoising step, a 0-dim tensor on the device or a number, or why it is not known.

    Args:
        step: its index, as SGLang publishes it.
        batch: the request.
        pipeline: SGLang's configuration of the pipeline.
    """
    scheduler = batch.scheduler
    whole = getattr(scheduler, "num_train_timesteps", None)
    if whole is None:
        whole = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    # Distilled pipelines walk a list of their own; where they shift its values, SGLang publishes those nowhere.
    steps = getattr(pipeline, "dmd_denoising_steps", None)
    if steps is not None and getattr(pipeline, "warp_denoising_step", False):
        steps = None
    elif steps is None:
        steps = batch.timesteps
    if whole is None or steps is None or isinstance(step, bool) or not isinstance(step, int) or step >= len(steps):
        return Dense("SGLang published no noise level of the step")
    return steps[step] / whole
