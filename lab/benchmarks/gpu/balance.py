"""Attention of each rank's heads in turn on one GPU, heads as they come and balanced, as records.

python lab/benchmarks/gpu/balance.py --output FILE.jsonl [--config wan-2.1-14b-720p] [--rounds 7]

What ranks would wait for each other can so be measured without them; the exchange of tokens for heads cannot, but what
it does on each rank before and after sending.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.presets import PRESETS
from paroattn_lab.speed.random_plan import unequal_plan
from paroattn_lab.speed.rounds import interleaved
from paroattn_lab.speed.subjects import random_subject
from torch import Tensor

from paroattn.balance import balanced_heads, heads_in_order, load_of
from paroattn.integrations.clock import now
from paroattn.integrations.pipeline import Pipeline
from paroattn.ops.exchange import _packed, _unpack
from paroattn.plan import Plan
from paroattn.runner import Runner

LAYERS = 4
RANKS = (2, 4, 8)


def times_of_ranks(plan: Plan, heads: Tensor, ranks: int, tensors: list[Tensor], rounds: int) -> Tensor:
    """Milliseconds of each layer's call of each rank, [ranks, layers]."""
    own = plan.model.heads // ranks
    device, bucket = tensors[0].device, torch.tensor(0, device=tensors[0].device)
    parts = [Runner(plan, device, heads=heads[..., rank * own : (rank + 1) * own]) for rank in range(ranks)]
    given = [x[:, :, :own] for x in tensors]

    def seconds(runner: Runner, layer: int) -> float:
        start = now(device)
        runner.call(layer, *given, bucket=bucket)
        return now(device) - start

    calls = [functools.partial(seconds, part, layer) for part in parts for layer in range(plan.model.layers)]
    found = interleaved(calls, rounds, progress=False)
    return torch.tensor([1000 * statistics.median(row) for row in found]).view(ranks, -1)


def packing(tensors: list[Tensor], ranks: int, rounds: int) -> tuple[float, float]:
    """Milliseconds to pack a rank's query, key and value, and to unpack its output."""
    query = tensors[0]
    device, heads = query.device, torch.randperm(query.shape[2], device=query.device)
    count = query.shape[1] // ranks
    own, place = [x[:, :count].contiguous() for x in tensors], query.new_empty(1, count, *query.shape[2:])
    sent = _packed(own[0], heads, ranks)

    def pack() -> float:
        start = now(device)
        for x in own:
            _packed(x, heads, ranks)
        return now(device) - start

    def unpack() -> float:
        start = now(device)
        _unpack(sent, heads, ranks, place)
        return now(device) - start

    packed, unpacked = interleaved([pack, unpack], rounds, progress=False)
    assert torch.equal(place, own[0])
    return 1000 * statistics.median(packed), 1000 * statistics.median(unpacked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan-2.1-14b-720p", choices=PRESETS)
    parser.add_argument("--size", type=int, nargs=3, help="frames, height and width in pixels; default: the config's")
    parser.add_argument("--density", type=float, nargs="+", default=[0.3, 0.125])
    parser.add_argument("--precision", help="default: int8/fp8 on a GPU, int8 without")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision or ("int8/fp8" if device.type == "cuda" else "int8")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = arguments.size and tuple(arguments.size)
    subject = random_subject(arguments.config, size, layers=LAYERS, device=device, dtype=dtype)
    model, grid = Pipeline(subject.pipe).identity, subject.grid
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        tensors = [torch.randn(1, grid.tokens, model.heads, model.head_dim, device=device, dtype=dtype) for _ in "qkv"]
        for density in arguments.density:
            plan = unequal_plan(model, grid, density, precision)
            for ranks in (number for number in (1, *RANKS) if model.heads % number == 0):
                packed, unpacked = packing(tensors, ranks, arguments.rounds)
                for method, heads in (("in order", heads_in_order(plan)), ("balanced", balanced_heads(plan, ranks))):
                    times = times_of_ranks(plan, heads, ranks, tensors, arguments.rounds)
                    record = {
                        "kind": "balance",
                        "model": subject.name,
                        "tokens": grid.tokens,
                        "heads": model.heads,
                        "method": method,
                        "precision": precision,
                        "density": density,
                        "ranks": ranks,
                        "layer_ms": float(times.amax(0).mean()),
                        "slowest": float(times.amax(0).sum() / times.mean(0).sum()),
                        "estimated": load_of(plan, heads, ranks).slowest,
                        "pack_ms": packed,
                        "unpack_ms": unpacked,
                        **environment(device),
                    }
                    records.append(record)
                    shown = {
                        key: record[key] for key in ("density", "ranks", "method", "layer_ms", "slowest", "estimated")
                    }
                    print(shown, flush=True)
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
