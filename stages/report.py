"""Report: every score of every candidate in one table, one page and one picture."""

from stages.core.files import REPORT, writing
from stages.job.entry import entry
from stages.reporting import agreement, collect, comparison, export, figures, page
from stages.reporting.scope import Scope


def report(scope: Scope) -> None:
    """Write data/report: tables, metrics, data for plots, figures, and index.html."""
    results = collect.collect(scope.evaluations, scope.candidates, scope.suites)
    compared, alike = comparison.compare(results), agreement.agreement(results)
    drawn = {"quality": figures.quality(compared), "difficulty": figures.difficulty(compared)}
    with writing(REPORT) as folder:
        export.write(folder, results, compared, alike)
        pictures = {
            stem: figures.write(figure, folder / stem) for stem, figure in drawn.items() if figure is not None
        }
        (folder / "index.html").write_text(page.render(scope, results, compared, alike, pictures))


if __name__ == "__main__":
    entry(report)
