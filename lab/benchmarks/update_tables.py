"""Write the tables of README and docs from lab/benchmarks/records.

    python lab/benchmarks/update_tables.py          # rewrite the tables
    python lab/benchmarks/update_tables.py --check  # exit 1 if a table differs from its records

A table stands between `<!-- records: NAME -->` and `<!-- end -->`, and NAME.jsonl holds its records. With
`<!-- records: NAME density=0.3 -->` it shows those of one density only, beside dense SDPA, and with
`<!-- records: NAME group=parts -->` one group of an ablation beside the paper's method and paroattn's. Several
files have plus signs between their names; `table=compensation` shows what compensation costs, `table=linears` steps
with linear layers in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from gpu_tables import (
    balance_table,
    calibration_table,
    correctness_table,
    counters_table,
    gpu_attention_table,
    host_table,
    linear_steps_table,
    model_calibration_table,
    sampling_table,
    trials_table,
)
from record_tables import (
    ablation_table,
    attention_table,
    busy_table,
    closeness_table,
    compensation_table,
    evaluation_table,
    few_steps_table,
    known_models_table,
    linears_table,
    model_table,
    plan_size_table,
    repair_table,
    transfer_table,
)

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "records"
PAGES = tuple(sorted((ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("lab/models/*/*/README.md"))))
TABLE = re.compile(r"(<!-- records: ([\w+-]+)(?: (density|group|table)=([\w.]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


KINDS = {
    "evaluation": evaluation_table,
    "attention": attention_table,
    "ablation": ablation_table,
    "model": model_table,
    "plan size": plan_size_table,
    "plan transfer": transfer_table,
    "repair": repair_table,
    "linears": linears_table,
    "few steps": few_steps_table,
    "known model": known_models_table,
    "gpu calibration": calibration_table,
    "calibration sampling": sampling_table,
    "gpu model calibration": model_calibration_table,
    "gpu correctness": correctness_table,
    "gpu counters": counters_table,
    "gpu trial": trials_table,
    "gpu host": host_table,
    "balance": balance_table,
    "busy": busy_table,
}


def updated(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        paths = [RECORDS / f"{name}.jsonl" for name in match[2].split("+")]
        records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        make = KINDS[records[0]["kind"]]
        if make is attention_table and "gpu" in records[0]:
            make = gpu_attention_table
        if match[3] == "density":
            records = [item for item in records if item["density"] == float(match[4]) or item["method"] == "sdpa"]
        elif match[3] == "table":
            make = {"compensation": compensation_table, "linears": linear_steps_table}[match[4]]
        elif match[3] == "group" and match[4] == "all":
            make = closeness_table
        elif match[3] == "group":
            places = {(item["asked_density"], item["precision"]) for item in records if item["group"] == match[4]}
            records = [
                item
                for item in records
                if item["group"] == match[4]
                or (item["method"] in ("paper", "paroattn") and (item["asked_density"], item["precision"]) in places)
            ]
        return match[1] + "\n".join(make(records)) + "\n" + match[5]

    return TABLE.sub(fill, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    stale = [page for page in PAGES if updated(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: table differs from its records")
        if not check:
            page.write_text(updated(page.read_text()))
    sys.exit(1 if check and stale else 0)
