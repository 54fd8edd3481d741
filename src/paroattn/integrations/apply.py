"""Applying a plan to a pipeline, and taking it off again."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import PlanError
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Attachment, transformer_of
from paroattn.integrations.descriptors import identify
from paroattn.integrations.schedule import Schedule
from paroattn.ops import PreparedAttention, prepare
from paroattn.ops.prepared import choose_for_layer
from paroattn.plan import LayerPlan, ModelIdentity, Plan
from paroattn.quantize import Precision


def apply(
    pipe: Any, plan: Plan | None = None, *, precision: str | Precision | None = None, backend: str = "auto"
) -> Handle:
    """Let a pipeline's transformer attend as a plan says, until the handle is removed.

    Args:
        pipe: a diffusers pipeline (Wan 2.1).
        plan: from `paroattn.calibrate` or `Plan.load`. None computes every block.
        precision: without a plan, the number format of all heads ("int8", ...); a plan brings its own.
        backend: "auto" or a backend's name.

    Returns:
        A handle with `remove()`; also a context manager.

    Raises:
        PlanError: the plan is for another model, number of heads or layers; while generating, for another grid.
        ValueError: an unknown model class, precision or backend; both or neither of plan and precision.

    Example:
        >>> with paroattn.apply(pipe, plan):  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
    """
    if (plan is None) == (precision is None):
        raise ValueError("apply takes either a plan or a precision; got " + ("both" if plan is not None else "neither"))
    identity = identify(transformer_of(pipe))
    if plan is not None:
        check_model(plan, identity)
        layers = [plan.layer(index) for index in range(identity.layers)]
    else:
        parsed = Precision.parse(precision)  # type: ignore[arg-type]
        layers = [LayerPlan(precisions=(parsed,) * identity.heads)] * identity.layers
    for layer in layers:
        choose_for_layer(backend, layer)
    return Handle(pipe, plan, layers, backend)


class Handle:
    """What `apply` returns; `remove()` restores the pipeline."""

    def __init__(self, pipe: Any, plan: Plan | None, layers: list[LayerPlan], backend: str):
        self.plan = plan
        self._bucket = _StepBucket()
        intercepts = [_PlannedLayer(layer, self._bucket, backend) for layer in layers]
        self._attachment = Attachment(pipe, intercepts, self._check_grid, self._follow)

    def remove(self) -> None:
        """Restore the pipeline's own attention, bitwise."""
        self._attachment.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _check_grid(self, grid: TokenGrid) -> None:
        if self.plan is not None and grid != self.plan.grid:
            raise PlanError(
                f"plan is for grid {self.plan.grid}; the model produced {grid}. "
                "Calibrate for that grid, or load a matching plan."
            )

    def _follow(self, schedule: Schedule) -> None:
        if self.plan is not None:
            self._bucket.set(self.plan.bucket_of(schedule.step, schedule.num_steps))


class _StepBucket:
    """The current step bucket as a 0-dim tensor per device, changed in place."""

    def __init__(self) -> None:
        self._value = 0
        self._tensors: dict[torch.device, Tensor] = {}

    def set(self, value: int) -> None:
        self._value = value
        for tensor in self._tensors.values():
            tensor.fill_(value)

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self._value, device=device)
        return self._tensors[device]


class _PlannedLayer:
    """The intercept of one layer: its operator, prepared for each device and dtype it meets."""

    def __init__(self, layer_plan: LayerPlan, bucket: _StepBucket, backend: str):
        self._layer_plan = layer_plan
        self._bucket = bucket
        self._backend = backend
        self._prepared: dict[tuple[torch.device, torch.dtype, float | None], PreparedAttention] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dense: Callable[[], Tensor]
    ) -> Tensor:
        situation = (query.device, query.dtype, scale)
        if situation not in self._prepared:
            self._prepared[situation] = prepare(
                self._layer_plan, device=query.device, dtype=query.dtype, scale=scale, backend=self._backend
            )
        return self._prepared[situation](query, key, value, step=self._bucket.on(query.device))


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
