"""Draw the two figures: quality against size, and accuracy by difficulty.

Colours are Okabe and Ito's, which colour-blind eyes can tell apart, and every family has its own marker as
well. Both sizes are drawn because they disagree: unstructured zeros shrink a model's ideal size but not its
file. The same rows give the same bytes: no date, no random ids.
"""

import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from stages.reporting.collect import measure_of, records
from stages.reporting.comparison import Comparison
from stages.reporting.statistics.pareto import contenders, frontier
from stages.reporting.words import FAMILIES, family, short

COLOURS = dict(zip(FAMILIES, ("#000000", "#0072B2", "#D55E00", "#CC79A7", "#009E73"), strict=True))
_MARKERS = dict(zip(FAMILIES, ("*", "o", "s", "P", "^"), strict=True))
_READOUTS = {"likelihood": ("#0072B2", "o"), "generation": ("#D55E00", "s")}
_SIZES = {"bytes_on_disk": "size on disk", "bytes_ideal": "ideal size"}
STYLE = {"svg.hashsalt": "prunequant", "svg.fonttype": "path", "font.size": 9, "text.parse_math": False}
_OFFSETS = [(dx, dy) for dy in (0, 12, -12, 24, -24, 36, -36, 48, -48, 64, -64) for dx in (8, -8, 20, -20)]
"""Where a label may stand, in points from its marker, the nearest first."""
_NAMED = 16
"""With more candidates than this, only the dense ones and those that may be best for their size are named."""
_Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""


