"""What all commands share: options, errors in one line, examples in the help, the console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from paroattn.cli.models import GenerativeModel, load_model, provided_models
from paroattn.errors import InputError, MissingPartError


class OneLineErrors(click.Group):
    """What a user can mend ends with one line on stderr and exit code 2; a bug keeps its traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        except (click.ClickException, InputError, MissingPartError, OSError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"Error: {' '.join(message.split())}", err=True)
            sys.exit(2)


def example_lines(*lines: str) -> str:
    """An epilog of examples."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def new_console(width: int = 120) -> Console:
    """Files and pipes have no width, and rich would take 80 columns, too few for the tables: they get `width`."""
    return Console(width=None if sys.stdout.isatty() else width)


def options(*decorators: Any) -> Any:
    """Several options as one decorator."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


device_option = click.option("--device", default=None, help="cpu or cuda; default: cuda if there is one.")
size_options = options(
    click.option("--height", type=int, help="Frame height in pixels; default: the model's."),
    click.option("--width", type=int, help="Frame width in pixels; default: the model's."),
    click.option("--frames", "num_frames", type=int, help="Number of frames; default: the model's."),
    click.option("--steps", "num_inference_steps", type=int, help="Denoising steps; default: the model's."),
    click.option("--guidance", "guidance_scale", type=float, help="Guidance scale, 1 for none; default: the model's."),
)
model_options = options(
    click.option(
        "--model",
        help="A diffusers pipeline folder, a Hub name, or a small model of paroattn-lab; default: its first, if it is "
        "installed.",
    ),
    device_option,
    size_options,
)
calibration_prompt_option = click.option(
    "--calibration-prompt",
    "calibration_prompts",
    multiple=True,
    help="Prompt to calibrate on; repeatable, one or two are enough. Default: the model's own, where it has some.",
)
backend_option = click.option("--backend", default="auto", show_default=True, help="Attention backend.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of all random numbers."
)


def chosen_device(name: str | None) -> Any:
    """The torch device of that name; by default cuda if there is one, else the CPU."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise click.UsageError(f"--device is {name!r}; expected cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device is {name!r}; expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(f"--device is {name!r}, but torch sees no GPU; expected cpu")
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise click.UsageError(f"--device is {name!r}; torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def load(model: str | None, device: str | None, **changes: Any) -> GenerativeModel:
    """The model of that name; by default the first that another distribution brings."""
    from diffusers.utils import logging as diffusers_logging

    chosen = str(chosen_device(device))
    provided = list(provided_models())
    if model is None:
        if not provided:
            raise click.UsageError(
                "--model is missing; expected a diffusers pipeline folder or a Hub name "
                "(`pip install 'paroattn[lab]'` brings small models to try)"
            )
        model = provided[0]
    if model in provided:  # is loaded at once
        diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    return load_model(model, device=chosen, **changes)


def calibration_prompts_of(model: GenerativeModel, given: tuple[str, ...]) -> list[str]:
    """The prompts to calibrate on: those given, or the model's own."""
    chosen = list(given) or list(model.calibration_prompts)
    if not chosen:
        raise click.UsageError("this model brings no prompts to calibrate on; give one or two by --calibration-prompt")
    return chosen


def path_option(name: str, help: str, **settings: Any) -> Any:
    """An option that names a file."""
    return click.option(name, type=click.Path(path_type=Path, dir_okay=False), help=help, **settings)
