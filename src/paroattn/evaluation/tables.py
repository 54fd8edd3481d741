"""Tables for the terminal, from records and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from paroattn.evaluation.pairs import Evaluation

Record = Mapping[str, Any]


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per variant: density, closeness to full attention, speed-up of the transformer."""
    pairs = len(evaluation.pairs)
    table = Table("variant", title=f"closeness to full attention over {pairs} prompt/seed pairs, mean ± spread")
    for column in ("density", "PSNR (dB)", "SSIM", "cosine", "speed-up"):
        table.add_column(column, justify="right")
    for result in evaluation.results:
        table.add_row(
            result.variant.name,
            f"{result.variant.plan.density():.3f}",
            f"{result.mean('psnr'):.2f} ± {result.spread('psnr'):.2f}",
            f"{result.mean('ssim'):.4f} ± {result.spread('ssim'):.4f}",
            f"{result.mean('cosine'):.4f} ± {result.spread('cosine'):.4f}",
            f"{result.speed_up:.2f}x",
        )
    return table


def ablation_table(records: Sequence[Record]) -> Table:
    """One row per record of `paroattn ablate`, precisions last."""
    pairs = len(records[0]["pairs"])
    table = Table("method", title=f"closeness to full attention over {pairs} prompt/seed pairs, ± standard error")
    for column in ("density", "precision", "PSNR (dB)", "SSIM", "cosine", "over the paper (dB)"):
        table.add_column(column, justify="right")
    for record in sorted(records, key=lambda item: (item["group"] == "precision", -item["asked_density"])):
        table.add_row(
            record["method"],
            f"{record['density']:.3f}",
            record["precision"],
            _with_error(record, "psnr", 2),
            _with_error(record, "ssim", 4),
            _with_error(record, "cosine", 4),
            _with_error(record, "over_paper", 2) if record["group"] != "paper" else "",
        )
    return table


def attention_table(records: Sequence[Record]) -> Table:
    """One row per record of `paroattn bench attention`."""
    first = records[0]
    size = f"{first['tokens']:,} tokens, {first['heads']} heads, head_dim {first['head_dim']}"
    table = Table("method", title=f"{size}; {first['rounds']} rounds")
    columns = ["density", "error", "median (ms)", "spread (ms)", "x SDPA", "TFLOP/s"]
    floors = first.get("matrix_floor_ms") is not None
    for column in columns + ["matrix floor (ms)", "exp2 floor (ms)"] * floors:
        table.add_column(column, justify="right")
    for record in records:
        limits = [record["matrix_floor_ms"], record["exp2_floor_ms"]] if floors else []
        table.add_row(
            f"{record['method']} {record['precision']}"
            + (", compensated" if record["compensate"] else "")
            + (", prologue out" if record["prologue"] is False else ""),
            f"{record['density']:g}",
            "" if record["error"] is None else f"{record['error']:.1e}",
            f"{record['median_ms']:.2f}",
            f"{record['spread_ms']:.2f}",
            f"{record['times_sdpa']:.2f}",
            f"{record['tflops']:.1f}",
            *(f"{limit:.2f}" for limit in limits),
        )
    return table


def model_table(records: Sequence[Record]) -> Table:
    """One row per record of `paroattn bench model`."""
    first = records[0]
    layers = f"{first['layers']} of {first['model_layers']} layers"
    size = f"{first['tokens']:,} tokens, {layers}, {first['heads']} heads, head_dim {first['head_dim']}"
    how = f"{first['dtype']}{', compiled' if first['compiled'] else ''}, weights: {first['weights']}"
    table = Table("attention", title=f"{first['model']}, one step: {size}; {how}; {first['rounds']} rounds")
    columns = ("density", "median (ms)", "spread (ms)", "x own", "x fastest dense", "attention (ms)", "its share")
    for column in columns:
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(
            record["method"] + ("" if record["plan"] is None else f" {record['precision']}"),
            f"{record['density']:.3f}",
            f"{record['median_ms']:.1f}",
            f"{record['spread_ms']:.1f}",
            f"{record['times_own']:.2f}",
            f"{record['times_dense']:.2f}",
            f"{record['attention_ms']:.1f}",
            f"{record['attention_share']:.0%}",
        )
    return table


def _with_error(record: Record, key: str, digits: int) -> str:
    value, error = record[key], record[f"{key}_error"]
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
