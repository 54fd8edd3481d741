"""`paroattn inspect`: what a plan file holds, or in what two plans differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from paroattn.cli.options import example_lines, json_option, new_console
from paroattn.plan import Plan
from paroattn.plan_facts import plan_difference, plan_facts


@click.command(
    epilog=example_lines(
        "paroattn inspect plan.safetensors",
        "paroattn inspect plan.safetensors --diff other.safetensors --json",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare with this plan instead.")
@json_option
def inspect(path: Path, other: Path | None, as_json: bool) -> None:
    """Show what a plan file holds, or in what two plans differ."""
    plan = Plan.load(path)
    if other is None:
        facts = {**plan_facts(plan), "size in bytes": path.stat().st_size}
        tables = _plan_tables(facts, path.name)
    else:
        facts = plan_difference(plan, Plan.load(other))
        tables = _difference_tables(facts, path.name, other.name)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = new_console()
    for table in tables:
        console.print(table)


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
