"""Test-time scaling: the gain from more thinking and more draws, with a task asked at every budget and draw.

For each budget (see `stages.evaluation.thinking.budget`), from the n draws of each item (see
`stages.evaluation.draws`):

- pass@k for k = 1, 2, 4, ... and n, and maj@n, for each metric of the task that is right or wrong.
- tokens: everything the model generated for an answer. Two models rarely cost the same at one budget: a
  damaged model thinks on, or stops at once.
- ended: the share of thinking that ended by itself.
- repetition of the thinking, and self_bleu of the draws' thinking: identical draws gain nothing.

`stages.evaluation.thinking.judged` picks the metrics that count and the part of an answer that is compared,
which votes are on; both are the same for every model. A sample row is a draw (metric `draw`) or an item's
score; error bars are over items.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.errors import Refusal
from stages.core.tables import Sample, Score
from stages.evaluation.draws import majority, pass_at_k, repetition, self_bleu
from stages.evaluation.lm_tasks import run_tasks
from stages.evaluation.means import mean, standard_error
from stages.evaluation.shared import SharedPrefixLM
from stages.evaluation.task_rows import answers_of, rows_of
from stages.evaluation.thinking.budget import BudgetLM, Reply
from stages.evaluation.thinking.judged import Reading, compared, right_or_wrong
from stages.evaluation.thinking.settings import Thinking

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    from stages.evaluation.suite import SuiteRows

_FEWER_IS_BETTER = ("tokens", "repetition", "self_bleu")


def score_draws(
    lm: LM,
    thinking: Thinking,
    tasks: Sequence[Task],
    *,
    name: str,
    limit: int | None,
    chat_template: bool,
    seed: int,
    penalties: Mapping[str, float],
    execute_code: bool = False,
    read: Reading | None = None,
) -> SuiteRows:
    """Score every budget, the largest first, overall and by difficulty; samples are draws and items.

    Args:
        lm: a model, or a responder without knowledge; that answers without thinking and always the same, so
            it is asked once.
        tasks: lm-eval's task, or those of a group; answered by generation, and right or wrong.
        name: the task's name in the result tables.
        penalties: options of `generate` for thoughts and answers.
        read: the part of a filtered answer that votes are on; None: the part that the task compares.

    Raises:
        Refusal: the task is answered by likelihood, none of its metrics is right or wrong, or a prompt and
            its budget are longer than the model reads.
    """
    if any(task.OUTPUT_TYPE != "generate_until" for task in tasks):
        raise Refusal(f"{name} is answered by likelihood, which involves no thinking; leave thinking out.")
    readings = {task.task_name: read or compared(task) for task in tasks}
    metrics = right_or_wrong(tasks)
    if not metrics:
        raise Refusal(f"{name} has no metric that is right or wrong, which draws need; leave thinking out.")

    def ask(lm: LM, reply_to: Callable[[str, str], Reply]) -> _Draw:
        result = run_tasks(
            lm, tasks, limit=limit, chat_template=chat_template, seed=seed, execute_code=execute_code
        )
        scores, samples = rows_of(
            result,
            list(readings),
            lm=lm,
            name=name,
            readout="generation",
            chat_template=chat_template,
            seed=seed,
            metrics=metrics,
        )
        return _Draw(scores, samples, *_votes_and_replies(result, readings, reply_to))

    items = sum(min(len(task.eval_docs), limit or sys.maxsize) for task in tasks)
    drawn = _draw_all(lm, thinking, seed, penalties, items, ask)
    scores: list[Score] = []
    samples: list[Sample] = []
    for budget in reversed(thinking.budgets):
        draws = drawn[budget]
        for place, counted in enumerate(draws[0].counted()):
            _check_truths(name, counted, draws)
            about = {"counted": counted.metric, "filter": counted.filter, "budget": budget}
            measured: list[tuple[dict[str, Any], dict[str, list[float]]]] = [(about, _counts(draws, counted))]
            if isinstance(lm, SharedPrefixLM) and place == 0:  # whatever is counted, thinking is the same
                unfiltered = {"counted": None, "filter": None, "budget": budget}
                measured.append((unfiltered, _traces(draws, thought=budget > 0)))
            for columns, by_metric in measured:
                scores += _scores(draws[0], counted, by_metric, columns, thinking)
                samples += _item_samples(draws[0], counted, by_metric, columns)
            samples += _draw_samples(draws, counted, about)
    return scores, samples


def _draw_all(
    lm: LM,
    thinking: Thinking,
    seed: int,
    penalties: Mapping[str, float],
    items: int,
    ask: Callable[[LM, Callable[[str, str], Reply]], _Draw],
) -> dict[int, list[_Draw]]:
    """Return all draws at every budget."""
    if not isinstance(lm, SharedPrefixLM):
        only = ask(lm, lambda _, answer: Reply("", 0, True, answer, len(lm.tok_encode(answer))))
        return {budget: [only] * thinking.draws for budget in thinking.budgets}
    thinker = BudgetLM(
        thinking,
        seed,
        penalties,
        kept_answers=lm.kept_answers,
        pretrained=lm.model,
        tokenizer=lm.tokenizer,
        batch_size=lm.batch_size,
        memory=lm.memory,
        device=str(lm.device),
    )
    drawn: dict[int, list[_Draw]] = {budget: [] for budget in thinking.budgets}
    with thinker.watched(items):
        for thinker.draw in range(thinking.draws):
            for thinker.budget in thinking.budgets:
                drawn[thinker.budget].append(ask(thinker, lambda prompt, _: thinker.replies[prompt]))
    return drawn


class _Counted(NamedTuple):
    """A metric of one answer, as one filter reads it."""

    metric: str
    filter: str | None


@dataclass(frozen=True)
class _Draw:
    """One draw of all answers at one budget."""

    scores: list[Score]
    samples: list[Sample]
    votes: Mapping[str | None, list[str]]
    """The vote of each item, by filter; "" is no vote."""
    replies: list[Reply]
    """The reply to each item."""

    def counted(self) -> list[_Counted]:
        """Return the metrics of one answer, filter by filter."""
        return list(dict.fromkeys(_Counted(sample.metric, sample.filter) for sample in self.samples))

    def scores_of(self, counted: _Counted) -> list[Score]:
        """Return a metric's score rows, overall and level by level."""
        return [score for score in self.scores if (score.metric, score.filter) == counted]

    def items_of(self, counted: _Counted) -> list[Sample]:
        """Return a metric's sample rows, an item each."""
        return [sample for sample in self.samples if (sample.metric, sample.filter) == counted]


