"""Write the tables of README and docs from benchmarks/records.

    python benchmarks/update_tables.py          # rewrite the tables
    python benchmarks/update_tables.py --check  # exit 1 if a table differs from its records

A table stands between `<!-- records: NAME -->` and `<!-- end -->`, and NAME.jsonl holds its records.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "src/paroattn/models/moving_digits/README.md")
TABLE = re.compile(r"(<!-- records: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def evaluation_table(records: list[dict]) -> str:
    lines = [
        "| variant | density | PSNR (dB) | SSIM | cosine similarity |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        psnr = f"{record['psnr']:.2f} ± {record['psnr_spread']:.2f}"
        ssim = f"{record['ssim']:.4f} ± {record['ssim_spread']:.4f}"
        cosine = f"{record['cosine']:.4f} ± {record['cosine_spread']:.4f}"
        lines.append(f"| {record['variant']} | {record['density']:.3f} | {psnr} | {ssim} | {cosine} |")
    first = records[0]
    steps = first["settings"]["num_inference_steps"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines += [
        "",
        f"Mean ± standard deviation over {len(first['pairs'])} prompt/seed pairs; {first['grid']}, "
        f"{steps} steps; {first['machine']}, {first['threads']} threads; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        path = ROOT / "benchmarks" / "records" / f"{match[2]}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return match[1] + evaluation_table(records) + match[3]

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
