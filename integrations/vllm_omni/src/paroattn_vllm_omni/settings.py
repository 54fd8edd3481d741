"""What vLLM-Omni was started with, as far as it concerns a plan."""

from __future__ import annotations

import atexit
import functools
import logging
from typing import Any

from paroattn.errors import InputError
from paroattn.serving import ServedPlan, Tally

# vLLM-Omni shows what is logged below its own name.
tally = Tally(logging.getLogger("vllm_omni.paroattn"))
atexit.register(tally.log_summary)


def plan_path(config: Any) -> str:
    """The path under `paroattn_plan` in `additional_config`.

    Args:
        config: vLLM-Omni's configuration of the model that it builds, or None outside of that.

    Raises:
        InputError: there is none, or the model is split in a way that takes tokens from a process.
    """
    path = (getattr(config, "additional_config", None) or {}).get("paroattn_plan")
    if not isinstance(path, str) or not path:
        raise InputError(
            f"paroattn_plan in additional_config is {path!r}; expected the path of a plan file. With this plug-in the "
            "backend RAINFUSION_ATTN is paroattn's; choose another one to do without a plan."
        )
    for degree in ("ring_degree", "allgather_degree"):
        value = getattr(config.parallel_config, degree, 1)
        if value > 1:
            raise InputError(
                f"{degree} is {value}, and a process then has a part of the tokens; plans need all of them, in each "
                "head's order. Use ulysses_degree."
            )
    return path


@functools.lru_cache(maxsize=1)
def served_plan(path: str) -> ServedPlan:
    """The plan of a file, which all layers of the process share."""
    return ServedPlan.load(path, tally)
