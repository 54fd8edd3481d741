"""paroattn plans in vLLM-Omni.

vLLM-Omni's list of attention backends is closed; a plug-in can give a name another class. `RAINFUSION_ATTN` runs on
Ascend only, and elsewhere stands for paroattn where this package is installed.
"""

from __future__ import annotations

BACKEND_NAME = "RAINFUSION_ATTN"


def register() -> None:
    """Take the backend's name, unless the machine is one that the backend is for; called in each process."""
    from vllm_omni.diffusion.attention.backends.registry import (
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import current_omni_platform

    if not current_omni_platform.is_npu():
        name = DiffusionAttentionBackendEnum[BACKEND_NAME]
        register_diffusion_backend(name, "paroattn_vllm_omni.backend.ParoAttentionBackend")


def report() -> str:
    """What became of this process's attention calls so far, in one line."""
    from paroattn_vllm_omni.settings import tally

    return tally.summary()
