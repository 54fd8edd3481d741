"""The command line: reads arguments, calls the package, prints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import click

from paroattn.cli_bench import bench
from paroattn.cli_options import (
    DENSITIES,
    OneLineErrors,
    backend_option,
    comparison_options,
    example_lines,
    json_option,
    load,
    model_options,
    new_console,
    report_option,
    seed_option,
)
from paroattn.models import IMAGE
from paroattn.plan import Plan

_DEMO_PAIRS = 2


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paroattn")
def main() -> None:
    """Faster attention for visual diffusion transformers: reordered tokens, skipped blocks, low precision."""


@main.command(
    epilog=example_lines("paroattn demo", "paroattn demo --image --output-dir runs/image --steps 8"),
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/demo",
    show_default=True,
    help="Where report.html, records.jsonl and the plan are written.",
)
@click.option("--image", is_flag=True, help="With the bundled image model instead of the video model.")
@report_option
@model_options
@backend_option
@json_option
def demo(
    output_dir: Path, image: bool, report: Path | None, as_json: bool, backend: str, **model_arguments: Any
) -> None:
    """Calibrate on two prompts, generate two others with full and with sparse attention, and compare.

    Writes a page with the videos (images) side by side. Takes five to ten minutes on two CPU cores.
    """
    if image:
        model_arguments["model"] = IMAGE
    model = load(**model_arguments)
    calibration, pairs = _prompts(model, (), (), None, _DEMO_PAIRS)
    variants = _paroattn_and_paper(model, calibration, pairs, DENSITIES, (0.3,), (0.3,), None)
    _compare(model, variants, pairs, output_dir, report, as_json, backend=backend)


@main.command(
    epilog=example_lines(
        "paroattn evaluate --output-dir runs/full",
        "paroattn evaluate --plan mine.safetensors --pairs 4 --report mine.html",
        "paroattn evaluate --prompts prompts.txt --method paper --method ours --density 0.5 --precision int8",
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
@click.option("--method", "methods", multiple=True, help="Method to compare, as `ablate` names them; repeatable.")
@click.option("--precision", "precisions", multiple=True, help="With --method paper or ours: also in this precision.")
@comparison_options
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/evaluate",
    show_default=True,
    help="Where report.html, records.jsonl, plans, videos and the results of each pair are written.",
)
@report_option
@model_options
@backend_option
@json_option
def evaluate(
    plans: tuple[Path, ...],
    methods: tuple[str, ...],
    precisions: tuple[str, ...],
    pair_count: int | None,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    calibration_prompts: tuple[str, ...],
    densities: tuple[float, ...],
    clip_model: Path | None,
    fvd_model: Path | None,
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Measure how close PARO attention stays to full attention, for methods x densities, or for given plans.

    Without --method: paroattn's plans and the paper's, and paroattn's with INT8 at density 0.3. Every pair that is done
    is kept in the output folder: after an interruption the same command goes on where it was.
    """
    from paroattn.evaluation.ablation import Measured, cases
    from paroattn.evaluation.learned_metrics import find_learned_metrics
    from paroattn.evaluation.pair_store import PairStore
    from paroattn.evaluation.pairs import Variant
    from paroattn.evaluation.prompt_files import read_prompts
    from paroattn.quantize import Precision

    if plans and methods:
        raise click.UsageError("both --plan and --method; expected one of them")
    if precisions and not methods:
        raise click.UsageError(f"--precision is {precisions[0]}, which needs --method paper or ours")
    _check_methods(methods)
    densities = tuple(dict.fromkeys(densities))
    for precision in precisions:
        Precision.parse(precision)
    learned = find_learned_metrics(clip_model, fvd_model)
    loaded = [Plan.load(path) for path in plans]
    model = load(**model_arguments)
    calibration, pairs = _prompts(model, calibration_prompts, prompts, prompt_file, pair_count, not plans)
    _check_pairs(model, densities, pairs)
    store = PairStore(output_dir, fps=model.settings.fps, videos=True)
    chosen: dict[str, Any] = {"plans": [_digest(path) for path in plans], "methods": methods, "precisions": precisions}
    chosen |= {"densities": densities, "calibration prompts": calibration, "backend": backend}
    chosen |= {"clip model": str(clip_model), "fvd model": str(fvd_model)}
    store.configure({**_configuration(model, pairs), **chosen})
    work_dir = output_dir / "calibration"
    if plans:
        names = [path.stem for path in plans] if len({path.stem for path in plans}) == len(plans) else map(str, plans)
        variants = [Variant(name, plan) for name, plan in zip(names, loaded, strict=True)]
    elif methods:
        rows = [(density, precision) for density in densities for precision in precisions]
        measured = Measured(model, calibration, densities, work_dir=work_dir)
        choice: dict[str, Any] = {"methods": methods, "lowest": None, "precisions": rows, "backend": backend}
        wanted = cases(measured, densities, **choice)
        variants = [Variant(case.name, case.plan, case.attach) for case in wanted]
    else:
        variants = _paroattn_and_paper(model, calibration, pairs, densities, densities, (0.3,), work_dir)
    how = {"backend": backend, "store": store, "learned": learned}
    dimensions = {prompt.text: prompt.dimensions for prompt in read_prompts(prompt_file)} if prompt_file else {}
    _compare(model, variants, pairs, output_dir, report, as_json, dimensions, **how)


