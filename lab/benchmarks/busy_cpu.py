"""How all threads of a CPU do beside other busy processes, against one thread, as records.

python lab/benchmarks/busy_cpu.py [--passes 8] [--output FILE.jsonl]

Threads that wait for each other are as slow as the one that the system has taken from its CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.random_plan import random_plan
from paroattn_lab.speed.rounds import interleaved

from paroattn import TokenGrid, prepare
from paroattn.plan import ModelIdentity

GRID = TokenGrid(1, 64, 64)
HEADS, HEAD_DIM = 8, 64
WAYS = ((0.3, "int8"), (1.0, "int8"), (0.3, "exact"))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)  # until they are at work
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def timed(call: Callable[[], Any], threads: int) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def operator(density: float, precision: str) -> Callable[[], Any]:
    """A call of random masks and orders."""
    model = ModelIdentity("random", "", 1, HEADS, HEAD_DIM)
    (plan,) = random_plan(model, GRID, density, precision).layers()
    prepared = prepare(plan, device="cpu", dtype=torch.float32, backend="cpu")
    tensors = [torch.randn(1, HEADS, GRID.tokens, HEAD_DIM) for _ in range(3)]
    return partial(prepared, *tensors, bucket=torch.tensor(0))


def summary(one: list[float], all_threads: list[float]) -> dict[str, float]:
    """Of the seconds of one thread and all threads, by round."""
    return {
        "one_thread_ms": 1000 * statistics.median(one),
        "all_threads_ms": 1000 * statistics.median(all_threads),
        "ninth_decile_ms": 1000 * statistics.quantiles(all_threads, n=10)[-1],
        "times_one": statistics.median(own / base for base, own in zip(one, all_threads, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=8, help="through all cases, of five rounds each; default: 8")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    most, surroundings = os.cpu_count() or 1, environment(torch.device("cpu"))
    calls = {way: operator(*way) for way in WAYS}
    cases = [(*way, busy) for way in WAYS for busy in range(most + 1)]
    times: dict[tuple[float, str, int], tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for _ in range(arguments.passes):  # so that a slow minute is slow for all
        for density, precision, busy in cases:
            timings = [partial(timed, calls[density, precision], threads) for threads in (1, most)]
            with busy_processes(busy):
                found = interleaved(timings, 5, progress=False)
            for own, more in zip(times[density, precision, busy], found, strict=True):
                own += more
    shape = {"tokens": GRID.tokens, "heads": HEADS, "head_dim": HEAD_DIM}
    records = []
    for (density, precision, busy), own in times.items():
        case = {"kind": "busy", "density": density, "precision": precision, "busy_processes": busy, **summary(*own)}
        print(", ".join(f"{key} {value}" for key, value in case.items()))
        records.append({**case, **shape, **surroundings})
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
