"""Write the tables of README and docs from benchmarks/records.

    python benchmarks/update_tables.py          # rewrite the tables
    python benchmarks/update_tables.py --check  # exit 1 if a table differs from its records

A table stands between `<!-- records: NAME -->` and `<!-- end -->`, and NAME.jsonl holds its records. With
`<!-- records: NAME density=0.3 -->` it shows those of one density only, beside dense SDPA, and with
`<!-- records: NAME group=parts -->` one group of an ablation beside the paper's method and ours. Several files have
plus signs between their names; `table=compensation` shows what compensation costs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(sorted((ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/paroattn/models/*/README.md"))))
TABLE = re.compile(r"(<!-- records: ([\w+-]+)(?: (density|group|table)=([\w.]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def evaluation_table(records: list[dict]) -> list[str]:
    lines = [
        "| variant | density | PSNR (dB) | SSIM | cosine similarity | transformer |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        psnr = f"{record['psnr']:.2f} ± {record['psnr_spread']:.2f}"
        ssim = f"{record['ssim']:.4f} ± {record['ssim_spread']:.4f}"
        cosine = f"{record['cosine']:.4f} ± {record['cosine_spread']:.4f}"
        speed = f"{record['speed_up']:.2f}x"
        lines.append(f"| {record['variant']} | {record['density']:.3f} | {psnr} | {ssim} | {cosine} | {speed} |")
    first = records[0]
    steps = first["settings"]["num_inference_steps"]
    return [
        *lines,
        "",
        f"Mean ± standard deviation over {len(first['pairs'])} prompt/seed pairs; last column: median of the paired "
        f"ratios of time in the transformer to full attention; {first['grid']}, {steps} steps; {surroundings(first)}.",
    ]


def attention_table(records: list[dict]) -> list[str]:
    """Times SDPA by contender and shape, and SDPA's own milliseconds; equal densities and prologue included only."""
    shown = [record for record in records if record["prologue"] is not False and not record["unequal"]]
    shapes = list(dict.fromkeys((record["tokens"], record["heads"], record["head_dim"]) for record in shown))
    names = {"paroattn": "paroattn {precision}", "flex": "FlexAttention {precision}", "sdpa": "SDPA {precision}"}
    rows: dict[tuple[str, float], dict] = {}
    for record in shown:
        name = names[record["method"]].format(**record)
        cell = f"{record['times_sdpa']:.2f}x"
        if record["method"] == "sdpa":
            cell = f"{record['median_ms']:.0f} ms"
        key = (name, record["density"])
        rows.setdefault(key, {})[record["tokens"], record["heads"], record["head_dim"]] = cell
    lines = [
        "| | density | " + " | ".join(f"{tokens:,} x {dim}" for tokens, _, dim in shapes) + " |",
        "|---|---|" + "---|" * len(shapes),
    ]
    for (name, density), cells in rows.items():
        lines.append(f"| {name} | {density:g} | " + " | ".join(cells.get(shape, "") for shape in shapes) + " |")
    first = shown[0]
    backend = next(record["backend"] for record in shown if record["backend"])
    heads = ", ".join(f"{tokens:,} tokens: {heads} heads" for tokens, heads in dict(s[:2] for s in shapes).items())
    return [
        *lines,
        "",
        "Tokens x head_dim. Speed is against the faster of SDPA in fp32 and bf16, as the median of the ratios of "
        f"interleaved rounds; quantising and reordering are included. {heads}. {surroundings(first)} ({backend}).",
    ]


