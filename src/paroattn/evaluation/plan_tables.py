"""Tables for the terminal of what a plan holds and in what two plans differ; light to import, so that it is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text


def plan_tables(facts: Mapping[str, Any], name: str) -> list[Table]:
    """What a plan holds (`inspection.plan_facts`): facts, then a row per layer."""
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


def difference_tables(facts: Mapping[str, Any], first: str, second: str) -> list[Table]:
    """In what two plans differ (`inspection.plan_difference`)."""
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
