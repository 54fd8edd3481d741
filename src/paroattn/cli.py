"""The command line: reads arguments, calls the package, prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console

from paroattn.models import IMAGE, VIDEO
from paroattn.plan import Plan

_DEMO_PAIRS = 2
_DENSITIES = (0.5, 0.3, 0.2)


class _OneLineErrors(click.Group):
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


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _console() -> Console:
    """Files and pipes have no width, and rich would take 80 columns, too few for our tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _options(*decorators: Any) -> Any:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_model_options = _options(
    click.option(
        "--model",
        default=VIDEO,
        show_default=True,
        help="A bundled model's name (moving-digits, painted-digits), a diffusers pipeline folder, or a Hub name.",
    ),
    click.option("--device", default=None, help="cpu or cuda; default: cuda if there is one."),
    click.option("--height", type=int, help="Frame height in pixels; default: the model's."),
    click.option("--width", type=int, help="Frame width in pixels; default: the model's."),
    click.option("--frames", "num_frames", type=int, help="Number of frames; default: the model's."),
    click.option("--steps", "num_inference_steps", type=int, help="Denoising steps; default: the model's."),
    click.option("--guidance", "guidance_scale", type=float, help="Guidance scale, 1 for none; default: the model's."),
)
_comparison_options = _options(
    click.option(
        "--pairs", "pair_count", type=click.IntRange(min=1), default=8, show_default=True, help="Prompt/seed pairs."
    ),
    click.option("--prompt", "prompts", multiple=True, help="Prompt to evaluate on; repeatable, seeds count from 101."),
    click.option(
        "--calibration-prompt", "calibration_prompts", multiple=True, help="Prompt to calibrate on; repeatable."
    ),
    click.option(
        "--density",
        "densities",
        multiple=True,
        type=float,
        default=_DENSITIES,
        show_default=True,
        help="Densities to compare at; repeatable.",
    ),
)
_backend_option = click.option("--backend", default="auto", show_default=True, help="Attention backend.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
_report_option = click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="HTML page to write; default: report.html in the output folder.",
)
_seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the initial noise.")


def _load(model: str, device: str | None, **changes: Any) -> Any:
    from diffusers.utils import logging as diffusers_logging

    from paroattn.integrations.generation import load_model

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    return load_model(model, device=device, **changes)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paroattn")
def main() -> None:
    """Faster attention for visual diffusion transformers: reordered tokens, skipped blocks, low precision."""


@main.command(
    epilog=_examples("paroattn demo", "paroattn demo --image --output-dir runs/image --steps 8"),
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/demo",
    show_default=True,
    help="Where report.html, records.jsonl and the plan are written.",
)
@click.option("--image", is_flag=True, help="With the bundled image model instead of the video model.")
@_report_option
@_model_options
@_backend_option
@_json_option
def demo(
    output_dir: Path, image: bool, report: Path | None, as_json: bool, backend: str, **model_arguments: Any
) -> None:
    """Calibrate on two prompts, generate two others with full and with sparse attention, and compare.

    Writes a page with the videos (images) side by side. Takes five to ten minutes on two CPU cores.
    """
    if image:
        model_arguments["model"] = IMAGE
    model = _load(**model_arguments)
    calibration, pairs = _prompts(model, (), (), _DEMO_PAIRS)
    _compare(model, calibration, pairs, _DENSITIES, (0.3,), (0.3,), output_dir, report, backend, as_json)


