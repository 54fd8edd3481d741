"""`paroattn demo`, `evaluate` and `ablate`: methods and plans compared with full attention."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from paroattn.cli.options import (
    backend_option,
    calibration_prompts_of,
    chosen_device,
    example_lines,
    json_option,
    load,
    model_options,
    new_console,
)
from paroattn.files import plain_name
from paroattn.plan import Plan
from paroattn_lab.cli.options import (
    DENSITIES,
    check_outputs,
    chosen_model,
    comparison_options,
    demo_model_options,
    evaluation_pairs_of,
    report_option,
    require_report,
)

_DEMO_PAIRS = 2


@click.command(
    epilog=example_lines("paroattn demo", "paroattn demo --image --output-dir runs/image --steps 8"),
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/demo",
    show_default=True,
    help="Where report.html, records.jsonl and the plan are written.",
)
@click.option("--image", is_flag=True, help="With a bundled image model instead of a video model.")
@report_option
@demo_model_options
@backend_option
@json_option
def demo(
    output_dir: Path,
    image: bool,
    report: Path | None,
    as_json: bool,
    backend: str,
    model: str | None,
    device: str | None,
    **settings: Any,
) -> None:
    """Calibrate on two prompts, generate two others with full and with sparse attention, and compare.

    Writes a page with the videos (images) side by side. Takes five to ten minutes on two CPU cores.
    """
    require_report()
    check_outputs(output_dir, report)
    name = chosen_model(model, image=image, on_gpu=chosen_device(device).type == "cuda")
    loaded = load(name, device, **settings)
    calibration, pairs = calibration_prompts_of(loaded, ()), evaluation_pairs_of(loaded, (), None, _DEMO_PAIRS)
    variants = _paroattn_and_paper(loaded, calibration, DENSITIES, (0.3,), (0.3,), None)
    _compare(loaded, variants, pairs, output_dir, report, as_json, backend=backend)


@click.command(
    epilog=example_lines(
        "paroattn evaluate --output-dir runs/full",
        "paroattn evaluate --plan mine.safetensors --pairs 4 --report mine.html",
        "paroattn evaluate --prompt-file prompts.txt --method paper --method paroattn --density 0.5 --precision int8",
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
@click.option(
    "--precision", "precisions", multiple=True, help="With --method paper or paroattn: also in it; repeatable."
)
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
    """Measure how close sparse attention stays to full attention, for methods x densities, or for given plans.

    Without --method: paroattn's plans and the paper's, and paroattn's with INT8 at density 0.3. Every pair that is done
    is kept in the output folder: after an interruption the same command continues.
    """
    from paroattn.cli.prompt_files import read_prompts
    from paroattn.quantize import Precision
    from paroattn_lab.quality import ablation
    from paroattn_lab.quality.learned_metrics import find_learned_metrics
    from paroattn_lab.quality.pair_store import PairStore

    if plans and methods:
        raise click.UsageError("both --plan and --method; expected one of them")
    if precisions and not methods:
        raise click.UsageError(f"--precision is {precisions[0]}, which needs --method paper or paroattn")
    require_report()
    check_outputs(output_dir, report, *plans, prompt_file)
    _check_methods(methods)
    densities = tuple(dict.fromkeys(densities))
    _check_densities(densities)
    for precision in precisions:
        Precision.parse(precision)
    learned = find_learned_metrics(clip_model, fvd_model)
    loaded = [Plan.load(path) for path in plans]
    model = load(**model_arguments)
    calibration = [] if plans else calibration_prompts_of(model, calibration_prompts)
    pairs = evaluation_pairs_of(model, prompts, prompt_file, pair_count)
    store = PairStore(output_dir, fps=model.settings.fps, videos=True)
    store.configure(
        _configuration(
            model,
            pairs,
            plans=[_digest(path) for path in plans],
            methods=methods,
            precisions=precisions,
            densities=densities,
            calibration_prompts=calibration,
            backend=backend,
            clip_model=str(clip_model),
            fvd_model=str(fvd_model),
        )
    )
    work_dir = output_dir / "calibration"
    if plans:
        names = [path.stem for path in plans] if len({path.stem for path in plans}) == len(plans) else map(str, plans)
        variants = [_labelled(plan, name) for name, plan in zip(names, loaded, strict=True)]
    elif methods:
        rows = [(density, precision) for density in densities for precision in precisions]
        measured = ablation.Measured(model, calibration, densities, work_dir=work_dir)
        choice: dict[str, Any] = {"methods": methods, "lowest": None, "precisions": rows, "backend": backend}
        variants = ablation.variants(measured, densities, **choice)
    else:
        variants = _paroattn_and_paper(model, calibration, densities, densities, (0.3,), work_dir)
    how = {"backend": backend, "store": store, "learned": learned}
    dimensions = {prompt.text: prompt.dimensions for prompt in read_prompts(prompt_file)} if prompt_file else {}
    _compare(model, variants, pairs, output_dir, report, as_json, dimensions, **how)


@click.command(
    epilog=example_lines(
        "paroattn ablate --output-dir runs/ablation",
        "paroattn ablate --density 0.3 --pairs 2 --method paper --method paroattn",
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

    Takes about an hour on two CPU cores for the tiny video model. Every pair that is done is kept in the output folder:
    after an interruption the same command continues.
    """
    from paroattn_lab.quality import ablation
    from paroattn_lab.quality.learned_metrics import find_learned_metrics
    from paroattn_lab.quality.pair_store import PairStore
    from paroattn_lab.quality.pairs import PAPER, PAROATTN, evaluate_pairs
    from paroattn_lab.records import write_records
    from paroattn_lab.report import write_report
    from paroattn_lab.report.tables import ablation_table

    require_report()
    check_outputs(output_dir, report, prompt_file)
    _check_methods(methods)
    learned = find_learned_metrics(clip_model, fvd_model)
    _check_densities(densities)
    model = load(**model_arguments)
    calibration = calibration_prompts_of(model, calibration_prompts)
    pairs = evaluation_pairs_of(model, prompts, prompt_file, pair_count)
    store = PairStore(output_dir)
    store.configure(
        _configuration(
            model,
            pairs,
            methods=methods,
            densities=densities,
            calibration_prompts=calibration,
            backend=backend,
            clip_model=str(clip_model),
            fvd_model=str(fvd_model),
        )
    )
    work_dir = output_dir / "calibration"
    precisions = ablation.precisions_of(backend)
    if not methods or {*methods} & {PAPER, PAROATTN}:
        for density, precision in ablation.PRECISIONS:
            if (density, precision) not in precisions:
                click.echo(f"left out: {precision} at density {density:g}, which backend {backend!r} lacks", err=True)
    int4 = any(precision == "int4" for _, precision in precisions)
    measured = ablation.Measured(model, calibration, densities, work_dir=work_dir, int4=int4, progress=not as_json)
    given: dict[str, Any] = {"precisions": precisions, "backend": backend, "progress": not as_json}
    variants = ablation.variants(measured, densities, methods=methods, **given)
    if not variants:
        raise click.UsageError(f"nothing to compare: backend {backend!r} lacks the precisions of {', '.join(methods)}")
    records: list[dict[str, Any]] = []
    how: dict[str, Any] = {"backend": backend, "store": store, "learned": learned, "progress": not as_json}
    for evaluation in evaluate_pairs(model, variants, pairs, keep_videos=0, **how):
        records = ablation.ablation_records(model, evaluation)
        write_records(records, output_dir / "records.jsonl")  # after each pair: an interrupted run leaves a table
    report = report or output_dir / "report.html"
    write_report(report, records, plans={variant.name: variant.plan for variant in variants})
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    console = new_console()
    console.print(ablation_table(records))
    console.print(f"records: {output_dir / 'records.jsonl'}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


def _check_methods(methods: Sequence[str]) -> None:
    from paroattn_lab.quality.ablation import METHODS

    for name in methods:
        if name not in METHODS:
            raise click.UsageError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")


def _check_densities(densities: Sequence[float]) -> None:
    from paroattn.keep import check_density

    for density in densities:
        check_density(density)


def _configuration(model: Any, pairs: Sequence[tuple[str, int]], **chosen: Any) -> dict[str, Any]:
    """What results depend on, `chosen` by the command, to tell an evaluation from another in the same folder."""
    from dataclasses import asdict

    from paroattn import __version__
    from paroattn.calibration.checkpoint import weights_fingerprint
    from paroattn.integrations.pipeline import Pipeline

    return {
        "paroattn": __version__,
        "model": model.name,
        "config": Pipeline(model.pipe).identity.config_hash,
        "weights": weights_fingerprint(Pipeline(model.pipe).transformers),
        "settings": asdict(model.settings),
        "pairs": pairs,
        **{name.replace("_", " "): value for name, value in chosen.items()},
    }


def _digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _paroattn_and_paper(
    model: Any,
    calibration: Sequence[str],
    densities: Sequence[float],
    paper_at: Sequence[float],
    int8_at: Sequence[float],
    work_dir: Path | None,
) -> list[Any]:
    """Calibrate; paroattn's and the paper's plans, and paroattn's in INT8."""
    from paroattn.calibration.budget import select_by_cost
    from paroattn.calibration.calibrate import collect_costs
    from paroattn.calibration.paper import collect_block_sums, select_plan
    from paroattn_lab.quality.pairs import PAPER, PAROATTN, Variant

    arguments = [model.call_arguments(prompt) for prompt in calibration]
    common: dict[str, Any] = {"densities": sorted({*densities, *paper_at, *int8_at}), "prompt_texts": calibration}
    common["work_dir"] = work_dir
    (sums,) = collect_block_sums(model.pipe, arguments, **common)
    costs = collect_costs(model.pipe, arguments, **common)
    own = [Variant.of(select_by_cost(costs, density=density), PAROATTN, density) for density in densities]
    papers = [Variant.of(select_plan(sums, density=density), PAPER, density) for density in paper_at]
    int8 = (select_by_cost(costs, density=density, precision="int8") for density in int8_at)
    return [*own, *papers, *(Variant.of(plan, PAROATTN, density) for plan, density in zip(int8, int8_at, strict=True))]


def _labelled(plan: Plan, label: str) -> Any:
    """The variant of a plan from a file, with what its calibration was asked for."""
    from paroattn_lab.quality.pairs import Variant

    asked = plan.provenance
    return Variant.of(plan, asked.get("method", label), asked.get("density"), label=label)


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
    from paroattn_lab.quality.pairs import evaluate_variants

    for variant in variants:
        if variant.plan is not None:
            variant.plan.save(output_dir / "plans" / f"{plain_name(variant.name)}.safetensors")
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
    from paroattn_lab.quality.evaluation_records import evaluation_records
    from paroattn_lab.quality.head_study import study_heads, study_records
    from paroattn_lab.quality.pairs import PAPER, PAROATTN
    from paroattn_lab.quality.table_rows import headline, table_rows
    from paroattn_lab.records import write_records
    from paroattn_lab.report import launch_note, write_report
    from paroattn_lab.report.tables import evaluation_table, missing_metrics

    records = evaluation_records(model, evaluation, dimensions)
    write_records(records, output_dir / "records.jsonl")  # before what follows, so that an interruption leaves them
    variants = [result.variant for result in evaluation.results]
    plans = {variant.name: variant.plan for variant in variants if variant.plan is not None}
    shown, study = headline(table_rows(records)).name, None
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
    papers = {result.variant.asked: result for result in evaluation.results if result.variant.method == PAPER}
    for result in evaluation.results:
        other = papers.get(result.variant.asked) if result.variant.method == PAROATTN else None
        if len(evaluation.pairs) > 1 and other is not None:
            gain, error = result.gain_over(other)
            names = f"{result.variant.name} over {other.variant.name}"
            console.print(f"{names}: {gain:+.2f} dB, standard error {error:.2f}", markup=False)
    note = launch_note(records[0]).strip()
    if note:
        console.print(note, markup=False)
    console.print(f"report: {report}", soft_wrap=True)
