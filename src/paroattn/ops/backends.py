"""The backends by name, imported only when chosen."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from paroattn.block_mask import BlockMask
from paroattn.quantize import Precision

logger = logging.getLogger(__name__)

_MODULES = {"reference": "paroattn.ops.reference"}


class Backend(Protocol):
    """What a backend module provides. Inputs are validated and in "HND" layout."""

    FORMATS: frozenset[str]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        permutation: Tensor | None,
        block_mask: BlockMask | None,
        precisions: Sequence[Precision],
        compensate: Sequence[bool],
        key_mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...


def load_backend(name: str, precisions: Sequence[Precision]) -> Backend:
    """The backend module of that name; "auto" takes the best one that can run here and says which, once."""
    if name == "auto":
        name = "reference"
        _log_choice(name)
    if name not in _MODULES:
        raise ValueError(f"backend {name!r} is unknown; expected 'auto' or one of {', '.join(map(repr, _MODULES))}")
    backend: Backend = importlib.import_module(_MODULES[name])
    for precision in precisions:
        for number_format in (precision.qk, precision.pv):
            if number_format not in backend.FORMATS:
                raise ValueError(
                    f"precision {number_format!r} is not available in backend {name!r}; "
                    f"it has {', '.join(sorted(backend.FORMATS))}"
                )
    return backend


@functools.lru_cache
def _log_choice(name: str) -> None:
    logger.info("backend 'auto' is %r", name)
