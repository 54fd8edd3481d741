"""Applying without a plan: the first request of a size is observed, later ones run with the plan that came of it.

The next few are observed as well while they run with it, and make it better.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from tqdm.auto import tqdm

from paroattn.calibration.calibrate import check_precision
from paroattn.calibration.observation import Observation
from paroattn.errors import InputError, PlanError
from paroattn.grid import Boxes
from paroattn.integrations.apply import Handle, Observer, Report
from paroattn.integrations.apply import apply as apply_plan
from paroattn.integrations.attach import Forward
from paroattn.integrations.descriptors import output_projection
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import AttentionCall
from paroattn.integrations.schedule import Schedule
from paroattn.keep import check_density, check_reachable
from paroattn.plan import Plan
from paroattn.plan_cache import PlanCache, PlanWish
from paroattn.quantize import Precision
from paroattn.runner import Dense

OBSERVED = "the first request of a size runs so while its plan is made"


def apply(
    pipe: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    density: float | None = None,
    precision: str | Precision | None = None,
    strict: bool = False,
    backend: str = "auto",
    other_sizes: str = "dense",
    repair: bool = False,
    compile_blocks: bool = False,
    cache: str | os.PathLike[str] | PlanCache | None = None,
    requests: int = 3,
    memory_gb: float = 8.0,
    progress: bool = True,
) -> Handle:
    """Let a pipeline's transformers attend as a plan says, until the handle is removed.

    With a density instead of a plan, the pipeline calibrates itself: the first request of each size runs with the
    model's own attention and is observed, and later ones of that size, also of later processes, run with the plan that
    came of it. `paroattn.calibrate` takes longer and makes better plans (docs/fidelity.md). Code that was compiled
    cannot be observed: generate once before compiling.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows (docs/models.md).
        plan: from `paroattn.calibrate` or `Plan.load`, or a plan file's path. None computes every block, unless there
            is a density.
        density: without a plan, kept blocks over all blocks, in (0, 1], of the plans that are made.
        precision: without a plan, the number format of all heads ("int8", ...; with a density, default "exact" and no
            "int4"); a plan brings its own.
        strict: raise `PlanError` at the first call that runs with the model's own attention (another size, tokens
            beyond the grid, masks of another kind) instead of warning once of each reason. Requests that are observed
            may.
        backend: "auto" or a backend's name.
        other_sizes: what requests of another size than the plan's get: "dense", the model's own attention; "adapt", the
            plan fitted to them (`Plan.adapt`) at the first one; "error", a `PlanError`. With a density each size gets a
            plan of its own.
        repair: bring outputs closer to the model's own attention: in each call 64 rows attend to all keys, and what
            they miss says what all rows miss (docs/fidelity.md).
        compile_blocks: compile the transformers' blocks while the handle lasts, one graph for all blocks of a kind; the
            first request takes some seconds longer. With a plan or a precision, since compiled code cannot be observed.
        cache: the folder of plans that were made, or a `PlanCache`; default: the user's (docs/how-to.md).
        requests: how many requests of a size its plan is made of. The first runs with the model's own attention, the
            next ones with the plan so far, and each makes it better, best with another prompt each; they have to come
            in one process, and all of one size before those of another.
        memory_gb: host memory for what skipping blocks costs from the first of these requests to the last, in 10^9
            bytes; what takes more lies in a temporary file.
        progress: say on stderr when a plan is made or found.

    Returns:
        A handle with `remove()`, `report()` and `ready`; also a context manager.

    Raises:
        PlanError: the plan is for another model, number of heads or layers; with `strict` also while generating.
        InputError: an unknown model class, precision or backend; a plan beside a density or precision, or none of them;
            `compile_blocks` with a density, or with a transformer that is compiled as a whole.

    Example:
        >>> with paroattn.apply(pipe, plan) as handle:  # doctest: +SKIP
        ...     video = pipe(prompt="a cat").frames
        >>> print(handle.report())  # doctest: +SKIP
        >>> handle = paroattn.apply(pipe, density=0.3, precision="int8")  # doctest: +SKIP
    """
    if density is None:
        return apply_plan(
            pipe, plan, precision=precision, strict=strict, backend=backend, other_sizes=other_sizes,
            repair=repair, compile_blocks=compile_blocks,
        )  # fmt: skip
    if plan is not None:
        raise InputError("apply takes either a plan or a density; got both")
    if compile_blocks:
        raise InputError(
            "compile_blocks goes with a plan, and a density makes one by observing requests, which compiled code does "
            "not allow; let it make its plan, then apply that (`paroattn plans export` writes it to a file)"
        )
    check_density(density)
    parsed = Precision.parse(precision or "exact")
    if "int4" in (parsed.qk, parsed.pv):
        raise InputError(
            "precision 'int4' needs to know which heads it harms, which one request does not tell; make a plan with "
            "paroattn.calibrate, or ask for int8"
        )
    if requests < 1:
        raise InputError(f"requests is {requests}; expected at least 1")
    check_precision(pipe, parsed)
    plans = cache if isinstance(cache, PlanCache) else PlanCache(cache)
    return SelfCalibratingHandle(
        Pipeline(pipe), PlanWish(density, parsed), plans, strict=strict, backend=backend, repair=repair,
        requests=requests, memory_gb=memory_gb, progress=progress,
    )  # fmt: skip


class SelfCalibratingHandle(Handle):
    """A handle that makes its plans beside requests; `plan` is that of the last request, or None."""

    def __init__(
        self,
        pipeline: Pipeline,
        wish: PlanWish,
        cache: PlanCache,
        *,
        strict: bool,
        backend: str,
        repair: bool,
        requests: int,
        memory_gb: float,
        progress: bool,
    ):
        self._wish = wish
        self._cache = cache
        self._most_requests = requests
        self._memory_gb = memory_gb
        self._progress = progress
        self._pipeline = pipeline
        self._plans: dict[Boxes, Plan | Dense] = {}
        self._states: dict[str, str] = {}
        self._observed: _ObservedRequest | None = None
        self._observation: Observation | None = None  # of the last size, as long as more requests can add to it
        super().__init__(pipeline, None, None, strict, backend, repair=repair)

    @property
    def ready(self) -> bool:
        """Whether the next request of the size of the last one has a plan."""
        return self.plan is not None

    def report(self) -> Report:
        """As `Handle.report`, and what became of the plan of each size."""
        found = super().report()
        return Report(found.planned, found.dense, dict(self._states))

    def count(self, reason: str | None) -> None:
        """As `Handle.count`; observed calls neither warn nor raise."""
        if reason == OBSERVED:
            with self._lock:
                self._counts[reason] += 1
        else:
            super().count(reason)

    def _choose(self, forward: Forward) -> Plan | Dense | None:
        grid = forward.grid
        if grid is None:
            return Dense("this request has tokens that form no boxes of frames, height and width")
        request = self._own_request
        if request is not None:
            if request.goes_on(forward, self._pipeline.scheduler):
                return request.attention
            self._finish(request)  # a host that does not call the pipeline has begun another generation
        if grid.boxes not in self._plans:
            self._look_for(forward)
        elif self._observation is not None and self._observation.grid.boxes == grid.boxes:
            self._begin(forward, self._observation)
        chosen = self._plans.get(grid.boxes, Dense("another request is being observed"))
        self.plan = chosen if isinstance(chosen, Plan) else None
        return chosen if self._own_request is None else self._own_request.attention

    @property
    def _own_request(self) -> _ObservedRequest | None:
        """The request that is observed, if it is this thread's."""
        request = self._observed
        return request if request is not None and request.thread is threading.current_thread() else None

    def _look_for(self, forward: Forward) -> None:
        """Take a size's plan from the cache, or begin to observe."""
        grid = forward.grid
        assert grid is not None
        size, name = grid.boxes, str(grid)
        try:
            check_reachable(self._wish.density, grid)
        except PlanError as error:
            self._plans[size] = Dense(str(error))
            self._say(name, str(error))
            return
        found = self._cache.find(self._identity, grid, self._wish)
        if found is not None:
            self._plans[size] = found
            self._say(name, f"density {found.density():.3f}, from {self._cache.folder}")
            return
        if self._begin(forward, None):
            self._say(name, "being made; this request runs with the model's own attention")

    def _begin(self, forward: Forward, earlier: Observation | None) -> bool:
        """Begin to observe a request, the first one of its size or after earlier ones, unless another one is."""
        assert forward.grid is not None
        with self._lock:
            if self._observed is not None and self._observed.thread.is_alive():
                return False
            attention = Dense(OBSERVED) if earlier is None else self._plans[forward.grid.boxes]
            request = _ObservedRequest(forward, self._pipeline, attention)
            if earlier is None:
                self._observation = None  # gives its memory back before another one is made
                earlier = request.new_observation(self._pipeline, self._memory_gb)
            elif earlier.schedule != request.levels:
                return False
            else:
                earlier.next_request()
            self._observed, request.observation = request, earlier
        return True

    def _observer(self) -> Observer | None:
        request = self._own_request
        return None if request is None else request.take

    def _after_call(self, succeeded: bool) -> None:
        request = self._own_request
        if request is not None:
            request.is_complete &= succeeded
            self._finish(request)

    def _finish(self, request: _ObservedRequest) -> None:
        """Make the plan of a request that has ended, and keep it."""
        self._observed = None
        name = str(request.grid)
        is_first = isinstance(request.attention, Dense)
        if not request.is_complete:
            if is_first:
                self._say(name, "not made: the request ended early; the next one will be observed")
            return
        observation = request.observation
        if not observation.is_of_use:
            if is_first:
                self._say(name, "not made: no attention call of this size could be observed")
            return
        start = time.perf_counter()
        try:
            plan = observation.plan(self._wish.density, self._wish.precision, request.device)
        except InputError as error:
            if is_first:
                self._plans[request.grid.boxes] = Dense(f"no plan could be made of the first request: {error}")
            self._say(name, f"not made: {error}")
            return
        self._plans[request.grid.boxes] = self.plan = plan
        self._forget(request.attention)
        self._observation = observation if observation.requests < self._most_requests else None
        seconds = time.perf_counter() - start
        try:
            kept = f"kept as {self._cache.put(plan, self._wish)}"
        except InputError as error:
            kept = f"not kept: {error}"
        of = f", of {observation.requests} requests" if observation.requests > 1 else ""
        self._say(name, f"density {plan.density():.3f}{of}, made in {seconds:.1f} s, {kept}")

    def _forget(self, plan: Plan | Dense) -> None:
        """Free what computes a plan that another one has replaced; other threads may be looking for theirs."""
        for place in list(self._runners):
            if place[0] is plan:
                self._runners.pop(place, None)

    def _say(self, size: str, state: str) -> None:
        self._states[size] = state
        if self._progress:
            tqdm.write(f"paroattn: plan for {size}: {state}", file=sys.stderr)


