"""`paroattn plan`: plan files, to look at, merge, fit to other sizes and densities, and hand to other libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from paroattn.cli.options import example_lines, json_option, new_console, path_option
from paroattn.files import check_output, save_tensors
from paroattn.grid import TokenGrid
from paroattn.plan import Plan
from paroattn.plan_facts import plan_difference, plan_facts

_plan_argument = click.argument("path", metavar="PLAN", type=click.Path(path_type=Path))
_density_option = click.option("--density", type=float, help="Share of blocks to compute; default: the plan's.")


@click.group(epilog=example_lines("paroattn plan show wan.safetensors", "paroattn plan adapt wan.safetensors --help"))
def plan() -> None:
    """Plan files; statistics of their calibration, where they are needed, are the files beside them."""


@plan.command(
    epilog=example_lines(
        "paroattn plan show plan.safetensors",
        "paroattn plan show plan.safetensors --diff other.safetensors --json",
    )
)
@_plan_argument
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare with this plan instead.")
@json_option
def show(path: Path, other: Path | None, as_json: bool) -> None:
    """Show what a plan file holds, or in what two plans differ."""
    loaded = Plan.load(path)
    if other is None:
        facts = {**plan_facts(loaded), "size in bytes": path.stat().st_size}
        tables = _plan_tables(facts, path.name)
    else:
        facts = plan_difference(loaded, Plan.load(other))
        tables = _difference_tables(facts, path.name, other.name)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = new_console()
    for table in tables:
        console.print(table)


@plan.command(epilog=example_lines("paroattn plan merge cat.safetensors harbour.safetensors --output both.safetensors"))
@_plan_argument
@click.argument("others", nargs=-1, required=True, metavar="PLAN...", type=click.Path(path_type=Path))
@path_option("--output", "Plan file; its statistics are written, too.", required=True)
@_density_option
def merge(path: Path, others: tuple[Path, ...], output: Path, density: float | None) -> None:
    """Make one plan of the calibrations of several prompts.

    Each plan needs its statistics (`paroattn calibrate --keep-statistics`). Precision, and how blocks are chosen, are
    the first plan's. Heads that have another token order in another plan keep what the first one knows of them.
    """
    from paroattn.calibration.budget import select_like
    from paroattn.calibration.cost_statistics import CostStatistics, statistics_path

    check_output(output, path, *others)
    first, rest = CostStatistics.load(statistics_path(path)), [CostStatistics.load(statistics_path(o)) for o in others]
    merged, skipped = first.merged(rest)
    made = select_like(Plan.load(path), merged, density)
    merged.save(statistics_path(output))
    made.save(output)
    if skipped:
        heads = merged.order_index.numel() * len(rest)
        click.echo(f"{skipped} of {heads} heads of the others have another token order and are left out")
    _say_written(output, made)


@plan.command(
    epilog=example_lines(
        "paroattn plan adapt wan.safetensors --grid 21x45x80 --output large.safetensors",
        "paroattn plan adapt wan.safetensors --density 0.2 --output sparse.safetensors",
    )
)
@_plan_argument
@click.option("--grid", metavar="FxHxW", help="Frames, height and width in tokens, as warnings about sizes name them.")
@_density_option
@path_option("--output", "Plan file.", required=True)
def adapt(path: Path, grid: str | None, density: float | None, output: Path) -> None:
    """Fit a plan to another size, another density, or both, without the model.

    Another density needs the plan's statistics (`paroattn calibrate --keep-statistics`).
    """
    if grid is None and density is None:
        raise click.UsageError("expected --grid, --density or both")
    check_output(output, path)
    made = Plan.load(path)
    if density is not None:
        from paroattn.calibration.budget import select_like
        from paroattn.calibration.cost_statistics import CostStatistics, statistics_path

        made = select_like(made, CostStatistics.load(statistics_path(path)), density)
    if grid is not None:
        made = made.adapt(_grid_of(grid, made.grid))
    made.save(output)
    _say_written(output, made)


@plan.command(epilog=example_lines("paroattn plan export wan.safetensors masks.safetensors --layer 3 --form bsr"))
@_plan_argument
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--layer", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--bucket", type=click.IntRange(min=0), default=0, show_default=True, help="Step bucket.")
@click.option("--form", type=click.Choice(("flex", "bsr", "coo")), default="flex", show_default=True)
def export(path: Path, output: Path, layer: int, bucket: int, form: str) -> None:
    """Write masks and token orders of a layer for other libraries, as a safetensors file.

    "order" int32 [heads, tokens]: the token at each place of a head's order. With form flex (FlexAttention),
    "kv_num_blocks" int32 [heads, q blocks] and "kv_indices" int32 [heads, q blocks, kv blocks]; bsr (FlashInfer), of
    each head, "indptr.HEAD" int32 [q blocks + 1] and "indices.HEAD" int32 [kept blocks]; coo, "blocks" int64 [3, kept
    blocks]: head, q block, kv block.
    """
    check_output(output, path)
    loaded = Plan.load(path)
    for name, number, count in (("layer", layer, loaded.model.layers), ("bucket", bucket, loaded.buckets)):
        if number >= count:
            raise click.UsageError(f"--{name} is {number}; the plan has {count}, counted from 0")
    mask, order = loaded.mask(bucket, layer), loaded.layer(layer).permutation
    assert order is not None
    tensors = {"order": order}
    if form == "flex":
        tensors["kv_num_blocks"], tensors["kv_indices"] = mask.kv_lists()
    elif form == "bsr":
        for head in range(mask.heads):
            tensors[f"indptr.{head}"], tensors[f"indices.{head}"] = mask.to_bsr(head)
    else:
        tensors["blocks"] = mask.to_coo()
    facts = {"form": form, "tokens": mask.tokens, "block_q": mask.block_q, "block_kv": mask.block_kv}
    facts |= {"layer": layer, "bucket": bucket}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(output, contiguous, {name: str(value) for name, value in facts.items()})
    click.echo(f"wrote {output}: {mask.heads} heads, {mask.density:.3f} of the blocks")


@plan.command(epilog=example_lines("paroattn plan balance wan.safetensors --ranks 2,4,8"))
@_plan_argument
@click.option("--ranks", default="2,4,8", show_default=True, help="Numbers of GPUs that share the heads.")
@json_option
def balance(path: Path, ranks: str, as_json: bool) -> None:
    """Show how evenly GPUs that share a plan's heads (Ulysses) are busy, with and without balancing.

    Each call of a layer takes as long as its slowest rank; 1.00 times the mean is best. Costs are estimated from the
    blocks that each head computes or approximates.
    """
    from paroattn.balance import balanced_heads, heads_in_order, load_of

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", ranks):
        raise click.UsageError(f"--ranks is {ranks!r}; expected numbers with commas, such as 2,4,8")
    loaded, rows = Plan.load(path), []
    for count in map(int, ranks.split(",")):
        for name, heads in (("in their order", heads_in_order(loaded)), ("balanced", balanced_heads(loaded, count))):
            rows.append({"ranks": count, "heads": name, **load_of(loaded, heads, count)._asdict()})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("ranks", "heads", "slowest over mean", "share of each rank", title=escape(path.name))
    for row in rows:
        shares = " ".join(f"{share:.1%}" for share in row["shares"])
        table.add_row(str(row["ranks"]), row["heads"], f"{row['slowest']:.3f}", shares)
    new_console().print(table)


def _grid_of(text: str, own: TokenGrid) -> TokenGrid:
    """The grid of a size such as 21x45x80, with text as in a plan's own grid."""
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if match is None:
        raise click.UsageError(f"--grid is {text!r}; expected frames, height and width in tokens, such as 21x45x80")
    frames, height, width = map(int, match.groups())
    return replace(own, frames=frames, height=height, width=width)


