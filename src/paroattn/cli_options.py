"""What all commands share: options, errors in one line, examples in the help, the console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from paroattn.models import BUNDLED, LARGE, TINY, VIDEO, bundled_name

DENSITIES = (0.5, 0.3, 0.2)


class OneLineErrors(click.Group):
    """Bad input ends with one line on stderr and exit code 2, without a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.Abort:
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        except (click.ClickException, ValueError, OSError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"Error: {' '.join(message.split())}", err=True)
            sys.exit(2)


def example_lines(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def new_console() -> Console:
    """Files and pipes have no width, and rich would take 80 columns, too few for our tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def options(*decorators: Any) -> Any:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _model_options(default: str | None, shown: str) -> Any:
    return options(
        click.option(
            "--model",
            default=default,
            help=f"A bundled model ({', '.join(BUNDLED)}; {TINY} and {LARGE} for short), a diffusers pipeline folder, "
            f"or a Hub name. Default: {shown}.",
        ),
        click.option("--device", default=None, help="cpu or cuda; default: cuda if there is one."),
        click.option("--height", type=int, help="Frame height in pixels; default: the model's."),
        click.option("--width", type=int, help="Frame width in pixels; default: the model's."),
        click.option("--frames", "num_frames", type=int, help="Number of frames; default: the model's."),
        click.option("--steps", "num_inference_steps", type=int, help="Denoising steps; default: the model's."),
        click.option(
            "--guidance", "guidance_scale", type=float, help="Guidance scale, 1 for none; default: the model's."
        ),
    )


model_options = _model_options(VIDEO, VIDEO)
demo_model_options = _model_options(None, f"{LARGE} on a GPU, else {TINY}")
comparison_options = options(
    click.option("--prompt", "prompts", multiple=True, help="Prompt to evaluate on; repeatable, seeds count from 101."),
    click.option(
        "--prompts",
        "prompt_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File of prompts to evaluate on: one per line, or VBench's JSON list (prompt_en, dimension).",
    ),
    click.option("--pairs", "pair_count", type=click.IntRange(min=1), help="Only so many prompt/seed pairs."),
    click.option(
        "--calibration-prompt", "calibration_prompts", multiple=True, help="Prompt to calibrate on; repeatable."
    ),
    click.option(
        "--density",
        "densities",
        multiple=True,
        type=float,
        default=DENSITIES,
        show_default=True,
        help="Densities to compare at; repeatable.",
    ),
    click.option("--clip-model", type=click.Path(path_type=Path), help="Folder of a CLIP model, for the CLIP score."),
    click.option("--fvd-model", type=click.Path(path_type=Path), help="TorchScript file of an I3D network, for FVD."),
)
backend_option = click.option("--backend", default="auto", show_default=True, help="Attention backend.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
report_option = click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="HTML page to write; default: report.html in the output folder.",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the initial noise.")


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


def load(model: str, device: str | None, *, image: bool = False, **changes: Any) -> Any:
    """The model; `TINY` and `LARGE` stand for the bundled video (image) model of that size."""
    from diffusers.utils import logging as diffusers_logging

    from paroattn.integrations.generation import load_model

    if model in (TINY, LARGE):
        model = bundled_name(model, image=image)
    if model in BUNDLED:  # is loaded at once
        diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    return load_model(model, device=str(chosen_device(device)), **changes)


def chosen_prompts(
    model: Any,
    calibration: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    pair_count: int | None,
    need_calibration: bool = True,
) -> tuple[list[str], list[tuple[str, int]]]:
    """Prompts to calibrate on and pairs to evaluate, a bundled model's own where none are given."""
    from paroattn.evaluation.prompt_files import read_prompts

    if prompts and prompt_file is not None:
        raise click.UsageError("both --prompt and --prompts; expected one of them")
    if prompt_file is not None:
        prompts = tuple(prompt.text for prompt in read_prompts(prompt_file))
    examples = model.examples or {"calibration_prompts": [], "evaluation_pairs": []}
    chosen = list(calibration) or examples["calibration_prompts"]
    pairs = [(prompt, 101 + number) for number, prompt in enumerate(prompts)]
    pairs = pairs or [(prompt, seed) for prompt, seed in examples["evaluation_pairs"]]
    if need_calibration and not chosen:
        raise click.UsageError(
            "this model brings no prompts to calibrate on; give one or two (evaluate: --calibration-prompt, calibrate: "
            "--prompt)"
        )
    if not pairs:
        raise click.UsageError("this model brings no prompts to evaluate on; give them with --prompt or --prompts")
    return chosen, pairs[:pair_count]
