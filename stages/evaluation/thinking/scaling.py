"""Test-time scaling: what more thinking and more draws bring, a task asked at every budget and draw.

By budget (see `stages.evaluation.thinking.budget`), and for each item from its n draws of which c are right:

- pass@k, the chance that one of k draws is right: 1 - C(n - c, k) / C(n, k), without bias (2107.03374).
- maj@n, whether the answer given most often is right (self-consistency, 2203.11171). Answers that are tied
  share the item; no answer at all is no vote.
- tokens: all that the model generated for an answer, over all continuations. Two models at one budget are
  seldom at one cost: a model that is damaged thinks on, or stops at once.
- repetition: the share of 4-word runs in the thinking that were there before (1908.04319).
- self_bleu: BLEU-4 of each draw's thinking against the other draws', in [0, 1] (1802.01886): draws that are
  all alike bring nothing, and pass@k cannot grow.
- ended: the share of thinking that ended by itself.

Only metrics that are right or wrong are counted, and votes are on what the task compares; which and what,
`stages.evaluation.thinking.judged` tells, the same for every model. A sample row is a draw (metric `draw`) or an item's
score; the item is the unit of every error bar.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.evaluation.lm_tasks import Rows, rows, run_tasks
from stages.evaluation.shared import SharedPrefixLM
from stages.evaluation.thinking.budget import BudgetLM, Reply
from stages.evaluation.thinking.judged import Reading, compared, right_or_wrong
from stages.evaluation.thinking.settings import Thinking

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

RUN = 4
"""Words of a run that counts as repeated."""
FEWER_IS_BETTER = ("tokens", "repetition", "self_bleu")


def evaluate(
    lm: "LM",
    thinking: Thinking,
    tasks: "Sequence[Task]",
    *,
    name: str,
    limit: int | None,
    chat_template: bool,
    seed: int,
    execute_code: bool = False,
    read: Reading | None = None,
) -> tuple[Rows, Rows]:
    """Score rows, the largest budget first, overall and by difficulty; sample rows of draws and of items.

    Args:
        lm: a model; a null responder is asked once, as it answers without thinking and always alike.
        tasks: lm-eval's, one or those of a group, answered by generation, scored right or wrong.
        name: the task's name in our tables.
        read: what of an answer, after the task's own filters, is voted on; None: what the task compares.

    Raises:
        Refusal: the task is answered by likelihood, none of its metrics is right or wrong, or a prompt and
            its budget outgrow the model.
    """
    if any(task.OUTPUT_TYPE != "generate_until" for task in tasks):
        raise Refusal(f"{name} is answered by likelihood, before which no model thinks; leave thinking out.")
    readings = {task.task_name: read or compared(task) for task in tasks}
    names = list(readings)
    metrics = right_or_wrong(tasks)
    if not metrics:
        raise Refusal(f"{name} has no metric that is right or wrong; draws are not counted by others.")

    def ask(lm: "LM", replies: Callable[[str, str], Reply]) -> _Asked:
        result = run_tasks(
            lm,
            tasks,
            limit=limit,
            chat_template=chat_template,
            seed=seed,
            execute_code=execute_code,
        )
        scores, samples = rows(
            result,
            names,
            lm=lm,
            name=name,
            readout="generation",
            chat_template=chat_template,
            seed=seed,
            metrics=metrics,
        )
        items = [
            {**item, "vote": readings[task](item["doc"], str(item["filtered_resps"][0]))}
            for task in names
            for item in sorted(result["samples"][task], key=lambda item: item["doc_id"])
        ]
        return _Asked(scores, samples, items, replies)

    asked: dict[int, list[_Asked]] = {budget: [] for budget in thinking.budgets}
    if isinstance(lm, SharedPrefixLM):
        thinker = BudgetLM(
            thinking,
            seed,
            finished=lm.finished,
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            batch_size=lm.batch_size,
            device=str(lm.device),
        )
        for thinker.draw in range(thinking.draws):
            for thinker.budget in thinking.budgets:
                asked[thinker.budget].append(ask(thinker, lambda prompt, _: thinker.replies[prompt]))
    else:
        once = ask(lm, lambda _, answer: Reply("", 0, True, answer, len(lm.tok_encode(answer))))
        asked = {budget: [once] * thinking.draws for budget in thinking.budgets}
    scored: Rows = []
    sampled: Rows = []
    for budget in reversed(thinking.budgets):
        labels = list(dict.fromkeys(row["metric"] for row in asked[budget][0].samples))
        about = {"budget": budget, "draws": thinking.draws, "temperature": thinking.temperature}
        for metric in labels:
            if any(value not in (0, 1) for draw in asked[budget] for value in draw.column(metric, "score")):
                raise Refusal(
                    f"{name} gives {metric} by degrees, and only what is right or wrong is counted."
                )
            tag = f"budget {budget}" if len(labels) == 1 else f"{metric}, budget {budget}"
            traced = isinstance(lm, SharedPrefixLM) and metric == labels[0]
            by_item = _by_item(asked[budget], metric, lengths=traced, thought=budget > 0)
            found = _rows(asked[budget], metric, by_item, about, tag)
            scored += found[0]
            sampled += found[1]
    return scored, sampled


class _Asked:
    """What one draw at one budget gave.

    Args:
        items: lm-eval's, one a filter and document, those of a filter in the order of the rows, each with
            its `vote`.
        replies: what was generated, from the prompt and the answer.
    """

    def __init__(
        self, scores: Rows, samples: Rows, items: Rows, replies: Callable[[str, str], Reply]
    ) -> None:
        self.scores, self.samples = scores, samples
        by_filter: dict[str, Rows] = {}
        for item in items:
            by_filter.setdefault(item["filter"], []).append(item)
        self._votes = {kept: [str(item["vote"]) for item in found] for kept, found in by_filter.items()}
        first = next(iter(by_filter.values()))
        self.replies = [replies(item["arguments"][0][0], str(item["resps"][0][0])) for item in first]

    def of(self, metric: str) -> Rows:
        """The sample rows of a metric, an item each."""
        return [row for row in self.samples if row["metric"] == metric]

    def column(self, metric: str, column: str) -> list[Any]:
        return [row[column] for row in self.of(metric)]

    def votes(self, metric: str) -> list[str]:
        """What each item's answer is read as by the metric's filter."""
        kept = next((kept for kept in self._votes if metric.endswith(f"({kept})")), next(iter(self._votes)))
        return self._votes[kept]


def _by_item(draws: list[_Asked], metric: str, *, lengths: bool, thought: bool) -> dict[str, list[Any]]:
    """Every score of every item, by its metric, and the `answer` that has most votes.

    Args:
        lengths: whether those of the traces are among them, which are the same for every metric.
        thought: whether there is any thinking to be described.
    """
    count = len(draws)
    right = list(zip(*(draw.column(metric, "score") for draw in draws), strict=True))
    votes = list(zip(*(draw.votes(metric) for draw in draws), strict=True))
    replies = list(zip(*(draw.replies for draw in draws), strict=True))
    ks = sorted({2**power for power in range(count.bit_length())} | {count})
    made: dict[str, list[Any]] = {
        f"pass@{k}": [pass_at_k(count, sum(map(int, item)), k) for item in right] for k in ks
    }
    if count > 1:
        made[f"maj@{count}"] = [majority(*item) for item in zip(votes, right, strict=True)]
    if lengths:
        made["tokens"] = [_mean([r.thinking_tokens + r.answer_tokens for r in item]) for item in replies]
    if lengths and thought:
        made["ended"] = [_mean([float(r.ended) for r in item]) for item in replies]
        made["repetition"] = [_mean([repetition(r.thinking) for r in item]) for item in replies]
        if count > 1:
            made["self_bleu"] = [self_bleu([r.thinking for r in item]) for item in replies]
    return made


def _rows(
    draws: list[_Asked], metric: str, by_item: dict[str, list[Any]], about: dict[str, Any], tag: str
) -> tuple[Rows, Rows]:
    """Score and sample rows of one metric at one budget."""
    items = draws[0].of(metric)
    scores, samples = [], []
    for name, values in by_item.items():
        label = f"{name} ({tag})"
        for row in (row for row in draws[0].scores if row["metric"] == metric):
            level = row["difficulty"]
            picked = [
                v for v, item in zip(values, items, strict=True) if level in ("all", item["difficulty"])
            ]
            mean = _mean(picked)
            spread = math.fsum((value - mean) ** 2 for value in picked)
            stderr = math.sqrt(spread / (len(picked) - 1) / len(picked)) if len(picked) > 1 else None
            better = name not in FEWER_IS_BETTER
            scores.append(
                {**row, **about, "metric": label, "value": mean, "stderr": stderr, "higher_is_better": better}
            )
        for item, value in zip(items, values, strict=True):
            own = {"response": None, "generated_tokens": None}
            samples.append({**item, **own, "budget": about["budget"], "metric": label, "score": value})
    for number, draw in enumerate(draws):
        for item, reply in zip(draw.of(metric), draw.replies, strict=True):
            samples.append(
                {
                    **item,
                    "budget": about["budget"],
                    "draw": number,
                    "metric": f"draw ({tag})",
                    "response": reply.answer,
                    "thinking": reply.thinking,
                    "generated_tokens": reply.thinking_tokens + reply.answer_tokens,
                }
            )
    return scores, samples


def pass_at_k(draws: int, right: int, k: int) -> float:
    """The chance that at least one of `k` draws out of `draws`, of which `right` are right, is right."""
    return 1 - math.comb(draws - right, k) / math.comb(draws, k)


def majority(votes: Sequence[str], right: Sequence[float]) -> float:
    """Whether the answer with most votes is right, in [0, 1]; those tied count by their share.

    Args:
        votes: what each draw answered; "" did not.
        right: whether it was right, 0 or 1.
    """
    counts = Counter(vote for vote in votes if vote)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote in counts if counts[vote] == most]
    return _mean([right[votes.index(winner)] for winner in winners])


def repetition(text: str) -> float:
    """The share of runs of four words that the text had before, in [0, 1); 0 where it has no such run."""
    words = text.split()
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU-4 of each text against all the others, in [0, 1]; a text without words has 0."""
    import sacrebleu

    found = [
        sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]]).score / 100
        for i, text in enumerate(texts)
    ]
    return _mean(found)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
