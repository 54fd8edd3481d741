"""A step of a video model on one GPU and on several, with full attention and with plans, as records.

torchrun --nproc-per-node 2 lab/benchmarks/gpu/parallel.py --output FILE.jsonl [--config wan-2.1-14b-720p] [--layers 4]

Random weights; plans with random masks whose heads have densities from 0.05 to 0.6. Without GPUs it runs with gloo at
any --size, which tests the script.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.presets import PRESETS
from paroattn_lab.speed.random_plan import unequal_plan
from paroattn_lab.speed.rounds import interleaved
from paroattn_lab.speed.subjects import Subject, random_subject
from torch import Tensor

import paroattn
from paroattn.balance import heads_in_order
from paroattn.integrations import apply as applying
from paroattn.integrations.clock import now
from paroattn.integrations.compiling import compile_blocks
from paroattn.integrations.pipeline import Pipeline
from paroattn.ops.exchange import Exchange
from paroattn.runner import LayerRunner


def share(subject: Subject) -> Subject:
    transformer = subject.transformer
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    transformer.enable_parallelism(config=config, cp_plan=paroattn.cp_plan(transformer))
    return subject


def own_attention(subject: Subject) -> Subject:
    """With the fastest dense attention that is part of PyTorch."""
    if subject.device.type == "cuda":
        subject.transformer.set_attention_backend("_native_cudnn")
    return subject


def seconds(subject: Subject) -> float:
    dist.barrier()
    start = now(subject.device)
    subject.step()
    taken = torch.tensor(now(subject.device) - start, device=subject.device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


class Parts:
    """Times of parts of a step on this rank, by events where there is a GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seen: dict[str, list[Any]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            output = function(*args, **kwargs)
            self._seen.setdefault(name, []).append((begin, self._mark()))
            return output

        return run

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return now(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, name: str) -> Tensor:
        """Of each call, on all ranks: [ranks, calls]."""
        now(self._device)
        pairs = self._seen.pop(name, [])
        gpu = self._device.type == "cuda"
        own = [begin.elapsed_time(end) if gpu else 1000 * (end - begin) for begin, end in pairs]
        given = torch.tensor(own, device=self._device)
        found = [torch.empty_like(given) for _ in range(dist.get_world_size())]
        dist.all_gather(found, given)
        return torch.stack(found)


def parts_of(subject: Subject, rounds: int) -> dict[str, float]:
    """Attention and exchange of an eager step: the mean over ranks, and the slowest rank of each call over the mean."""
    parts = Parts(subject.device)
    timed = ((LayerRunner, "__call__", "attention"), (Exchange, "to_heads", "to"), (Exchange, "to_tokens", "back"))
    rows = []
    with ExitStack() as stack:
        for owner, method, name in timed:
            stack.enter_context(mock.patch.object(owner, method, parts.timed(name, getattr(owner, method))))
        for number in range(rounds + 1):
            dist.barrier()
            subject.step()
            attention, to, back = (parts.milliseconds(name) for _, _, name in timed)
            if number:
                slowest = float(attention.amax(0).sum() / attention.mean(0).sum())
                # Waiting for slower ranks is part of `back` on the others: the quickest rank's is the exchange.
                rows.append((float(attention.mean(0).sum()), slowest, float((to.amin(0) + back.amin(0)).sum())))
    attention, slowest, exchange = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"attention_ms": attention, "slowest": slowest, "exchange_ms": exchange}


def measure(subject: Subject, densities: Sequence[float], precision: str, rounds: int) -> list[dict[str, Any]]:
    ranks, grid, identity = dist.get_world_size(), subject.grid, Pipeline(subject.pipe).identity
    plans = {density: unequal_plan(identity, grid, density, precision) for density in densities}
    contenders: dict[tuple[str, float, int], Subject] = {}
    parts: dict[tuple[str, float, int], dict[str, float]] = {}
    for method, count in (("own", 1), ("own", ranks)):
        twin = own_attention(subject.twin())
        contenders[method, 1.0, count] = share(twin) if count > 1 else twin
        compile_blocks([twin.transformer])
    for density, plan in plans.items():
        for method, count in (("paroattn", 1), ("paroattn", ranks), ("unbalanced", ranks)):
            twin = subject.twin()
            twin = share(twin) if count > 1 else twin
            as_it_is = mock.patch.object(applying, "balanced_heads", lambda plan, ranks: heads_in_order(plan))
            with as_it_is if method == "unbalanced" else ExitStack():
                handle = paroattn.apply(twin.pipe, plan, strict=True)
                if count > 1:
                    parts[method, density, count] = parts_of(twin, rounds)
            handle.remove()
            with as_it_is if method == "unbalanced" else ExitStack():
                paroattn.apply(twin.pipe, plan, strict=True, compile_blocks=True)
                contenders[method, density, count] = twin
                twin.step()
    outputs = {key: twin.step().float().flatten() for key, twin in contenders.items()}
    times = dict(
        zip(
            contenders,
            interleaved([functools.partial(seconds, twin) for twin in contenders.values()], rounds),
            strict=True,
        )
    )
    medians = {key: statistics.median(column) for key, column in times.items()}
    records = []
    for key, median in medians.items():
        method, density, count = key
        alone = ("own" if method == "own" else "paroattn", density, 1)
        reference = outputs[alone]
        records.append(
            {
                "kind": "parallel",
                "model": subject.name,
                "tokens": grid.tokens,
                "layers": identity.layers,
                "method": method,
                "precision": precision if method != "own" else None,
                "density": density,
                "gpus": count,
                "median_ms": 1000 * median,
                "times_one": medians[alone] / median,
                "times_own": medians["own", 1.0, count] / median,
                "difference": float((outputs[key] - reference).norm() / reference.norm()),
                **parts.get(key, {}),
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan-2.1-14b-720p", choices=PRESETS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=3, help="frames, height and width in pixels; default: the config's")
    parser.add_argument("--density", type=float, nargs="+", default=[0.3, 0.125])
    parser.add_argument("--precision", help="default: int8/fp8 on GPUs, int8 without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        torch.accelerator.device_count = lambda: 1  # diffusers divides a rank by it
        dist.init_process_group("gloo")
    torch._dynamo.config.cache_size_limit = 64  # contenders share the code of their blocks
    subject = random_subject(
        arguments.config,
        arguments.size and tuple(arguments.size),
        layers=arguments.layers,
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    precision = arguments.precision or ("int8/fp8" if on_gpu else "int8")
    with torch.no_grad():
        records = measure(subject, arguments.density, precision, arguments.rounds)
    if dist.get_rank() == 0:
        write_records([{**record, **environment(device)} for record in records], arguments.output)
        for record in records:
            shown = [f"{key} {record[key]:.4g}" for key in list(record)[8:] if key in record]
            print(f"{record['method']:10} {record['density']:g} on {record['gpus']}: {', '.join(shown)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
