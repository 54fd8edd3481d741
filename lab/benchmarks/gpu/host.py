"""What a planned call takes the CPU, and the GPU when one call follows the other and in a CUDA graph, as records.

python lab/benchmarks/gpu/host.py --output FILE.jsonl [--rounds 30]

Random masks, orders in tables as a plan has them, tensors [1, N, H, D].
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.records import environment, write_records
from torch.nn.functional import scaled_dot_product_attention

from paroattn import LayerPlan, Precision, prepare
from paroattn.block_mask import BLOCK, block_count, pack_bits

SHAPES = {"flux": (24, 4_608, 128), "moving-digits-large": (6, 16_384, 64), "one block": (2, 256, 64)}
DENSITY = 0.3
CALLS = 20


def layer_of(heads: int, tokens: int, precision: str, compensate: bool) -> LayerPlan:
    """A layer with two step buckets."""
    blocks = block_count(tokens, BLOCK)
    masks = torch.rand(2 * heads, blocks, blocks) < DENSITY
    masks[:, range(blocks), range(blocks)] = True
    return LayerPlan(
        precisions=(Precision.parse(precision),) * heads,
        orders=torch.stack([torch.randperm(tokens) for _ in range(3)]),
        order_index=torch.randint(3, (heads,)),
        mask_table=pack_bits(masks),
        mask_index=torch.arange(2 * heads, dtype=torch.int32).view(2, heads),
        compensate=torch.full((2, heads), compensate),
        tokens=tokens,
    )


def host_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds until a call returns, the GPU being idle."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_each(call: Callable[[], Any]) -> float:
    """Seconds of a call among others, by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / CALLS


def measured(shape: str, precision: str, compensate: bool, rounds: int) -> dict[str, Any]:
    heads, tokens, head_dim = SHAPES[shape]
    device = torch.device("cuda")
    layer = layer_of(heads, tokens, precision, compensate)
    operator = prepare(layer, device=device, dtype=torch.bfloat16, tensor_layout="NHD")
    tensors = [torch.randn(1, tokens, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)]
    bucket = torch.tensor(1, device=device)

    def call() -> torch.Tensor:
        return operator(*tensors, bucket=bucket)

    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    others = [x.transpose(1, 2) for x in tensors]
    scaled_dot_product_attention(*others)
    return {
        "shape": shape,
        "heads": heads,
        "tokens": tokens,
        "head_dim": head_dim,
        "precision": precision,
        "compensate": compensate,
        "density": DENSITY,
        "host_us": 1e6 * host_seconds(call, rounds),
        "ms": 1000 * seconds_each(call),
        "graph_ms": 1000 * seconds_each(graph.replay),
        "sdpa_ms": 1000 * seconds_each(lambda: scaled_dot_product_attention(*others)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    records = []
    with torch.no_grad():
        for shape in SHAPES:
            for precision, compensate in (("int8/fp8", False), ("int8/fp8", True), ("exact", False)):
                found = {"way": "launches made again", **measured(shape, precision, compensate, arguments.rounds)}
                records.append({"kind": "gpu host", **found, **environment(torch.device("cuda"))})
                print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
                write_records(records, arguments.output)


if __name__ == "__main__":
    main()
