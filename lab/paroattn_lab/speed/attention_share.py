"""How much of a transformer's step is self-attention, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from paroattn.integrations.rebind import AttentionCall, Intercept

_STEP, _ATTENTION = "paroattn step", "paroattn self-attention"


def attention_seconds(step: Callable[[], object], processors: Sequence[Any], device: torch.device) -> dict[str, float]:
    """Run a step under the profiler.

    Args:
        step: runs the transformer once, not compiled.
        processors: of its self-attention modules, rebound (`paroattn.integrations.rebind`).
        device: where it runs.

    Returns:
        `attention_ms`, of the attention calls with reordering and quantising and without projections; and
        `attention_share` of the step. On a GPU both count kernels, so that time in which it waits for the host is left
        out.
    """
    if device.type == "cuda":
        # A profile does not say in which call a kernel was launched that no operator of torch launches.
        whole = _kernel_ms(step, device)
        with _replaced(processors, lambda intercept: _nothing):
            attention = whole - _kernel_ms(step, device)
        return {"attention_ms": attention, "attention_share": attention / whole if whole else 0.0}
    with (
        _replaced(processors, _Marked),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        record_function(_STEP),
    ):
        step()
    totals = dict.fromkeys((_STEP, _ATTENTION), 0.0)
    for event in profiler.events() or ():
        if event.name in totals:
            totals[event.name] += event.cpu_time_total
    return {
        "attention_ms": totals[_ATTENTION] / 1000,
        "attention_share": totals[_ATTENTION] / totals[_STEP] if totals[_STEP] else 0.0,
    }


def _kernel_ms(step: Callable[[], object], device: torch.device) -> float:
    """Time of all kernels of a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1000


def _nothing(call: AttentionCall) -> Tensor:
    """An intercept that computes nothing."""
    return torch.empty_like(call.query)


@contextmanager
def _replaced(processors: Sequence[Any], other: Callable[[Intercept], Intercept]) -> Iterator[None]:
    """Every intercept of rebound processors replaced by what is made of it."""
    intercepts = [processor._paroattn_intercept for processor in processors]
    for processor, intercept in zip(processors, intercepts, strict=True):
        processor._paroattn_intercept = other(intercept)
    try:
        yield
    finally:
        for processor, intercept in zip(processors, intercepts, strict=True):
            processor._paroattn_intercept = intercept


class _Marked:
    """An intercept that stands in profiles under one name."""

    def __init__(self, intercept: Intercept):
        self._intercept = intercept

    def __call__(self, call: AttentionCall) -> Tensor:
        with record_function(_ATTENTION):
            return self._intercept(call)
