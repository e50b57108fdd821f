"""The model card of an artifact: what it is, how it scores, what to watch, how to load and repeat it.

Written at export from the artifact's record and the last report, so no stage depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stages.reporting.words import number

NO_SCORES = "The last report is not of this artifact, so no scores are given."
_NO_LICENCE = "Licence: that of the base; read it before you share the model."
_GRID = (
    "The base's weights lie on a quantized grid already ({grid}), which flatters quantization to as many "
    "bits."
)


def model_card(
    record: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]],
    loading: str,
    licence: str | None,
    commit: str | None,
    gguf: int | None = None,
) -> str:
    """Return the card as Markdown, with the front matter that hubs read.

    Args:
        record: the artifact's `artifact.json`.
        scores: its rows of `flows.scores.summarized`; none if the last report is not of this artifact.
        loading: how to load what was exported, Markdown.
        licence: as hubs name it, such as apache-2.0; None leaves it to the reader.
        commit: of the project that made the artifact; None if what made it is not committed.
        gguf: bytes of the GGUF file that was exported; None for a checkpoint of transformers.
    """
    artifact, base = record["artifact"], record["base"]
    front = {
        "base_model": _hub_name(base["source"]), "license": licence,
        "library_name": "transformers" if gguf is None else "gguf",
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items() if value),
        "---",
        "",
        f"# {artifact}",
        "",
    ]
    size, count = record["bytes_on_disk"], record["num_parameters"]
    bits = record["bits_per_weight"]
    if gguf is not None:
        size, bits = gguf, 8 * gguf / count
    lines += [f"{_summary(record)} Its base is `{base['source']}`.", ""]
    lines += [
        f"Licence: {licence}." if licence else _NO_LICENCE,
        "", "## Scores", "", *_scores(scores), "", "## Size", "",
        f"{count:,} parameters, {size / 1e6:,.1f} MB on disk, {bits:.2f} bits a parameter"
        + (f"; {record['sparsity']:.1%} of the compressed weights are zero." if record["sparsity"] else "."),
        "", "## Load", "", loading, "", "## Recipe", "",
        "Each step, from the base on, with every setting:", "",
    ]  # fmt: skip
    for name in record["lineage"]:
        lines.append(
            f"- `{name}`"
            + (f": `{json.dumps(record['recipes'][name])}`" if name in record["recipes"] else "")
        )
    lines += [
        "",
        "## Repeat it",
        "",
        "```sh",
        *_repeat(artifact, commit),
        "```",
        "",
        _where(record.get("numerics", {})),
    ]
    if grid := base.get("grid"):
        groups = f", groups of {grid['group_size']}" if grid.get("group_size") else ""
        lines += ["", _GRID.format(grid=f"{grid['format']}{groups}")]
    return "\n".join(lines) + "\n"


def _hub_name(source: str) -> str | None:
    """Return `org/name` of a `hub:` source, None of any other."""
    return source.removeprefix("hub:").partition("@")[0] if source.startswith("hub:") else None


def _summary(record: Mapping[str, Any]) -> str:
    steps = [name for name in record["lineage"] if name in record["recipes"]]
    if not steps:
        return "An uncompressed model."
    words = [f"{record['recipes'][name]['method']} ({name})" for name in steps]
    return f"A language model after {', then '.join(words)}."


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of headline scores beside those of the reference and their floors."""
    if not rows:
        return [NO_SCORES]
    lines = [
        "| suite | score | 95 % interval | reference | of it | floor | noise | against the reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        metric = str(row["metric"])
        shown = ("value", "low", "high", "floor", "noise")
        value, low, high, floor, noise = (number(row[name], metric) for name in shown)
        share = "–" if row["of_reference"] is None else f"{row['of_reference']:.1%}"
        words = (
            f"{row['suite']}: {row['label']}",
            value,
            f"{low} to {high}",
            row["reference"] or "–",
            share,
            floor,
            noise,
        )
        lines.append(f"| {' | '.join(words)} | {row['word'] or '–'} |")
    return [
        *lines, "",
        "A score counts from its floor, which needs no knowledge; a difference counts above the noise, by "
        "which the base's own score moves with batch size or dtype. Perplexity is better when lower.",
    ]  # fmt: skip


def _repeat(artifact: str, commit: str | None) -> list[str]:
    return [*([f"git checkout {commit}"] if commit else []), f"prunequant run {artifact}"]


def _where(numerics: Mapping[str, Any]) -> str:
    known = ", ".join(
        f"{key} {numerics[key]}"
        for key in ("device", "dtype", "threads", "torch", "cpu_capability")
        if key in numerics
    )
    computed = f"Computed with {known}. " if known else ""
    return f"{computed}Other processors, devices or versions may give other last bits."
