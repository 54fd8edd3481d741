"""Tables for the terminal, from records and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from paroattn_lab.quality.metrics import LEAST_MS_SSIM_SIDE
from paroattn_lab.quality.pairs import Evaluation

Record = Mapping[str, Any]


_LABELS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "ms_ssim": ("MS-SSIM", 4), "cosine": ("cosine", 4)}
_MORE_LABELS = {"lpips": "LPIPS", "clip_score_change": "CLIP score, change", "fvd": "FVD"}


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per variant: density, speed-up of the transformer, closeness to full attention: mean, error, worst."""
    pairs = len(evaluation.pairs)
    title = f"closeness to full attention over {pairs} prompt/seed pairs: mean ± standard error (worst)"
    table = Table("variant", title=title)
    for column in ("density", "speed-up"):
        table.add_column(column, justify="right")
    shown = {**_LABELS, **{name: (label, 4) for name, label in _MORE_LABELS.items()}}
    figures = [
        {**{name: result.summary(name) for name in result.metrics()}, "fvd": {"fvd": result.fvd}}
        for result in evaluation.results
    ]
    shown = {name: how for name, how in shown.items() if any(own.get(name, {}).get(name) for own in figures)}
    for label, _ in shown.values():
        table.add_column(label, justify="right")
    for result, own in zip(evaluation.results, figures, strict=True):
        cells = [_with_worst(own.get(name, {}), name, digits) for name, (_, digits) in shown.items()]
        table.add_row(result.variant.name, f"{result.density:.3f}", f"{result.speed_up:.2f}x", *cells)
    return table


def missing_metrics(evaluation: Evaluation) -> list[str]:
    """Lines below the table: metrics that are not in it, and what they need."""
    lines = ["relative L2, and figures of the final latents, are in the records"]
    lines += [f"{name} is missing: it needs {need}" for name, need in evaluation.missing.items()]
    if any(item.ms_ssim is None for result in evaluation.results for item in result.closeness):
        lines.append(f"ms_ssim is not defined for frames with a side below {LEAST_MS_SSIM_SIDE} pixels")
    return lines


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
    rooflines = first.get("matrix_roofline_ms") is not None
    for column in columns + ["matrix roofline (ms)", "exp2 roofline (ms)"] * rooflines:
        table.add_column(column, justify="right")
    for record in records:
        limits = [record["matrix_roofline_ms"], record["exp2_roofline_ms"]] if rooflines else []
        table.add_row(
            f"{record['method']} {record['precision']}"
            + (", compensated" if record["compensate"] else "")
            + (", without prologue" if record["prologue"] is False else ""),
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


def _with_worst(figures: Mapping[str, float | None], name: str, digits: int) -> str:
    mean, error, worst = (figures.get(key) for key in (name, f"{name}_error", f"{name}_worst"))
    if mean is None:
        return "∞" if name == "psnr" else ""
    return (
        f"{mean:.{digits}f}"
        + ("" if error is None else f" ± {error:.{digits}f}")
        + ("" if worst is None else f" ({worst:.{digits}f})")
    )


def _with_error(record: Record, key: str, digits: int) -> str:
    value, error = record[key], record[f"{key}_error"]
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
