"""Which GPU there is, whether kernels run on it, and what they may use of it.

With TRITON_INTERPRET=1 in the environment they run in Triton's interpreter on CPU tensors, which is slow and meant for
tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = {  # bytes that one program may use
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm89": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "sm120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = tuple(SHARED_MEMORY)
FP8_TARGETS = ("sm89", "sm90", "sm100", "sm120")


def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` gets it"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it needs Triton 3.6 or newer; {triton.__version__} is installed"
    return None


_missing = _why_missing()


def unavailable() -> str | None:
    """Why no kernel can run on this machine, or None."""
    return _missing


def unsupported(device: torch.device) -> str | None:
    """Why kernels cannot run on a device of this machine, or None."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {device}; it takes tensors on {'the CPU, interpreted' if INTERPRETED else 'a GPU'}"
    if constant_target(device) is None:
        return f"it has no configuration for this GPU; it has {', '.join(TARGETS)}"
    return None


def check_device(x: Tensor) -> None:
    """Raise `InputError` where kernels cannot run on a tensor."""
    reason = unavailable() or unsupported(x.device)
    if reason:
        raise InputError(f"backend 'triton' cannot do this: {reason}")


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """While it is entered, kernels are launched where `x` is."""
    if INTERPRETED or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@torch.compiler.assume_constant_result
def constant_target(device: torch.device) -> str | None:
    """`target_of`, of which compiled code asks once; the interpreter is taken for Hopper."""
    return "sm90" if INTERPRETED else target_of(device)


def target_here(device: torch.device) -> str:
    """The target of a device that `check_device` has accepted."""
    target = constant_target(device)
    if target is None:
        raise InputError(f"backend 'triton' has no configuration for {torch.cuda.get_device_name(device)}")
    return target


@functools.lru_cache
def target_of(device: torch.device) -> str | None:
    """The target of a GPU, or None if there is none."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "gfx942" if name in ("gfx940", "gfx941", "gfx942") else None
    return nearest_target(*torch.cuda.get_device_capability(device))


def nearest_target(major: int, minor: int) -> str | None:
    """The newest target of the same generation that is not newer than this compute capability."""
    known = [int(name[2:]) for name in TARGETS if name.startswith("sm")]
    usable = [number for number in known if number <= 10 * major + minor and number // 10 == major]
    return f"sm{max(usable)}" if usable else None
