"""The group of all commands: the library's own, and those that other distributions add."""

from __future__ import annotations

from importlib.metadata import entry_points

import click

from paroattn.cli.calibrate import calibrate
from paroattn.cli.generate import generate
from paroattn.cli.options import OneLineErrors
from paroattn.cli.plan import plan
from paroattn.cli.plans import plans

COMMANDS_GROUP = "paroattn.commands"
"""Entry points of other distributions, each a click command."""


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paroattn")
def command_line() -> None:
    """Faster attention for visual diffusion transformers: reordered tokens, skipped blocks, low precision."""


for command in (calibrate, generate, plan, plans):
    command_line.add_command(command)
for entry_point in entry_points(group=COMMANDS_GROUP):
    command_line.add_command(entry_point.load(), entry_point.name)
