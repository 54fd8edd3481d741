"""`paroattn generate`: a video or an image, with a plan or with full attention."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from paroattn.cli.options import backend_option, example_lines, load, model_options, path_option, seed_option
from paroattn.files import check_output
from paroattn.plan import Plan


@click.command(
    epilog=example_lines(
        "paroattn generate --prompt 'a slow red two over the cat' --plan digits.safetensors --output two.mp4",
        "paroattn generate --prompt 'a slow red two over the cat' --precision int8 --output two.webp",
        "paroattn generate --model painted-digits --prompt 'a big red two over the cat left' --output two.png",
    ),
)
@click.option("--prompt", required=True, help="What to generate.")
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
    prompt: str,
    plan_path: Path | None,
    precision: str | None,
    repair: bool,
    output: Path | None,
    seed: int,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Generate a video or an image, with a plan or with full attention."""
    from paroattn.cli.frames import check_path, save_frames
    from paroattn.integrations.apply import apply

    if output is not None:
        check_path(output)
        check_output(output, plan_path)
    if repair and not plan_path:
        raise click.UsageError("--repair is for the blocks that a plan leaves out; expected --plan")
    plan = Plan.load(plan_path) if plan_path else None
    model = load(**model_arguments)
    output = output or Path("image.png" if model.makes_images else "video.mp4")
    check_path(output, images=model.makes_images)
    check_output(output)
    model.pipe.set_progress_bar_config(disable=False, desc="generation", leave=False)
    applied = (
        apply(model.pipe, plan, precision=precision, strict=True, backend=backend, repair=repair)
        if plan or precision
        else nullcontext()
    )
    with applied as handle:
        frames = model.generate(prompt, seed)
    save_frames(frames, output, model.settings.fps)
    if handle is not None:
        click.echo(handle.report())
    count = "" if model.makes_images else f"{len(frames)} frames of "
    rounded = "; the model rounds sizes" if model.settings.differs_from(frames) else ""
    click.echo(f"wrote {output}: {count}{frames.shape[3]} x {frames.shape[2]} pixels{rounded}")
