"""Applying a plan to a pipeline, and taking it off again."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError, PlanError
from paroattn.grid import TokenGrid
from paroattn.integrations.attach import Attachment
from paroattn.integrations.descriptors import describe
from paroattn.integrations.operators import Operators, PlannedLayer, Request
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.schedule import Schedule
from paroattn.plan import LayerPlan, ModelIdentity, Plan
from paroattn.quantize import Precision


def apply(
    pipe: Any,
    plan: Plan | None = None,
    *,
    precision: str | Precision | None = None,
    strict: bool = False,
    backend: str = "auto",
) -> Handle:
    """Let a pipeline's transformers attend as a plan says, until the handle is removed.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows (docs/models.md).
        plan: from `paroattn.calibrate` or `Plan.load`. None computes every block.
        precision: without a plan, the number format of all heads ("int8", ...); a plan brings its own.
        strict: raise `PlanError` for requests that the plan does not cover (another size, tokens beyond the grid)
            instead of running them with the model's own attention after one warning.
        backend: "auto" or a backend's name.

    Returns:
        A handle with `remove()`; also a context manager.

    Raises:
        PlanError: the plan is for another model, number of heads or layers; with `strict` also while generating.
        InputError: an unknown model class, precision or backend; both or neither of plan and precision.

    Example:
        >>> with paroattn.apply(pipe, plan):  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
    """
    if (plan is None) == (precision is None):
        raise InputError("apply takes either a plan or a precision; got " + ("both" if plan is not None else "neither"))
    pipeline = Pipeline(pipe)
    identity = pipeline.identity
    layers: list[LayerPlan] = []
    if plan is not None:
        check_model(plan, identity)
        text = describe(pipeline.transformers[0]).text
        if plan.grid.text_tokens and plan.grid.text_position != text:
            raise PlanError(f"plan has text tokens as {plan.grid.text_position}; this model has them as {text}")
    else:
        parsed = Precision.parse(precision)  # type: ignore[arg-type]
        layers = [LayerPlan(precisions=(parsed,) * identity.heads)] * identity.layers
    return Handle(pipeline, plan, Operators(plan, layers, backend), strict)


class Handle:
    """What `apply` returns; `remove()` restores the pipeline."""

    def __init__(self, pipeline: Pipeline, plan: Plan | None, operators: Operators, strict: bool):
        self.plan = plan
        self._operators = operators
        self._strict = strict
        self._request = Request()
        self._warned = False
        self._ready_for: tuple[torch.device, torch.dtype] | None = None
        self._intercepts = [PlannedLayer(operators, layer, self._request) for layer in range(pipeline.identity.layers)]
        self._attachment = Attachment(pipeline, self._intercepts, self._before_call, self._follow)
        self._make_ready(*pipeline.place)

    def remove(self) -> None:
        """Restore the pipeline's own attention, bitwise."""
        self._attachment.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _before_call(self, grid: TokenGrid | None, hidden_states: Tensor) -> None:
        self._request.stays_dense = self.plan is not None and not _covers(self.plan.grid, grid)
        if torch.compiler.is_compiling():
            return
        if self._request.stays_dense:
            self._refuse(grid)
            return
        self._make_ready(hidden_states.device, hidden_states.dtype)

    def _refuse(self, grid: TokenGrid | None) -> None:
        """Raise or warn, once, for a request that the plan does not cover."""
        assert self.plan is not None
        found = "tokens that are no single box of frames, height and width" if grid is None else f"grid {grid}"
        message = f"plan is for grid {self.plan.grid}; this request has {found}"
        if self._strict:
            raise PlanError(f"{message}. Calibrate for that grid, or load a matching plan.")
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message}, and runs with the model's own attention", stacklevel=2)

    def _make_ready(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._ready_for != (device, dtype) and device.type != "meta":
            self._ready_for = (device, dtype)
            for intercept in self._intercepts:
                intercept.make_ready(device, dtype)

    def _follow(self, schedule: Schedule) -> None:
        if self.plan is not None:
            self._operators.show(self.plan.bucket_of(schedule.step, schedule.num_steps))


def _covers(planned: TokenGrid, found: TokenGrid | None) -> bool:
    """Whether a request has the box of visual tokens that was planned; the number of text tokens may differ."""
    if found is None:
        return False
    return (planned.frames, planned.height, planned.width) == (found.frames, found.height, found.width)


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
