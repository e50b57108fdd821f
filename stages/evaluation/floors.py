"""Floors: the best score that a responder without knowledge gets on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

from stages.core.tables import MEASURE

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from stages.evaluation.suite import SuiteRows

_measure_of = attrgetter(*(column for column in MEASURE if column != "suite"))


def with_floors(lm: LM, seed: int, ask: Callable[[LM], SuiteRows]) -> SuiteRows:
    """Return the rows of `lm`, with the floor of each score.

    Where one of several choices is right, chance is known, and a responder raises the floor only if over all
    items it is two standard errors above chance: on the few items of a level the best of several responders
    would nearly always be above it by luck. A metric without a highest score, such as perplexity, has no
    floor.

    Args:
        ask: asks a model, or a responder in its place.
    """
    from stages.evaluation import null, requests  # they import lm-eval

    scores, samples = ask(lm)
    if isinstance(lm, requests.Recorder):  # its scores are not read
        return scores, samples
    floors = {(_measure_of(score), score.difficulty): score.floor for score in scores}
    for responder in null.for_readouts({score.readout for score in scores}, lm.tokenizer, seed):
        responder_scores, _ = ask(responder)
        beyond_luck = {
            _measure_of(score)
            for score in responder_scores
            if score.difficulty == "all"
            and (score.floor is None or score.value > score.floor + 2 * (score.stderr or 0))
        }
        for score in responder_scores:
            measure = _measure_of(score)
            if score.higher_is_better and measure in beyond_luck:
                floor = floors[measure, score.difficulty]
                floors[measure, score.difficulty] = max(score.value, -math.inf if floor is None else floor)
    return [replace(score, floor=floors[_measure_of(score), score.difficulty]) for score in scores], samples
