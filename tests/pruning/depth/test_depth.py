"""Depth pruning: what is left reloads and generates with a cache, and is what its recipe says."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig

from stages.core.errors import Refusal
from stages.core.run import Run
from stages.job.load import validate
from stages.model.blocks import blocks, forward
from stages.model.checkpoint import finish_base
from stages.pruning.depth.ablate import Ablation
from stages.pruning.depth.depth import Depth
from stages.pruning.depth.mean import check_biases
from stages.pruning.depth.remove import output_projections, remove_blocks
from stages.pruning.depth.tasks import Items
from tests import families, project
from tests.deep import WINDOWS, deep, logits, without, without_attention
from tests.pipeline import NONE, TEXT, dense, do, download, load, params, record

RUN = Run(device="cpu", dtype="float32", threads=1, seed=0)


@pytest.fixture
def source(workspace: Path):
    """Writes a model as the artifact base/deep, with the text it is calibrated on."""

    def write(model: nn.Module) -> nn.Module:
        folder = Path("data/models/base/deep")
        model.save_pretrained(folder)
        families.tokenizer().save_pretrained(folder)
        finish_base("base/deep", folder, {"name": "deep"})
        chosen = params("llama", {})
        download(chosen, "datasets/news")
        return model

    return write


def prune(**settings) -> dict:
    """Run a recipe on base/deep and return its record."""
    recipe = {"source": "base/deep", "method": "depth", "metric": "reverse", "blocks": 2, "calibration": NONE}
    Depth(**(recipe | settings)).execute("prune/made", RUN)
    return record("prune/made")


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_is_left_reloads_and_generates_alike_with_and_without_a_cache(family, tmp_path):
    model = deep(family)
    expected = logits(without(model, {1, 3}))
    remove_blocks(model, {1, 3})
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(made), expected)
    assert made.config.num_hidden_layers == 4
    for number, (_, block) in enumerate(blocks(made)):
        assert {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} == {number}
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        assert made.config.layer_types == kinds
    for left in (model, made):  # before it is written, and after
        told = [
            left.generate(
                WINDOWS, attention_mask=torch.ones_like(WINDOWS), use_cache=cache, do_sample=False,
                min_new_tokens=20, max_new_tokens=20,
            )
            for cache in (True, False)
        ]  # fmt: skip
        assert torch.equal(*told)
        with torch.no_grad():
            cache, steps = None, []
            for tokens in WINDOWS.split(1, dim=1):
                step = left(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache, steps = step.past_key_values, [*steps, step.logits]
        assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-3)
        assert len(set(told[0][:, 24:].flatten().tolist())) >= 4


def test_reverse_takes_the_last_but_the_very_last(source):
    source(deep("llama"))
    assert prune(blocks=3)["notes"]["prune/made"] == {"removed": [2, 3, 4]}
    assert prune(blocks=3, keep=(3,))["notes"]["prune/made"] == {"removed": [1, 2, 4]}


@pytest.mark.parametrize("metric", ["block-influence", "angular", "perplexity", "shapley", "greedy"])
def test_a_recipe_removes_what_its_metric_says_and_notes_it(metric, source):
    model = source(deep("gemma3"))
    drawn = {"samples": 2} if metric == "shapley" else {}
    told = prune(metric=metric, calibration=TEXT, keep=(5,), **drawn)
    notes = told["notes"]["prune/made"]
    assert len(notes["removed"]) == 2 and 5 not in notes["removed"]
    assert len(notes["scores"] if metric != "greedy" else notes["steps"]) == (2 if metric == "greedy" else 5)
    made = load("prune/made")
    assert torch.equal(logits(made), logits(without(model, notes["removed"])))
    assert told["num_parameters"] == sum(p.numel() for p in made.parameters())
    first = Path("data/models/prune/made/model.safetensors").read_bytes()
    prune(metric=metric, calibration=TEXT, keep=(5,), **drawn)
    assert Path("data/models/prune/made/model.safetensors").read_bytes() == first


@pytest.mark.parametrize("family", families.CONFIGS)
def test_attention_alone(family, source):
    model = source(deep(family, 4))
    told = prune(metric="block-influence", target="attention", calibration=TEXT)
    notes, made = told["notes"]["prune/made"], load("prune/made")
    projections = output_projections(made)
    assert notes["zeroed"] == [projections[number].name for number in notes["removed"]]
    assert "no plain checkpoint leaves it out" in notes["attention"]
    zeros = sum(projections[number].weight.numel() for number in notes["removed"])
    total = sum(p.numel() for n, p in made.named_parameters() if p.ndim == 2 and blocks(made)[0][0][:-2] in n)
    assert told["sparsity"] == zeros / total
    assert torch.equal(logits(made), logits(without_attention(model, notes["removed"])))
    # What is gone already does not count as removed a second time.
    Depth(
        source="prune/made", method="depth", metric="reverse", blocks=1, target="attention", calibration=NONE
    ).execute("prune/again", RUN)
    again = record("prune/again")["notes"]["prune/again"]
    assert not set(again["removed"]) & set(notes["removed"])
    with pytest.raises(Refusal, match="only 2 are neither kept nor already zero"):
        Depth(
            source="prune/made", method="depth", metric="perplexity", blocks=3, target="attention",
            calibration=TEXT,
        ).execute("prune/again", RUN)  # fmt: skip


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_a_block_leaves_its_mean_update(family, source):
    model = source(deep(family))
    notes = prune(replace_by_mean=True, keep=(0, 3), calibration=TEXT, blocks=3)["notes"]["prune/made"]
    assert notes["removed"] == [1, 2, 4]
    seen: dict[int, list[torch.Tensor]] = {}
    windows = calibration()
    for number in (1, 2, 4):
        handle = blocks(model)[number][1].register_forward_hook(
            lambda _, args, output, number=number: seen.update({number: [args[0], output]})
        )
        forward(model, windows)
        handle.remove()
    means = {number: (after - before).mean((0, 1)) for number, (before, after) in seen.items()}
    assert torch.allclose(
        logits(load("prune/made")), logits(without(model, {1, 2, 4}, means)), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_an_attention_leaves_its_mean(family, source):
    model = source(deep(family, 3))
    prune(replace_by_mean=True, target="attention", blocks=1, calibration=TEXT)
    made = output_projections(load("prune/made"))[1]
    seen: list[torch.Tensor] = []
    handle = output_projections(model)[1].module.register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    forward(model, calibration())
    handle.remove()
    assert not made.weight.count_nonzero()
    assert torch.allclose(made.module.bias.data, seen[0].flatten(0, -2).mean(0), atol=1e-5)


def calibration() -> torch.Tensor:
    from stages.corpus.windows import Windows, calibration_windows

    return calibration_windows(families.tokenizer(), Windows(**TEXT), families.VOCAB)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("target", ["block", "attention"])
def test_a_family_without_such_a_bias_is_refused_by_name(family, target, source):
    model = source(deep(family, 3))
    with pytest.raises(Refusal, match=f"{type(model).__name__} has no bias in .*leave replace_by_mean out"):
        prune(replace_by_mean=True, target=target, keep=(0,), blocks=1, calibration=TEXT)
    assert not Path("data/models/prune/made").exists()


def test_a_bias_that_a_norm_follows_holds_no_mean():
    with pytest.raises(Refusal, match="OPTForCausalLM has no bias"):
        check_biases(deep("opt", 2, do_layer_norm_before=False), "block")
    check_biases(deep("llama", 2, mlp_bias=True), "block")


def test_a_model_its_config_cannot_say_is_refused():
    model = deep("gpt2", 4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(Refusal, match=r"config of GPT2LMHeadModel cannot describe .*attn\.scaling"):
        remove_blocks(model, {1})


def test_places_in_the_cache_that_are_not_renumbered_are_refused():
    config = GPTNeoConfig(
        vocab_size=259, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global"], 4]],
        max_position_embeddings=64, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    with pytest.raises(Refusal, match=r"config of GPTNeoForCausalLM cannot describe .*layer_id"):
        remove_blocks(AutoModelForCausalLM.from_config(config), {1})


def test_a_packed_source_gives_a_dense_model_without_a_block(workspace):
    recipes = {
        "quantize/rtn": {
            "source": "base/tiny", "method": "rtn", "bits": 4, "group_size": 32, "calibration": NONE,
        },
        "prune/after": {
            "source": "quantize/rtn", "method": "depth", "metric": "perplexity", "blocks": 1,
            "calibration": TEXT,
        },
    }  # fmt: skip
    do(params("qwen3", recipes), list(recipes))
    packed, made = dense(load("quantize/rtn")), load("prune/after")
    (removed,) = record("prune/after")["notes"]["prune/after"]["removed"]
    assert record("prune/after")["layout"] == "dense"
    (_, ours), (_, theirs) = blocks(made)[0], blocks(packed)[1 - removed]
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine and all(torch.equal(parameter, other[name]) for name, parameter in mine.items())


@pytest.fixture
def graded(source):
    chosen = params("llama", {})
    made = chosen.datasets["arithmetic"].model_copy(update={"train": 6})
    made.download("arithmetic")
    return source(deep("llama", 4))


def test_items_are_scored_as_lm_eval_scores_them(graded):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = Items(dataset="arithmetic", shots=1).choices(families.tokenizer())
    assert len(asked.ranges) == 6 and set(asked.levels) == {"add"}
    found = Ablation(graded, asked.rows, 4, "block", "test").likelihoods([frozenset()])[frozenset()]
    import pandas as pd

    shot = pd.read_parquet("data/datasets/arithmetic/fewshot.parquet").iloc[0]
    lm = HFLM(pretrained=graded, tokenizer=families.tokenizer(), device="cpu", batch_size=1)
    expected = [
        lm.loglikelihood(
            [
                Instance(
                    "loglikelihood", {},
                    (f"{shot.question} {shot.answer}\n{item.question}", f" {choice}"), 0,
                )
            ],
            disable_tqdm=True,
        )[0][0]
        for item in pd.read_parquet("data/datasets/arithmetic/train.parquet").itertuples()
        for choice in item.choices
    ]  # fmt: skip
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_greedy_by_graded_items(graded):
    asked = Items(dataset="arithmetic", shots=1).choices(families.tokenizer())
    ablation = Ablation(graded, asked.rows, 4, "block", "test")
    tried = ablation.likelihoods(frozenset({n}) for n in range(4))
    dense = asked.accuracies(ablation.likelihoods([frozenset()])[frozenset()])
    right = {n: sum(int(tried[frozenset({n})][rows.start : rows.stop].argmax()) == gold
                    for rows, gold in zip(asked.ranges, asked.gold, strict=True)) for n in range(4)}  # fmt: skip
    assert dense == {"add": pytest.approx(dense["add"])} and dense["add"] > 0
    for n in range(4):
        retained = asked.retained(tried[frozenset({n})], dense)
        assert retained == pytest.approx(right[n] / 6 / dense["add"])
    told = prune(metric="greedy", blocks=1, calibration={"dataset": "arithmetic", "shots": 1})
    notes = told["notes"]["prune/made"]
    most = max(right[n] for n in (1, 2, 3))
    assert right[notes["removed"][0]] == most and notes["dense_accuracy"] == dense
    with pytest.raises(Refusal, match="answers none of the graded items right"):
        asked.retained(tried[frozenset({1})], {"add": 0.0})


TEXTED = {"metric": "perplexity", "calibration": TEXT}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metric": "perplexity"}, "metric perplexity is measured on text; name a data set"),
        ({"replace_by_mean": True, "keep": (0,)}, "replace_by_mean is measured on text"),
        ({"calibration": TEXT}, "no part of this recipe reads text"),
        (TEXTED | {"samples": 3}, "metric perplexity draws nothing; leave samples and seed out"),
        (TEXTED | {"seed": 3}, "metric perplexity draws nothing; leave samples and seed out"),
        (TEXTED | {"metric": "shapley"}, "metric shapley needs samples"),
        (TEXTED | {"metric": "angular", "target": "attention"}, "compares runs of blocks"),
        (TEXTED | {"replace_by_mean": True}, "add 0 to keep"),
        ({"keep": (1, 1)}, "names a block twice"),
        ({"ignore": ("mlp.gate",)}, "name blocks in keep instead"),
        ({"metric": "perplexity", "calibration": {"dataset": "a", "shots": 1}}, "only metric greedy without"),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"keep": (-1,)}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings, said):
    with pytest.raises(ValidationError) as error:
        Depth(
            **{
                "source": "base/deep",
                "method": "depth",
                "metric": "reverse",
                "blocks": 1,
                "calibration": NONE,
            }
            | settings
        )
    (only,) = error.value.errors()
    assert said in only["msg"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": 4}, "only 3 of the 4 blocks"),
        (TEXTED | {"blocks": 4}, "only 3 of the 4 blocks"),
        ({"keep": (1, 3), "blocks": 3}, "only 2 of the 4 blocks"),
        ({"keep": (4, 1, 9)}, "keep names 4, 9, but base/deep has only blocks 0 to 3"),
        (TEXTED | {"target": "attention", "blocks": 5}, "only 4 of the 4 blocks"),
        (TEXTED | {"metric": "angular", "blocks": 2, "keep": (1, 2)}, "keep leaves no run of 2 blocks"),
        (TEXTED | {"calibration": TEXT | {"num_samples": 1, "sequence_length": 300}}, "more than the 256"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_refused(settings, said, source):
    source(deep("llama", 4))
    with pytest.raises(Refusal, match=said):
        prune(**settings)
    assert not Path("data/models/prune/made").exists()


@pytest.mark.parametrize(
    ("wanted", "train", "said"),
    [
        (
            {"dataset": "news", "shots": 1},
            4,
            "dataset: 'news' has no graded items; allowed: arith",
        ),
        (
            {"dataset": "none", "shots": 1},
            4,
            "dataset: 'none' has no graded items; allowed: arith",
        ),
        ({"dataset": "arithmetic", "shots": 1}, 0, "arithmetic keeps all its items for evaluation"),
        (
            {"dataset": "arithmetic", "shots": 2},
            4,
            "shots: 2 given; datasets.arithmetic has 1 examples",
        ),
    ],
)
def test_items_that_are_not_there_are_told_with_the_params(wanted, train, said, workspace):
    raw = project.params(Path("inputs"))
    raw["datasets"]["arithmetic"]["train"] = train
    recipe = {"source": "base/tiny", "method": "depth", "metric": "greedy", "blocks": 1}
    raw["prune"]["depth-1"] = recipe | {"calibration": {"dataset": "arithmetic", "shots": 1}}
    if train:
        validate(raw)
    raw["prune"]["depth-1"] = recipe | {"calibration": wanted}
    with pytest.raises(Refusal, match=f"prune.depth-1.*{said}"):
        validate(raw)