def _votes_and_replies(
    result: Mapping[str, Any], readings: Mapping[str, Reading], reply_to: Callable[[str, str], Reply]
) -> tuple[dict[str | None, list[str]], list[Reply]]:
    """Return each item's vote by filter, and each item's reply.

    Args:
        readings: by task.
        reply_to: (prompt, answer) -> the reply.
    """
    filtered = list(answers_of(result, list(readings)))
    votes = {
        answers.column: [
            readings[task](item["doc"], str(item["filtered_resps"][0]))
            for task, item in zip(answers.tasks, answers.items, strict=True)
        ]
        for answers in filtered
    }
    items = filtered[0].items
    return votes, [reply_to(item["arguments"][0][0], str(item["resps"][0][0])) for item in items]


def _check_truths(name: str, counted: _Counted, draws: Sequence[_Draw]) -> None:
    if any(item.score not in (0, 1) for draw in draws for item in draw.items_of(counted)):
        raise Refusal(
            f"{name} gives partial scores for {counted.metric}, but draws are counted as right or wrong; "
            "leave thinking out."
        )


def _counts(draws: Sequence[_Draw], counted: _Counted) -> dict[str, list[float]]:
    """Return the metrics over draws that count a metric of one answer, an item each."""
    count = len(draws)
    right = list(zip(*([item.score for item in draw.items_of(counted)] for draw in draws), strict=True))
    votes = list(zip(*(draw.votes[counted.filter] for draw in draws), strict=True))
    values = {
        f"pass@{k}": [pass_at_k(count, sum(map(int, item)), k) for item in right]
        for k in sorted({2**power for power in range(count.bit_length())} | {count})
    }
    if count > 1:
        values[f"maj@{count}"] = [majority(*item) for item in zip(votes, right, strict=True)]
    return values


def _traces(draws: Sequence[_Draw], *, thought: bool) -> dict[str, list[float]]:
    """Return the metrics of thinking and its length, an item each.

    Args:
        thought: whether anything was thought.
    """
    items = list(zip(*(draw.replies for draw in draws), strict=True))
    values = {"tokens": [mean([r.thinking_tokens + r.answer_tokens for r in item]) for item in items]}
    if thought:
        values["ended"] = [mean([float(r.ended) for r in item]) for item in items]
        values["repetition"] = [mean([repetition(r.thinking) for r in item]) for item in items]
        if len(draws) > 1:
            values["self_bleu"] = [self_bleu([r.thinking for r in item]) for item in items]
    return values


def _scores(
    draw: _Draw,
    counted: _Counted,
    by_metric: Mapping[str, Sequence[float]],
    columns: Mapping[str, Any],
    thinking: Thinking,
) -> Iterator[Score]:
    """Yield the score rows of metrics over draws.

    Args:
        draw: any draw, whose rows have the tasks, items and levels.
        by_metric: the values of each metric, an item each.
    """
    items = draw.items_of(counted)
    for metric, values in by_metric.items():
        for score in draw.scores_of(counted):
            picked = [
                value
                for value, item in zip(values, items, strict=True)
                if score.difficulty in ("all", item.difficulty)
            ]
            yield replace(
                score,
                **columns,
                metric=metric,
                draws=thinking.draws,
                temperature=thinking.temperature,
                answer_when=thinking.answer_when,
                value=mean(picked),
                stderr=standard_error(picked),
                higher_is_better=metric not in _FEWER_IS_BETTER,
            )


def _item_samples(
    draw: _Draw,
    counted: _Counted,
    by_metric: Mapping[str, Sequence[float]],
    columns: Mapping[str, Any],
) -> Iterator[Sample]:
    """Yield the sample rows of metrics over draws, an item each."""
    for metric, values in by_metric.items():
        for item, value in zip(draw.items_of(counted), values, strict=True):
            yield replace(item, **columns, metric=metric, score=value, response=None, generated_tokens=None)


def _draw_samples(draws: Sequence[_Draw], counted: _Counted, columns: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the sample rows of single draws."""
    for number, draw in enumerate(draws):
        for item, reply in zip(draw.items_of(counted), draw.replies, strict=True):
            yield replace(
                item,
                **columns,
                metric="draw",
                draw=number,
                response=reply.answer,
                thinking=reply.thinking,
                generated_tokens=reply.thinking_tokens + reply.answer_tokens,
            )
