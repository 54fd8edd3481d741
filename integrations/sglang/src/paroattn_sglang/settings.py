"""What SGLang was started with, as far as it concerns a plan."""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Mapping
from typing import Any

from paroattn.errors import InputError
from paroattn.serving import ServedPlan, Tally

tally = Tally(logging.getLogger("paroattn_sglang"))
atexit.register(tally.log_summary)


def server_args() -> Any:
    """SGLang's arguments, which are there before a model is built."""
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    return get_global_server_args()


def plan_path(server_args: Any) -> str | None:
    """The path under `paroattn_plan` in `--attention-backend-config`, or None.

    Raises:
        InputError: it is not a path.
    """
    config = server_args.attention_backend_config
    path = config.get("paroattn_plan") if isinstance(config, Mapping) else None
    if path is not None and (not isinstance(path, str) or not path):
        raise InputError(
            f"paroattn_plan in --attention-backend-config is {path!r}; expected the path of a plan file, as in "
            '\'{"paroattn_plan": "plan.safetensors"}\''
        )
    return path


def check_backend(path: str, server_args: Any) -> None:
    """Raise `InputError` unless a component has the backend whose place paroattn takes, in a way that it can serve."""
    backend, components = server_args.attention_backend, server_args.component_attention_backends or {}
    chosen = {component: str(name).lower() for component, name in components.items()}
    if "sparge_attn" not in (str(backend).lower(), *chosen.values()):
        raise InputError(
            f"paroattn_plan is {path!r} and the attention backend is {backend}; expected --attention-backend "
            "sparge_attn, whose place paroattn takes"
        )
    two = getattr(server_args.pipeline_config.dit_config, "boundary_ratio", None) is not None
    if two and "transformer" in chosen and "transformer_2" not in chosen:
        # SGLang then calls both by the first one's name.
        raise InputError(
            "paroattn cannot tell this model's two transformers apart when a backend is chosen for one of them; use "
            "--attention-backend sparge_attn, or choose one for the component transformer_2, too"
        )


@functools.lru_cache(maxsize=1)
def served_plan(path: str) -> ServedPlan:
    """The plan of a file, which all layers of the process share."""
    return ServedPlan.load(path, tally)
