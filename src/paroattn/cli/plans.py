"""`paroattn plans`: the plans in the cache, to look at, copy out and delete."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from paroattn.cli.options import example_lines, json_option, new_console
from paroattn.plan_cache import CachedPlan, PlanCache

_folder_option = click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Folder of the cache; default: the user's."
)


@click.group(epilog=example_lines("paroattn plans list", "paroattn plans export Wan wan.safetensors"))
def plans() -> None:
    """Plans that are kept in the cache; a name may be shortened to a beginning that no other plan has."""


@plans.command("list", epilog=example_lines("paroattn plans list", "paroattn plans list --json"))
@json_option
@_folder_option
def list_plans(as_json: bool, folder: Path | None) -> None:
    """Show the plans in the cache, most recently used first."""
    cache = PlanCache(folder)
    entries = cache.entries()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        facts = {"folder": str(cache.folder), "bytes": total, "plans": [_json(entry) for entry in entries]}
        click.echo(json.dumps(facts, indent=2))
    elif not entries:
        click.echo(f"no plans in {cache.folder}")
    else:
        new_console(width=160).print(_table(entries))
        for entry in entries:
            if entry.note:
                click.echo(f"{entry.name} is broken: {entry.note}")
        click.echo(f"{cache.folder}: {_counted(entries)}, {total / 1e6:.1f} MB")


@plans.command(epilog=example_lines("paroattn plans remove Wan", "paroattn plans remove --all"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Delete all plans.")
@_folder_option
def remove(names: tuple[str, ...], everything: bool, folder: Path | None) -> None:
    """Delete plans from the cache."""
    if bool(names) == everything:
        raise click.UsageError("expected either names of plans or --all" + ("; got both" if everything else ""))
    cache = PlanCache(folder)
    removed = cache.clear() if everything else cache.remove(*names)
    for name in removed:
        click.echo(f"removed {name}")
    if not removed:
        click.echo(f"no plans in {cache.folder}")


@plans.command(epilog=example_lines("paroattn plans export Wan wan.safetensors"))
@click.argument("name")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@_folder_option
def export(name: str, output: Path, folder: Path | None) -> None:
    """Copy a plan from the cache to a plan file."""
    PlanCache(folder).export(name, output)
    click.echo(f"wrote {output}")


def _table(entries: Sequence[CachedPlan]) -> Table:
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_column("model", overflow="fold")
    for column, justify in (("grid", "left"), ("density", "right"), ("precision", "left"), ("MB", "right")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("last used", no_wrap=True)
    for entry in entries:
        table.add_row(Text(entry.name), *_facts(entry), f"{entry.bytes / 1e6:.1f}", _minute(entry.used))
    return table


def _facts(entry: CachedPlan) -> tuple[Text, str, str, str]:
    if entry.grid is None:
        return Text("broken"), "", "", ""
    return Text(str(entry.model)), entry.grid.name, f"{entry.density:g}", str(entry.precision)


def _json(entry: CachedPlan) -> dict[str, object]:
    precision = None if entry.precision is None else str(entry.precision)
    grid = entry.grid and entry.grid.as_json()
    return {**asdict(entry), "path": str(entry.path), "grid": grid, "precision": precision}


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _counted(entries: Sequence[CachedPlan]) -> str:
    return f"{len(entries)} plan" + ("s" if len(entries) > 1 else "")
