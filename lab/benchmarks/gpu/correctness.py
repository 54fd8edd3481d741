"""Every shipped variant of the GPU's kernels against float64, as records; tests/gpu has the same checks.

python lab/benchmarks/gpu/correctness.py [--quick] [--output FILE.jsonl]

Each line is a variant: the relative L2 error against float64, and that of the reference, which rounds as the kernels
do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from paroattn_lab.records import environment, write_records

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import gpu_checks


def record_of(variant: gpu_checks.Variant) -> dict[str, Any]:
    """The record of one variant."""
    record = gpu_checks.check(variant)
    passed = record["repeats"] and record["error"] <= record["limit"]
    return {"kind": "gpu correctness", "variant": str(variant), **record, "passed": bool(passed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths only")
    parser.add_argument("--jobs", type=int, default=8, help="processes")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    records = []

    def take(record: dict[str, Any]) -> None:
        records.append(record)
        against = f"  reference {record['reference_error']:.2e}" if "reference_error" in record else ""
        mark = "" if record["passed"] else "  <- FAILED"
        print(f"{record['variant']:78} {record['error']:.2e}{against}{mark}", flush=True)

    for check in gpu_checks.checks():
        error, own = check.error(), {"kind": "gpu correctness", "variant": check.name}
        take({**own, "error": error, "limit": check.limit, "passed": error <= check.limit})
    # Compiling takes most of the time, and each process compiles for itself.
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for record in pool.map(record_of, gpu_checks.variants(arguments.quick)):
            take(record)
    if arguments.output:
        common = environment(gpu_checks.DEVICE)
        write_records([{**record, **common} for record in records], arguments.output)
    failed = sum(not record["passed"] for record in records)
    print(f"{torch.cuda.get_device_name()}: {len(records)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
