"""`paroattn page`: a plan's heads as a page to look into."""

from __future__ import annotations

from pathlib import Path

import click

from paroattn.cli.options import example_lines, path_option
from paroattn.files import check_output
from paroattn.plan import Plan
from paroattn_lab.cli.options import require_page


@click.command(epilog=example_lines("paroattn page plan.safetensors --output plan.html"))
@click.argument("path", type=click.Path(path_type=Path))
@path_option("--output", "HTML page to write; default: the plan's name with .html.")
def page(path: Path, output: Path | None) -> None:
    """Write a page that shows a plan's masks and orders, head by head; it needs no model."""
    require_page()
    from paroattn_lab.report import write_plan_page

    plan = Plan.load(path)
    output = output or path.with_suffix(".html")
    check_output(output, path)
    write_plan_page(output, plan, path.name)
    click.echo(f"wrote {output}")
