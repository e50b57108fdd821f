"""Write the results of a study that has run into its page, docs/studies/<name>.md, and draw its pictures.

    prunequant study frontier --profile laptop && prunequant run
    python -m benchmarks.study_page frontier

What stands between the two marks of the page is written anew: verdicts, scores, time and versions. All
else is written by hand. `--project FOLDER` takes the results of another clone; `--across COLUMN` draws the
scores against another column than the size, `--split COLUMN ...` gives each of its values a colour.
"""

import argparse
import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from benchmarks.figures import show
from flows.graph import read_graph
from stages.core.files import RUNS
from stages.reporting.collect import by_measure, competes, measure_of, records
from stages.reporting.comparison import headline_measures
from stages.reporting.effects import draw_effects
from stages.reporting.export import MEASURED_VERDICTS, VERDICTS
from stages.reporting.figures import COLOURS, STYLE, scale_perplexities
from stages.reporting.words import family
from tests import project

PAGES = project.ROOT / "docs/studies"
_SIZES = {"bytes_ideal": "ideal size, MB", "bytes_on_disk": "size on disk, MB"}
BEGIN, END = "<!-- results, by benchmarks.study_page -->", "<!-- end of results -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", help="its name, as in studies/ and in params.yaml")
    parser.add_argument("--project", type=Path, default=Path(), help="where it has run; default: here")
    parser.add_argument("--across", default="bytes_ideal", help="x of the scores, such as sparsity or budget")
    parser.add_argument("--split", nargs="+", default=[], help="columns that give the colours of the scores")
    options = parser.parse_args(arguments)
    axes = {"across": options.across, "split": options.split}
    written = write_page(options.study, options.project, PAGES, axes=axes)
    show(f"{written} holds the results of {options.study}")


def write_page(
    name: str,
    at: Path,
    pages: Path,
    runs: Iterable[Path] | None = None,
    axes: Mapping[str, Any] | None = None,
) -> Path:
    """Write results of the project `at` into `pages/<name>.md`, and pictures beside it; return the page.

    Args:
        name: the study.
        at: the project's folder.
        pages: the folder of the pages.
        runs: the run records of its stages, in its folder; None: DVC names them. Others are stale.
        axes: options of `draw_scores`.

    Raises:
        SystemExit: the project holds no verdicts of that study, or the page lacks a mark.
    """
    study = yaml.safe_load((at / "params.yaml").read_text()).get("studies", {}).get(name)
    verdicts = read_verdicts(at / "data/report", name)
    if study is None or not verdicts:
        raise SystemExit(f"{at.resolve()} holds no verdicts of {name}; run the study there first.")
    page = pages / f"{name}.md"
    text = page.read_text() if page.exists() else f"# {name}\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} needs the lines {BEGIN} and {END}, once each.")
    if runs is None:
        with contextlib.chdir(at):
            runs = [stage.record for stage in read_graph().values()]
    rows = pd.read_parquet(at / "data/report/results.parquet")
    asked = [(axes or {}).get("across", "budget"), *(axes or {}).get("split", ())]
    if missing := [column for column in asked if column not in rows]:
        raise SystemExit(f"no column {', '.join(missing)}; allowed: {', '.join(sorted(map(str, rows)))}.")
    pictures = {"effects": draw_effects(verdicts), "scores": draw_scores(rows, **axes or {})}
    pages.mkdir(parents=True, exist_ok=True)
    shown = []
    for title, figure in pictures.items():
        if figure is not None:
            save(figure, pages / f"{name}-{title}.png")
            shown += [f"![{name}: {title}]({name}-{title}.png)", ""]
    block = [*verdict_table(study, verdicts), "", *shown, *score_table(at), "", *spent(at, runs)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + "\n".join([BEGIN, "", *block, "", END]) + after)
    return page


def read_verdicts(report: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read all verdicts of a study, those on measurements last; empty if there are none."""
    files = [report / file for file in (VERDICTS, MEASURED_VERDICTS)]
    known = [json.loads(file.read_text()).get(name, {}) for file in files if file.exists()]
    return {hypothesis: entry for part in known for hypothesis, entry in part.items()}


def verdict_table(study: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of hypotheses with their verdicts."""
    claims = study["hypotheses"] | study.get("no_data", {})
    yield "| hypothesis | claim | verdict | effect, 95 % interval | p after Holm | the items show |"
    yield "|---|---|---|---|---|---|"
    for name, entry in verdicts.items():
        cells = [f"`{name}`", claims[name]["claim"], entry["verdict"]]
        if entry["effect"] is None:
            cells += [entry["why"], "", ""]
        else:
            low, high = (_number(entry[end]) for end in ("low", "high"))
            interval = f" ({low} to {high})" if low and high else ""
            repeats = entry.get("over_repeats")
            over = f"; over repeats {_number(repeats)}" if repeats is not None else ""
            effect = f"{_number(entry['effect'])}{interval} {entry['unit']}{over}"
            cells += [effect, _number(entry["p_holm"]), _number(entry["smallest"])]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def score_table(at: Path) -> Iterator[str]:
    """Yield the table of all candidates, folded."""
    table = pd.read_csv(at / "data/report/summary.csv").drop(columns=["bytes_on_disk"])
    table["bytes_ideal"] = [f"{size / 1e6:.1f} MB" for size in table["bytes_ideal"]]
    yield "<details><summary>All scores</summary>"
    yield ""
    yield f"| {' | '.join(name.replace('_', ' ') for name in table.columns)} |"
    yield "|---" * len(table.columns) + "|"
    for row in table.itertuples(index=False):
        yield f"| {' | '.join(cell if isinstance(cell, str) else _number(cell) for cell in row)} |"
    yield ""
    yield "</details>"


def spent(at: Path, runs: Iterable[Path]) -> Iterator[str]:
    """Yield the CPU minutes of each kind of stage, and the commits and versions that computed."""
    minutes: defaultdict[str, float] = defaultdict(float)
    commits, versions = set(), set()
    for run in sorted(run for run in runs if (at / run).exists()):
        record = json.loads((at / run).read_text())
        minutes[run.relative_to(RUNS).parts[0]] += (record["cpu_seconds"] or 0) / 60
        commits.add(record["commit"][:7])
        packages = [f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "lm-eval")]
        versions.add(", ".join([f"Python {record['python']}", *packages]))
    parts = ", ".join(f"{kind} {spent:.1f}" for kind, spent in minutes.items() if spent >= 0.05)
    yield f"CPU minutes: {sum(minutes.values()):.0f} ({parts}). Code of commit {', '.join(sorted(commits))};"
    yield f"{'; '.join(sorted(versions))}."


