"""Applying a plan to a pipeline, and taking it off again."""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError, PlanError
from paroattn.integrations.attach import Attachment, Forward
from paroattn.integrations.descriptors import describe
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import AttentionCall
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision
from paroattn.runner import Dense, LayerRunner, Runner


def apply(
    pipe: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    precision: str | Precision | None = None,
    strict: bool = False,
    backend: str = "auto",
) -> Handle:
    """Let a pipeline's transformers attend as a plan says, until the handle is removed.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows (docs/models.md).
        plan: from `paroattn.calibrate` or `Plan.load`, or a plan file's path. None computes every block.
        precision: without a plan, the number format of all heads ("int8", ...); a plan brings its own.
        strict: raise `PlanError` at the first call that runs with the model's own attention (another size, tokens
            beyond the grid, masks of another kind) instead of warning once of each reason.
        backend: "auto" or a backend's name.

    Returns:
        A handle with `remove()` and `report()`; also a context manager.

    Raises:
        PlanError: the plan is for another model, number of heads or layers; with `strict` also while generating.
        InputError: an unknown model class, precision or backend; both or neither of plan and precision.

    Example:
        >>> with paroattn.apply(pipe, plan) as handle:  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
        >>> print(handle.report())  # doctest: +SKIP
    """
    if (plan is None) == (precision is None):
        raise InputError("apply takes either a plan or a precision; got " + ("both" if plan is not None else "neither"))
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan | None):
        raise InputError(f"plan is a {type(plan).__name__}; expected a Plan or the path of a plan file")
    pipeline = Pipeline(pipe)
    if plan is not None:
        check_model(plan, pipeline.identity)
        text = describe(pipeline.transformers[0]).text
        if plan.grid.text_tokens and plan.grid.text_position != text:
            raise PlanError(f"plan has text tokens as {plan.grid.text_position}; this model has them as {text}")
    return Handle(pipeline, plan, None if precision is None else Precision.parse(precision), strict, backend)


@dataclass(frozen=True)
class Report:
    """How attention ran since a plan was applied.

    Attributes:
        planned: calls of layers that ran as the plan says.
        dense: calls that ran with the model's own attention, by reason. Cross-attention, an IP-adapter's too, always
            does and is not counted.
    """

    planned: int
    dense: Mapping[str, int]

    def __str__(self) -> str:
        total = self.planned + sum(self.dense.values())
        lines = [f"{self.planned} of {total} attention calls ran as planned"]
        lines += [f"{count} ran with the model's own attention: {reason}" for reason, count in self.dense.items()]
        return "\n".join(lines)


class Handle:
    """What `apply` returns; `remove()` restores the pipeline."""

    def __init__(self, pipeline: Pipeline, plan: Plan | None, precision: Precision | None, strict: bool, backend: str):
        self.plan = plan
        self._identity = pipeline.identity
        self._precision = precision
        self._backend = backend
        self.strict = strict
        self._runners: dict[torch.device, Runner] = {}
        self._ready_for: tuple[torch.device, torch.dtype] | None = None
        self._lock = threading.Lock()
        self._counts: Counter[str | None] = Counter()
        self._requests = [_Request() for _ in pipeline.transformers]
        device, dtype = pipeline.place
        runner = self._runner(torch.device("cpu") if device.type == "meta" else device)
        owners = [request for request, own in zip(self._requests, pipeline.layers, strict=True) for _ in own]
        self._layers = [PlannedLayer(self, layer, request) for layer, request in enumerate(owners)]
        self._make_ready(runner, device, dtype)
        self._attachment = Attachment(pipeline, self._layers, self._before_forward, self._after_forward)

    def remove(self) -> None:
        """Restore the pipeline's own attention, bitwise; what others changed since stays."""
        self._attachment.remove()

    def report(self) -> Report:
        """How many attention calls ran as planned, and why the others did not."""
        self._collect()
        with self._lock:
            counts = dict(self._counts)
        return Report(counts.pop(None, 0), {str(reason): count for reason, count in counts.items()})

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def count(self, reason: str | None) -> None:
        """Count a call that ran as planned (None) or with the model's own attention."""
        with self._lock:
            self._counts[reason] += 1
            first = self._counts[reason] == 1
        if reason is None:
            return
        if self.strict:
            raise PlanError(f"{reason}. Calibrate for such requests, load a matching plan, or do not ask for strict.")
        if first:
            warnings.warn(f"{reason}: the model's own attention runs instead", stacklevel=2)

    def layer_runner(self, layer: int, device: torch.device) -> LayerRunner:
        """What computes a layer on a device."""
        return self._runner(device).layers[layer]

    def _runner(self, device: torch.device) -> Runner:
        if device not in self._runners:
            self._runners[device] = (
                Runner.of_precision(self._precision, self._identity, device, self._backend)
                if self._precision is not None
                else Runner(self.plan, device, backend=self._backend)  # type: ignore[arg-type]
            )
        return self._runners[device]

    def _before_forward(self, forward: Forward) -> None:
        self._collect()
        tensor = forward.hidden_states
        runner = self._runner(tensor.device)
        reason, level = runner.refusal(forward.grid), forward.descriptor.level(forward.timestep)
        self._requests[forward.transformer].begin(reason, runner.bucket(level))
        if reason is None:
            self._make_ready(runner, tensor.device, tensor.dtype)

    def _after_forward(self, transformer: int) -> None:
        self._requests[transformer].end()

    def _make_ready(self, runner: Runner, device: torch.device, dtype: torch.dtype) -> None:
        """Make operators before a forward call that may be compiled, where they could not be made."""
        if device.type == "meta" or self._ready_for == (device, dtype):
            return
        self._ready_for = (device, dtype)
        for layer, own in zip(self._layers, runner.layers, strict=True):
            own.make_ready(dtype)
            layer.runner = own

    def _collect(self) -> None:
        """Count what compiled code noted."""
        for layer in self._layers:
            noted, layer.noted = layer.noted, ()
            for reason in noted:
                self.count(reason)


