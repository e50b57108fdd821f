"""Columns that say what a candidate is, from its record and config; and questions, once a suite."""

from typing import Any

from stages.core.tables import (
    ITEM_COLUMNS,
    PROMPT_KEPT,
    SAMPLE_COLUMNS,
    Sample,
    item_table,
    sample_table,
    subject,
)

RECIPES: dict[str, dict[str, Any]] = {
    "prune/short": {
        "method": "depth", "metric": "reverse", "target": "block", "calibration": {"dataset": "none"},
    },
    "prune/thin": {
        "method": "width", "importance": "ppm", "seed": None, "calibration": {"dataset": "none"},
    },
    "prune/owl": {
        "method": "magnitude", "scope": "matrix", "structure": "unstructured", "allocation": {"kind": "owl"},
        "calibration": {"dataset": "news", "num_samples": 4, "sequence_length": 32, "seed": 3},
    },
    "finetune/tuned": {
        "method": "full", "keep": "none", "steps": 8, "seed": 5,
        "train": {"dataset": "sums", "num_samples": 4, "sequence_length": 32, "difficulty": "hard"},
    },
}  # fmt: skip


def record(*lineage: str) -> dict[str, Any]:
    return {
        "artifact": ["base/m", *lineage][-1], "lineage": ["base/m", *lineage],
        "base": {"name": "m", "source": "path:m"},
        "recipes": {name: RECIPES[name] for name in lineage}, "texts": {"news": "path:n", "sums": "path:s"},
        "notes": {"prune/short": {"removed": [4, 5]}, "finetune/tuned": {"steps": 7}}, "layout": "dense",
        "sparsity": 0.0, "num_parameters": 9, "bits_per_weight": 16.0, "bytes_ideal": 1, "bytes_on_disk": 1,
    }  # fmt: skip


def test_each_choice_of_a_lineage_has_a_column():
    about = subject(record("prune/short", "prune/thin", "prune/owl", "finetune/tuned"))
    chosen = {name: getattr(about, name) for name in ("block_metric", "importance", "scope", "allocation")}
    assert chosen == {
        "block_metric": "reverse", "importance": "ppm", "scope": "matrix", "allocation": "owl",
    }  # fmt: skip
    assert (about.blocks_removed, about.steps, about.arm, about.train_difficulty) == (2, 7, "none", "hard")
    assert (about.recipe_seed, about.reads) == (5, ["news", "sums"])
    assert subject(record("prune/owl")).recipe_seed == 3  # of its calibration
    dense = subject(record())
    assert (dense.blocks_removed, dense.steps, dense.arm, dense.reads) == (0, 0, None, [])


def test_the_width_ratio_comes_from_the_config():
    config = {"intermediate_size": 1536, "hidden_size": 576}
    assert subject(record(), config).width_ratio == 1536 / 576
    assert subject(record(), {"text_config": config}).width_ratio == 1536 / 576
    assert subject(record(), {"ffn_dim": 8, "hidden_size": 4}).width_ratio == 2
    assert subject(record(), {"intermediate_size": [8, 4], "hidden_size": 4}).width_ratio is None
    assert subject(record()).width_ratio is None


def test_a_question_is_kept_once_and_its_end_if_it_is_long():
    shared = {"task": "t", "readout": "likelihood", "target": "1"}
    asked = {"prompt_hash": "h", "prompt": "x" * PROMPT_KEPT + "2 + 2 =", "choices": [" 3", " 4"]}
    samples = [
        Sample(**shared, **asked, doc_id=0, metric=metric, score=1.0) for metric in ("acc", "acc_norm")
    ]
    rows = item_table("s", samples)
    assert list(rows.columns) == list(ITEM_COLUMNS)
    (row,) = rows.to_dict("records")
    assert row["prompt"].endswith("x2 + 2 =") and len(row["prompt"]) == PROMPT_KEPT
    assert (row["prompt_characters"], row["choices"]) == (PROMPT_KEPT + 7, [" 3", " 4"])
    answers = sample_table("base/m", "s", samples)
    assert list(answers.columns) == list(SAMPLE_COLUMNS) and "prompt" not in answers
