"""Dense and sparse attention at the shapes of models, beside SDPA's kernels and FlexAttention, as records.

python lab/benchmarks/gpu/attention.py --output FILE.jsonl [--shape cogvideox] [--density 0.3] [--rounds 7]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from paroattn_lab.records import write_records
from paroattn_lab.report.tables import attention_table
from paroattn_lab.speed.bench import Shape, bench_attention
from rich.console import Console

SHAPES = {
    "cogvideox": Shape(tokens=17_776, heads=48, head_dim=64, batch=2),
    "wan-720p": Shape(tokens=75_600, heads=40, head_dim=128),
    "wan-480p": Shape(tokens=32_760, heads=12, head_dim=128),
    "flux": Shape(tokens=4_608, heads=24, head_dim=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this one; may be repeated")
    parser.add_argument("--density", action="append", type=float, help="default: 1, 0.5, 0.3 and 0.2; may be repeated")
    parser.add_argument("--precision", action="append", help="default: exact, int8 and int8/fp8; may be repeated")
    parser.add_argument("--block-q", type=int, default=64)
    parser.add_argument("--block-kv", type=int, default=64, help="128: masks that every installed peer can take")
    parser.add_argument("--heads", type=int, help="fewer than the model has")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flex", action="store_true", help="also FlexAttention, which compiles for a while")
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    records = []
    for name in arguments.shape or list(SHAPES)[:2]:
        records += bench_attention(
            replace(SHAPES[name], heads=arguments.heads or SHAPES[name].heads),
            arguments.density or (1.0, 0.5, 0.3, 0.2),
            arguments.precision or ("exact", "int8", "int8/fp8"),
            backend="triton",
            rounds=arguments.rounds,
            flex=arguments.flex,
            block_q=arguments.block_q,
            block_kv=arguments.block_kv,
            progress=False,
        )
        write_records(records, arguments.output)  # what was measured stays if a later shape fails
        Console(width=140).print(attention_table([item for item in records if item["tokens"] == SHAPES[name].tokens]))


if __name__ == "__main__":
    main()
