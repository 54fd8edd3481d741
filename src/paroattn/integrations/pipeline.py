"""What paroattn takes of a diffusers pipeline, looked up in one place."""

from __future__ import annotations

import functools
import hashlib
import json
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.errors import InputError
from paroattn.integrations.descriptors import attention_modules, head_shape, known_class
from paroattn.plan import ModelIdentity

TRANSFORMERS = ("transformer", "transformer_2")
"""Attributes of pipelines that hold the transformers which denoise, in the order in which they run."""


ATTENTION_KEYS = (
    "all_patch_size",
    "attention_head_dim",
    "axes_dim_rope",
    "axes_dims",
    "axes_dims_rope",
    "depth",
    "dim",
    "dual_attention_layers",
    "guidance_embeds",
    "hidden_size",
    "image_dim",
    "in_channels",
    "model_dim",
    "n_heads",
    "n_layers",
    "num_attention_heads",
    "num_heads",
    "num_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "num_single_layers",
    "num_visual_blocks",
    "patch_size",
    "patch_size_t",
    "pos_embed_max_size",
    "qk_norm",
    "rope_axes_dim",
    "rope_theta",
    "use_rotary_positional_embeddings",
    "vace_layers",
)
"""Keys of a transformer's config on which attention depends, and those that tell kinds of a class apart."""


class Pipeline:
    """A diffusers pipeline as paroattn sees it.

    Args:
        pipe: the pipeline, or one that was wrapped before.

    Attributes:
        transformers: those that denoise, in the order in which they run; Wan 2.2 has two. One that was compiled is
            given as it was before.

    Raises:
        InputError: no transformer or no scheduler.
    """

    def __init__(self, pipe: Any):
        self._pipe: Any = pipe._pipe if isinstance(pipe, Pipeline) else pipe
        found = [getattr(self._pipe, name, None) for name in TRANSFORMERS]
        # A compiled transformer is a module around the original one.
        self._outer = [item for item in found if isinstance(item, nn.Module)]
        self.transformers: list[Any] = [getattr(item, "_orig_mod", item) for item in self._outer]
        if not self.transformers or getattr(self._pipe, "scheduler", None) is None:
            raise InputError(
                f"pipe is a {type(self._pipe).__name__}; expected a diffusers pipeline with transformer and scheduler"
            )

    @property
    def scheduler(self) -> Any:
        """The one in use now; users may exchange it."""
        return self._pipe.scheduler

    @cached_property
    def layers(self) -> list[list[Any]]:
        """The self-attention modules of each transformer."""
        return [attention_modules(transformer) for transformer in self.transformers]

    @cached_property
    def identity(self) -> ModelIdentity:
        """What plans are checked against: what attention depends on, so that fine-tunes, quantised weights, subclasses
        and new keys of a newer diffusers can share plans.

        The layers of a second transformer follow those of the first.
        """
        layers = sum(map(len, self.layers))
        heads, head_dim = head_shape(self.layers[0][0])
        configs: list[Any] = [transformer.config for transformer in self.transformers]
        public = [{key: config[key] for key in ATTENTION_KEYS if key in config} for config in configs]
        # The configs of two transformers are listed, the one of a single transformer stands alone.
        described = json.dumps(public[0] if len(public) == 1 else public, sort_keys=True, default=str)
        return ModelIdentity(
            class_name=known_class(self.transformers[0]),
            config_hash=hashlib.sha256(described.encode()).hexdigest(),
            layers=layers,
            heads=heads,
            head_dim=head_dim,
        )

    @property
    def is_compiled(self) -> bool:
        """Whether a transformer as a whole was compiled, not only its blocks."""
        return self._outer != self.transformers or any(item._compiled_call_impl for item in self.transformers)

    @property
    def makes_frames(self) -> bool:
        """Whether it can decode latents to frames."""
        return getattr(self._pipe, "vae", None) is not None

    def watch(self, around: Callable[[], AbstractContextManager[None]] | None) -> None:
        """Run each call of the pipeline within `around()`, until `watch(None)`."""
        watched = vars(self._pipe).pop("_paroattn_around", None) is not None
        if watched:
            self._pipe.__class__ = type(self._pipe).__mro__[1]
        if around is not None and callable(self._pipe):
            kind: Any = type(self._pipe)
            self._pipe.__class__ = _watched_class(kind)
            self._pipe._paroattn_around = around

    def hook(self, number: int, before: Any, after: Any) -> list[Any]:
        """Call `before(module, args, kwargs)` and `after(module, args, output)` around calls of a transformer."""
        outer = self._outer[number]
        return [
            outer.register_forward_pre_hook(before, with_kwargs=True),
            outer.register_forward_hook(after, always_call=True),
        ]

    def generate(self, **arguments: Any) -> Tensor:
        """What a call of the pipeline with these arguments returns first; `InputError` for arguments it refuses.

        A modular pipeline returns what `output` among the arguments says: a tensor, if it is one's name.
        """
        try:
            found = self._pipe(**arguments)
            found = found if isinstance(found, Tensor) else found[0]
            return found[0] if isinstance(found, list) and isinstance(found[0], Tensor) else found  # Framepack's frames
        except BaseException as error:
            # Parts that are moved when they are needed go back, as at the end of a generation.
            if hasattr(self._pipe, "maybe_free_model_hooks"):
                self._pipe.maybe_free_model_hooks()
            raised_in = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            if isinstance(error, ValueError) and "check_inputs" in raised_in:
                raise InputError(f"{type(self._pipe).__name__} refuses its arguments: {error}") from error
            raise

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the first transformer."""
        return self.transformers[0].device, self.transformers[0].dtype


@functools.lru_cache
def _watched_class(pipeline_class: Any) -> type:
    """The class under its own name, whose calls run within the instance's `_paroattn_around`."""
    original = pipeline_class.__call__

    @functools.wraps(original)  # keeps the signature
    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._paroattn_around():
            return original(self, *args, **kwargs)

    # Pipelines are saved and looked up by the name of their class.
    names = {"__module__": pipeline_class.__module__, "__qualname__": pipeline_class.__qualname__}
    return type(pipeline_class.__name__, (pipeline_class,), {"__call__": watched_call, **names})


def identify(pipe: Any) -> ModelIdentity:
    """What plans are checked against, of a diffusers pipeline: for plans that are made without it (`Plan.default`).

    Raises:
        InputError: no pipeline, or a transformer that paroattn does not know.

    Example:
        >>> paroattn.identify(pipe).class_name  # doctest: +SKIP
        'WanTransformer3DModel'
    """
    return Pipeline(pipe).identity
