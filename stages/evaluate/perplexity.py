"""Windowed perplexity, the measure of the pruning and quantization papers.

Documents of the evaluation split are joined by a blank line, tokenized once, and cut into
non-overlapping windows, the tail dropped. In each window every token but the first is predicted from
those before it; perplexity is exp of the mean negative log-likelihood over all of them. lm-eval's word
and byte perplexity are other quantities.
"""

import hashlib
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.calibration import documents, windows
from stages.core.errors import Refusal
from stages.core.schema import Strict

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

OVERFLOW = 700.0
"""Nats a token beyond which exp leaves the range of a double."""


class PerplexitySuite(Strict):
    """Perplexity over the first `windows` windows of a text data set's evaluation split."""

    windows: Annotated[int, Field(ge=2)]
    sequence_length: Annotated[int, Field(ge=8)] = 512
    batch_size: Annotated[int, Field(ge=1)]

    def evaluate(self, lm: "HFLM", name: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Score rows (`perplexity`) and one sample row a window, its score in nats a token.

        Raises:
            Refusal: the text is shorter than the windows asked for, or these are longer than the model reads.
        """
        if self.sequence_length > lm.max_length:
            raise Refusal(
                f"suites.perplexity.{name}.sequence_length: {self.sequence_length} asked for, the model "
                f"reads {lm.max_length} tokens at most."
            )
        cut = windows(lm.tokenizer, documents(name, "evaluation"), self.sequence_length)
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
        return [scores], samples
