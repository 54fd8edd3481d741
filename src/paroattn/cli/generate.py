"""`paroattn generate`: videos or images, with a plan or with full attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from paroattn.cli.models import GenerativeModel
from paroattn.cli.options import backend_option, example_lines, load, model_options, path_option, seed_option
from paroattn.files import check_output
from paroattn.plan import Plan

if TYPE_CHECKING:
    from paroattn.integrations.apply import Handle

LoadAndApply: TypeAlias = "Callable[[], tuple[GenerativeModel, AbstractContextManager[Handle | None]]]"
"""Loads the model and applies what was asked for, which is removed at the end of the context."""


@click.command(
    epilog=example_lines(
        "paroattn generate --prompt 'a slow red two over the cat' --plan digits.safetensors --output two.mp4",
        "paroattn generate --prompt 'a slow red two over the cat' --precision int8 --output two.webp",
        "paroattn generate --model painted-digits --prompt 'a big red two over the cat left' --output two.png",
        "torchrun --nproc-per-node 8 -m paroattn generate --prompts prompts.txt --output-dir videos",
    ),
)
@click.option("--prompt", help="What to generate.")
@path_option(
    "--prompts",
    "File of prompts, one per line (not those that begin with #): one output for each. The first has the seed --seed, "
    "each next one more.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --prompts: folder of the outputs. A run continues what is there; torchrun's processes share it.",
)
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan file; default: full attention.")
@click.option("--precision", help="Without a plan: compute all blocks in this precision.")
@click.option("--repair", is_flag=True, help="With a plan: closer to full attention, by 64 exact rows of each call.")
@path_option(
    "--output", "Video file (.mp4, .webp or .gif), or image file (.png, .jpg or .webp); default: video.mp4, image.png."
)
@seed_option
@model_options
@backend_option
def generate(
    prompt: str | None,
    prompts: Path | None,
    output_dir: Path | None,
    plan_path: Path | None,
    precision: str | None,
    repair: bool,
    output: Path | None,
    seed: int,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Generate a video or an image, or one for each line of a file, with a plan or with full attention."""
    from paroattn.cli import many
    from paroattn.cli.frames import check_path
    from paroattn.cli.prompt_files import read_prompts
    from paroattn.integrations.apply import apply

    if (prompt is None) == (prompts is None):
        raise click.UsageError("expected either --prompt or --prompts")
    if (prompts is None) != (output_dir is None) or (prompts and output):
        raise click.UsageError("--prompts goes with --output-dir, and --prompt with --output")
    if prompt is not None and many.rank_and_count()[1] > 1:
        raise click.UsageError("--prompt is made by one process, and several were started; expected --prompts")
    if output is not None:
        check_path(output)
        check_output(output, plan_path)
    if repair and not plan_path:
        raise click.UsageError("--repair is for the blocks that a plan leaves out; expected --plan")
    texts = None if prompts is None else [item.text for item in read_prompts(prompts, merge=False)]
    plan = Plan.load(plan_path) if plan_path else None
    sizes = {name: value for name, value in model_arguments.items() if name != "device"}
    settings = {"plan": plan and plan.digest, "precision": precision, "repair": repair, "seed": seed, **sizes}
    model_arguments["device"] = many.own_device(model_arguments["device"])

    def load_and_apply() -> tuple[GenerativeModel, AbstractContextManager[Handle | None]]:
        model = load(**model_arguments)
        if not plan and not precision:
            return model, nullcontext()
        return model, apply(model.pipe, plan, precision=precision, strict=True, backend=backend, repair=repair)

    if texts is not None and output_dir is not None:
        _generate_many(texts, output_dir, settings, load_and_apply)
    elif prompt is not None:
        _generate_one(prompt, output, seed, load_and_apply)


def _generate_one(prompt: str, output: Path | None, seed: int, load_and_apply: LoadAndApply) -> None:
    from paroattn.cli.frames import check_path, save_frames

    model, applied = load_and_apply()
    output = output or Path("image.png" if model.makes_images else "video.mp4")
    check_path(output, images=model.makes_images)
    check_output(output)
    model.pipe.set_progress_bar_config(disable=False, desc="generation", leave=False)
    with applied as handle:
        frames = model.generate(prompt, seed)
    save_frames(frames, output, model.settings.fps)
    if handle is not None:
        click.echo(handle.report())
    count = "" if model.makes_images else f"{len(frames)} frames of "
    rounded = "; the model rounds sizes" if model.settings.differs_from(frames) else ""
    click.echo(f"wrote {output}: {count}{frames.shape[3]} x {frames.shape[2]} pixels{rounded}")


def _generate_many(prompts: list[str], folder: Path, settings: dict[str, Any], load_and_apply: LoadAndApply) -> None:
    from paroattn.cli import many
    from paroattn.cli.frames import check_path, save_frames

    many.check_settings(folder, prompts, settings)  # before a model is loaded, which takes minutes
    with many.at_work(folder):
        model, applied = load_and_apply()
        outputs = many.outputs_of(prompts, folder, ".png" if model.makes_images else ".mp4", settings["seed"])
        check_path(outputs[0].path, images=model.makes_images)
        many.note_settings(folder, prompts, settings)

        def make(item: many.Output) -> None:
            save_frames(model.generate(item.prompt, item.seed), item.path, model.settings.fps)

        with applied as handle:
            made = many.make_all(outputs, make)
    if handle is not None and made and many.rank_and_count()[0] == 0:
        click.echo(handle.report())
    many.finish(outputs, folder, made)
