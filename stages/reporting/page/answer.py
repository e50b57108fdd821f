"""Answer what to ship, from the words that every headline score has.

- Ship: the smallest model whose every score is surely within the margin of the base's. That is `same within
  the margin`, `better` or `slightly better`; or `slightly worse` where the loss, though sure, is also surely
  smaller than the margin.
- Smallest acceptable: the smallest model of which no score is `worse`. Scores that are not settled may still
  hide a loss, so the answer counts them.
- Avoid: a model with a score that is `worse`, and one of these:
  - another model, no larger and not to be avoided itself, scores at least as well everywhere;
  - that score surely lost more than half, of the reference's points above the floor or of the probability of
    a token, which is twice the perplexity;
  - that score has a floor, and wherever the reference is clearly above its floor, the model is not.

Candidates that `report.noise` lists as draws of one recipe count as one model, each score by its worst draw,
so that no answer rests on a lucky one.

Only models smaller than the base count. Every answer that the page's controls can ask for is computed here,
so that the page and its controls cannot disagree.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stages.core.tables import MEASURE
from stages.reporting.collect import Measure, measure_of, records
from stages.reporting.comparison import Comparison
from stages.reporting.judging import repeats_of
from stages.reporting.margins import OPEN, SAME, margin_of
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.words import SHARES, compact, share, short, size

MARGINS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Margins to choose from, beside the one of params.yaml."""
BUDGETED = {"bytes_on_disk": "on disk", "bytes_ideal": "ideal"}
"""The sizes that a budget may limit."""
_NEEDED = [
    "candidate",
    "reference",
    *MEASURE,
    "higher_is_better",
    "value",
    "reference_value",
    "floor",
    "retention_low",
    "retention_high",
    "delta",
    "change",
    "low",
    "high",
    "p_same",
    "verdict",
]
_HALF = 0.5
"""A model is to be avoided if a score surely keeps less than this share of the reference's."""
_NAMED = 4
"""Models or scores that a line names at most."""


@dataclass(frozen=True)
class Advice:
    """A line of an answer: what it says first, the candidate it is about, and the rest."""

    head: str
    candidate: str | None
    text: str


@dataclass(frozen=True)
class _Model:
    """A candidate with its headline scores, by measure."""

    candidate: str
    sizes: dict[str, float]
    scores: dict[Measure, dict[str, Any]]
    draws: int = 1
    """How many candidates it stands for, by their worst."""

    @property
    def drawn(self) -> str:
        return f" (worst of {self.draws} draws)" if self.draws > 1 else ""

    @property
    def held(self) -> list[Measure]:
        """The scores that are surely within the margin."""
        return [measure for measure, row in self.scores.items() if _held(row)]

    @property
    def worse(self) -> list[Measure]:
        return [measure for measure, row in self.scores.items() if row["verdict"] == "worse"]

    @property
    def judged(self) -> bool:
        """Whether every score has a word that a test gave."""
        return bool(self.scores) and all(
            row["verdict"] not in ("", "untested") and row["change"] is not None
            for row in self.scores.values()
        )

    def largest_loss(self, margin: float) -> tuple[float, Measure]:
        """Return the largest loss, in margins, and where it is the largest of those that are shown."""
        losses = {
            measure: (-1 if row["higher_is_better"] else 1) * row["change"] / margin_of(row["metric"], margin)
            for measure, row in self.scores.items()
        }
        shown = {measure: losses[measure] for measure in self.worse} or losses
        return max(losses.values()), max(shown, key=shown.__getitem__)


def _held(row: dict[str, Any]) -> bool:
    if row["verdict"] == "slightly worse":
        return row["p_same"] is not None and row["p_same"] <= LEVEL
    return row["verdict"] in (SAME, "better", "slightly better")


