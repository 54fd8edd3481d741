"""What it costs that a large plan's masks stay in the host's memory, as records.

python lab/benchmarks/gpu/mask_memory.py [--output FILE.jsonl]

One attention call of a planned layer at density 0.3 in INT8/FP8, with the table of masks on the GPU and in pinned host
memory, in interleaved rounds; and the GPU memory that the table takes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.rounds import interleaved, median_and_spread, paired_ratio
from torch import Tensor

from paroattn import runner
from paroattn.block_mask import block_count
from paroattn.grid import TokenGrid
from paroattn.integrations.clock import now
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision

WORKLOADS = {  # heads, head_dim, grid, queries per block, masks of how many layers and step buckets are in the table
    "Wan 14B 720p": (40, 128, TokenGrid(21, 45, 80), 64, 4),
    "CogVideoX-5B": (48, 64, TokenGrid(13, 30, 45, 226, "prefix"), 64, 40),
}
ROUNDS, DENSITY = 7, 0.3


def random_plan(heads: int, head_dim: int, grid: TokenGrid, block_q: int, count: int) -> Plan:
    """One layer, with random bytes for masks of `count` step buckets."""
    rows, columns = block_count(grid.tokens, block_q), block_count(grid.tokens, 64)
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count * heads, rows, -(-columns // 8) * 8, dtype=torch.uint8)
    for mask in masks[:heads]:  # the same for all step buckets: making them takes longer than measuring
        mask[:, :columns] = torch.rand(rows, columns, generator=generator) < DENSITY
        mask[:, columns - -(-grid.text_tokens // 64) - 1 : columns] = 1
    bits = (masks[:heads].view(heads, rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    bits[:, rows - -(-grid.text_tokens // block_q) - 1 :] = bits[:, :1] | 255
    if columns % 8:
        bits[..., -1] &= 2 ** (columns % 8) - 1
    return Plan(
        model=ModelIdentity("Model", "", 1, heads, head_dim),
        grid=grid,
        order_names=("FHW",),
        order_index=torch.zeros(1, heads, dtype=torch.uint8),
        precisions=(Precision.parse("int8/fp8"),),
        precision_index=torch.zeros(1, heads, dtype=torch.uint8),
        schedule=tuple(1 - step / count for step in range(count)),
        bucket_edges=tuple(step / count for step in range(count)),
        mask_table=bits.repeat(count, 1, 1),
        mask_index=torch.arange(count * heads, dtype=torch.int32).view(count, 1, heads),
        compensate=torch.zeros(count, 1, heads, dtype=torch.bool),
        usage=torch.ones(count, 1),
        block_q=block_q,
    )


def attend(own: runner.Runner, plan: Plan, tensors: Sequence[Tensor]) -> Tensor:
    """One call of the layer, in the second step bucket."""
    output = own.call(0, *tensors, bucket=own.bucket(plan.schedule[1]))
    assert isinstance(output, Tensor)
    return output


def seconds(own: runner.Runner, plan: Plan, tensors: Sequence[Tensor]) -> float:
    start = now(tensors[0].device)
    attend(own, plan, tensors)
    return now(tensors[0].device) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device, records = torch.device("cuda", 0), []
    for name, (heads, head_dim, grid, block_q, count) in WORKLOADS.items():
        plan = random_plan(heads, head_dim, grid, block_q, count)
        tensors = torch.randn(3, 1, grid.tokens, heads, head_dim, device=device, dtype=torch.bfloat16).unbind(0)
        runners, memory = {}, {}
        for place, most in (("gpu", 2**40), ("host", 0)):
            runner.MOST_ON_GPU = most
            before = torch.cuda.memory_allocated()
            runners[place] = runner.Runner(plan, device)
            memory[place] = torch.cuda.memory_allocated() - before
        outputs = {place: attend(own, plan, tensors) for place, own in runners.items()}
        timed = [functools.partial(seconds, own, plan, tensors) for own in runners.values()]
        times = dict(zip(runners, interleaved(timed, ROUNDS, progress=False), strict=True))
        for place, own in times.items():
            record: dict[str, Any] = {"kind": "mask memory", "workload": name, "masks": place, **median_and_spread(own)}
            record |= {"times_gpu": paired_ratio(times["gpu"], own), "table_bytes": plan.mask_table.nbytes}
            record |= {"gpu_bytes": memory[place], "equal": torch.equal(outputs["gpu"], outputs[place])}
            print(record, flush=True)
            records.append({**record, **environment(device)})
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
