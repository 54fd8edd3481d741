"""Timing several contenders fairly: all of them once per round, so that a slow machine is slow for all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tqdm.auto import tqdm


def interleaved(timed: Sequence[Callable[[], float]], rounds: int, *, progress: bool = True) -> list[list[float]]:
    """Seconds of each contender in each round, after one round that does not count.

    Args:
        timed: each does its work once and returns the seconds that count.
        rounds: how many count.
        progress: show a bar with an estimate on stderr.

    Example:
        >>> interleaved([lambda: 1.0, lambda: 2.0], rounds=3, progress=False)
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    times: list[list[float]] = [[] for _ in timed]
    with tqdm(total=(rounds + 1) * len(timed), desc="rounds", disable=not progress) as bar:
        for number in range(rounds + 1):
            for contender, own in zip(timed, times, strict=True):
                seconds = contender()
                if number:
                    own.append(seconds)
                bar.update()
    return times


def median_and_spread(times: Sequence[float]) -> dict[str, float]:
    """`median_ms` and `spread_ms`, the interquartile range (0 for a single round), of seconds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"median_ms": 1000 * statistics.median(times), "spread_ms": 1000 * (quartiles[2] - quartiles[0])}


def paired_ratio(base: Sequence[float], times: Sequence[float]) -> float:
    """How many times faster than `base`: the median of the rounds' ratios."""
    return statistics.median(other / own for other, own in zip(base, times, strict=True))
