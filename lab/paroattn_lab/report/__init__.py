"""The HTML report: one self-contained file, its figures taken from records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from paroattn.files import write_atomically
from paroattn.plan import Plan
from paroattn.plan_facts import plan_facts
from paroattn_lab.quality.head_study import HeadStudy
from paroattn_lab.quality.metrics import lower_is_closer
from paroattn_lab.quality.pairs import Pair
from paroattn_lab.quality.table_rows import Record, TableRow, headline, metric_label, table_rows
from paroattn_lab.report.charts import density_map, quality_chart, time_chart
from paroattn_lab.report.clips import embedded_clips
from paroattn_lab.report.embedding import PAGE_BYTES
from paroattn_lab.report.head_browser import browser_data

_CHARTED = ("psnr", "ssim")
_SUMMARISED = ("psnr", "ssim", "ms_ssim", "cosine", "lpips")  # the table has all
_WAITING = 0.9  # share of the time from which on launches are what takes it
_MOST_BARS = 12  # of the time chart


def write_report(
    path: Path,
    records: Sequence[Record],
    *,
    plans: Mapping[str, Plan | None] | None = None,
    videos: Mapping[str, Sequence[Tensor]] | None = None,
    study: HeadStudy | None = None,
) -> None:
    """Write the report of an evaluation or an ablation.

    Args:
        path: the HTML file; written whole or not at all.
        records: what was written to records.jsonl; all figures, tables and charts come from them.
        plans: by name of row, for the densities and masks of the shown one's heads.
        videos: by variant, one [F, 3, H, W] in [0, 1] per pair, those of full attention among them.
        study: the heads' errors and attention maps.
    """
    rows = table_rows(records)
    shown = headline(rows)
    plan = (plans or {}).get(shown.name)
    pairs = pairs_of(shown)
    clips = embedded_clips(pairs, videos, rows, shown, shown.record["settings"]["fps"]) if videos else None
    browser = None
    if plan is not None:
        found = study.plans.get(shown.name) if study else None
        browser = browser_data(plan, found, study.maps if study else None)
        browser["start"] = _telling_head(plan, study)
    metrics = list(dict.fromkeys(name for row in rows for name in row.figures))
    parts = time_parts(rows)
    _write(
        path,
        "report.html.j2",
        title=f"paroattn report: {shown.record['model']}",
        lead=_lead(shown, len(pairs)),
        shown=shown,
        cards=_cards(shown),
        summary_note=_summary_note(shown, len(pairs)),
        clips=clips,
        charts=_charts(rows),
        metrics=[{"name": name, "label": metric_label(name), "lower": lower_is_closer(name)} for name in metrics],
        groups=_groups(rows),
        timed=any(row.speed_up for row in rows),
        timed_attention=any(row.attention for row in rows),
        pair_count=len(pairs),
        missing=shown.record.get("missing", {}),
        time_chart=time_chart(parts) if parts else None,
        time_note=_time_note(shown),
        density_map=density_map(plan.head_densities().tolist()) if plan is not None else None,
        browser=browser,
        browser_name=shown.name,
        study_pair=study.pair if study else None,
        made_with=_made_with(shown, plan),
    )


def write_plan_page(path: Path, plan: Plan, name: str) -> None:
    """Write a page with the heads of a plan: masks, orders, densities and compensation, without the model."""
    browser = browser_data(plan)
    browser["start"] = _telling_head(plan, None)
    facts = plan_facts(plan)
    _write(
        path,
        "inspect.html.j2",
        title=f"paroattn plan: {name}",
        lead=f"{plan.model.class_name} at grid {plan.grid}: {plan.density():.1%} of the attention blocks are computed, "
        f"in {len(plan.order_names)} token orders, with {len(plan.mask_table):,} different masks.",
        density_map=density_map(plan.head_densities().tolist()),
        browser=browser,
        browser_name=name,
        made_with={"Plan": _texts(facts, without=("calibration", "layers")), "Calibration": _texts(plan.provenance)},
    )


def pairs_of(row: TableRow) -> list[Pair]:
    """Prompts and seeds, as records of evaluations and of ablations hold them."""
    return [
        (pair["prompt"], pair["seed"]) if isinstance(pair, Mapping) else (pair[0], pair[1])
        for pair in row.record["pairs"]
    ]


def time_parts(rows: Sequence[TableRow]) -> dict[str, dict[str, float]]:
    """Seconds of one generation by part, for full attention and each row; empty where attention was not timed.

    Rows name all parts in their order; full attention has no prologue.
    """
    parts: dict[str, dict[str, float]] = {}
    for row in [row for row in rows if row.attention][:_MOST_BARS]:
        attention = row.attention
        assert attention is not None
        number = pairs_of(row).index((attention["prompt"], attention["seed"]))
        whole, full = row.record["transformer_seconds"][number], row.record["full_attention_seconds"][number]
        parts.setdefault(
            "full attention",
            {"attention": attention["full_seconds"], "other": max(full - attention["full_seconds"], 0.0)},
        )
        prologue = attention["prologue_seconds"] or 0.0
        parts[row.name] = {
            **({"reordering and quantising": prologue} if prologue else {}),
            "attention": attention["seconds"] - prologue,
            "other": max(whole - attention["seconds"], 0.0),
        }
    return parts


def _lead(row: TableRow, pairs: int) -> str:
    record = row.record
    faster = f" The transformer ran {row.speed_up:.2f} times as fast." if row.speed_up else ""
    psnr = row.figures.get("psnr")
    close = f" PSNR against full attention is {psnr.shown(psnr.mean)} dB." if psnr else ""
    return (
        f"{row.name} computed {row.density:.1%} of the attention blocks of {record['model']}.{faster}{close} "
        f"Measured on {pairs} prompt/seed {'pairs' if pairs > 1 else 'pair'}.{launch_note(record)}"
    )


def launch_note(record: Mapping[str, Any]) -> str:
    """On a GPU that waited for the CPU most of the time, a sentence that says so; else nothing."""
    share = record.get("launch_share", 0.0)
    if "gpu" not in record or share < _WAITING:
        return ""
    return (
        f" The GPU waited for the CPU, which took {share:.0%} of the transformer's time to launch its operations "
        f"({record['full_attention_launch_share']:.0%} with full attention): they, not attention, set the speed. "
        "Compiled blocks (pipe.transformer.compile_repeated_blocks()) need fewer launches."
    )


def _cards(row: TableRow) -> list[dict[str, str]]:
    visual = row.record.get("visual_density")
    cards = [
        {
            "label": "Density",
            "value": f"{row.density:.1%}",
            "note": "of blocks computed" if visual is None else f"{visual:.1%} without text blocks",
        },
        {"label": "Precision", "value": row.precision, "note": "of the products in attention"},
    ]
    if row.attention_speed_up:
        cards.append(
            {"label": "Attention", "value": f"{row.attention_speed_up:.1f}x", "note": "as fast, one generation"}
        )
    if row.speed_up:
        cards.append({"label": "Transformer", "value": f"{row.speed_up:.2f}x", "note": "as fast, median of pairs"})
    for figure in (row.figures[name] for name in _SUMMARISED if name in row.figures):
        note = "" if figure.spread is None else f"± {figure.shown(figure.spread)}, "
        if figure.worst is not None and figure.pairs > 1:
            note += f"worst {figure.shown(figure.worst)}"
        cards.append({"label": figure.label, "value": figure.shown(figure.mean), "note": note.rstrip(", ")})
    return cards


def _summary_note(row: TableRow, pairs: int) -> str:
    spread = f"mean ± standard deviation over {pairs} pairs" if pairs > 1 else "one pair"
    lower = ", ".join(metric_label(name) for name in _SUMMARISED if name in row.figures and lower_is_closer(name))
    note = f"Closeness to full attention: {spread}; higher is closer{f', lower for {lower}' if lower else ''}."
    unknown = [] if row.speed_up else ["the transformer's speed"]
    unknown += [] if row.attention else ["attention's own speed"]
    return note + (f" Not measured: {' and '.join(unknown)}." if unknown else "")


def _charts(rows: Sequence[TableRow]) -> list[dict[str, Any]]:
    charts = []
    for metric in _CHARTED:
        found = quality_chart(rows, metric)
        if found is None:
            continue
        svg, left_out = found
        note = f"{metric_label(metric)} against full attention, mean and standard deviation over the pairs."
        if left_out:
            note += f" The {left_out} methods with the lowest figures are in the table only."
        charts.append({"svg": svg, "note": note})
    return charts


def _groups(rows: Sequence[TableRow]) -> list[dict[str, Any]]:
    """Rows by group, in the records' order."""
    groups: dict[str, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [{"name": name, "rows": members} for name, members in groups.items()]


def _time_note(row: TableRow) -> str:
    attention = row.attention
    if attention is None:
        return "Not measured apart: attention, what precedes it, and the rest of the transformer."
    if attention["prologue_seconds"] is None:
        prologue = "Reordering and quantising are part of attention; this backend does not tell them apart."
    else:
        prologue = "Reordering and quantising are those of q, k and v before the products."
    return (
        f"One generation (“{attention['prompt']}”, seed {attention['seed']}). Attention was timed call by call in one "
        "more run, full attention and each plan's operator on the same inputs; other is what is left of the "
        f"transformer's time in the evaluated run. {prologue} Text encoder and VAE are not in these figures."
    )


def _telling_head(plan: Plan, study: HeadStudy | None) -> list[int]:
    """Layer, head and step bucket to begin with: where attention gains most from its order, else the sparsest head."""
    if study is None:
        flat = int(plan.densities().argmin())
    else:
        original, chosen = (part.nan_to_num(0).flatten(3) for part in (study.maps.original, study.maps.chosen))
        largest = max(1, round(plan.density() * original.shape[-1]))
        flat = int((chosen.topk(largest).values.sum(-1) - original.topk(largest).values.sum(-1)).argmax())
    bucket, layer, head = (int(part) for part in torch.unravel_index(torch.tensor(flat), plan.mask_index.shape))
    return [layer, head, bucket]


def _made_with(row: TableRow, plan: Plan | None) -> dict[str, dict[str, str]]:
    record = row.record
    made: dict[str, dict[str, str]] = {"Generation": _texts({"model": record["model"], **record["settings"]})}
    if plan is not None:
        made["Plan"] = _texts(plan_facts(plan), without=("calibration", "layers"))
    calibration = plan.provenance if plan is not None else record.get("calibration", {})
    if calibration:
        made["Calibration"] = _texts(calibration)
    made["Machine and versions"] = _texts(
        {
            "GPU": record.get("gpu"),
            "machine": record["machine"],
            "threads": record["threads"],
            **({"attention by": record["attention"]["backend"]} if record.get("attention") else {}),
            **record["versions"],
            "commit": record["commit"],
        }
    )
    return made


def _texts(facts: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, str]:
    """Values in words; what is None is the model's own."""
    texts = {}
    for name, value in facts.items():
        if name in without or value is None:
            continue
        if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
            value = ", ".join(f"“{item}”" if name == "prompts" else str(item) for item in value)
        texts[name.replace("_", " ")] = value if isinstance(value, str) else json.dumps(value, default=str)
    return texts


def _write(path: Path, template: str, **values: Any) -> None:
    page = Environment(
        loader=PackageLoader("paroattn_lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = page.get_template(template).render(**values).encode()
    assert len(content) < PAGE_BYTES, "the parts of a page are limited so that it cannot get this large"
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
