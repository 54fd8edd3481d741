"""A plan on a ComfyUI model: three wrappers and two callbacks of a clone, which nothing outside of it sees."""

from __future__ import annotations

import inspect
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paroattn import Plan, PlanError, TokenGrid
from paroattn.runner import Dense, Runner

from .checks import at_size, check_choices, layers_for, with_text_side
from .models import Family, family_of
from .override import Forward, Planned
from .report import Report, Tally, logger
from .schedule import check_part, is_whole, within

KEY = "paroattn"
"""Of the wrappers and callbacks on a model, and of what an evaluation leaves for its forward calls."""

Boxes = tuple[tuple[int, int, int], ...]


def apply_plan(
    model: Any,
    plan: Plan,
    *,
    part: str = "whole",
    start: float = 0.0,
    end: float = 1.0,
    other_sizes: str = "dense",
    repair: bool = False,
) -> Any:
    """A clone of a model whose self-attention runs as a plan says.

    Args:
        model: ComfyUI's model patcher; it is not changed.
        plan: made with diffusers for the same model.
        part: which layers of the plan the model has, one of `checks.PARTS`.
        start, end: shares of the schedule between which the plan is used; elsewhere the model's own attention runs.
        other_sizes: what other sizes than the plan's get, one of `checks.OTHER_SIZES`.
        repair: as of `paroattn.apply`.

    Raises:
        InputError: a model that is not known, or an input out of range.
        PlanError: a plan for another model or part, or a model that has a plan already.

    Example:
        >>> faster = apply_plan(model, plan, part="high noise")  # doctest: +SKIP
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    check_choices(part, start, end, other_sizes)
    if plan_on(model) is not None:
        raise PlanError("model already has a plan; use one 'Apply PARO plan' per model")
    diffusion_model = model.get_model_object("diffusion_model")
    family, refusal = family_of(diffusion_model)
    if refusal is None:
        layers = layers_for(plan, part, diffusion_model, family)
        plan = with_text_side(plan, diffusion_model, family)
    else:
        layers = range(0)
        logger.warning("PARO plan: all of it stays dense: %s", refusal)
    applied = AppliedPlan(plan, layers, family, refusal, part, start, end, other_sizes, repair)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, applied.around_sampling)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, applied.around_evaluation)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, applied.around_forward)
    clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, applied.prepare)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, applied.release)
    return clone


def plan_on(model: Any) -> AppliedPlan | None:
    """What `apply_plan` put on a model, or None."""
    from comfy.patcher_extension import WrappersMP

    found = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY)
    return found[0].__self__ if found else None


class Evaluation(NamedTuple):
    """What the evaluation of the model at a step knows and its forward calls do not.

    Attributes:
        sizes: frames, rows and columns of the whole latent, of which a forward call may get an area.
        dense: why all of it stays dense, or None.
    """

    sizes: tuple[int, ...]
    dense: str | None


class AppliedPlan:
    """A plan on one model; arguments as of `apply_plan`, after its checks.

    It keeps what is of a device, the operators and a step bucket at a fixed address, and counts. What is of a request
    travels with it.
    """

    def __init__(
        self,
        plan: Plan,
        layers: range,
        family: Family,
        refusal: str | None,
        part: str,
        start: float,
        end: float,
        other_sizes: str,
        repair: bool,
    ):
        self._plan = plan
        self._layers = layers
        self._family = family
        self._refusal = refusal
        self._part = part
        self._start, self._end = start, end
        self._other_sizes = other_sizes
        self._repair = repair
        self._adapted: dict[Boxes, Plan] = {}
        self._planned: dict[tuple[Boxes, torch.device], Planned] = {}
        self._lock = threading.Lock()
        self._tally = Tally()

    def report(self) -> Report:
        """What ran since the last report."""
        return self._tally.take()

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE: refuse a part that the plan has no masks for, before a picture is made with it."""
        sigmas = _named(executor, args, kwargs).get("sigmas")
        if self._refusal is None and sigmas is not None:
            check_part(self._plan, self._layers, self._part, sigmas.tolist())
        return executor(*args, **kwargs)

    def around_evaluation(
        self,
        executor: Any,
        model: Any,
        conds: Any,
        latent: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
        *rest: Any,
    ) -> Any:
        """CALC_COND_BATCH: leave for the forward calls what only this sees."""
        dense = None
        if not is_whole(self._start, self._end) and not within(self._start, self._end, model.model_sampling, timestep):
            dense = f"the step is outside of start {self._start:g} to end {self._end:g} of the schedule"
        evaluation = Evaluation(tuple(latent.shape[2:]), dense)
        own = {**options.get("transformer_options", {}), KEY: evaluation}
        return executor(model, conds, latent, timestep, {**options, "transformer_options": own}, *rest)

    @torch.compiler.disable(recursive=False)  # blocks may be compiled; this is not, but what it calls
    def around_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL: run a forward call with this plan's override."""
        forward, args, kwargs = self._begin(executor, args, kwargs)
        output = executor(*args, **kwargs)
        self._finish(forward)
        return output

    @torch.compiler.disable
    def _begin(
        self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Forward | None, tuple[Any, ...], dict[str, Any]]:
        """What becomes of a forward call, None if it cannot be told, and its arguments with that among them."""
        arguments = _named(executor, args, kwargs)
        options = arguments.get("transformer_options")
        if options is None:
            return None, args, kwargs
        model, mask = executor.class_obj, arguments.get("attention_mask")
        grid = self._family.grid(model, arguments["x"], arguments.get("context"))
        forward = Forward(
            self._choose(arguments, options, grid),
            grid,
            mask is None or not torch.is_floating_point(mask),  # numbers of 0 and 1 become a mask of padding
            self._tally.count,
        )
        own = forward.options(options, self._family.block_names(model))
        return (
            forward,
            tuple(own if x is options else x for x in args),
            {name: own if x is options else x for name, x in kwargs.items()},
        )

    @torch.compiler.disable
    def _finish(self, forward: Forward | None) -> None:
        self._tally.ended(0 if forward is None else forward.calls)

    def _choose(self, arguments: dict[str, Any], options: dict[str, Any], grid: TokenGrid) -> Planned | Dense:
        """What runs a forward call, its step bucket set, or why it stays dense."""
        latent, sigma, evaluation = arguments["x"], options.get("sigmas"), options.get(KEY)
        reason = self._refusal or self._reason(arguments, options, evaluation)
        if reason is not None:
            return Dense(reason)
        if sigma is None:
            return Dense("the sampler gives no sigma, by which the plan finds its step")
        sizes = tuple(latent.shape[2:])
        if evaluation is not None and len(evaluation.sizes) == len(sizes) and evaluation.sizes != sizes:
            return Dense("the conditioning is for an area: the model gets a part of the latent")
        plan = self._plan_for(grid, latent.device)
        if isinstance(plan, Dense):
            return plan
        planned = self._planned_on(plan, grid, latent)
        if not _is_capturing(latent.device):  # a graph that is made now reads what `prepare` sets before each replay
            _show(planned, sigma)
        return planned

    def _reason(self, arguments: dict[str, Any], options: dict[str, Any], evaluation: Evaluation | None) -> str | None:
        if "context_window" in options:
            return "context windows: the model gets some of the frames"
        for name, why in self._family.refused.items():
            if arguments.get(name) is not None:
                return why
        if evaluation is not None:
            return evaluation.dense
        if not is_whole(self._start, self._end):
            return "the sampler goes past ComfyUI's calc_cond_batch: start and end of the schedule are not known"
        return None

    def _plan_for(self, grid: TokenGrid, device: torch.device) -> Plan | Dense:
        """The plan at the size of a request, or why it has none.

        Raises:
            PlanError: another size than the plan's, where the node says so.
        """
        if grid.boxes == self._plan.grid.boxes:
            return self._plan
        reason = f"plan is for grid {self._plan.grid}; this request has grid {grid}"
        if self._other_sizes == "error":
            raise PlanError(f"{reason}. Load a plan for this size, or set other_sizes to 'adapt' or 'dense'.")
        if self._other_sizes == "dense":
            return Dense(reason)
        with self._lock, _allocating():
            if grid.boxes not in self._adapted:
                self._adapted[grid.boxes] = self._plan.adapt(at_size(self._plan, grid), device)
            return self._adapted[grid.boxes]

    def _planned_on(self, plan: Plan, grid: TokenGrid, latent: Tensor) -> Planned:
        """A plan's operators and step bucket on the latent's device, made at the first forward call there."""
        device = latent.device
        with self._lock:
            planned = self._planned.get((plan.grid.boxes, device))
            if planned is None:
                # Normal tensors, which threads without inference mode may write to, too.
                with torch.inference_mode(False), _allocating():
                    runner = Runner(plan, device, layers=self._layers, repair=self._repair)
                    if device.type == "cuda":
                        runner.build(grid.tokens, plan.model.head_dim, latent.dtype)
                    planned = Planned(runner, torch.zeros((), dtype=torch.int64, device=device))
                self._planned[plan.grid.boxes, device] = planned
        return planned

    def prepare(self, patcher: Any, timestep: Tensor, *_: Any) -> None:
        """ON_PREPARE_STATE: set the step buckets, in place and without waiting, also for graphs that are replayed."""
        with self._lock:
            for planned in self._planned.values():
                _show(planned, timestep)

    def release(self, *_: Any) -> None:
        """ON_CLEANUP: after sampling nothing stays on a device."""
        with self._lock:
            self._planned.clear()


def _named(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a wrapped call by name; their places differ from model to model."""
    return {**dict(zip(inspect.signature(executor.original).parameters, args, strict=False)), **kwargs}


def _show(planned: Planned, sigma: Tensor) -> None:
    planned.bucket.copy_(planned.runner.bucket(sigma.float().amax()))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _allocating() -> AbstractContextManager[Any]:
    """Memory that is taken now is not part of the plan of allocations that newer versions of ComfyUI replay."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
