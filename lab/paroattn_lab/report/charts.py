"""Charts as SVG for the page itself: lines and text take the page's colours, so that they suit both themes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paroattn_lab.quality.table_rows import TableRow, metric_label

_INK = "#010203"  # stands for the page's text colour until the SVG is in the page
_COLOURS = (
    "#3f7fd6",
    "#d97a1f",
    "#2f9a68",
    "#a066d3",
    "#cf5a5a",
    "#8a8f98",
    "#b8901c",
    "#2b9fb0",
    "#c45fa0",
    "#7a8c3a",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, read by screen readers
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "legend.frameon": False,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor", "titlecolor")},
    "legend.labelcolor": _INK,
}
_FOREIGN = tuple(
    map(re.compile, (r'\sxmlns(:\w+)?="[^"]*"', r"<style.*?</style>", r'(?<=<g) id="[^"]*"', r"font-family: [^;\"]*;?"))
)
"""Name spaces that HTML does not need, a style that would reach the whole page, ids that repeat from chart to chart,
and fonts in place of the page's."""
_MOST_LETTERS = 28  # of a name in a chart; tables have the whole
_BEST_METHODS = 8  # lines that a chart can hold and still be read


def quality_chart(rows: Sequence[TableRow], metric: str) -> tuple[Markup, int] | None:
    """A metric against density, one line per method; and how many methods were left out as the lowest.

    None where no row has a finite value of the metric.
    """
    series: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        found = row.figures.get(metric)
        if found is not None and found.mean is not None:
            series.setdefault(row.series, []).append((row.density, found.mean, found.spread or 0.0))
    if not series:
        return None
    best = sorted(series, key=lambda name: -max(mean for _, mean, _ in series[name]))
    chosen = {name: sorted(series[name]) for name in series if name in best[:_BEST_METHODS]}
    with matplotlib.rc_context(_STYLE):
        figure_height = 3.4 + 0.22 * ((len(chosen) + 1) // 2)
        figure = Figure(figsize=(5.4, figure_height), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(chosen.items()):
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(
                x,
                y,
                yerr=spread,
                label=_shortened(name),
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=6,
                linewidth=1.8,
                elinewidth=0.9,
                capsize=2.5,
            )
        axes.set_xlabel("density (share of attention blocks computed)")
        axes.set_ylabel(metric_label(metric))
        axes.grid(alpha=0.25, color=_INK, linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=2, fontsize=10, handlelength=1.6, columnspacing=1.2)
        return _svg(figure, f"{metric_label(metric)} against density for {len(chosen)} methods"), len(best) - len(
            chosen
        )


def time_chart(parts: Mapping[str, Mapping[str, float]]) -> Markup:
    """Stacked bars: by name, seconds of each part."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 1.5 + 0.38 * len(parts)), layout="constrained")
        axes = figure.subplots()
        longest = max(parts.values(), key=len)  # full attention has no prologue
        kinds = list(longest)
        places = range(len(parts))
        left = [0.0] * len(parts)
        for number, kind in enumerate(kinds):
            widths = [bar.get(kind, 0.0) for bar in parts.values()]
            axes.barh(places, widths, left=left, label=kind, color=_COLOURS[number], height=0.62)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(places, [_shortened(name) for name in parts])
        for place, total in enumerate(left):
            axes.annotate(f"{total:.2f} s", (total, place), xytext=(4, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlabel("seconds in the transformer")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=10, handlelength=1.2)
        return _svg(figure, "Seconds in the transformer by part: " + ", ".join(kinds))


def density_map(densities: Sequence[Sequence[float]]) -> Markup:
    """Density of each head: a row per layer, a column per head, with figures where there is room."""
    layers, heads = len(densities), len(densities[0])
    with matplotlib.rc_context(_STYLE):
        height = min(max(1.5 + 0.3 * layers, 2.2), 7.0)
        figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(densities, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        _whole_numbers(axes, layers, heads)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label("density")
        bar.outline.set_visible(False)
        if heads <= 12 and layers <= 24:
            for layer, row in enumerate(densities):
                for head, value in enumerate(row):
                    colour = "#ffffff" if value < 0.6 else "#101010"
                    axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
        return _svg(figure, f"Density of {layers} layers of {heads} heads")


def _shortened(name: str) -> str:
    """A name that leaves room for the chart itself."""
    return name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"


def _whole_numbers(axes: Axes, layers: int, heads: int) -> None:
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, -(-count // 12)))
        axis.set_tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element for use inside HTML, with the page's text colour and a description."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": description}):  # ids of two charts on one page must differ
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().replace(_INK, "currentColor")
    svg = svg[svg.index("<svg") :]
    for foreign in _FOREIGN:
        svg = foreign.sub("", svg)
    start = Markup('<svg role="img" aria-label="{}" class="chart"').format(description)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None, "matplotlib states a viewBox"
    return Markup(f"{start} {box[0]}>{rest}")
