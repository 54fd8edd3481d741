"""The command line: reads arguments, calls the package, prints.

`demo`, `evaluate` and `ablate` are in `cli_compare`, `bench` in `cli_bench`, what they share in `cli_options`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from paroattn.cli_bench import bench
from paroattn.cli_compare import ablate, demo, evaluate
from paroattn.cli_options import (
    OneLineErrors,
    backend_option,
    chosen_prompts,
    example_lines,
    json_option,
    load,
    model_options,
    new_console,
    seed_option,
)
from paroattn.plan import Plan


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paroattn")
def main() -> None:
    """Faster attention for visual diffusion transformers: reordered tokens, skipped blocks, low precision."""


@main.command(
    epilog=example_lines(
        "paroattn calibrate --prompt 'a slow red two over the cat' --density 0.3 --output digits.safetensors",
        "paroattn calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt 'a cat' --output wan.safetensors",
    ),
)
@click.option(
    "--prompt", "prompts", multiple=True, help="Prompt to calibrate on; repeatable. Default: the bundled ones."
)
@click.option("--density", type=float, help="Share of blocks to compute, in (0, 1]; default: 0.3.")
@click.option("--target-psnr", type=float, help="Instead of a density: PSNR in dB to reach on the calibration prompts.")
@click.option("--target-speed-up", type=float, help="Instead of a density: how many times faster the transformer is.")
@click.option(
    "--precision", default="exact", show_default=True, help="exact, bf16, int8, int4, or qk/pv such as int8/bf16."
)
@click.option("--step-buckets", type=click.IntRange(min=1), default=10, show_default=True, help="Most step buckets.")
@click.option(
    "--method",
    type=click.Choice(("cost", "paper")),
    default="cost",
    show_default=True,
    help="Spend blocks by measured cost, or as the paper does.",
)
@click.option(
    "--block-q", type=click.Choice(("64", "128")), default="64", show_default=True, help="Queries per block (cost)."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="plan.safetensors",
    show_default=True,
    help="Plan file.",
)
@seed_option
@model_options
def calibrate(
    prompts: tuple[str, ...],
    density: float | None,
    target_psnr: float | None,
    target_speed_up: float | None,
    precision: str,
    step_buckets: int,
    method: Literal["cost", "paper"],
    block_q: str,
    output: Path,
    seed: int,
    **model_arguments: Any,
) -> None:
    """Find token orders and block masks of a model and write them to a plan file.

    What every generation finds is kept in a folder beside the plan file until it is written: after an interruption the
    same command goes on where it was.
    """
    from paroattn.calibration.keep import check_density
    from paroattn.integrations.calibrate import calibrate as calibrate_pipeline
    from paroattn.integrations.targets import target_of
    from paroattn.quantize import Precision

    if density is not None:
        check_density(density)
    target_of(target_psnr, target_speed_up, density=density)
    Precision.parse(precision)
    model = load(**model_arguments)
    calibration, _ = chosen_prompts(model, prompts, ("unused",), None, 1)
    plan = calibrate_pipeline(
        model.pipe,
        [model.call_arguments(prompt) for prompt in calibration],
        prompt_texts=calibration,
        density=density,
        target_psnr=target_psnr,
        target_speed_up=target_speed_up,
        precision=precision,
        seed=seed,
        step_buckets=step_buckets,
        method=method,
        block_q=int(block_q),
        work_dir=output.with_name(f"{output.name}.work"),
    )
    plan.save(output)
    click.echo(f"wrote {output}: density {plan.density():.3f}, {plan.mask_table.shape[0]} masks, grid {plan.grid}")


@main.command(
    epilog=example_lines(
        "paroattn generate --prompt 'a slow red two over the cat' --plan digits.safetensors --output two.mp4",
        "paroattn generate --prompt 'a slow red two over the cat' --precision int8 --output two.webp",
        "paroattn generate --model painted-digits --prompt 'a big red two over the cat left' --output two.png",
    ),
)
@click.option("--prompt", required=True, help="What to generate.")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan file; default: full attention.")
@click.option("--precision", help="Without a plan: compute all blocks in this precision.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Video file (.mp4, .webp or .gif), or image file (.png, .jpg or .webp); default: video.mp4, image.png.",
)
@seed_option
@model_options
@backend_option
def generate(
    prompt: str,
    plan_path: Path | None,
    precision: str | None,
    output: Path | None,
    seed: int,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Generate a video or an image, with a plan or with full attention."""
    from contextlib import nullcontext

    from paroattn.frames import check_path, save_frames
    from paroattn.integrations.apply import apply

    if output is not None:
        check_path(output)
    plan = Plan.load(plan_path) if plan_path else None
    model = load(**model_arguments)
    output = output or Path("image.png" if model.makes_images else "video.mp4")
    check_path(output, images=model.makes_images)
    model.pipe.set_progress_bar_config(disable=False, desc="generation", leave=False)
    applied = (
        apply(model.pipe, plan, precision=precision, strict=True, backend=backend)
        if plan or precision
        else nullcontext()
    )
    with applied:
        frames = model.generate(prompt, seed)
    save_frames(frames, output, model.settings.fps)
    count = "" if model.makes_images else f"{len(frames)} frames of "
    click.echo(f"wrote {output}: {count}{frames.shape[3]} x {frames.shape[2]} pixels")


@main.command(
    epilog=example_lines(
        "paroattn inspect plan.safetensors",
        "paroattn inspect plan.safetensors --html plan.html",
        "paroattn inspect plan.safetensors --diff other.safetensors --json",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page to look into heads.")
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare with this plan instead.")
@json_option
def inspect(path: Path, html: Path | None, other: Path | None, as_json: bool) -> None:
    """Show what a plan file holds, or in what two plans differ."""
    from paroattn.evaluation.inspection import plan_difference, plan_facts
    from paroattn.evaluation.plan_tables import difference_tables, plan_tables

    plan = Plan.load(path)
    if other is None:
        facts = {**plan_facts(plan), "size in bytes": path.stat().st_size}
        tables = plan_tables(facts, path.name)
    else:
        facts = plan_difference(plan, Plan.load(other))
        tables = difference_tables(facts, path.name, other.name)
    if html is not None:
        from paroattn.evaluation.report import write_plan_page

        write_plan_page(html, plan, path.name)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = new_console()
    for table in tables:
        console.print(table)
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


for command in (demo, evaluate, ablate, bench):
    main.add_command(command)