class _Known:
    """What is known of a forward call: its step bucket, or why it stays dense."""

    reason: str | None = "attention was called outside of the transformer's forward call"
    bucket: Tensor


class _KnownByThread(threading.local, _Known):
    pass


class _Request:
    """The forward call of a transformer in progress in each thread.

    Compiled code cannot read what belongs to a thread, in all versions of PyTorch: for it there is one call at a time.
    """

    def __init__(self) -> None:
        self._by_thread = _KnownByThread()
        self._in_compiled = _Known()
        self._is_compiled = False
        self._thread: threading.Thread | None = None

    def begin(self, reason: str | None, bucket: Tensor) -> None:
        own, other = threading.current_thread(), self._thread
        if self._is_compiled and other not in (None, own) and other.is_alive():
            raise InputError("two threads call one compiled transformer at once; give each a transformer of its own")
        self._thread = own
        for known in (self._by_thread, self._in_compiled):
            known.reason, known.bucket = reason, bucket

    def end(self) -> None:
        self._thread = None

    @property
    def now(self) -> _Known:
        """The call in progress."""
        if not torch.compiler.is_compiling():
            return self._by_thread
        self._is_compiled = True
        return self._in_compiled


class PlannedLayer:
    """The intercept of one layer: its operator, or the model's own attention where the plan has nothing to say."""

    def __init__(self, handle: Handle, layer: int, request: _Request):
        self._handle = handle
        self._layer = layer
        self._request = request
        self.runner: LayerRunner | None = None
        self.noted: tuple[str | None, ...] = ()  # by compiled code, which cannot count: the reason of its last call

    def __call__(self, call: AttentionCall) -> Tensor:
        known = self._request.now
        reason = call.refusal or known.reason
        output: Tensor | Dense = Dense(reason) if reason else self._attend(call, known.bucket)
        if not isinstance(output, Dense):
            self._note(None)
            return output
        if call.attends_to_itself:  # an IP-adapter's calls do not, and no plan is about them
            self._note(output.reason)
        return call.dense()

    def _attend(self, call: AttentionCall, bucket: Tensor) -> Tensor | Dense:
        runner = self.runner
        if not torch.compiler.is_compiling() and (runner is None or runner.device != call.query.device):
            runner = self._handle.layer_runner(self._layer, call.query.device)
        if runner is None:
            raise InputError("paroattn was applied to a transformer on the meta device; apply it where it runs")
        return runner(call.query, call.key, call.value, bucket=bucket, key_mask=call.key_mask, scale=call.scale)

    def _note(self, reason: str | None) -> None:
        if torch.compiler.is_compiling():
            if reason is not None and self._handle.strict:
                raise PlanError(reason)
            self.noted = (reason,)
        else:
            self._handle.count(reason)


def check_model(plan: Plan, identity: ModelIdentity) -> None:
    """Raise `PlanError` unless the plan was made for a model like this one."""
    labels = {"class_name": "class", "heads": "number of heads", "layers": "number of layers", "head_dim": "head_dim"}
    for name, label in labels.items():
        expected, found = getattr(plan.model, name), getattr(identity, name)
        if expected != found:
            raise PlanError(f"plan is for another model: its {label} is {expected}, this model's is {found}")
    if plan.model.config_hash != identity.config_hash:
        raise PlanError(
            "plan is for another model: the class and sizes agree but the config differs "
            f"(hash {plan.model.config_hash[:12]}, this model's {identity.config_hash[:12]}). Calibrate this model."
        )
