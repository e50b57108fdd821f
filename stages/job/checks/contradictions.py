"""Names of recipes that contradict their settings: `wanda-50` at a sparsity of 0.6, `gptq-w4` with 3 bits.

A name is free, so this is a warning and no mistake. It usually means that a setting was changed for a try
(`dvc exp run -S`) and kept, or a line was copied. Only the words after the name of the recipe's own method
are read: `wanda-50-gptq-w4g64` is a quantized model whose source has the 50.
"""

import re
from collections.abc import Iterator
from typing import Any

from stages.job.params import Params

_COUNTED = ("blocks", "heads")
"""Settings that a name gives as they are; shares are given in per cent."""
_SHARES = ("sparsity", "remove")
_ROUNDED = 0.0101
"""How far a share may be from its name: a third of the heads is 34 to one method and 33 to its author."""


def contradictions(params: Params) -> Iterator[str]:
    """Yield a sentence for each recipe whose name says another number than its settings."""
    for artifact, recipe in params.recipes().items():
        name, method = artifact.partition("/")[2], getattr(recipe, "method", "")
        said = re.search(rf"(?:^|-){re.escape(method)}-([a-z0-9]+)", name)
        if not method or not said:
            continue
        for field, word, value in _readings(said[1], recipe):
            at = artifact.replace("/", ".", 1)
            yield f"{at}: its name says {word}, but its {field} is {value}; rename it, or correct {field}."


def _readings(word: str, recipe: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield each setting that a word of a name contradicts: its field, what the word says, its value."""
    if re.fullmatch(r"\d+", word):
        for field in _SHARES:
            share = getattr(recipe, field, None)
            if isinstance(share, float) and abs(share - int(word) / 10 ** max(2, len(word))) > _ROUNDED:
                yield field, word, share
        for field in _COUNTED:
            count = getattr(recipe, field, None)
            if isinstance(count, int) and count != int(word):
                yield field, word, count
    structure = getattr(recipe, "structure", None)
    if structure and re.fullmatch(r"\d+of\d+", word) and structure != word.replace("of", ":"):
        yield "structure", word, structure
    if code := re.match(r"w(\d+)(?:a\d+)?(?:g(\d+))?", word):
        for field, said in (("bits", code[1]), ("group_size", code[2])):
            value = getattr(recipe, field, None)
            if said is not None and value is not None and value != int(said):
                yield field, word, value