class _ObservedRequest:
    """A generation that is observed, in the thread in which it began.

    Attributes:
        attention: what it runs with.
        is_complete: whether the last step was reached.
    """

    observation: Observation

    def __init__(self, forward: Forward, pipeline: Pipeline, attention: Plan | Dense):
        assert forward.grid is not None
        self.attention = attention
        self.thread = threading.current_thread()
        self.grid = forward.grid
        self.device = forward.latents.device
        self._schedule = Schedule()
        self._schedule.follow(forward.descriptor, forward.timestep, pipeline.scheduler)
        self.is_complete = self._schedule.num_steps == 1

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of each step."""
        return self._schedule.levels

    def new_observation(self, pipeline: Pipeline, memory_gb: float) -> Observation:
        """One that knows nothing yet."""
        projections = [output_projection(module) for layers in pipeline.layers for module in layers]
        return Observation(pipeline.identity, self.grid, self.levels, memory_gb, projections)

    def goes_on(self, forward: Forward, scheduler: Any) -> bool:
        """Whether a forward call belongs to this generation; it is then followed."""
        assert forward.grid is not None
        if forward.grid.boxes != self.grid.boxes:
            return False
        before, levels = self._schedule.step, self._schedule.levels
        self._schedule.follow(forward.descriptor, forward.timestep, scheduler)
        if self._schedule.levels != levels or self._schedule.step < before:
            return False
        self.is_complete = self._schedule.step == len(levels) - 1
        return True

    def take(self, layer: int, call: AttentionCall) -> None:
        """Take a call of a layer."""
        if call.attends_to_itself and call.query.shape[1] >= self.grid.visual_tokens:
            self.observation.add(ObservedCall.of(call, layer, self._schedule, self.grid))
