"""Names in studies: candidates, suites, levels, budgets, metrics and controls must exist."""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.evaluation.graded import METRICS, GradedSuite
from stages.evaluation.perplexity import PerplexitySuite
from stages.evaluation.suite import Suite
from stages.job.params import Params
from stages.job.sentences import allowed
from stages.reporting.hypotheses.readout import Readout
from stages.reporting.hypotheses.tested import Tested
from stages.reporting.study import Study
from stages.sources.graded.items import GradedData

ENTROPY = "entropy"
_TRACES = ("tokens", "ended", "repetition", "self_bleu")
"""Metrics of thoughts, which no other metric counts."""


def of_studies(params: Params, broken: set[str]) -> Iterator[str]:
    """Yield the mistakes of every study, and of the report's reference and noise.

    Args:
        broken: data sets with mistakes of their own, whose levels are not known.
    """
    known = list(params.evaluate.candidates)
    if params.report.reference not in (None, *known):
        yield f"report.reference: {_unknown(params.report.reference, known)}"
    yield from _of_repeats(params)
    for name, study in params.studies.items():
        at = f"studies.{name}.hypotheses"
        yield from _of_controls(at, study)
        for key in study.no_data:
            if key in study.hypotheses:
                yield f"studies.{name}.no_data.{key}: it is among hypotheses too; remove it from either."
        for key, hypothesis in study.hypotheses.items():
            for mistake in _of_hypothesis(hypothesis, params, broken):
                yield f"{at}.{key}: {mistake}"


def _unknown(name: str | None, known: Sequence[str]) -> str:
    return f"{name!r} is not among evaluate.candidates; {allowed(known, name)}."


def _of_repeats(params: Params) -> Iterator[str]:
    """Yield repeats that are not evaluated, are listed twice, or differ in more than seeds."""
    known = list(params.evaluate.candidates)
    first: dict[str, str] = {}
    for group, names in params.report.noise.items():
        at = f"report.noise.{group}"
        for name in names:
            if name not in known:
                yield f"{at}: {_unknown(name, known)}"
            if name in first:
                yield f"{at}: {name} is in {first[name]} already; list each candidate once."
            first.setdefault(name, group)
        others = [name for name in names if _seedless(name, params) != _seedless(names[0], params)]
        if others:
            yield (
                f"{at}: {', '.join(others)} and {names[0]} differ in more than seeds; list recipes that are "
                "equal but for the seeds of their calibration or training, and of their sources'."
            )
        elif len({repr(_lineage(name, params)) for name in names}) < len(set(names)):
            yield f"{at}: some of these are equal in every setting; give each another seed."


def _lineage(artifact: str, params: Params) -> list[Any]:
    """Return the base of an artifact and the settings of every recipe on the way, sources left out."""
    recipes = params.recipes()
    chain = params.lineage(artifact)
    steps = [recipes[name].model_dump(mode="json", exclude={"source"}) for name in chain if name in recipes]
    return [chain[-1], *steps]


