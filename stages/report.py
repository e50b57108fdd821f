"""Report: all scores of all candidates as tables, metrics, figures and a page."""

from stages.core.files import REPORT, write_text, writing
from stages.job.entry import entry
from stages.reporting import agreement, collect, comparison, export, figures, verdicts
from stages.reporting.effects import draw_effects
from stages.reporting.measured import read_measured
from stages.reporting.page import rendering
from stages.reporting.scope import Scope
from stages.reporting.wrong import wrong_answers


def report(scope: Scope) -> None:
    """Write data/report: tables, metrics, data for plots, figures, and index.html."""
    results = collect.collect(scope.evaluations, scope.candidates, scope.suites)
    compared = comparison.compare_candidates(results, scope.report)
    agreements = agreement.agreement(results, scope.report.reference)
    wrong = wrong_answers(results.samples)
    measured = read_measured(scope.profiled)
    judged = verdicts.judge_studies(results, scope.studies, scope.report.noise, measured)
    drawn = {"quality": figures.draw_quality(compared), "difficulty": figures.draw_difficulty(compared)}
    with writing(REPORT) as folder:
        export.write_data(folder, results, compared, agreements, judged, measured, wrong)
        for stem, figure in drawn.items():
            if figure is not None:
                figures.save_figure(figure, folder / stem)
        effects = {
            study: figures.save_figure(figure, folder / f"effects-{study}")
            for study, entries in verdicts.nested_verdicts(judged).items()
            if (figure := draw_effects(entries)) is not None
        }
        text = rendering.render(scope, results, compared, agreements, judged, measured, wrong, effects)
        write_text(folder / "index.html", text)


if __name__ == "__main__":
    entry(report)