def _say_written(path: Path, written: Plan) -> None:
    click.echo(f"wrote {path}: density {written.density():.3f}, grid {written.grid}")


def _plan_tables(facts: Mapping[str, Any], name: str) -> list[Table]:
    """What a plan holds (`plan_facts`): facts, then a row per layer."""
    table = Table(show_header=False, title=escape(name))
    for key, value in facts.items():
        if key not in ("layers", "calibration"):
            table.add_row(key, _text(value))
    for key, value in facts["calibration"].items():
        table.add_row(f"calibration {key.replace('_', ' ')}", _text(value))
    layers = Table("layer", title="layers, over all steps")
    for column in ("density", "least head", "most head", "approximated"):
        layers.add_column(column, justify="right")
    layers.add_column("token orders and their heads")
    for number, layer in enumerate(facts["layers"]):
        counts = ", ".join(f"{order} x{count}" for order, count in layer["order counts"].items())
        spread = (layer["density"], min(layer["heads"]), max(layer["heads"]))
        layers.add_row(str(number), *(f"{value:.3f}" for value in spread), f"{layer['compensated']:.0%}", counts)
    return [table, layers]


def _difference_tables(facts: Mapping[str, Any], first: str, second: str) -> list[Table]:
    """In what two plans differ (`plan_difference`)."""
    fields = Table("field", escape(first), escape(second), title="fields that differ")
    for name, values in facts["fields"].items():
        fields.add_row(name, *map(_text, values))
    shares = Table(show_header=False, title="heads and masks")
    for name, label in (
        ("other orders", "heads with another token order"),
        ("other masks", "blocks that only one computes, in heads with equal orders"),
    ):
        shares.add_row(label, "not comparable" if facts[name] is None else f"{facts[name]:.2%}")
    if facts["layers"] is None:
        return [fields, shares]
    layers = Table("layer", title="density of layers")
    for column in (escape(first), escape(second), "difference"):
        layers.add_column(column, justify="right")
    for number, (one, two) in enumerate(facts["layers"]):
        layers.add_row(str(number), f"{one:.3f}", f"{two:.3f}", f"{two - one:+.3f}")
    return [fields, shares, layers]


def _text(value: Any) -> Text:
    """A fact as it is: brackets in names are no markup."""
    return Text(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
