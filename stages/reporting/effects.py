"""Draw the verdicts of studies: a line a hypothesis, its effect with the interval that carries it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stages.reporting.figures import STYLE

_LOOKS = {
    "supported": ("#009E73", "o", "full"),
    "contradicted": ("#D55E00", "X", "full"),
    "undecided": ("#777777", "o", "none"),
}
"""The colour, marker and filling of each verdict."""


def draw_effects(verdicts: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Draw the hypotheses of one study that have an effect, a panel a unit; None without any.

    A grey band about zero shows the effects that a hypothesis's items are too few to show; a dotted line,
    where a claim ends elsewhere than at zero.

    Args:
        verdicts: the entries of verdicts.json, by hypothesis.
    """
    known = [(name, entry) for name, entry in verdicts.items() if entry["effect"] is not None]
    units = list(dict.fromkeys(entry["unit"] for _, entry in known))
    if not known:
        return None
    panels = [[row for row in known if row[1]["unit"] == unit] for unit in units]
    sizes = [len(panel) for panel in panels]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 0.32 * sum(sizes) + 0.75 * len(sizes) + 0.4), layout="constrained")
        grid = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=[n + 1 for n in sizes]).flatten()
        for axis, panel, unit in zip(grid, panels, units, strict=True):
            _panel(axis, panel)
            axis.set_xlabel(f"effect, {unit}")
        handles: list[Any] = [
            Line2D([], [], color=colour, marker=marker, fillstyle=fill, linewidth=1.2, label=verdict)
            for verdict, (colour, marker, fill) in _LOOKS.items()
        ]
        handles.append(Line2D([], [], color="#000000", linestyle=":", label="the claim's bound"))
        handles.append(Patch(color="#dddddd", label="too small to show"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        return figure


def _panel(axis: Axes, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    axis.grid(axis="x", alpha=0.25, linewidth=0.5)
    axis.axvline(0, color="#000000", linewidth=1)
    for place, (_, entry) in enumerate(rows):
        colour, marker, fill = _LOOKS[entry["verdict"]]
        if (smallest := entry["smallest"]) is not None:
            axis.barh(place, 2 * smallest, 0.7, -smallest, color="#dddddd", zorder=0.5)
            axis.update_datalim([(-1.1 * smallest, place), (1.1 * smallest, place)])
        for bound in (entry["claim_low"], entry["claim_high"]):
            if bound:
                axis.plot(
                    [bound] * 2, [place - 0.4, place + 0.4], color="#000000", linewidth=1.2, linestyle=":"
                )
        ends = [entry[end] for end in ("low", "high")]
        if None not in ends and all(map(math.isfinite, ends)):
            axis.plot(ends, [place] * 2, color=colour, linewidth=1.2)
        axis.plot(entry["effect"], place, color=colour, marker=marker, fillstyle=fill, markersize=6)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
