"""Lengths of conversations: whether those that a recipe trains on fit into a row, before anything runs.

The stage refuses a conversation that does not fit only after a download and a prune. Take the same ones from
the data set and tokenize them with the functions of the stage. Leave to the stage what is not on this machine
and what is large, as `stages.job.checks.counts` does. Keep the longest conversation in
`data/runs/conversations.json`, so that unchanged ones are tokenized once.
"""

import json
from collections.abc import Iterator

from stages.core import identity
from stages.core.errors import Refusal
from stages.core.files import DATASETS, RUNS
from stages.corpus.examples import Train, chat_example, take_evenly
from stages.job.checks.counts import checkpoint_of, kept, origin_of, reading_limit, tokenizer_of
from stages.job.params import Params
from stages.sources.conversations import Conversations

LONGEST = RUNS / "conversations.json"
"""The kept lengths."""
Chat = list[dict[str, str]]


def of_lengths(params: Params) -> Iterator[str]:
    """Yield recipes that train on a conversation longer than a row or than the model reads."""
    for name, recipe in params.finetune.items():
        train, base = recipe.train, params.base_of(f"finetune/{name}")
        dataset = params.datasets.get(train.dataset)
        if base is None or not isinstance(dataset, Conversations):
            continue
        at = f"finetune.{name}.train"
        try:
            longest = _longest(params, base, train, dataset)
        except Refusal as refusal:
            yield f"{at}: {refusal}"
            continue
        if longest is None:
            continue
        place, begin, tokens = longest
        which = f"conversation {place} of data set {train.dataset}, which begins {begin!r}, has {tokens}"
        limit = reading_limit(params, base)
        if limit is not None and tokens > limit:
            yield (
                f"{at}.dataset: {which} tokens, but base/{base} reads {limit} at most; shorten or remove "
                "that conversation."
            )
        elif tokens > train.sequence_length:
            yield (
                f"{at}.sequence_length: {train.sequence_length} given, but {which} tokens of base/{base}; "
                f"raise it to {tokens}, or shorten or remove that conversation."
            )


def _longest(params: Params, base: str, train: Train, dataset: Conversations) -> tuple[int, str, int] | None:
    """Return the place, the first words and the tokens of the longest conversation that a recipe takes.

    None if the data set or the tokenizer is not here. Places count from 1, without repeats.
    """
    folder, origin = checkpoint_of(params, base), origin_of(train.dataset, dataset)
    if folder is None or origin is None:
        return None

    def longest() -> tuple[int, str, int]:
        tokenizer = tokenizer_of(folder, f"base/{base}")
        chats = dataset.read() if origin == "path" else _downloaded(train.dataset)
        lengths = [
            (place, _first_prompt(turns)[:40], len(chat_example(turns, train, tokenizer).input_ids))
            for place, turns in _taken(chats, train)
        ]
        return max(lengths, key=lambda length: length[2])

    settings = train.model_dump(mode="json", exclude={"sequence_length", "packing"})
    place, begin, tokens = kept(LONGEST, identity.digest("finetune"), folder, dataset, settings, longest)
    return place, begin, tokens


def _downloaded(name: str) -> list[Chat]:
    import pandas as pd

    rows = pd.read_parquet(DATASETS / name / "train.parquet")["messages"]
    return [json.loads(turns) for turns in rows]


def _taken(chats: list[Chat], train: Train) -> list[tuple[int, Chat]]:
    """Return the conversations that the stage learns from and holds out, after their places."""
    places = list(enumerate(chats, 1))
    learned = take_evenly(train, places, "num_samples", "conversations")
    seen = {_first_prompt(turns) for _, turns in learned}
    rest = [(place, turns) for place, turns in places if _first_prompt(turns) not in seen]
    return learned + take_evenly(train, rest, "held_out", "other conversations")


def _first_prompt(turns: Chat) -> str:
    return next(turn["content"] for turn in turns if turn["role"] == "user")