def _seedless(artifact: str, params: Params) -> Any:
    """Return `_lineage` without seeds."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key != "seed"}
        return list(map(without, value)) if isinstance(value, list) else value

    return without(_lineage(artifact, params))


def _of_controls(at: str, study: Study) -> Iterator[str]:
    for key, hypothesis in study.hypotheses.items():
        trail, control = [key], hypothesis.control
        while control in study.hypotheses and control not in trail:
            trail.append(control)
            control = study.hypotheses[control].control
        if control == key:
            yield f"{at}.{key}.control: a cycle, {' <- '.join([*trail, key])}; leave a control out."
        elif (
            hypothesis.control in study.hypotheses
            and study.hypotheses[hypothesis.control].measured()
            and not hypothesis.measured()
        ):
            yield (
                f"{at}.{key}.control: {hypothesis.control} reads measurements, which vary from run to run, "
                f"and {key} reads scores only; leave the control out."
            )
        elif hypothesis.control not in (None, *study.hypotheses):
            others = [other for other in study.hypotheses if other != key]
            yield (
                f"{at}.{key}.control: there is no hypothesis {hypothesis.control!r} in this study; "
                f"{allowed(others, hypothesis.control)}."
            )


def _of_hypothesis(hypothesis: Tested, params: Params, broken: set[str]) -> Iterator[str]:
    yield from hypothesis.mistakes()
    known = list(params.evaluate.candidates)
    for name in dict.fromkeys([*hypothesis.candidates_read(), *filter(None, [hypothesis.reference])]):
        if name not in known:
            yield _unknown(name, known)
    yield from _of_measured(hypothesis, params)
    for readout in hypothesis.readouts_read():
        yield from _of_readout(readout, params, broken)


def _of_measured(hypothesis: Tested, params: Params) -> Iterator[str]:
    profiled, sizes = params.profile.candidates, params.profile.batch_sizes
    for name in dict.fromkeys(candidate for candidate, _ in hypothesis.measured()):
        if name not in profiled:
            yield f"{name!r} is not among profile.candidates, which are measured; {allowed(profiled, name)}."
    for size in dict.fromkeys(size for _, size in hypothesis.measured()):
        if size not in sizes:
            listed = ", ".join(map(str, sizes))
            yield f"batch size {size} is not among profile.batch_sizes; allowed: {listed}."


def _of_readout(readout: Readout, params: Params, broken: set[str]) -> Iterator[str]:
    suites = params.suites.by_name()
    suite = suites.get(readout.suite)
    if suite is None:
        yield f"there is no suite {readout.suite!r}; {allowed(suites, readout.suite)}."
        return
    scored = params.suites.dataset_of(readout.suite)
    dataset = params.datasets.get(scored)
    levels = [level.name for level in dataset.levels] if isinstance(dataset, GradedData) else []
    if readout.level not in ("all", *levels) and scored not in broken:
        yield f"{readout.suite} has no level {readout.level!r}; {allowed(['all', *levels], readout.level)}."
    thinking = getattr(suite, "thinking", None)
    budgets = list(thinking.budgets) if thinking else []
    if readout.budget is not None and readout.budget not in budgets:
        listed = ", ".join(map(str, budgets)) or "none, as the suite does not think"
        yield f"{readout.suite} has no budget {readout.budget}; allowed: {listed}."
    elif readout.budget is None and len(budgets) > 1:
        yield f"{readout.suite} thinks under several budgets; add budget: {', '.join(map(str, budgets))}."
    if not (metrics := _metrics(suite)):
        return  # lm-eval alone knows the rest
    if readout.metric not in metrics:
        yield f"{readout.suite} has no metric {readout.metric!r}; {allowed(metrics, readout.metric)}."
        return
    possible = {"readout": _readouts_of(suite, readout.metric), "filter": []}
    possible["counted"] = ["exact_match"] if thinking and readout.metric not in _TRACES else []
    if isinstance(suite, GradedSuite):
        possible["task"] = [readout.suite]
    for field, values in possible.items():
        value = getattr(readout, field)
        if value is not None and value not in values:
            yield (
                f"{readout.suite} {readout.metric} has no {field} {value!r}; "
                f"{f'leave it out, or say {values[0]}' if values else 'leave it out'}."
            )


def _readouts_of(suite: Suite, metric: str) -> list[str]:
    """Return the readout that a metric of a graded or perplexity suite is of."""
    if isinstance(suite, GradedSuite) and metric != ENTROPY:
        return [next((name for name, of in METRICS.items() if of == metric), "generation")]
    return ["likelihood"]


def _metrics(suite: Suite) -> list[str]:
    """Return the metrics of a suite; none if only lm-eval knows them, so that the report must check."""
    if isinstance(suite, PerplexitySuite):
        more = ["kl", "same_top"] if suite.divergence else []  # of the others there are no scores by item
        return ["perplexity", *more]
    if not isinstance(suite, GradedSuite):
        return []
    if suite.thinking is None:
        asked = suite.asked()
        return [*(METRICS[readout] for readout in asked), *([ENTROPY] if "likelihood" in asked else [])]
    draws = suite.thinking.draws
    powers = {2**power for power in range(draws.bit_length())} | {draws}
    return [
        *(f"pass@{k}" for k in sorted(powers)), *([f"maj@{draws}", "self_bleu"] if draws > 1 else []),
        *(trace for trace in _TRACES if trace != "self_bleu"),
    ]  # fmt: skip