class Recommendations:
    """The answers to every margin, kind of size and budget."""

    def __init__(
        self,
        comparison: Comparison,
        label: dict[Measure, str],
        margin: float,
        noise: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Judge every model by every margin.

        Args:
            noise: which candidates repeat each other, as in `report.noise`.
        """
        self.margins = sorted({*MARGINS, margin})
        self._noise = noise or {}
        self._label = label
        facts = comparison.rows.drop_duplicates("candidate").set_index("candidate")
        self._sizes = {kind: facts[kind].astype("float64").to_dict() for kind in BUDGETED}
        rows = {at: comparison.at_margin(at)[_NEEDED] for at in self.margins}
        known = rows[margin].dropna(subset=["reference"])
        self.references = [str(name) for name in dict.fromkeys(known["reference"])]
        self._models = {
            (name, at): self._compared(judged, name)
            for at, judged in rows.items()
            for name in self.references
        }
        compared = known["candidate"].unique()
        self.budgets = {
            kind: sorted({_rounded_up(self._sizes[kind][name]) for name in compared}) for kind in BUDGETED
        }

    def of(
        self, reference: str, margin: float, kind: str = "bytes_on_disk", budget: float = math.inf
    ) -> list[Advice]:
        """Return the answer for the candidates compared with `reference`.

        Args:
            margin: one of `margins`.
            kind: one of `BUDGETED`.
            budget: the most bytes of that kind.
        """
        whole = self._sizes[kind][reference]
        models = self._models[reference, margin]
        fitting = sorted(
            (model for model in models if model.sizes[kind] < whole and model.sizes[kind] <= budget),
            key=lambda model: (model.sizes[kind], -len(model.held)),
        )
        limit = "" if math.isinf(budget) else f" of at most {size(budget)} {BUDGETED[kind]}"
        if not fitting:
            nothing = f"no model{limit or ' here'} is smaller than {short(reference)}."
            return [Advice("Nothing to ship", None, nothing)]
        within = share_of(margin)

        def smaller(model: _Model) -> str:
            count = model.sizes[kind]
            return f"{share(1 - count / whole)} smaller ({size(count)} {BUDGETED[kind]})"

        judged = [model for model in fitting if model.judged]
        lines = []
        if best := next((model for model in judged if len(model.held) == len(model.scores)), None):
            lines.append(
                Advice("Ship", best.candidate, f"{smaller(best)}, {self._within(best, within)}{best.drawn}.")
            )
        else:
            none = f"no smaller model{limit} is shown to be the same within {within} on every score."
            lines.append(Advice("Ship none yet", None, none))
        if best := next((model for model in judged if not model.worse), None):
            text = f"{smaller(best)}, {self._open(best, within)}{best.drawn}."
            lines.append(Advice("Smallest acceptable", best.candidate, text))
        else:
            untested = " or was not tested" if len(judged) < len(fitting) else ""
            text = f"none{limit}: each is worse by more than {within} on a score{untested}"
            lines.append(Advice("Smallest acceptable", None, f"{text}{self._mildest(judged, margin)}."))
        allowed = [model for model in models if model.sizes[kind] <= budget]
        if avoided := self._avoided(allowed, kind, reference, whole):
            drawn = {model.candidate: model.drawn for model in allowed}
            named = [f"{_listed(bad, drawn)} ({why})" for why, bad in avoided.items()]
            lines.append(Advice("Avoid", None, f"{'; '.join(named)}."))
        return lines

    def _avoided(
        self, models: Sequence[_Model], kind: str, reference: str, whole: float
    ) -> dict[str, list[str]]:
        """Return the models to avoid, by the reason."""
        lost = {model.candidate: why for model in models if (why := self._lost(model))}
        drawn = {model.candidate: model.drawn for model in models}
        beaten = _beaten(models, kind, reference, whole, lost)
        groups: dict[str, list[str]] = {}
        for name in drawn:
            if (good := beaten.get(name)) is not None:
                why = f"{short(good)}{drawn.get(good, '')} is no larger and scores no worse"
                groups.setdefault(why, []).append(name)
            elif name in lost:
                groups.setdefault(lost[name], []).append(name)
        return groups

    def _lost(self, model: _Model) -> str:
        """Say how a model lost more than its size can be worth; empty where it did not."""
        most = {
            measure: kept
            for measure in model.worse
            if (kept := _kept_at_most(model.scores[measure])) is not None and kept < _HALF
        }
        if most:
            return f"surely lost more than half on {self._name(min(most, key=most.__getitem__))}"
        graded = {m: row for m, row in model.scores.items() if row["retention_low"] is not None}
        guesses = all(row["retention_low"] <= 0 for row in graded.values())
        if guesses and not graded.keys().isdisjoint(model.worse):
            return "not clearly above the floor on any score"
        return ""

    def _mildest(self, models: Sequence[_Model], margin: float) -> str:
        """Name the model that loses least, and the score that is shown to be worse on which it loses most."""
        if not models:
            return ""
        best = min(models, key=lambda model: model.largest_loss(margin)[0])
        most = self._name(best.largest_loss(margin)[1])
        return f"; {short(best.candidate)}{best.drawn} loses least, most of it on {most}"

    def controls(self) -> dict[str, Any]:
        """Return every answer, as the page's controls look them up.

        Returns:
            `texts`, each distinct answer as a list of [head, candidate, text]; and `answers`, by reference,
            kind and margin, a list with the place in `texts` for each budget, the last for no budget.
        """
        texts: list[list[list[str | None]]] = []
        places: dict[str, int] = {}
        answers: dict[str, dict[str, list[list[int]]]] = {}
        for reference in self.references:
            for kind in BUDGETED:
                for margin in self.margins:
                    row = []
                    for budget in (*self.budgets[kind], math.inf):
                        lines = [
                            [x.head, x.candidate, x.text] for x in self.of(reference, margin, kind, budget)
                        ]
                        if (key := repr(lines)) not in places:
                            places[key] = len(texts)
                            texts.append(lines)
                        row.append(places[key])
                    answers.setdefault(reference, {}).setdefault(kind, []).append(row)
        return {"texts": texts, "answers": answers}

    def _compared(self, rows: pd.DataFrame, reference: str) -> list[_Model]:
        chosen = rows[rows["candidate"].isin(rows[rows["reference"] == reference]["candidate"])]
        groups: dict[tuple[str, ...], list[_Model]] = {}
        for candidate, group in chosen.groupby("candidate", sort=False):
            name = str(candidate)
            sizes = {kind: self._sizes[kind][name] for kind in BUDGETED}
            model = _Model(name, sizes, {measure_of(row): row for row in records(group)})
            groups.setdefault(repeats_of(name, self._noise) or (name,), []).append(model)
        return [_worst(models) for models in groups.values()]

    def _name(self, measure: Measure) -> str:
        return f"{measure[0]} ({self._label[measure]})"

    def _within(self, model: _Model, within: str) -> str:
        words = [row["verdict"] for row in model.scores.values()]
        count = len(words)
        if set(words) == {SAME}:
            return f"same within {within} on {'the one score' if count == 1 else f'all {count} scores'}"
        counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        scores = "the one score" if count == 1 else f"any of {count} scores"
        return f"no loss beyond {within} on {scores} ({counted})"

    def _open(self, model: _Model, within: str) -> str:
        unsettled = [m for m in model.scores if m not in model.held]
        if not unsettled:
            return f"every score surely within {within}"
        named = _counted([f"{self._name(m)} {_doubt(model.scores[m])}" for m in unsettled])
        return (
            f"no score shown worse by more than {within}, but {len(unsettled)} of {len(model.scores)} "
            f"not shown the same: {named}"
        )


def _worst(draws: Sequence[_Model]) -> _Model:
    """Return one model in place of draws of one recipe: the first's name, and the worst of all of them."""
    measures = dict.fromkeys(measure for model in draws for measure in model.scores)
    return _Model(
        draws[0].candidate,
        {kind: max(model.sizes[kind] for model in draws) for kind in BUDGETED},
        {
            measure: max((m.scores[measure] for m in draws if measure in m.scores), key=_badness)
            for measure in measures
        },
        len(draws),
    )


def _badness(row: dict[str, Any]) -> tuple[bool, bool, bool, float]:
    """Return what orders the scores of draws, the largest the worst; a score without a test comes last."""
    tested = row["verdict"] not in ("", "untested") and row["change"] is not None
    loss = (-1 if row["higher_is_better"] else 1) * row["change"] if tested else math.inf
    return not tested, row["verdict"] == "worse", not _held(row), loss


def _rounded_up(count: float) -> float:
    """Round bytes up to a tenth of a megabyte, in which budgets are named."""
    return math.ceil(count / 1e5) * 1e5


def share_of(margin: float) -> str:
    """Format a margin: 0.005 is `0.5 %`."""
    return f"{compact(100 * margin)} %"


def _doubt(row: dict[str, Any]) -> str:
    return "not settled" if row["verdict"] == OPEN else str(row["verdict"])


def _listed(candidates: Sequence[str], drawn: Mapping[str, str]) -> str:
    return _counted([short(name) + drawn[name] for name in candidates])


def _counted(names: Sequence[str]) -> str:
    """Join names; of many only the first, with the number of the others, which is never one."""
    if len(names) <= _NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"


def _beaten(
    models: Sequence[_Model], kind: str, reference: str, whole: float, lost: Collection[str]
) -> dict[str, str]:
    """Return the models that are beaten, each with the one to prefer: no larger, nowhere worse.

    Args:
        lost: models that are to be avoided for another reason, which none is preferred to.
    """
    beaten_by: dict[str, list[_Model]] = {}
    for bad in models:
        if bad.worse:
            beaten_by[bad.candidate] = [
                good
                for good in models
                if good is not bad and good.sizes[kind] <= bad.sizes[kind] and _covers(good, bad)
            ]
    preferred = {}
    for bad in models:
        if good := [
            other
            for other in beaten_by.get(bad.candidate, [])
            if not beaten_by.get(other.candidate) and other.candidate not in lost
        ]:
            best = max(good, key=lambda model: (len(model.held), -model.sizes[kind]))
            preferred[bad.candidate] = best.candidate
        elif bad.worse and whole <= bad.sizes[kind] and not any(map(_gained, bad.scores.values())):
            preferred[bad.candidate] = reference
    return preferred


def _kept_at_most(row: dict[str, Any]) -> float | None:
    """Return the upper end of the share of the reference's score that is kept, None where undefined.

    It is that of the points above the floor, and for a perplexity that of the probability of a token.
    """
    if row["floor"] is not None:
        return float(row["retention_high"]) if row["retention_high"] is not None else None
    if row["low"] is None:
        return None
    if row["metric"] == "perplexity":
        return math.exp(-row["low"])
    if row["metric"] in SHARES and row["reference_value"] > 0:
        return float(1 + row["high"] / row["reference_value"])
    return None


def _gained(row: dict[str, Any]) -> bool:
    return row["delta"] is None or ((row["delta"] > 0) == bool(row["higher_is_better"]) and row["delta"] != 0)


def _covers(good: _Model, bad: _Model) -> bool:
    """Tell whether a model scores at least as well as another on every score, and better on one."""
    if not bad.scores.keys() <= good.scores.keys():
        return False
    leads = []
    for measure, row in bad.scores.items():
        ours, theirs = good.scores[measure]["value"], row["value"]
        if ours is None or theirs is None:
            return False
        leads.append((ours - theirs) * (1 if row["higher_is_better"] else -1))
    return min(leads) >= 0 and max(leads) > 0
