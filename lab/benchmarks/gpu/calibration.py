"""How long calibration's kernels take per head, beside dense attention.

python lab/benchmarks/gpu/calibration.py [--output FILE.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from paroattn_lab.records import environment, write_records
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration import gpu as triton_calibration
from paroattn.calibration.kernels import skip_costs_of_heads

SHAPES = ((17_776, 64), (32_760, 128), (75_600, 128))
HEADS = 8
ROUNDS = 5


def seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call, the host's part included."""
    times = []
    for number in range(ROUNDS + 1):
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        if number:
            times.append(first.elapsed_time(last) / 1000)
    return statistics.median(times)


def dense(*heads: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(*(x.unsqueeze(0) for x in heads))


def block_sums_of_heads(q: torch.Tensor, k: torch.Tensor, orders: list[torch.Tensor], scale: float) -> None:
    for query, key in zip(q, k, strict=True):
        triton_calibration.block_sums(query, key, orders, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    records = []
    for tokens, head_dim in SHAPES:
        q, k, v = torch.randn(3, HEADS, tokens, head_dim, device="cuda").bfloat16()
        orders = [torch.randperm(tokens) for _ in range(HEADS)]
        scale, blocks = head_dim**-0.5, block_count(tokens, BLOCK)
        required = torch.zeros(blocks, blocks, dtype=torch.bool)
        tenth = torch.arange(0, blocks, 10)

        head = seconds(partial(dense, q, k, v)) / HEADS
        given = (q, k, v, orders, scale, required)
        calls = {
            "skip costs": partial(triton_calibration.skip_costs, *given),
            "skip costs of a tenth of the rows": partial(triton_calibration.skip_costs, *given, q_blocks=tenth),
            "block sums in two orders": partial(block_sums_of_heads, q, k, orders[:2], scale),
        }
        if tokens < 20_000:
            calls["skip costs in PyTorch"] = partial(skip_costs_of_heads, *given)
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats()
            own = seconds(call) / HEADS
            record = {
                "kind": "gpu calibration",
                "call": name,
                "tokens": tokens,
                "head_dim": head_dim,
                "median_ms": 1000 * own,
                "dense_head_ms": 1000 * head,
                "over_dense": own / head,
                "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
            }
            records.append(record)
            print(
                f"{tokens:6,} x {head_dim:3} {name:34} {record['median_ms']:8.2f} ms = "
                f"{record['over_dense']:6.1f} dense heads of {record['dense_head_ms']:.2f} ms, "
                f"peak {record['peak_mib']:.0f} MiB",
                flush=True,
            )
    if arguments.output:
        common = environment(torch.device("cuda"))
        write_records([{**record, **common} for record in records], arguments.output)


if __name__ == "__main__":
    main()
