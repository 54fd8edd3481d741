"""How large plan files of real sizes are and how long they take to load, as records.

python lab/benchmarks/plan_sizes.py [--plan FILE ...] [--output FILE.jsonl]

There are no such plans without the models' weights. Their masks are made here, from costs of blocks that fall with the
distance in the grid, with a reach per head and axis that changes from step bucket to step bucket, with smooth content
and heavier and lighter keys; the costliest 30% are kept, in one bucket more and in another less. To this comes noise of
single blocks of 64 x 64, which no coding can save: none, little, or as much as makes the masks of a 16x32x32 grid take
as many bits as those of the plan of moving-digits-large. Where blocks have 128 queries, their costs are sums of two.
Eight heads are made; the others are as large. `--plan` measures plans that were calibrated.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from paroattn_lab.records import environment, write_records
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import block_count, pack_bits, text_blocks, usual_block_q
from paroattn.grid import TokenGrid
from paroattn.mask_coding import encode_masks
from paroattn.order import candidate_orders, token_places
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision

WORKLOADS = {  # layers, heads, head_dim, grid
    "CogVideoX-5B": (42, 48, 64, TokenGrid(13, 30, 45, 226, "prefix")),
    "Wan 14B 720p": (40, 40, 128, TokenGrid(21, 45, 80)),
    "HunyuanVideo 720p": (60, 24, 128, TokenGrid(33, 45, 80, 256)),
}
NOISE = {  # in units of the log cost: of single blocks, the part of it that is new in a bucket, sway of the density
    "none": (0.0, 0.0, 0.1),
    "little": (0.05, 0.15, 0.1),
    "as bundled": (0.3, 0.4, 0.3),
}
BUCKETS, DENSITY, HEADS, LOADS = 10, 0.3, 8, 3
LOADED = "little"  # the noise of the plans that are saved and loaded whole, which takes minutes


def structured_masks(grid: TokenGrid, noise: str, seed: int) -> Tensor:
    """The masks of one head, bool [buckets, q blocks, kv blocks], in a random order of the grid."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    names = candidate_orders(grid)
    places = _block_centres(grid, names[int(torch.randint(len(names), (), generator=generator))])
    blocks = len(places)
    amount, renewed, sway = NOISE[noise]
    reach, growth = 0.15 * (0.8 * normal(3)).exp(), 0.05 * normal(3)
    single, keys = normal(blocks, blocks), 0.3 * normal(blocks)
    early, late = (_smooth(places, normal) for _ in range(2))
    block_q = usual_block_q(grid.tokens)
    together = block_q // 64  # rows of 64 queries
    padding = (0, 0, 0, -blocks % together)
    diagonal = pad(torch.eye(blocks, dtype=torch.bool), padding).unflatten(0, (-1, together)).any(1)
    kept = text_blocks(grid, block_q) | diagonal
    masks = []
    for bucket in range(BUCKETS):
        distance = torch.cdist(places / (reach * (growth * bucket).exp()), places / (reach * (growth * bucket).exp()))
        share = 0.5 * bucket / (BUCKETS - 1)
        if bucket:
            single = math.sqrt(1 - renewed**2) * single + renewed * normal(blocks, blocks)
        cost = 0.5 * ((1 - share) * early + share * late) + keys + amount * single - distance
        density = DENSITY * math.exp(sway * math.sin(seed + 0.3 * bucket))
        cost = pad(cost, padding, value=-math.inf).unflatten(0, (-1, together)).logsumexp(1)
        count = int(density * cost.numel())
        threshold = np.partition(cost.masked_fill(kept, math.inf).numpy().ravel(), -count)[-count]
        masks.append((cost >= float(threshold)) | kept)
    return torch.stack(masks)


def _block_centres(grid: TokenGrid, order: str) -> Tensor:
    """Mean place of each block's visual tokens, as shares of the grid's sides [blocks, 3]."""
    places = token_places(order, grid) / torch.tensor(grid.size)
    block = torch.arange(grid.visual_tokens) // 64
    sums = torch.zeros(block_count(grid.tokens, 64), 3).index_add_(0, block, places)
    return sums / block.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)


def _smooth(places: Tensor, normal: Any) -> Tensor:
    """A smooth function of two places, [blocks, blocks]: products of slow waves, as of queries and keys."""
    query, key = (torch.cos(places @ (normal(3, 8) * 5) + 6 * normal(8)) / 2 for _ in range(2))
    return query @ key.T