@main.command(
    epilog=example_lines(
        "paroattn ablate --output-dir runs/ablation",
        "paroattn ablate --density 0.3 --pairs 2 --method paper --method ours",
    ),
)
@comparison_options
@click.option("--method", "methods", multiple=True, help="Only rows of this name; repeatable. Default: all.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/ablate",
    show_default=True,
    help="Where report.html and records.jsonl are written.",
)
@report_option
@model_options
@backend_option
@json_option
def ablate(
    pair_count: int | None,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    calibration_prompts: tuple[str, ...],
    densities: tuple[float, ...],
    methods: tuple[str, ...],
    clip_model: Path | None,
    fvd_model: Path | None,
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    backend: str,
    **model_arguments: Any,
) -> None:
    """Compare methods, densities and precisions: the paper's, paroattn's part by part, and other mask rules.

    Takes about an hour on two CPU cores for the bundled model. Every pair that is done is kept in the output folder:
    after an interruption the same command goes on where it was.
    """
    from paroattn.evaluation import ablation
    from paroattn.evaluation.learned_metrics import find_learned_metrics
    from paroattn.evaluation.pair_store import PairStore
    from paroattn.evaluation.records import write_records
    from paroattn.evaluation.report import write_report
    from paroattn.evaluation.rows import Row
    from paroattn.evaluation.tables import ablation_table

    _check_methods(methods)
    learned = find_learned_metrics(clip_model, fvd_model)
    _check_densities(densities)
    model = load(**model_arguments)
    calibration, pairs = _prompts(model, calibration_prompts, prompts, prompt_file, pair_count)
    _check_pairs(model, densities, pairs)
    store = PairStore(output_dir)
    chosen: dict[str, Any] = {
        "methods": methods,
        "densities": densities,
        "calibration prompts": calibration,
        "backend": backend,
    }
    chosen |= {"clip model": str(clip_model), "fvd model": str(fvd_model)}
    store.configure({**_configuration(model, pairs), **chosen})
    work_dir = output_dir / "calibration"
    measured = ablation.Measured(model, calibration, densities, work_dir=work_dir, progress=not as_json)
    cases = ablation.cases(measured, densities, methods=methods, backend=backend, progress=not as_json)
    records: list[dict[str, Any]] = []
    for results in ablation.run(model, cases, pairs, store=store, learned=learned, progress=not as_json):
        records = ablation.ablation_records(model, results, pairs[: len(results[0].closeness)])
        write_records(records, output_dir / "records.jsonl")  # after each pair: an interrupted run leaves a table
    report = report or output_dir / "report.html"
    plans = {Row(record).name: case.plan for record, case in zip(records, cases, strict=True)}
    write_report(report, records, plans=plans)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    console = new_console()
    console.print(ablation_table(records))
    console.print(f"records: {output_dir / 'records.jsonl'}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


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
    calibration, _ = _prompts(model, prompts, ("unused",), None, 1)
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


main.add_command(bench)


def _check_methods(methods: Sequence[str]) -> None:
    from paroattn.evaluation.ablation import METHODS

    for name in methods:
        if name not in METHODS:
            raise click.UsageError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")


def _check_densities(densities: Sequence[float]) -> None:
    from paroattn.calibration.keep import check_density

    for density in densities:
        check_density(density)


def _check_pairs(model: Any, densities: Sequence[float], pairs: Sequence[tuple[str, int]]) -> None:
    """Find what cannot be before minutes of calibration."""
    _check_densities(densities)
    for prompt, _ in pairs:
        model.call_arguments(prompt)  # raises for unknown words


def _prompts(
    model: Any,
    calibration: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    pair_count: int | None,
    need_calibration: bool = True,
) -> tuple[list[str], list[tuple[str, int]]]:
    """Prompts to calibrate on and pairs to evaluate, the bundled model's own where none are given."""
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


def _configuration(model: Any, pairs: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What results depend on besides the methods, to tell an evaluation from another in the same folder."""
    from dataclasses import asdict

    from paroattn import __version__
    from paroattn.integrations.checkpoint import weights_fingerprint
    from paroattn.integrations.descriptors import identify, transformers_of

    return {
        "paroattn": __version__,
        "model": model.name,
        "config": identify(model.pipe).config_hash,
        "weights": weights_fingerprint(transformers_of(model.pipe)),
        "settings": asdict(model.settings),
        "pairs": pairs,
    }


def _digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _paroattn_and_paper(
    model: Any,
    calibration: Sequence[str],
    pairs: Sequence[tuple[str, int]],
    densities: Sequence[float],
    paper_at: Sequence[float],
    int8_at: Sequence[float],
    work_dir: Path | None,
) -> list[Any]:
    """Calibrate; the variants of both methods."""
    from paroattn.evaluation.pairs import variants_of
    from paroattn.integrations.calibrate import collect_costs
    from paroattn.integrations.paper import collect_block_sums

    _check_pairs(model, densities, pairs)
    arguments = [model.call_arguments(prompt) for prompt in calibration]
    common: dict[str, Any] = {"densities": sorted({*densities, *paper_at, *int8_at}), "prompt_texts": calibration}
    common["work_dir"] = work_dir
    (paper,) = collect_block_sums(model.pipe, arguments, **common)
    costs = collect_costs(model.pipe, arguments, **common)
    return variants_of(costs, paper, densities, paper_at, int8_at)


def _compare(
    model: Any,
    variants: Sequence[Any],
    pairs: Sequence[tuple[str, int]],
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    dimensions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    **how: Any,
) -> None:
    """Write the plans, evaluate, and write and print what was found."""
    from paroattn.evaluation.pairs import evaluate_variants

    for variant in variants:
        if variant.plan is not None:
            name = re.sub(r"[^\w.+-]+", "-", variant.name.lower()).strip("-")
            variant.plan.save(output_dir / "plans" / f"{name}.safetensors")
    evaluation = evaluate_variants(model, variants, pairs, **how)
    _finish(model, evaluation, output_dir, report, as_json, dimensions, how["backend"])


def _finish(
    model: Any,
    evaluation: Any,
    output_dir: Path,
    report: Path | None,
    as_json: bool,
    dimensions: Mapping[str, Sequence[str]],
    backend: str,
) -> None:
    """Look into the heads, write records and report, print the table."""
    from paroattn.evaluation.head_study import study_heads, study_records
    from paroattn.evaluation.records import evaluation_records, write_records
    from paroattn.evaluation.report import write_report
    from paroattn.evaluation.rows import headline, rows_of
    from paroattn.evaluation.tables import evaluation_table, missing_metrics

    records = evaluation_records(model, evaluation, dimensions)
    write_records(records, output_dir / "records.jsonl")  # before what follows, so that an interruption leaves them
    variants = [result.variant for result in evaluation.results]
    plans = {variant.name: variant.plan for variant in variants if variant.plan is not None}
    shown, study = headline(rows_of(records)).name, None
    if shown in plans:
        study = study_heads(model, plans, evaluation.pairs[0], shown=shown, backend=backend, progress=not as_json)
        records = study_records(records, study)
        write_records(records, output_dir / "records.jsonl")
    report = report or output_dir / "report.html"
    write_report(report, records, plans=plans, videos=evaluation.videos, study=study)
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    console = new_console()
    console.print(evaluation_table(evaluation))
    for line in missing_metrics(evaluation):
        console.print(line, style="dim")
    by_name = {result.variant.name: result for result in evaluation.results}
    for name, result in by_name.items():
        other = by_name.get(name.replace("paroattn", "paper"))
        if len(evaluation.pairs) > 1 and other is not None and other is not result:
            gain, error = result.gain_over(other)
            console.print(f"{name} over {other.variant.name}: {gain:+.2f} dB, standard error {error:.2f}")
    console.print(f"report: {report}", soft_wrap=True)
