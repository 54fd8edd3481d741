"""paroattn plans in SGLang-diffusion.

SGLang's list of attention backends is closed. With a plan in its configuration, the name `sparge_attn` stands for
paroattn; without one, it stands for what it is in SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BACKEND_NAME = "SPARGE_ATTN"
CHOOSES_BACKENDS = "sglang.multimodal_gen.runtime.platforms.cuda.CudaPlatformBase.get_attn_backend_cls_str"
TAKES_ARGUMENTS = "sglang.multimodal_gen.runtime.server_args.server_args.set_global_server_args"


def register() -> None:
    """Register the hooks; SGLang calls this in each of its processes, before it builds a model."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(CHOOSES_BACKENDS, backend_path, HookType.AROUND)
    HookRegistry.register(TAKES_ARGUMENTS, check_start, HookType.BEFORE)


def backend_path(
    original: Callable[..., str], platform: type, selected_backend: Any, head_size: int, dtype: torch.dtype
) -> str:
    """The dotted path of the class behind a backend's name: paroattn's, where a plan is configured for it."""
    from paroattn_sglang.settings import plan_path, server_args

    if getattr(selected_backend, "name", None) == BACKEND_NAME and plan_path(server_args()) is not None:
        return "paroattn_sglang.backend.ParoAttentionBackend"
    return original(platform, selected_backend, head_size, dtype)


def check_start(server_args: Any) -> None:
    """Raise for a plan that cannot be used, before SGLang loads a model.

    Later errors may be lost: SGLang tries other backends where one cannot be had, and diffusers' own model where its
    own cannot be built.

    Raises:
        InputError: what is under `paroattn_plan` is no path, or the backend is not the one that a plan needs.
        PlanError: the plan cannot be read, or is for another model.
    """
    from paroattn_sglang.models import model_of
    from paroattn_sglang.settings import check_backend, plan_path, served_plan

    path = plan_path(server_args)
    if path is not None:
        check_backend(path, server_args)
        model_of(served_plan(path).plan.model.class_name, server_args.pipeline_config.dit_config)


def report() -> str:
    """What became of this process's attention calls so far, in one line."""
    from paroattn_sglang.settings import tally

    return tally.summary()