def gpu_attention_table(records: list[dict]) -> list[str]:
    """Milliseconds, prologue and ratios to SDPA's kernels, a table per shape."""
    lines: list[str] = []
    shapes = list(dict.fromkeys((record["batch"], record["heads"], record["tokens"]) for record in records))
    for shape in shapes:
        own = [record for record in records if (record["batch"], record["heads"], record["tokens"]) == shape]
        dense = list(own[0]["times_each"])
        lines += [
            f"Batch {shape[0]}, {shape[1]} heads, {shape[2]:,} tokens, head_dim {own[0]['head_dim']}:",
            "",
            "| | blocks | density | ms | prologue | TFLOP/s | "
            + " | ".join(f"x {name.rpartition(' ')[0]}" for name in dense)
            + " | matrix floor | exp2 floor |",
            "|---|---|---|---|---|---|" + "---|" * (len(dense) + 2),
        ]
        for record in own:
            floors = (record["matrix_floor_ms"], record["exp2_floor_ms"])
            cells = (
                f"{record['method']} {record['precision']}" + (", compensated" if record["compensate"] else ""),
                "" if record["density"] == 1 else f"{record['block_q']} x 64",
                f"{record['density']:g}",
                f"{record['median_ms']:.2f}",
                f"{record['prologue_ms']:.2f}" if "prologue_ms" in record else "",
                f"{record['tflops']:.0f}",
                *(f"{ratio:.2f}" for ratio in record["times_each"].values()),
                *("" if floor is None else f"{floor:.2f}" for floor in floors),
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    first = records[0]
    return [
        *lines,
        f"Median of {first['rounds']} interleaved rounds in bfloat16, everything included; ratios are medians of the "
        "rounds' ratios; the prologue is the GPU time of its kernels. "
        f"{first['gpu']}; {surroundings(first)}.",
    ]


def compensation_table(records: list[dict]) -> list[str]:
    """Time with compensation over time without, by instructions and shape; a column per density and precision."""
    times: dict[tuple, dict] = {}
    for record in records:
        if record["method"] == "paroattn" and record["prologue"]:
            row = (record["backend"].partition(",")[0], record["tokens"], record["head_dim"])
            place = (record["density"], record["precision"], record["compensate"])
            times.setdefault(row, {})[place] = record["median_ms"]
    columns = list(dict.fromkeys(place[:2] for cells in times.values() for place in cells))
    heads = (
        f"{density:g}, {precision.upper() if precision == 'int8' else precision}" for density, precision in columns
    )
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    for (backend, tokens, head_dim), cells in sorted(times.items()):
        ratios = (f"{cells[(*column, True)] / cells[(*column, False)]:.2f}" for column in columns)
        lines.append(f"| `{backend}`, {tokens:,} x {head_dim} | " + " | ".join(ratios) + " |")
    rounds = sorted({record["rounds"] for record in records})
    return [*lines, "", f"Ratios of medians of {rounds[0]} to {rounds[-1]} interleaved rounds."]


def model_table(records: list[dict]) -> list[str]:
    """A row per contender of each model."""
    lines = [
        "| model | tokens | layers | attention | density | step | x own | x fastest dense | share of attention |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        name = record["method"] + ("" if record["plan"] is None else f" {record['precision']}")
        cells = (
            record["model"] + (", compiled" if record["compiled"] else ""),
            f"{record['tokens']:,}",
            f"{record['layers']} of {record['model_layers']}",
            name,
            f"{record['density']:.3g}",
            f"{record['median_ms']:.0f} ms",
            f"{record['times_own']:.2f}x",
            f"{record['times_dense']:.2f}x",
            f"{record['attention_share']:.0%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    first = records[0]
    return [
        *lines,
        "",
        f"One step of the transformer in {first['dtype']}, weights: {first['weights']}. Median of {first['rounds']} "
        "interleaved rounds; speed is the median of the rounds' ratios. The share is that of the kernels of "
        f"self-attention, without compiling. {first.get('gpu') or ''}{', ' if first.get('gpu') else ''}"
        f"{surroundings(first)}.",
    ]


def ablation_table(records: list[dict]) -> list[str]:
    """PSNR of each method, a column per density (and precision), and paired differences to the paper's method."""
    places = list(dict.fromkeys((record["asked_density"], record["precision"]) for record in records))
    rows: dict[str, dict] = {}
    for record in records:
        rows.setdefault(record["method"], {})[record["asked_density"], record["precision"]] = record
    heads = [f"{density:g}" + ("" if precision == "exact" else f" + {precision}") for density, precision in places]
    lines = ["| PSNR (dB) | " + " | ".join(heads) + " |", "|---|" + "---|" * len(places)]
    for method, cells in rows.items():
        shown = [_with_gain(cells[place], method) if place in cells else "" for place in places]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    first = records[0]
    return [
        *lines,
        "",
        f"Mean over {len(first['pairs'])} prompt/seed pairs; in brackets the mean paired difference to the paper's "
        "method at the same density and precision and its standard error. "
        f"{first['settings']['num_inference_steps']} steps; {surroundings(first)}.",
    ]


def _with_gain(record: dict, method: str) -> str:
    if record["psnr"] is None:
        return "∞"
    shown = f"{record['psnr']:.2f}"
    if method == "paper" or record["over_paper"] is None:
        return shown
    return f"{shown} ({record['over_paper']:+.2f} ± {record['over_paper_error']:.2f})"


def closeness_table(records: list[dict]) -> list[str]:
    """The columns of the paper's table 1 that compare with full attention."""
    lines = ["| method | density | precision | PSNR (dB) | SSIM | CosSim |", "|---|---|---|---|---|---|"]
    for record in records:
        cells = [f"{record[name]:.{digits}f}" for name, digits in (("psnr", 2), ("ssim", 4), ("cosine", 4))]
        lines.append(
            f"| {record['method']} | {record['density']:.3f} | {record['precision']} | " + " | ".join(cells) + " |"
        )
    return lines


def surroundings(record: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return f"{record['machine']}, {threads}; {versions}"


KINDS = {"evaluation": evaluation_table, "attention": attention_table, "ablation": ablation_table, "model": model_table}


def updated(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        paths = [ROOT / "benchmarks" / "records" / f"{name}.jsonl" for name in match[2].split("+")]
        records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        make = KINDS[records[0]["kind"]]
        if make is attention_table and "gpu" in records[0]:
            make = gpu_attention_table
        if match[3] == "density":
            records = [item for item in records if item["density"] == float(match[4]) or item["method"] == "sdpa"]
        elif match[3] == "table":
            make = {"compensation": compensation_table}[match[4]]
        elif match[3] == "group" and match[4] == "all":
            make = closeness_table
        elif match[3] == "group":
            places = {(item["asked_density"], item["precision"]) for item in records if item["group"] == match[4]}
            records = [
                item
                for item in records
                if item["group"] == match[4]
                or (item["method"] in ("paper", "ours") and (item["asked_density"], item["precision"]) in places)
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
