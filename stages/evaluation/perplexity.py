"""Windowed perplexity, the measure of the pruning and quantization papers.

Documents of the evaluation split are joined by a blank line, tokenized once, and cut into
non-overlapping windows, the tail dropped. In each window every token but the first is predicted from
those before it; perplexity is exp of the mean negative log-likelihood over all of them. lm-eval's word
perplexity is another quantity.

Bits a byte is the same sum over the bytes of the text that was predicted, in bits: models with different
tokenizers can be compared by it, and by perplexity they cannot.
"""

import hashlib
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.errors import Refusal
from stages.corpus.windows import documents, windows
from stages.evaluation.emergence import Emergence
from stages.evaluation.suite import Suite
from stages.sources.text import Text

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

OVERFLOW = 700.0
"""Nats a token beyond which exp leaves the range of a double."""


class PerplexitySuite(Suite):
    """Perplexity over the first `windows` windows of a text data set's evaluation split."""

    scores = Text

    windows: Annotated[int, Field(ge=2)]
    sequence_length: Annotated[int, Field(ge=8)] = 512
    emergence: Emergence | None = None
    """Information Emergence of every block on the same text; null: not estimated."""

    def evaluate(self, lm: "HFLM", name: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Score rows (`perplexity`, `bits_per_byte`) and one sample row a window, its score in nats a token.

        A tokenizer that does not tell which characters a token stands for leaves `bits_per_byte` out.

        Raises:
            Refusal: the text is shorter than the windows asked for, or these are longer than the model reads.
        """
        if self.sequence_length > lm.max_length:
            raise Refusal(
                f"suites.perplexity.{name}.sequence_length: {self.sequence_length} asked for, the model "
                f"reads {lm.max_length} tokens at most."
            )
        texts = documents(name, "evaluation")
        cut = windows(lm.tokenizer, texts, self.sequence_length)
        if len(cut) < self.windows:
            raise Refusal(
                f"suites.perplexity.{name}.windows: {self.windows} asked for, the evaluation split has "
                f"{len(cut)} of {self.sequence_length} tokens; ask for fewer."
            )
        rows = cut[: self.windows].tolist()
        requests = [(("", ""), row[:1], row[1:]) for row in rows]
        likelihoods = [total for total, _ in lm._loglikelihood_tokens(requests)]
        predicted = self.sequence_length - 1
        losses = [-total / predicted for total in likelihoods]
        mean = math.fsum(losses) / len(losses)
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
        value = math.inf if mean > OVERFLOW else math.exp(mean)
        hashes = [hashlib.sha256(repr(row).encode()).hexdigest() for row in rows]
        shared = {"task": f"perplexity-{name}", "readout": "likelihood"}
        scores = {
            **shared,
            "task_version": f"windows of {self.sequence_length}",
            "template": "none",
            "shots": 0,
            "prompt_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "difficulty": "all",
            "metric": "perplexity",
            "value": value,
            "stderr": value * deviation / math.sqrt(len(losses)),
            "num_items": len(losses),
            "higher_is_better": False,
            "seed": seed,
        }
        found = [scores]
        if lm.tokenizer.is_fast:
            sizes = predicted_bytes(lm.tokenizer, texts, self.sequence_length)[: self.windows]
            bits = [-total / math.log(2) for total in likelihoods]
            ratio = math.fsum(bits) / sum(sizes)
            off = math.fsum((bit - ratio * size) ** 2 for bit, size in zip(bits, sizes, strict=True))
            found.append(
                {
                    **scores,
                    "metric": "bits_per_byte",
                    "value": ratio,
                    "stderr": math.sqrt(off * len(bits) / (len(bits) - 1)) / sum(sizes),
                }
            )
        if self.emergence and hasattr(lm, "model"):  # a responder that knows nothing has no blocks
            found += self.emergence.evaluate(lm, name, seed, self.batch_size)
        samples = [
            {
                **shared,
                "doc_id": i,
                "difficulty": "all",
                "prompt_hash": hashes[i],
                "metric": "nats_per_token",
                "score": losses[i],
                "log_likelihoods": [likelihoods[i]],
            }
            for i in range(len(rows))
        ]
        return found, samples


def predicted_bytes(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], sequence_length: int
) -> list[int]:
    """Bytes of UTF-8 that the tokens of each window but its first stand for; windows as in `windows`."""
    text = "\n\n".join(texts)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        len(text[offsets[first][1] : offsets[first + sequence_length - 1][1]].encode())
        for first in range(0, len(offsets) - sequence_length + 1, sequence_length)
    ]