def draw_scores(rows: pd.DataFrame, across: str = "bytes_ideal", split: Sequence[str] = ()) -> Figure | None:
    """Draw each suite's headline scores against a column, with 95 % intervals and floors; None without any.

    Across budgets a line joins the scores of a candidate, in panels of the suites that think.

    Args:
        rows: results.parquet of the report.
        across: the column on the x axis, such as `width_ratio`.
        split: the columns whose values share a colour; none: what was done to the model.
    """
    whole = rows[(rows["difficulty"] == "all") & competes(rows)]
    panels = _panels(whole, across)
    if not panels:
        return None
    labels = list(dict.fromkeys(_label(row, split) for chosen in panels for row in records(chosen)))
    colours = dict(zip(labels, _palette(labels, split), strict=True))
    with rc_context(STYLE):
        columns = min(3, len(panels))
        lines = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(max(6.4, 4.2 * columns), 0.4 + 3.3 * lines), layout="constrained")
        grid = [figure.add_subplot(lines, columns, place + 1) for place in range(len(panels))]
        for axis, chosen in zip(grid, panels, strict=True):
            suite, metric = chosen["suite"].iloc[0], chosen["metric"].iloc[0]
            axis.set_yscale("log" if metric == "perplexity" else "linear")
            for _, one in chosen.groupby("candidate", sort=False):
                colour = colours[_label(one.iloc[0].to_dict(), split)]
                x = one[across] / (1e6 if across in _SIZES else 1)
                axis.errorbar(
                    x, one["value"], 1.96 * one["stderr"], linestyle="-", linewidth=1, marker="o",
                    markersize=4, elinewidth=0.8, color=colour,
                )  # fmt: skip
            if metric == "perplexity":
                reach = 1.96 * chosen["stderr"]
                scale_perplexities(axis, (chosen["value"] - reach).min(), (chosen["value"] + reach).max())
            elif chosen["floor"].notna().any():
                axis.axhline(chosen["floor"].dropna().iloc[0], color="#777777", linestyle=":", linewidth=1)
            if across == "budget":
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_locator(FixedLocator(sorted(set(chosen[across]))))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set(title=f"{suite}: {metric}", xlabel=_SIZES.get(across, across.replace("_", " ")))
            axis.grid(alpha=0.25, linewidth=0.5)
        handles = [
            Line2D([], [], color=colour, marker="o", linewidth=1, label=label)
            for label, colour in colours.items()
        ]
        handles.append(Line2D([], [], color="#777777", linestyle=":", linewidth=1, label="floor"))
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(2 * columns + 1, len(handles)),
            frameon=False,
        )
        return figure


def _panels(whole: pd.DataFrame, across: str) -> list[pd.DataFrame]:
    """Return the rows of each panel: a headline measure, or all budgets of one."""
    if across != "budget":
        by = by_measure(whole)
        return [by[measure].sort_values(across) for measure in headline_measures(whole)]
    thought = whole[whole["budget"].notna()]
    heads = [
        thought[[measure_of(row)[:-1] == head[:-1] for row in records(thought)]]
        for head in headline_measures(thought)
    ]
    return [rows.sort_values("budget") for rows in heads if rows["budget"].nunique() > 1]


def _label(row: Mapping[Any, Any], split: Sequence[str]) -> str:
    if not split:
        return family(row)
    if family(row) == "dense" and "base" not in split:
        return "dense"
    return " ".join(str(row[column]) for column in split if not pd.isna(row[column]))


def _palette(labels: Sequence[str], split: Sequence[str]) -> list[str]:
    if not split:
        return [COLOURS[label] for label in labels]
    shades = itertools.cycle(["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"])
    return ["#000000" if label == "dense" else next(shades) for label in labels]


def save(figure: Figure, at: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    with rc_context(STYLE):
        figure.savefig(at, dpi=110, metadata={"Software": None})


def _number(value: float | None) -> str:
    """Return a number with three digits, and nothing for none."""
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
