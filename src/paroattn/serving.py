"""A plan in a serving engine: which of its heads a process has, what a call gets, and a count of both outcomes.

Engines split a model over processes and build it before they know a request. What their plug-ins need beside a
`Runner` is here; it imports no engine.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter

import torch
from torch import Tensor

from paroattn.errors import PlanError
from paroattn.grid import TokenGrid
from paroattn.plan import Plan
from paroattn.runner import Dense, Runner


class Tally:
    """Counts the attention calls of a process and logs what became of them.

    Args:
        logger: is given the first call of each reason as a warning, and the rest as information.
    """

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._lock = threading.Lock()
        self._total: Counter[str | None] = Counter()
        self._recent: Counter[str | None] = Counter()

    def log(self, line: str) -> None:
        """Log a line."""
        self._logger.info("paroattn: %s", line)

    def count(self, reason: str | None) -> None:
        """Count a call that ran as planned (None), or with the engine's own attention."""
        with self._lock:
            self._recent[reason] += 1
            self._total[reason] += 1
            first = self._total[reason] == 1
        if first and reason is not None:
            self._logger.warning("paroattn: %s: the engine's own attention runs instead", reason)

    @property
    def planned(self) -> int:
        """Calls that ran as planned."""
        return self._total[None]

    @property
    def dense(self) -> dict[str, int]:
        """Calls that ran with the engine's own attention, by reason."""
        with self._lock:
            return {reason: count for reason, count in self._total.items() if reason is not None}

    def summary(self) -> str:
        """All that was counted, in one line."""
        with self._lock:
            return _as_line(self._total)

    def log_summary(self) -> None:
        """Log what was counted since the last time, in one line; nothing if nothing was."""
        with self._lock:
            recent, self._recent = self._recent, Counter()
        if recent:
            self.log(_as_line(recent))


def _as_line(counts: Counter[str | None]) -> str:
    line = f"{counts[None]} of {sum(counts.values())} attention calls ran as planned"
    reasons = [f"{count} did not: {reason}" for reason, count in counts.items() if reason is not None]
    return "; ".join([line, *reasons])


class ServedPlan:
    """A plan for the calls of one process.

    Args:
        plan: the plan.
        tally: counts the calls.
        name: what messages call the plan, such as its path.
    """

    def __init__(self, plan: Plan, tally: Tally, name: str = "plan"):
        self.plan = plan
        self.tally = tally
        self._name = name
        self._runners: dict[tuple[range, torch.device], Runner] = {}
        self._bucket: tuple[Runner, Tensor | float, Tensor] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], tally: Tally) -> ServedPlan:
        """Load a plan while an engine builds its model; raises as `Plan.load` does."""
        with torch.device("cpu"):  # engines build models on the meta device
            plan = Plan.load(path)
        tally.log(f"{path} is in use, for {plan.model.class_name} and grid {plan.grid}")
        return cls(plan, tally, str(path))

    def check(
        self, *, class_name: str | None = None, layers: int | None = None, heads: int, head_dim: int, text: str | None
    ) -> None:
        """Raise `PlanError` unless the plan is for a model like this one.

        Args:
            class_name: of the model, or None if it is not known.
            layers: of all transformers together, or None if that is not known.
            heads, head_dim: of a layer, over all processes.
            text: where the model has text tokens, "prefix" or "suffix"; None: among the visual tokens are none.
        """
        own, found = self.plan.model, {"class": class_name, "number of layers": layers}
        found |= {"number of heads": heads, "head_dim": head_dim}
        expected = (own.class_name, own.layers, own.heads, own.head_dim)
        for (label, value), planned in zip(found.items(), expected, strict=True):
            if value not in (None, planned):
                raise PlanError(
                    f"{self._name} is for another model: its {label} is {planned}, this model's is {value}. "
                    "Load a plan that was made for this model."
                )
        grid = self.plan.grid
        if grid.text_tokens and grid.text_position != text:
            place = "no text tokens" if text is None else f"them as {text}"
            raise PlanError(
                f"{self._name} has text tokens as {grid.text_position}; this model has {place}. "
                "Load a plan that was made for this model."
            )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: range | Dense,
        grid: TokenGrid,
        level: Tensor | float,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | Dense:
        """Attend as planned, or say why not; nothing waits for the GPU.

        Args:
            layer: number among the plan's layers.
            query, key, value: [B, N, H, D], all tokens of the sequence, the heads of this process.
            heads: from `heads_of_rank`.
            grid: of the request; its number of text tokens does not matter.
            level: noise level, as `Runner.bucket` takes it. Calls of one forward pass should bring the same object.
            key_mask: bool [B, N], False for keys to ignore, or None.
            scale: factor of the logits; default 1 / sqrt(D).
        """
        if isinstance(heads, Dense):
            return heads
        runner = self._runners.get((heads, query.device))
        if runner is None:
            runner = Runner(self.plan, query.device, heads=heads)
            self._runners[heads, query.device] = runner
        reason = runner.refusal(grid)
        if reason is not None:
            return Dense(reason)
        # Another thread may replace the bucket: each looks at what it read.
        known = self._bucket
        if known is None or known[0] is not runner or not _same(known[1], level):
            known = self._bucket = (runner, level, runner.bucket(level))
        return runner.call(layer, query, key, value, bucket=known[2], key_mask=key_mask, scale=scale)


def heads_of_rank(
    layer_heads: int, call_heads: int, *, tensor_rank: int = 0, sequence_rank: int = 0, sequence_ranks: int = 1
) -> range | Dense:
    """Numbers of the plan's heads that a call has in one process.

    Tensor parallelism gives each rank as many heads, in the order of ranks; Ulysses sequence parallelism parts those
    in the same way, and gives each rank all tokens.

    Args:
        layer_heads: of the layer in this process, before tokens are exchanged for heads.
        call_heads: of the call's tensors.
        tensor_rank: of the process in its tensor parallel group.
        sequence_rank, sequence_ranks: of the process in its Ulysses group, and their number.

    Example:
        >>> heads_of_rank(20, 10, tensor_rank=1, sequence_rank=1, sequence_ranks=2)
        range(30, 40)
    """
    start = tensor_rank * layer_heads
    if call_heads == layer_heads:
        return range(start, start + layer_heads)
    if call_heads * sequence_ranks == layer_heads:
        start += sequence_rank * call_heads
        return range(start, start + call_heads)
    return Dense(f"the call has {call_heads} of a layer's {layer_heads} heads, which {sequence_ranks} ranks share")


def _same(level: Tensor | float, other: Tensor | float) -> bool:
    """Whether two noise levels are one; tensors are not compared by value, which would wait for the GPU."""
    return level is other or (not isinstance(level, Tensor) and not isinstance(other, Tensor) and level == other)
