"""How long a calibration will take, told while its first generation compares token orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paroattn.calibration.costs import LEVELS
from paroattn.calibration.run import CalibrationRun, Sampling, spread
from paroattn.integrations.clock import now

_BACKWARD = 2.5  # what a backward pass takes over a forward pass, of which attention is the most


class Forecast:
    """Times the steps of a generation and says, once, what all generations and passes will take.

    Args:
        run: whose generations these are.
        sampling: how much is looked at.
        order_steps: denoising steps at which orders are compared, by the number of steps.
        most_buckets: step buckets, where there are as many steps.
        effects: whether those are measured, too.
    """

    def __init__(
        self,
        run: CalibrationRun,
        sampling: Sampling,
        order_steps: Callable[[int], list[int]],
        most_buckets: int,
        effects: bool,
    ):
        self._run = run
        self._sampling = sampling
        self._order_steps = order_steps
        self._most_buckets = most_buckets
        self._effects = effects
        self._device = run.pipeline.place[0]
        self._begin: tuple[float, int] | None = None  # of the step in progress: when, after how many forward calls
        self._plain: tuple[float, int] | None = None  # a step in which nothing is compared: seconds, forward calls
        self._comparisons: list[float] = []
        self._work = 0.0  # of a comparison, in attentions of its heads
        self._told = False

    @contextmanager
    def comparing(self, work: float) -> Iterator[None]:
        """Time a comparison of orders in one call, which takes as much as `work` times the call's attention."""
        if self._told:
            yield
            return
        start, self._work = now(self._device), work
        yield
        self._comparisons.append(now(self._device) - start)

    def follow(self, step: int) -> None:
        """Take note of a step that begins, and tell the forecast as soon as enough is known."""
        if self._told:
            return
        time, forwards, before = now(self._device), self._run.forwards, self._begin
        self._begin = time, forwards
        if step > 0 and before is not None and step - 1 not in self._order_steps(self._run.num_steps):
            self._plain = time - before[0], forwards - before[1]
        if self._plain is not None and self._comparisons:
            self._told = True
            parts = self._parts(*self._plain)
            listed = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
            self._run.say(f"calibration will take about {sum(parts.values()):.0f} s: {listed}")

    def _parts(self, step: float, forwards: int) -> dict[str, float]:
        """Seconds of each part, where a step of so many forward calls takes `step` seconds."""
        sampling, steps, prompts = self._sampling, self._run.num_steps, self._run.prompt_count
        buckets, order_steps = min(self._most_buckets, steps), self._order_steps(steps)
        usual = min(self._comparisons)  # the first one compiles kernels
        compared = usual * len(self._comparisons)  # in a step
        generated = steps if steps > buckets else max(order_steps) + 1
        looked_at = steps if sampling.cost_steps is None else min(steps, buckets * sampling.cost_steps)
        costs = 2 * sampling.cost_rows + 2 * (1 + max(LEVELS)) * sampling.error_rows  # in attentions
        parts = {
            "orders": sum(self._comparisons) - compared + prompts * (generated * step + len(order_steps) * compared),
            "costs": prompts * (steps * step + looked_at * compared / self._work * costs),
        }
        if self._effects:
            probes = min(buckets, sampling.sensitivity_steps or buckets) * len(self._run.pipeline.transformers)
            calls = probes * (forwards if sampling.samples is None else min(forwards, sampling.samples))
            passes = calls * (1 + _BACKWARD * sampling.cotangents + (self._device.type == "cuda"))  # blocks run again
            passes += forwards * sum(steps * (1 - own / buckets) for own in spread(sampling.propagation_runs, buckets))
            parts["effects"] = step / forwards * passes
        return parts