@main.command(
    epilog=_examples(
        "paroattn evaluate --output-dir runs/full",
        "paroattn evaluate --plan mine.safetensors --pairs 4 --report mine.html",
        "paroattn evaluate --model folder --calibration-prompt 'a cat' --prompt 'a dog' --prompt 'a harbour'",
    ),
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Plan file to evaluate instead of calibrating; repeatable.",
)
@_comparison_options
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/evaluate",
    show_default=True,
    help="Where report.html, records.jsonl and the plans are written.",
)
@_report_option
@_model_options
@_backend_option
@_json_option
def evaluate(
    plans: tuple[Path, ...],
    pair_count: int,
    prompts: tuple[str, ...],
    calibration_prompts: tuple[str, ...],
    densities: tuple[float, ...],
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Measure how close PARO attention stays to full attention: the full matrix, or given plans."""
    loaded = [Plan.load(path) for path in plans]
    model = _load(**model_arguments)
    calibration, pairs = _prompts(model, calibration_prompts, prompts, pair_count, need_calibration=not plans)
    if not plans:
        _compare(model, calibration, pairs, densities, densities, (0.3,), output_dir, report, backend, as_json)
        return

    from paroattn.evaluation.pairs import Variant, evaluate_variants

    variants = [Variant(path.stem, plan) for path, plan in zip(plans, loaded, strict=True)]
    _finish(model, evaluate_variants(model, variants, pairs, backend=backend), output_dir, report, backend, as_json)


@main.command(
    epilog=_examples(
        "paroattn ablate --output-dir runs/ablation",
        "paroattn ablate --density 0.3 --pairs 2 --method paper --method ours",
    ),
)
@_comparison_options
@click.option("--method", "methods", multiple=True, help="Only rows of this name; repeatable. Default: all.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/ablate",
    show_default=True,
    help="Where report.html and records.jsonl are written.",
)
@_report_option
@_model_options
@_backend_option
@_json_option
def ablate(
    pair_count: int,
    prompts: tuple[str, ...],
    calibration_prompts: tuple[str, ...],
    densities: tuple[float, ...],
    methods: tuple[str, ...],
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Compare methods, densities and precisions: the paper's, paroattn's part by part, and other mask rules.

    Takes about an hour on two CPU cores for the bundled model.
    """
    from paroattn.calibration.keep import check_density
    from paroattn.evaluation import ablation
    from paroattn.evaluation.records import write_records
    from paroattn.evaluation.report import write_report
    from paroattn.evaluation.rows import Row
    from paroattn.evaluation.tables import ablation_table

    for density in densities:
        check_density(density)
    for name in methods:
        if name not in ablation.METHODS:
            raise click.UsageError(f"method {name!r} is unknown; expected one of {', '.join(ablation.METHODS)}")
    model = _load(**model_arguments)
    calibration, pairs = _prompts(model, calibration_prompts, prompts, pair_count)
    for prompt, _ in pairs:
        model.call_arguments(prompt)  # unknown words are found before minutes of calibration
    measured = ablation.Measured(model, calibration, densities, progress=not as_json)
    cases = ablation.cases(measured, densities, methods=methods, backend=backend)
    results = []
    for result in ablation.run(model, cases, pairs, progress=not as_json):
        results.append(result)
        records = ablation.ablation_records(model, results, pairs)
        write_records(records, output_dir / "records.jsonl")  # after each row, so that an interrupted run leaves rows
    report = report or output_dir / "report.html"
    plans = {Row(record).name: item.case.plan for record, item in zip(records, results, strict=True)}
    write_report(report, records, plans=plans)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    console = _console()
    console.print(ablation_table(records))
    console.print(f"records: {output_dir / 'records.jsonl'}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


@main.command(
    epilog=_examples(
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
@_seed_option
@_model_options
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
    """Find token orders and block masks of a model and write them to a plan file."""
    from paroattn.calibration.keep import check_density
    from paroattn.integrations.calibrate import calibrate as calibrate_pipeline
    from paroattn.integrations.targets import target_of
    from paroattn.quantize import Precision

    if density is not None:
        check_density(density)
    target_of(target_psnr, target_speed_up, density=density)
    Precision.parse(precision)
    model = _load(**model_arguments)
    calibration, _ = _prompts(model, prompts, ("unused",), 1)
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
    )
    plan.save(output)
    click.echo(f"wrote {output}: density {plan.density():.3f}, {plan.mask_table.shape[0]} masks, grid {plan.grid}")


@main.command(
    epilog=_examples(
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
@_seed_option
@_model_options
@_backend_option
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
    model = _load(**model_arguments)
    output = output or Path("image.png" if model.makes_images else "video.mp4")
    check_path(output, images=model.makes_images)
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
    epilog=_examples(
        "paroattn inspect plan.safetensors",
        "paroattn inspect plan.safetensors --html plan.html",
        "paroattn inspect plan.safetensors --diff other.safetensors --json",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page to look into heads.")
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare with this plan instead.")
@_json_option
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
    console = _console()
    for table in tables:
        console.print(table)
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


@main.group()
def bench() -> None:
    """Time the operator beside what PyTorch has."""


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(item) for item in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}; expected numbers separated by commas, such as 1,0.3") from None


@bench.command(
    "attention",
    epilog=_examples(
        "paroattn bench attention --tokens 17776 --heads 2 --head-dim 64 --densities 1,0.5,0.3,0.2",
        "paroattn bench attention --tokens 4096 --precisions bf16,int8 --output attention.jsonl",
        "paroattn bench attention --backend triton --tokens 17776 --heads 24 --precisions exact,int8,int8/fp8",
    ),
)
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Sequence length.")
@click.option("--heads", type=click.IntRange(min=1), default=2, show_default=True, help="Attention heads.")
@click.option("--head-dim", type=click.IntRange(1, 128), default=64, show_default=True, help="Channels per head.")
@click.option("--densities", callback=_numbers, default="1,0.5,0.3,0.2", show_default=True, help="Shares of blocks.")
@click.option("--precisions", default="exact,int8", show_default=True, help="exact, bf16, int8, int4 or qk/pv pairs.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds of all contenders.")
@click.option("--unequal", is_flag=True, help="Let the heads' densities differ by up to a factor of three.")
@click.option("--compensate", is_flag=True, help="Also with skipped blocks approximated by their means.")
@click.option("--flex/--no-flex", default=True, show_default=True, help="Also time compiled FlexAttention.")
@click.option("--block-q", type=click.Choice(["64", "128"]), default="64", show_default=True, help="Queries per block.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the records to this file.")
@_seed_option
@_backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the records, one JSON line each.")
def bench_attention(
    tokens: int,
    heads: int,
    head_dim: int,
    precisions: str,
    block_q: str,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time attention on random inputs with random masks, after a check against float64.

    Medians of interleaved rounds; ratios are to the fastest dense attention, round by round: on a CPU SDPA in fp32 and
    bf16; on a GPU, in bf16, SDPA's kernels and the packages that are installed.
    """
    from paroattn.evaluation.bench import Shape
    from paroattn.evaluation.bench import bench_attention as run
    from paroattn.evaluation.records import write_records
    from paroattn.evaluation.tables import attention_table

    shape = Shape(tokens, heads, head_dim)
    try:
        records = run(shape, precisions=precisions.split(","), block_q=int(block_q), progress=not as_json, **settings)
    except ArithmeticError as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        write_records(records, output)
    if as_json:
        for record in records:
            click.echo(json.dumps(record, sort_keys=True))
        return
    first = records[0]
    console = _console()
    console.print(attention_table(records))
    used = {record["backend"] for record in records if record["backend"]}
    machine = first.get("gpu") or f"{first['machine']}, {first['threads']} threads"
    console.print(f"{machine}; paroattn on: {', '.join(sorted(used))}")
    if output is not None:
        console.print(f"records: {output}", soft_wrap=True)


def _prompts(
    model: Any,
    calibration: tuple[str, ...],
    prompts: tuple[str, ...],
    pair_count: int,
    need_calibration: bool = True,
) -> tuple[list[str], list[tuple[str, int]]]:
    """Prompts to calibrate on and pairs to evaluate, the bundled model's own where none are given."""
    examples = model.examples or {"calibration_prompts": [], "evaluation_pairs": []}
    chosen = list(calibration) or examples["calibration_prompts"]
    pairs = [(prompt, 101 + number) for number, prompt in enumerate(prompts)]
    pairs = pairs or [(prompt, seed) for prompt, seed in examples["evaluation_pairs"]]
    if need_calibration and not chosen:
        raise click.UsageError("this model brings no prompts; give prompts to calibrate on")
    if not pairs:
        raise click.UsageError("this model brings no prompts to evaluate on; give them with `evaluate --prompt`")
    return chosen, pairs[:pair_count]


def _compare(
    model: Any,
    calibration: Sequence[str],
    pairs: Sequence[tuple[str, int]],
    densities: Sequence[float],
    paper_at: Sequence[float],
    int8_at: Sequence[float],
    output_dir: Path,
    report: Path | None,
    backend: str,
    as_json: bool,
) -> None:
    """Calibrate, evaluate paroattn's plans and the paper's, write plans and report."""
    from paroattn.calibration.keep import check_density
    from paroattn.evaluation.pairs import evaluate_variants, variants_of
    from paroattn.integrations.calibrate import collect_costs
    from paroattn.integrations.paper import collect_block_sums

    all_densities = sorted({*densities, *paper_at, *int8_at})
    for density in all_densities:
        check_density(density)
    for prompt, _ in pairs:
        model.call_arguments(prompt)  # unknown words are found before minutes of calibration
    arguments = [model.call_arguments(prompt) for prompt in calibration]
    common: dict[str, Any] = {"densities": all_densities, "prompt_texts": calibration}
    (paper,) = collect_block_sums(model.pipe, arguments, **common)
    costs = collect_costs(model.pipe, arguments, **common)
    variants = variants_of(costs, paper, densities, paper_at, int8_at)
    for variant in variants:
        variant.plan.save(output_dir / "plans" / f"{variant.name.lower().replace(' ', '-')}.safetensors")
    evaluation = evaluate_variants(model, variants, pairs, backend=backend)
    _finish(model, evaluation, output_dir, report, backend, as_json)


def _finish(model: Any, evaluation: Any, output_dir: Path, report: Path | None, backend: str, as_json: bool) -> None:
    """Look into the heads, write records and report, print the table."""
    from paroattn.evaluation.head_study import study_heads, study_records
    from paroattn.evaluation.records import evaluation_records, write_records
    from paroattn.evaluation.report import write_report
    from paroattn.evaluation.rows import headline, rows_of
    from paroattn.evaluation.tables import evaluation_table

    records = evaluation_records(model, evaluation)
    write_records(records, output_dir / "records.jsonl")  # before what follows, so that an interruption leaves them
    variants = [result.variant for result in evaluation.results]
    shown = headline(rows_of(records)).name
    study = study_heads(model, variants, evaluation.pairs[0], shown=shown, backend=backend, progress=not as_json)
    records = study_records(records, study)
    write_records(records, output_dir / "records.jsonl")
    report = report or output_dir / "report.html"
    plans = {variant.name: variant.plan for variant in variants}
    write_report(report, records, plans=plans, videos=evaluation.videos, study=study)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    console = _console()
    console.print(evaluation_table(evaluation))
    by_name = {result.variant.name: result for result in evaluation.results}
    for name, result in by_name.items():
        other = by_name.get(name.replace("paroattn", "paper"))
        if len(evaluation.pairs) > 1 and other is not None and other is not result:
            gain, error = result.gain_over(other)
            console.print(f"{name} over {other.variant.name}: {gain:+.2f} dB, standard error {error:.2f}")
    console.print(f"report: {report}", soft_wrap=True)
