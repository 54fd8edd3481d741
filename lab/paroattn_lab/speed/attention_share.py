"""How much of a transformer's step is self-attention, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
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
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _marked(processors), profile(activities=activities) as profiler:
        with record_function(_STEP):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    totals = dict.fromkeys((_STEP, _ATTENTION), 0.0)
    for event in profiler.events() or ():
        if event.name in totals and event.device_type == DeviceType.CPU:
            totals[event.name] += event.device_time_total if on_gpu else event.cpu_time_total
    return {
        "attention_ms": totals[_ATTENTION] / 1000,
        "attention_share": totals[_ATTENTION] / totals[_STEP] if totals[_STEP] else 0.0,
    }


@contextmanager
def _marked(processors: Sequence[Any]) -> Iterator[None]:
    """Name every attention call of rebound processors in profiles."""
    intercepts = [processor._paroattn_intercept for processor in processors]
    for processor, intercept in zip(processors, intercepts, strict=True):
        processor._paroattn_intercept = _Marked(intercept)
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
