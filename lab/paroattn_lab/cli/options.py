"""What the lab's commands share: options of comparisons, and the pairs to evaluate."""

from __future__ import annotations

from pathlib import Path

import click

from paroattn.cli.frames import require_video_writer
from paroattn.cli.models import GenerativeModel
from paroattn.cli.options import calibration_prompt_option, device_option, options, path_option, size_options
from paroattn.errors import require
from paroattn.files import check_output
from paroattn_lab.models import LARGE, TINY, bundled_name

DENSITIES = (0.5, 0.3, 0.2)
FIRST_SEED = 101  # of evaluation; calibration takes lower ones

demo_model_options = options(
    click.option("--model", help=f"A model, as for `calibrate`; default: {LARGE} on a GPU, else {TINY}."),
    device_option,
    size_options,
)
comparison_options = options(
    click.option("--prompt", "prompts", multiple=True, help="Prompt to evaluate on; repeatable, seeds count from 101."),
    path_option(
        "--prompt-file",
        "File of prompts to evaluate on: one per line, or VBench's JSON list (prompt_en, dimension).",
    ),
    click.option("--pairs", "pair_count", type=click.IntRange(min=1), help="Only so many prompt/seed pairs."),
    calibration_prompt_option,
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
report_option = path_option("--report", "HTML page to write; default: report.html in the output folder.")


def check_outputs(output_dir: Path, report: Path | None, *inputs: Path | None) -> None:
    """Raise `InputError`, before work begins, where results cannot be written or would take the place of an input."""
    check_output(output_dir / "records.jsonl", *inputs)
    check_output(report or output_dir / "report.html", *inputs)


def require_metrics() -> None:
    """Raise `MissingPartError` where nothing can be compared."""
    require("paroattn-lab", "torchmetrics")


def require_page() -> None:
    """Raise `MissingPartError` where a page with charts cannot be made, before work begins."""
    require("paroattn-lab", "jinja2", "markupsafe", "matplotlib", "torchmetrics")


def require_report() -> None:
    """Raise `MissingPartError` where a page with videos cannot be made, before work begins."""
    require_page()
    require_video_writer()


def evaluation_pairs_of(
    model: GenerativeModel, prompts: tuple[str, ...], prompt_file: Path | None, pair_count: int | None
) -> list[tuple[str, int]]:
    """Prompts and seeds to evaluate on: those given, or the model's own."""
    from paroattn.cli.prompt_files import read_prompts

    if prompts and prompt_file is not None:
        raise click.UsageError("both --prompt and --prompt-file; expected one of them")
    if prompt_file is not None:
        prompts = tuple(prompt.text for prompt in read_prompts(prompt_file))
    pairs = [(prompt, FIRST_SEED + number) for number, prompt in enumerate(prompts)] or list(model.evaluation_pairs)
    if not pairs:
        raise click.UsageError("this model brings no prompts to evaluate on; give them with --prompt or --prompt-file")
    for prompt, _ in pairs:
        model.call_arguments(prompt)  # finds unknown words before minutes of calibration
    return pairs[:pair_count]


def chosen_model(model: str | None, *, image: bool, on_gpu: bool) -> str:
    """The model of that name; "tiny" and "large" (default: what suits the device) are bundled."""
    if image and model not in (None, TINY, LARGE):
        raise click.UsageError(
            f"--model is {model!r} with --image; expected {TINY}, {LARGE}, or one of the two options"
        )
    name = model or (LARGE if on_gpu else TINY)
    return bundled_name(name, image=image) if name in (TINY, LARGE) else name