def sizes_by_coding(plan: Plan) -> dict[str, float]:
    """Bytes of the masks of a plan, as they are and in several codings, and how many blocks change by the bucket."""
    heads = plan.mask_index.permute(1, 2, 0).flatten(0, 1).long()
    compress = zstandard.ZstdCompressor(level=9).compress
    sizes = dict.fromkeys(("bits", "single masks", "differences of rows", "differences of buckets"), 0)
    changed = 0.0
    for head in heads:
        masks = plan.mask_table[head].numpy()
        rows, buckets = masks.copy(), masks.copy()
        rows[:, 1:] ^= masks[:, :-1]
        buckets[1:] ^= masks[:-1]
        sizes["bits"] += masks.nbytes
        for name, content in zip(list(sizes)[1:], (masks, rows, buckets), strict=True):
            sizes[name] += len(compress(content.tobytes()))
        changed += float(np.unpackbits(buckets[1:]).mean()) / len(heads)
    coded = encode_masks(plan.mask_table, plan.mask_index)
    return {**sizes, "palette": len(coded["mask_data"]), "changed_by_bucket": changed}


def whole_plan(name: str, noise: str) -> tuple[Plan, dict[str, float]]:
    """A plan of a whole model in which `HEADS` heads repeat, and their sizes as those of all heads."""
    layers, heads, head_dim, grid = WORKLOADS[name]
    masks = torch.cat([pack_bits(structured_masks(grid, noise, seed)) for seed in range(HEADS)])
    index = torch.arange(HEADS * BUCKETS, dtype=torch.int32).view(1, HEADS, BUCKETS).permute(2, 0, 1).contiguous()
    few = Plan(
        model=ModelIdentity("Model", "", 1, HEADS, head_dim),
        grid=grid,
        order_names=("FHW",),
        order_index=torch.zeros(1, HEADS, dtype=torch.uint8),
        precisions=(Precision.parse("int8"),),
        precision_index=torch.zeros(1, HEADS, dtype=torch.uint8),
        schedule=tuple(1 - bucket / BUCKETS for bucket in range(BUCKETS)),
        bucket_edges=tuple(bucket / BUCKETS for bucket in range(BUCKETS)),
        mask_table=masks,
        mask_index=index,
        compensate=torch.zeros(BUCKETS, 1, HEADS, dtype=torch.bool),
        usage=torch.ones(BUCKETS, 1),
        block_q=usual_block_q(grid.tokens),
    )
    sizes = sizes_by_coding(few)
    changed = sizes.pop("changed_by_bucket")
    sizes = {coding: size * layers * heads / HEADS for coding, size in sizes.items()}
    total = layers * heads * BUCKETS
    numbers = torch.arange(total, dtype=torch.int32).view(layers, heads, BUCKETS)
    plan = replace(
        few,
        model=replace(few.model, layers=layers, heads=heads),
        order_index=torch.zeros(layers, heads, dtype=torch.uint8),
        precision_index=torch.zeros(layers, heads, dtype=torch.uint8),
        mask_table=masks.repeat(-(-total // len(masks)), 1, 1)[:total],
        mask_index=numbers.permute(2, 0, 1).contiguous(),
        compensate=torch.zeros(BUCKETS, layers, heads, dtype=torch.bool),
        usage=torch.ones(BUCKETS, layers),
    )
    return plan, {**sizes, "changed_by_bucket": changed}


def save(plan: Plan, path: Path) -> dict[str, float]:
    start = time.perf_counter()
    plan.save(path)
    return {"save_seconds": time.perf_counter() - start, "file_bytes": path.stat().st_size}


def load(path: Path) -> dict[str, float]:
    """Seconds of the fastest load, and the seconds of all processors that it took."""
    loads = []
    for _ in range(LOADS):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        Plan.load(path)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        loads.append({"load_seconds": seconds, "load_user_seconds": user, "load_system_seconds": system})
    return min(loads, key=lambda load: load["load_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a calibrated plan; repeatable")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []

    def add(**record: Any) -> None:
        records.append({"kind": "plan size", **record, **environment()})
        print(record, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.safetensors"
        for calibrated in arguments.plan:
            plan = Plan.load(calibrated)
            sizes, saved = sizes_by_coding(plan), save(plan, path)
            add(
                workload=calibrated.stem, noise="calibrated", masks=len(plan.mask_table), **sizes, **saved, **load(path)
            )
        for name in WORKLOADS:
            for noise in NOISE:
                plan, sizes = whole_plan(name, noise)
                masks, times = len(plan.mask_table), save(plan, path) if noise == LOADED else {}
                del plan  # there is no room for two
                times |= load(path) if times else {}
                add(workload=name, noise=noise, masks=masks, **sizes, **times)
    if arguments.output:
        write_records(records, arguments.output)


if __name__ == "__main__":
    main()
