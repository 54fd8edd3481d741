"""The backends by name, and which of them a call gets."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.ops import cpu, reference
from paroattn.ops.gpu import backend as gpu
from paroattn.ops.inputs import AttentionInputs, CallKind, Repeat

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What a backend module provides."""

    FORMATS: frozenset[str]

    def describe(self) -> str:
        """What it runs on here, in a few words."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None if it can."""

    def unsupported(self, kind: CallKind) -> str | None:
        """What of a kind of call it does not do, or None."""

    def attend(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Attention: output like query, lse float32 [B, H, N]."""

    @property
    def repeater(self) -> Callable[[AttentionInputs], Repeat | None] | None:
        """For inputs that were attended once. None if the backend reads no tables: it gets `looked_up()` inputs."""


# "auto" tries them in this order.
_BACKENDS: dict[str, Backend] = {"triton": gpu, "cpu": cpu, "reference": reference}


def backends() -> dict[str, str]:
    """The backends by name, with what each runs on here or why it cannot.

    Example:
        >>> paroattn.backends()["reference"]
        'plain PyTorch'
    """
    return {name: backend.unavailable() or backend.describe() for name, backend in _BACKENDS.items()}


def formats_of(name: str) -> frozenset[str]:
    """The number formats of a backend, or with "auto" of all of them; raises `InputError` for an unknown name."""
    if name == "auto":
        return frozenset().union(*(backend.FORMATS for backend in _BACKENDS.values()))
    return backend_named(name).FORMATS


def choose_backend(name: str, kind: CallKind) -> Backend:
    """The backend module for a kind of call; "auto" takes the first one that does it and says which, once.

    Raises:
        InputError: unknown name, or the named backend does not do this.
    """
    return backend_named(name_of_choice(name, kind))


def name_of_choice(name: str, kind: CallKind) -> str:
    """The name of `choose_backend`'s choice."""
    if name != "auto":
        backend_named(name)
        reason = _refusal(name, kind)
        if reason:
            raise InputError(reason)
        return name
    reasons: list[str] = []
    for candidate in _BACKENDS:
        reason = _refusal(candidate, kind)
        if not reason:
            if not torch.compiler.is_compiling():
                _log_choice(candidate, "; ".join(reasons))
            return candidate
        reasons.append(reason)
    raise InputError(reasons[-1])


def backend_named(name: str) -> Backend:
    """The backend module of a name, or `InputError`."""
    if name not in _BACKENDS:
        raise InputError(f"backend {name!r} is unknown; expected 'auto' or one of {', '.join(map(repr, _BACKENDS))}")
    return _BACKENDS[name]


def _refusal(name: str, kind: CallKind) -> str | None:
    backend = _BACKENDS[name]
    reason = backend.unavailable() or backend.unsupported(kind)
    if reason:
        return f"backend {name!r} cannot do this: {reason}"
    for precision in kind.precisions:
        for number_format in (precision.qk, precision.pv):
            if number_format not in backend.FORMATS:
                return (
                    f"precision {number_format!r} is not available in backend {name!r}; "
                    f"it has {', '.join(sorted(backend.FORMATS))}"
                )
    return None


@functools.lru_cache
def _log_choice(name: str, reasons: str) -> None:
    logger.info("backend 'auto' is %r (%s)%s", name, _BACKENDS[name].describe(), f": {reasons}" if reasons else "")
