"""Windowed perplexity, the measure of the pruning and quantization papers.

The documents of the evaluation split are joined by a blank line, tokenized once, and cut into non-overlapping
windows; the tail is dropped. In each window every token but the first is predicted from those before it.
Perplexity is exp of the mean negative log-likelihood of all predicted tokens. lm-eval's word perplexity is
another quantity.

Where the model expects it, BOS is read before each window (see `stages.corpus.bos`). The predicted tokens,
`sequence_length` - 1 a window, are the same with it and without, so that both can be compared.

Bits per byte is the same sum in bits, over the bytes of the predicted text. It compares models with different
tokenizers, which perplexity does not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.core.errors import Refusal
from stages.core.files import text_sha256
from stages.core.tables import Likeliest, Sample, Score
from stages.corpus.bos import Bos, bos_tokens
from stages.corpus.windows import begin_windows, cut_windows, read_documents
from stages.evaluation.emergence import Emergence
from stages.evaluation.likeliest import Divergence
from stages.evaluation.means import mean
from stages.evaluation.suite import Suite, SuiteRows
from stages.sources.text import Text

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

_OVERFLOW = 700.0
"""Nats a token beyond which exp leaves the range of a double."""


class PerplexitySuite(Suite):
    """Perplexity over the first `windows` windows of a text data set's evaluation split."""

    scores = Text

    windows: Annotated[int, Field(ge=2)]
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of text in a window; BOS comes on top."""
    bos: Bos = "auto"
    emergence: Emergence | None = None
    """Information Emergence of every block on the same text; null: not estimated."""
    divergence: Divergence | None = None
    """Keep the likeliest tokens, for the divergence from the base; null: not kept."""

    def evaluate(self, lm: HFLM, name: str, seed: int) -> SuiteRows:
        """Score `perplexity` and `bits_per_byte`; a sample row is one window's nats a token.

        Without a fast tokenizer, which says which characters a token stands for, there is no `bits_per_byte`.

        Raises:
            Refusal: the text has too few windows, a window is longer than the model reads, or the tokenizer
                lacks the BOS that is asked for.
        """
        bos = bos_tokens(lm.tokenizer, self.bos)
        texts = read_documents(name, "evaluation")
        rows = self._rows(lm, texts, name, bos)
        first = len(bos) + 1
        requests = [(("", ""), row[:first], row[first:]) for row in rows]
        likelihoods = [total for total, _ in lm._loglikelihood_tokens(requests)]
        losses = [-total / (self.sequence_length - 1) for total in likelihoods]
        hashes = [text_sha256(repr(row)) for row in rows]
        perplexity, stderr = _perplexity(losses)
        score = Score(
            task=f"perplexity-{name}",
            task_version=f"windows of {self.sequence_length}",
            shots=0,
            bos=bool(bos),
            prompt_hash=text_sha256("".join(hashes)),
            readout="likelihood",
            metric="perplexity",
            value=perplexity,
            stderr=stderr,
            num_items=len(losses),
            higher_is_better=False,
            seed=seed,
        )
        scores = [score]
        if lm.tokenizer.is_fast:
            sizes = predicted_bytes(lm.tokenizer, texts, self.sequence_length)[: self.windows]
            ratio, stderr = _bits_per_byte(likelihoods, sizes)
            scores.append(replace(score, metric="bits_per_byte", value=ratio, stderr=stderr))
        if self.emergence and hasattr(lm, "model"):  # a responder without knowledge has no blocks
            scores += self.emergence.evaluate(lm, name, seed, self.batch_size or lm.batch_size, bos)
        kept: list[Likeliest | None] = [None] * len(rows)
        if self.divergence and hasattr(lm, "model"):
            from stages.evaluation.shared import SharedPrefixLM  # imports lm-eval

            length, size = len(rows[0]), self.batch_size or lm.batch_size
            if isinstance(lm, SharedPrefixLM):
                size = lm.fitting(length, length, length)
            kept = [*self.divergence.likeliest(lm.model, rows, first, size)]
        samples = [
            Sample(
                task=score.task,
                readout=score.readout,
                doc_id=i,
                prompt_hash=hashes[i],
                metric="nats_per_token",
                score=losses[i],
                log_likelihoods=[likelihoods[i]],
                prompt=lm.tokenizer.decode(rows[i]),
                likeliest=kept[i],
            )
            for i in range(len(rows))
        ]
        return scores, samples

    def _rows(self, lm: HFLM, texts: list[str], name: str, bos: list[int]) -> list[list[int]]:
        """Return the token ids of the windows, each after `bos`."""
        # The last token of a window is predicted and not read, which makes room for one token of BOS.
        longest = lm.max_length - max(0, len(bos) - 1)
        if self.sequence_length > longest:
            raise Refusal(
                f"suites.perplexity.{name}.sequence_length is {self.sequence_length}, but the model reads "
                f"{longest} tokens at most; set it to that or less."
            )
        whole = cut_windows(lm.tokenizer, texts, self.sequence_length)
        if len(whole) < self.windows:
            raise Refusal(
                f"suites.perplexity.{name}.windows is {self.windows}, but the evaluation split has "
                f"{len(whole)} windows of {self.sequence_length} tokens; ask for fewer."
            )
        rows: list[list[int]] = begin_windows(whole[: self.windows], bos).tolist()
        return rows


def _perplexity(losses: list[float]) -> tuple[float, float]:
    """Return exp of the mean of losses in nats a token, and its standard error."""
    center = mean(losses)
    deviation = math.sqrt(math.fsum((loss - center) ** 2 for loss in losses) / (len(losses) - 1))
    value = math.inf if center > _OVERFLOW else math.exp(center)
    return value, value * deviation / math.sqrt(len(losses))


def _bits_per_byte(likelihoods: list[float], sizes: list[int]) -> tuple[float, float]:
    """Return bits per byte and its standard error, from the windows' log-likelihoods in nats and bytes."""
    bits = [-total / math.log(2) for total in likelihoods]
    ratio = math.fsum(bits) / sum(sizes)
    spread = math.fsum((bit - ratio * size) ** 2 for bit, size in zip(bits, sizes, strict=True))
    return ratio, math.sqrt(spread * len(bits) / (len(bits) - 1)) / sum(sizes)


def predicted_bytes(tokenizer: PreTrainedTokenizerBase, texts: list[str], sequence_length: int) -> list[int]:
    """Return the UTF-8 bytes of each window's predicted tokens, all but the first; see `cut_windows`."""
    text = "\n\n".join(texts)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        len(text[offsets[first][1] : offsets[first + sequence_length - 1][1]].encode())
        for first in range(0, len(offsets) - sequence_length + 1, sequence_length)
    ]