def draw_quality(comparison: Comparison) -> Figure | None:
    """Draw finite perplexities (log axis) against both sizes, a row a text suite; None without any."""
    rows, _ = comparison.perplexities
    suites = list(dict.fromkeys(rows["suite"]))
    if not suites:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 0.7 + 4.1 * len(suites)), layout="constrained")
        grid = figure.subplots(len(suites), len(_SIZES), squeeze=False, sharey="row")
        for suite, pair in zip(suites, grid, strict=True):
            for axis, (column, label) in zip(pair, _SIZES.items(), strict=True):
                _points(axis, rows[rows["suite"] == suite], column)
                axis.set(xlabel=f"{label}, MB", title=f"{suite}: perplexity against {label}")
            pair[0].set_ylabel("perplexity (log axis, lower is better)")
        present = {family(row) for row in records(rows)}
        handles = [
            Line2D([], [], color=COLOURS[f], marker=_MARKERS[f], linestyle="", markersize=8, label=f)
            for f in FAMILIES
            if f in present
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()  # labels are placed around points where the layout has put them
        figure.set_layout_engine("none")
        for suite, pair in zip(suites, grid, strict=True):
            for axis, column in zip(pair, _SIZES, strict=True):
                chosen = rows[rows["suite"] == suite]
                if len(chosen) > _NAMED:
                    dense = [family(row) == "dense" for row in records(chosen)]
                    chosen = chosen[[a or b for a, b in zip(dense, _in_play(chosen, column), strict=True)]]
                points = list(zip(chosen[column].astype(float) / 1e6, chosen["value"], strict=True))
                _labels(axis, points, [short(name) for name in chosen["candidate"]], renderer)
        return figure


def _points(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    sizes, losses = rows[column].astype("float64") / 1e6, rows["value"]
    edge = sorted(zip(sizes[on := frontier(sizes, losses)], losses[on], strict=True))
    axis.step(*zip(*edge, strict=True), where="post", color="#777777", linewidth=1, zorder=1.5)
    for row, chosen in zip(records(rows), _in_play(rows, column), strict=True):
        kind = family(row)
        if kind == "dense":
            axis.axhline(row["value"], color="#777777", linestyle="--", linewidth=1, zorder=1)
        axis.plot(
            row[column] / 1e6, row["value"], marker=_MARKERS[kind], color=COLOURS[kind],
            markersize=14 if kind == "dense" else 9, linestyle="", zorder=3,
            markerfacecolor=COLOURS[kind] if chosen else "white",
            markeredgecolor="white" if chosen else COLOURS[kind], markeredgewidth=0.7 if chosen else 1.2,
        )  # fmt: skip
    axis.margins(x=0.22, y=0)
    scale_perplexities(axis, rows["value"].min(), rows["value"].max())


def scale_perplexities(axis: Axes, low: float, high: float) -> None:
    """Give a log axis of perplexities from `low` to `high` room on both sides and plain numbers."""
    room = max((high / low) ** 0.16, 1.02)
    axis.set_ylim(low / room, min(float(high) * float(room), sys.float_info.max))
    # A log axis labels decades; a narrow range has none, so it gets the round numbers of a linear axis.
    steps = range(1, 10) if high < 8 * low else (1, 2, 5)
    axis.yaxis.set_major_locator(MaxNLocator(5) if high < 2 * low else LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _in_play(rows: pd.DataFrame, column: str) -> NDArray[np.bool_]:
    """Tell of each row whether nothing smaller is surely better."""
    sizes = rows[column].astype("float64") / 1e6
    return contenders(sizes, *zip(*map(_nats, records(rows)), strict=True))


def _nats(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval of a perplexity's logarithm, paired with its base's; unbounded where unknown."""
    if row["reference"] is None:
        known = row["candidate"] == f"base/{row['base']}"
        return (math.log(row["value"]),) * 2 if known else (-math.inf, math.inf)
    if row["low"] is None or not math.isfinite(row["reference_value"]):
        return -math.inf, math.inf
    start = math.log(row["reference_value"])
    return start + row["low"], start + row["high"]


def _labels(
    axis: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], renderer: RendererAgg
) -> None:
    """Write each name near its point where it covers least of the others, with a line to a distant one."""
    scale = axis.figure.dpi / 72
    frame = axis.get_window_extent(renderer).extents
    pixels = axis.transData.transform(points)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    order = sorted(range(len(names)), key=lambda i: (pixels[i][1], names[i]))
    for (x, y), point, name in ((pixels[i], points[i], names[i]) for i in order):
        probe = axis.text(*point, name, fontsize=8)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        boxes = [_box(x + dx * scale, y + dy * scale, extent, dx < 0) for dx, dy in _OFFSETS]
        costs = [
            sum(_shared(box, other) for other in taken) + 3 * (_area(box) - _shared(box, frame)) + place
            for place, box in enumerate(boxes)
        ]
        best = costs.index(min(costs))
        dx, dy = _OFFSETS[best]
        line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axis.annotate(
            name, point, (dx, dy), textcoords="offset points", fontsize=8, va="center",
            ha="left" if dx > 0 else "right", arrowprops=line if best > 1 else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}, zorder=2,
        ).set_in_layout(False)  # fmt: skip
        taken.append(boxes[best])


def _box(x: float, y: float, extent: Bbox, leftwards: bool) -> _Box:
    """Return the box of a text of `extent` whose left (or right) end is at x and whose middle is at y."""
    left = x - extent.width if leftwards else x
    return left, y - extent.height / 2, left + extent.width, y + extent.height / 2


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(box: _Box, other: _Box) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(0.0, width) * max(0.0, height)


def draw_difficulty(comparison: Comparison) -> Figure | None:
    """Draw headline scores by difficulty, a panel a candidate, with floors; None without levels."""
    rows = _leveled(comparison)
    panels = list(dict.fromkeys(zip(rows["suite"], rows["candidate"], strict=True)))
    if not panels:
        return None
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.7 + 0.22 * rows["difficulty"].nunique()
    with rc_context(STYLE):
        figure = Figure(figsize=(1.9 * columns + 1.6, height * lines + 0.7), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
        several = rows["suite"].nunique() > 1
        for axis, (suite, candidate) in zip(grid, panels, strict=False):
            _levels(axis, rows[(rows["suite"] == suite) & (rows["candidate"] == candidate)])
            axis.set_title(f"{suite}: {short(candidate)}" if several else short(candidate), fontsize=9)
        for axis in grid[len(panels) :]:
            axis.set_visible(False)
        for axis in grid[len(panels) - columns : len(panels)]:
            axis.tick_params(axis="x", labelbottom=True)
            axis.set_xlabel("share right")
        grid[0].invert_yaxis()  # the easiest on top
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=4, label=readout)
            for readout, (colour, marker) in _READOUTS.items()
            if readout in set(rows["readout"])
        ]
        handles += [
            Line2D([], [], color="#777777", linewidth=1, label="dense base, same readout"),
            Line2D(
                [], [], color="#777777", linestyle=":", linewidth=1, marker="|", label="floor, same readout"
            ),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        return figure


def _leveled(comparison: Comparison) -> pd.DataFrame:
    """Return competitors' scores at single levels, of the headline of each suite and readout."""
    rows = comparison.competitors
    rows = rows[(rows["difficulty"] != "all") & rows["readout"].isin(_READOUTS)]
    headlines = comparison.headlines()
    return rows.loc[[measure_of(row) in headlines for row in records(rows)]]


def _levels(axis: Axes, rows: pd.DataFrame) -> None:
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.set(xlim=(-0.05, 1.05), xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", "", ".5", "", "1"))
    for readout, (colour, marker) in _READOUTS.items():
        chosen = rows[rows["readout"] == readout]
        axis.plot(chosen["reference_value"], chosen["difficulty"], color=colour, alpha=0.4, linewidth=1)
        axis.errorbar(
            chosen["value"], chosen["difficulty"], xerr=chosen["stderr"].fillna(0), color=colour,
            marker=marker, markersize=4, linewidth=1.5, elinewidth=0.8,
        )  # fmt: skip
        floors = chosen[chosen["floor"].notna()]
        axis.plot(
            floors["floor"], floors["difficulty"], color=colour, linestyle=":", linewidth=1, marker="|",
            markersize=6,
        )  # fmt: skip


def save_figure(figure: Figure, stem: Path) -> str:
    """Write `<stem>.svg` and `<stem>.png`, the same bytes for the same figure, and return the SVG."""
    text = _svg(figure)
    stem.with_suffix(".svg").write_text(text)
    with rc_context(STYLE):
        figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
    return text


def _svg(figure: Figure) -> str:
    """Return the figure as SVG without date, generator or comments (matplotlib repeats each text in one)."""
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context(STYLE), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata=nothing)
        return re.sub(r"<!--.*?-->\n?", "", buffer.getvalue(), flags=re.DOTALL)
