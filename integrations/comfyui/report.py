"""What ran sparse and what dense, and why."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

logger = logging.getLogger("paroattn")


@dataclass(frozen=True)
class Report:
    """How attention ran.

    Attributes:
        planned: self-attention calls of blocks that ran as the plan says.
        dense: those that ran with the model's own attention, by reason. Cross-attention and what runs outside of
            blocks always do and are not counted.
        forwards: forward calls of the diffusion model.
        idle: those in which no block called attention.
    """

    planned: int
    dense: Mapping[str, int]
    forwards: int
    idle: int

    def __str__(self) -> str:
        if not self.forwards:
            return "nothing ran since the last report"
        total = self.planned + sum(self.dense.values())
        lines = [f"{self.planned} of {total} attention calls in {self.forwards} forward calls ran as planned"]
        lines += [f"{count} ran with the model's own attention: {reason}" for reason, count in self.dense.items()]
        if self.idle:
            lines.append(
                f"{self.idle} forward calls called no attention that could be taken over: a cache left the blocks out, "
                "or the model hands its attention no transformer_options"
            )
        return "\n".join(lines)


class Tally:
    """Counts calls, from any thread; each reason is logged once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self._calls: Counter[str | None] = Counter()
        self._forwards = self._idle = 0

    def count(self, reason: str | None) -> None:
        """Count a call that ran as planned (None) or with the model's own attention."""
        with self._lock:
            self._calls[reason] += 1
            new = reason is not None and reason not in self._logged
            if reason is not None:
                self._logged.add(reason)
        if new:
            logger.warning("PARO plan: the model's own attention runs: %s", reason)

    def ended(self, calls: int) -> None:
        """Count a forward call in which so many blocks called attention."""
        with self._lock:
            self._forwards += 1
            self._idle += calls == 0

    def take(self) -> Report:
        """What was counted since this was last asked."""
        with self._lock:
            dense = {str(reason): count for reason, count in self._calls.items() if reason is not None}
            report = Report(self._calls[None], dense, self._forwards, self._idle)
            self._clear()
        return report
