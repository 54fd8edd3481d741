"""`paroattn calibrate`: a model's plan, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paroattn.cli.options import (
    calibration_prompt_option,
    calibration_prompts_of,
    example_lines,
    load,
    model_options,
    path_option,
    seed_option,
)
from paroattn.files import check_output

_NOT_THE_PAPERS = (
    "target_psnr", "target_speed_up", "block_q", "int8_share", "dense_steps", "dense_layers", "thorough",
    "memory_gb", "steady", "start", "keep_statistics",
)  # fmt: skip


@click.command(
    epilog=example_lines(
        "paroattn calibrate --calibration-prompt 'a slow red two over the cat' --output digits.safetensors",
        "paroattn calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --calibration-prompt 'a cat'",
        "paroattn calibrate --precision int4 --int8-share 0.5 --dense-steps 0.1 --order FHW --order 4x4x4",
    ),
)
@calibration_prompt_option
@click.option("--density", type=float, help="Share of blocks to compute, in (0, 1]; default: 0.3.")
@click.option("--target-psnr", type=float, help="Instead of a density: PSNR in dB to reach on the calibration prompts.")
@click.option("--target-speed-up", type=float, help="Instead of a density: how many times faster the transformer is.")
@click.option(
    "--precision", default="exact", show_default=True, help="exact, bf16, int8, int4, or qk/pv such as int8/bf16."
)
@click.option("--int8-share", type=float, help="With int4: share of heads that are computed in int8; default: 0.25.")
@click.option("--step-buckets", type=click.IntRange(min=1), default=10, show_default=True, help="Most step buckets.")
@click.option("--dense-steps", type=float, help="Share of the schedule, from its start, that stays dense; default: 0.")
@click.option("--dense-layers", type=click.IntRange(min=0), help="Layers, from the first, that stay dense; default: 0.")
@click.option("--order", "order_names", multiple=True, help="Candidate token order; repeatable. Default: all.")
@click.option(
    "--block-q", type=click.Choice(("64", "128")), help="Queries per block; default: 64, in long sequences 128."
)
@click.option(
    "--steady", type=float, help="Masks change from step to step only for costs larger by this share; default: 0."
)
@click.option("--thorough", is_flag=True, default=None, help="Measure everything instead of a part; slower.")
@click.option("--memory-gb", type=float, help="Host memory for costs of blocks; more lies in a file. Default: 8.")
@click.option("--method", type=click.Choice(("paroattn", "paper")), default="paroattn", show_default=True)
@path_option("--start", "Plan of this model, at any size, whose token orders, and statistics if kept, are used.")
@click.option("--keep-statistics", is_flag=True, help="Also write what was measured, for `paroattn plan adapt`.")
@path_option("--output", "Plan file.", default="plan.safetensors", show_default=True)
@seed_option
@model_options
def calibrate(
    calibration_prompts: tuple[str, ...],
    method: str,
    keep_statistics: bool,
    output: Path,
    model: str | None,
    device: str | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    **chosen: Any,
) -> None:
    """Find token orders and block masks of a model and write them to a plan file.

    What every generation finds is kept in a folder beside the plan file until it is written: after an interruption the
    same command continues. The method "paper" is the one of the PAROAttention paper.
    """
    from paroattn.calibration.calibrate import calibrate as calibrate_pipeline
    from paroattn.calibration.calibrate import check_choice
    from paroattn.calibration.cost_statistics import statistics_path
    from paroattn.calibration.paper import calibrate_paper

    given = {name: value for name, value in chosen.items() if value not in (None, ())}
    if "block_q" in given:
        given["block_q"] = int(given["block_q"])
    if keep_statistics:
        given["keep_statistics"] = statistics_path(output)
    if method == "paper":
        for name in _NOT_THE_PAPERS:
            if name in given:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} is {chosen.get(name, True)}, which method 'paper' does not have"
                )
    check_choice(
        **{
            name: value
            for name, value in given.items()
            if name in ("density", "target_psnr", "target_speed_up", "precision")
        }
    )
    check_output(output, given.get("start"))
    loaded = load(
        model,
        device,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    prompts = calibration_prompts_of(loaded, calibration_prompts)
    run = calibrate_paper if method == "paper" else calibrate_pipeline
    plan = run(
        loaded.pipe,
        [loaded.call_arguments(prompt) for prompt in prompts],
        prompt_texts=prompts,
        work_dir=output.with_name(f"{output.name}.work"),
        **given,
    )
    plan.save(output)
    click.echo(f"wrote {output}: density {plan.density():.3f}, {plan.mask_table.shape[0]} masks, grid {plan.grid}")
