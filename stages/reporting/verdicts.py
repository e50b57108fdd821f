"""Judge the hypotheses of every study: Holm's correction, floors, noise and controls limit what p says.

Hypotheses on measurements (speed, memory) are corrected among themselves: measured again they change, and a
verdict on scores must not change with them.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from stages.core.errors import Refusal
from stages.reporting.collect import Results
from stages.reporting.hypotheses.cells import Cells
from stages.reporting.hypotheses.evidence import Evidence, Verdict
from stages.reporting.hypotheses.tested import Tested
from stages.reporting.measured import Measured
from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.study import Study
from stages.reporting.words import p_value


def judge_studies(
    results: Results,
    studies: Mapping[str, Study],
    noise: Mapping[str, tuple[str, ...]] | None = None,
    measured: Measured | None = None,
) -> list[Verdict]:
    """Return a verdict for every hypothesis, in the order of params.yaml; those without data last.

    A hypothesis that cannot be tested, because its scores are missing, not finite or too few, is undecided
    and says so; it takes no other down.

    Args:
        noise: which candidates repeat each other, as in `report.noise`.
    """
    if not studies:
        return []
    cells = Cells(results, noise, measured)
    verdicts: list[Verdict] = []
    for name, study in studies.items():
        findings = {key: _evidence(hypothesis, cells) for key, hypothesis in study.hypotheses.items()}
        verdicts += [*_judged(name, study, findings).values(), *_untested(name, study)]
    return verdicts


def _untested(name: str, study: Study) -> list[Verdict]:
    """Return an undecided verdict for every hypothesis without data."""
    nothing = Evidence(effect=None, unit="", p=None, side=None, n=0)
    return [
        Verdict(
            study=name, hypothesis=key, test="none", claim=missing.claim, verdict="undecided",
            finding=nothing, p_holm=None, control=None, why=f"no data: {missing.why}",
        )
        for key, missing in study.no_data.items()
    ]  # fmt: skip


def _evidence(hypothesis: Tested, cells: Cells) -> Evidence:
    """Test a hypothesis; data that cannot be tested, such as too few items, block it."""
    try:
        return hypothesis.judge(cells)
    except Refusal as refusal:
        return Evidence(effect=None, unit="", p=None, side=None, n=0, blocked=str(refusal).rstrip("."))


def _judged(name: str, study: Study, findings: Mapping[str, Evidence]) -> dict[str, Verdict]:
    corrected: dict[str, float] = {}
    for measured in (False, True):
        family = [key for key in findings if bool(study.hypotheses[key].measured()) == measured]
        p_values = [math.nan if (p := findings[key].p) is None else p for key in family]
        corrected |= dict(zip(family, holm(p_values), strict=True))
    verdicts: dict[str, Verdict] = {}

    def judge(key: str) -> Verdict:
        if key not in verdicts:
            hypothesis = study.hypotheses[key]
            control = judge(hypothesis.control) if hypothesis.control else None
            verdicts[key] = _verdict(name, key, hypothesis, findings[key], corrected[key], control)
        return verdicts[key]

    return {key: judge(key) for key in findings}


def _verdict(
    study: str, key: str, hypothesis: Any, finding: Evidence, p_holm: float, control: Verdict | None
) -> Verdict:
    held = f"{control.hypothesis}: {control.verdict}" if control else None
    p = None if math.isnan(p_holm) else p_holm
    verdict: Literal["supported", "contradicted", "undecided"] = "undecided"
    if finding.blocked:
        why = f"{finding.blocked}."
    elif p is None or finding.side is None:
        why = "nothing could be tested."
    elif control and control.verdict != "supported":
        why = f"its control {control.hypothesis} is {control.verdict}."
    elif p > LEVEL:
        why = f"{p_value(p)} after correction; {finding.n} {finding.units} show {_shown(finding)}."
    else:
        verdict = finding.side
        why = f"{p_value(p)} after correction, for an effect of {finding.effect:.3g} {finding.unit}."
    return Verdict(
        study=study, hypothesis=key, test=hypothesis.test, claim=hypothesis.claim, verdict=verdict,
        finding=finding, p_holm=p, control=held, why=why, measured=bool(hypothesis.measured()),
    )  # fmt: skip


def _shown(finding: Evidence) -> str:
    if finding.smallest is None:
        return "no effect of known size"
    return f"{finding.smallest:.3g} {finding.unit} at best"


def nested_verdicts(verdicts: list[Verdict]) -> dict[str, Any]:
    """Return verdicts as `{study: {hypothesis: {...}}}`, of numbers and texts, for `dvc metrics`."""
    nested: dict[str, Any] = {}
    for verdict in verdicts:
        finding = verdict.finding
        nested.setdefault(verdict.study, {})[verdict.hypothesis] = {
            "verdict": verdict.verdict,
            "effect": _number(finding.effect),
            "low": _number(finding.low),
            "high": _number(finding.high),
            "unit": finding.unit,
            "claim_low": _number(finding.claimed[0]),
            "claim_high": _number(finding.claimed[1]),
            "p": _number(finding.p),
            "p_holm": _number(verdict.p_holm),
            finding.units: finding.n,
            "smallest": _number(finding.smallest),
            "floors": finding.floors,
            "noise": _number(finding.noise),
            "over_repeats": _number(finding.repeats.value if finding.repeats else None),
            "noise_of_repeats": _number(finding.repeats.noise if finding.repeats else None),
            "control": verdict.control,
            "why": verdict.why,
        }
    return nested


def _number(value: float | None) -> float | None:
    """Return a number that JSON has, which NaN and infinity are not."""
    return float(value) if value is not None and math.isfinite(value) else None
