"""The HTML report: one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from paroattn.calibration.select import CalibrationStatistics
from paroattn.evaluation.figures import DIFFERENCE_GAIN, attention_maps, video_row
from paroattn.evaluation.pairs import Evaluation, VariantResult
from paroattn.evaluation.records import environment
from paroattn.files import write_atomically
from paroattn.integrations.generation import GenerativeModel
from paroattn.plan import Plan


def write_report(
    path: Path,
    model: GenerativeModel,
    evaluation: Evaluation,
    statistics: tuple[CalibrationStatistics, CalibrationStatistics] | None = None,
) -> None:
    """Write the report of an evaluation.

    Args:
        path: the HTML file; written whole or not at all.
        model: what generated the videos.
        evaluation: results and videos.
        statistics: in the chosen orders and in the model's own, for the attention maps; None leaves them out.
    """
    page = Environment(loader=PackageLoader("paroattn.evaluation"), autoescape=True, undefined=StrictUndefined)
    shown = _plan_to_show(evaluation.results)
    html = page.get_template("report.html.j2").render(
        model=model,
        results=evaluation.results,
        rows=_video_rows(evaluation, model.settings.fps),
        columns=list(evaluation.videos),
        gain=DIFFERENCE_GAIN,
        maps=attention_maps(*statistics, shown) if statistics else None,
        shown=shown,
        orders=_order_rows(shown),
        environment=environment(),
    )
    write_atomically(path, lambda temporary: temporary.write_text(html))


def _video_rows(evaluation: Evaluation, fps: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "seed": seed,
            "video": video_row([videos[number] for videos in evaluation.videos.values()], fps),
        }
        for number, (prompt, seed) in enumerate(evaluation.pairs[: len(next(iter(evaluation.videos.values())))])
    ]


def _plan_to_show(results: Sequence[VariantResult]) -> Plan:
    """The reordering plan nearest to density 0.3, else the first plan."""
    plans = [result.variant.plan for result in results if result.variant.plan is not None]
    reordering = [plan for plan in plans if len(plan.order_names) > 1]
    return min(reordering or plans[:1], key=lambda plan: abs(plan.density() - 0.3))


def _order_rows(plan: Plan) -> list[dict[str, Any]]:
    densities = plan.densities().mean(0)
    return [
        {
            "layer": layer,
            "heads": [
                {"order": plan.order_names[index], "density": float(density)}
                for index, density in zip(plan.order_index[layer].tolist(), densities[layer], strict=True)
            ],
        }
        for layer in range(plan.model.layers)
    ]
