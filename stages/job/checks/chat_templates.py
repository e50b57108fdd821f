"""Chat templates: whether the models that are to write or read chats have one, before anything runs.

Models in a `path:` source or downloaded already are looked at; others are left to the stages.
"""

from collections.abc import Iterator

from stages.corpus.examples import Selection
from stages.job.checks.counts import checkpoint_of, tokenizer_of
from stages.job.params import Params
from stages.sources.conversations import Conversations


def of_chat_templates(params: Params) -> Iterator[str]:
    """Yield `chat_template: true` of models without a template, and chats that need one and ask for none."""
    for artifact, recipe in params.recipes().items():
        for field, text in recipe.reads().items():
            base = params.base_of(artifact)
            if not isinstance(text, Selection) or base is None:
                continue
            at = f"{artifact.replace('/', '.', 1)}.{field}"
            if text.chat_template and _lacks(params, base):
                yield (
                    f"{at}.chat_template: true given, but the tokenizer of base/{base} has no chat template; "
                    "set it to false."
                )
            elif not text.chat_template and _needs(params, text.dataset):
                cure = (
                    f"keep one prompt and one response a line, as the tokenizer of base/{base} has none"
                    if _lacks(params, base)
                    else "set it to true"
                )
                yield (
                    f"{at}.chat_template: false given, but {text.dataset} has chats of several turns, or "
                    f"with a system turn, which only a chat template can write; {cure}."
                )
    bases = dict.fromkeys(filter(None, map(params.base_of, params.evaluate.candidates)))
    for name, suite in params.suites.by_name().items():
        for base in bases if getattr(suite, "chat_template", False) else ():
            if _lacks(params, base):
                yield (
                    f"suites: {name} has chat_template: true, but the tokenizer of base/{base} has no chat "
                    "template; set it to false, or leave out the candidates made from that model."
                )


def _lacks(params: Params, base: str) -> bool:
    folder = checkpoint_of(params, base)
    return folder is not None and not tokenizer_of(folder, f"base/{base}").chat_template


def _needs(params: Params, name: str) -> bool:
    """Tell whether a data set on this machine has conversations that only a template can write."""
    dataset = params.datasets.get(name)
    if not isinstance(dataset, Conversations) or not dataset.source.startswith("path:"):
        return False
    return any([turn["role"] for turn in turns] != ["user", "assistant"] for turns in dataset.read())
