"""Both readouts of graded suites against the same quantities written out slowly."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from stages.core.errors import Refusal
from stages.corpus.written_numbers import first_number
from stages.job.params import Params
from tests import begins, families
from tests.pipeline import do, download, load, params
from tests.scoring import changed, log_likelihood, scored

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def asking(**options: object) -> Params:
    """Params with one suite, of arithmetic, its data downloaded."""
    suites = {"perplexity": {}, "graded": {"arithmetic": {"batch_size": 3} | options}, "benchmark": {}}
    chosen = changed(params("llama", {}), suites=suites)
    do(chosen)
    download(chosen, "datasets/arithmetic")
    return chosen


def test_every_score_says_whether_bos_was_read(workspace):
    chosen = asking(shots=1)
    for kind, read in (("none", False), ("bos", True)):
        begins.tokenizer(kind).save_pretrained("data/models/base/tiny")
        scores, _ = scored(chosen, "base/tiny", "arithmetic")
        assert len(scores) == 4 and set(scores["bos"]) == {read}


@pytest.mark.parametrize("shots", [0, 1])
def test_graded_readouts_are_the_slow_ones(shots, workspace):
    scores, samples = scored(asking(shots=shots), "base/tiny", "arithmetic")

    frames = {
        name: pd.read_parquet(f"data/datasets/arithmetic/{name}.parquet") for name in ("fewshot", "test")
    }
    examples = "".join(f"{r.question} {r.answer}\n" for r in frames["fewshot"].head(shots).itertuples())
    model, tokenizer = load("base/tiny"), families.tokenizer()
    right = {"likelihood": [], "generation": []}
    for item in frames["test"].itertuples():
        context = tokenizer(examples + item.question).input_ids
        likelihoods = [log_likelihood(model, context, tokenizer(f" {c}").input_ids) for c in item.choices]
        row = samples[(samples.readout == "likelihood") & (samples.doc_id == item.Index)].iloc[0]
        assert list(row.log_likelihoods) == pytest.approx(likelihoods, rel=1e-2)
        best = int(row.response)
        assert row.log_likelihoods[best] == max(row.log_likelihoods)
        assert likelihoods[best] > max(likelihoods) - 0.01  # two choices can be equal up to rounding to bf16
        right["likelihood"].append(best == item.gold)

        ids = model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=258)
        answer = tokenizer.decode(ids[0, len(context) :], skip_special_tokens=True).split("\n")[0]
        row = samples[(samples.readout == "generation") & (samples.doc_id == item.Index)].iloc[0]
        assert row.response == answer
        right["generation"].append(first_number(answer) == int(item.answer))
        assert row.target == item.answer

    for readout in ("likelihood", "generation"):
        rows = scores[scores.readout == readout]
        assert rows.difficulty.tolist() == ["all", "add"]
        assert rows.value.tolist() == [sum(right[readout]) / len(right[readout])] * 2
        assert rows.shots.tolist() == [shots] * 2
        assert rows.num_items.tolist() == [4, 4]
        assert rows.template.tolist() == ["none"] * 2
        assert rows.floor.between(0.25 if readout == "likelihood" else 0, 1).all()
    hashes = samples.groupby("doc_id").prompt_hash.nunique()
    assert (hashes == 1).all()  # both readouts saw the same prompt


@pytest.mark.parametrize("readout", ["likelihood", "generation"])
def test_one_readout_gives_the_scores_that_it_gives_beside_the_other(readout, workspace):
    both, answers = scored(asking(shots=1), "base/tiny", "arithmetic")
    alone, alone_answers = scored(asking(shots=1, readouts=[readout]), "base/tiny", "arithmetic")
    for all_rows, rows in ((both, alone), (answers, alone_answers)):
        expected = all_rows[all_rows.readout == readout].reset_index(drop=True)
        assert len(rows) and not set(all_rows.readout) - {"likelihood", "generation"}
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), expected, check_dtype=False)


THINKING = {
    "begin": " think:",
    "end": ";",
    "answer": "\nso",
    "temperature": 1.0,
    "budgets": [2, 5],
    "draws": 2,
}


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize(("answer_when", "asked_for"), [("always", "\nso"), ("cut", "\n")])
def test_shots_show_their_steps_as_thinking(answer_when, asked_for, chat_template, workspace):
    thinking = THINKING | {"answer_when": answer_when}
    chosen = asking(shots=1, chat_template=chat_template, chain_of_thought=True, thinking=thinking)
    suite = chosen.suites.graded["arithmetic"]
    (asked,) = suite.tasks("arithmetic", suite.asked())
    _, samples = scored(chosen, "base/tiny", "arithmetic")
    items = pd.read_parquet("data/results/base/tiny/arithmetic/items.parquet")
    shot = pd.read_parquet("data/datasets/arithmetic/fewshot.parquet").iloc[0]
    worked = f" think:{shot.steps};{asked_for} {shot.answer}"
    assert asked["fewshot_config"]["doc_to_target"](shot) == worked
    for prompt, question in zip(items.prompt, asked["custom_dataset"]()["test"]["question"], strict=True):
        assert shot.question in prompt and worked in prompt and question in prompt
        if not chat_template:
            assert prompt == f"{shot.question}{worked}\n{question}"
    test = pd.read_parquet("data/datasets/arithmetic/test.parquet")
    assert (samples.target == test.answer[samples.doc_id].to_numpy()).all()


def test_steps_that_the_model_would_not_see_are_refused(workspace):
    with pytest.raises(Refusal, match=r"thinking.end is '=', which occurs in the steps '.*'; choose an end"):
        scored(
            asking(shots=1, chain_of_thought=True, thinking=THINKING | {"end": "="}),
            "base/tiny",
            "arithmetic",
        )
    chosen = asking(shots=1, chain_of_thought=True, chat_template=True, thinking=THINKING)
    tokenizer = families.tokenizer()
    tokenizer.chat_template = (  # like that of Qwen3: earlier turns without their thinking
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split(';')[-1] }}{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained("data/models/base/tiny")
    with pytest.raises(Refusal, match=r"chat template does not keep ' think:.*set chat_template: false"):
        scored(chosen, "base/tiny", "arithmetic")


def test_an_answer_counts_by_its_first_number_alone(workspace, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    answers = iter([" 7\n", "", " none", " 70", "=> 7!", " -7", " 7 or 8", " 8 or 7"])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(answers) for _ in requests])
    chosen = asking(shots=1)
    item = {
        "difficulty": "add", "question": "3 + 4 =", "answer": "7", "choices": ["7", "8", "6", "9"], "gold": 0,
    }  # fmt: skip
    items = [item | {"question": f"{'0' * i}3 + 4 ="} for i in range(8)]
    pd.DataFrame(items).to_parquet(Path("data/datasets/arithmetic/test.parquet"))
    _, samples = scored(chosen, "base/tiny", "arithmetic")
    generated = samples[samples.readout == "generation"].sort_values("doc_id")
    assert generated.score.tolist() == [1, 0, 0, 0, 1, 0, 1, 0]


def test_penalties_and_prompts_that_were_cut_are_in_every_row(workspace):
    chosen = asking(shots=1, penalties={"repetition_penalty": 5.0, "no_repeat_ngram_size": 2})
    test = Path("data/datasets/arithmetic/test.parquet")
    items = pd.read_parquet(test)
    scores, plain = scored(chosen, "base/tiny", "arithmetic")
    assert scores.cut_prompts.tolist() == [0] * 4
    items.loc[:2, "question"] = [f"{'0' * size}3 + 4 =" for size in (300, 234, 1)]  # of 256 positions
    items.to_parquet(test)
    scores, _ = scored(chosen, "base/tiny", "arithmetic")
    for readout, cut, penalties in (
        ("likelihood", 1, "none"),  # the choice has a token or two, the generated answer room for twelve
        ("generation", 2, "repetition_penalty 5.0, no_repeat_ngram_size 2"),
    ):
        rows = scores[scores.readout == readout]
        assert rows.cut_prompts.tolist() == [cut] * 2
        assert set(rows.penalties) == {penalties}
    _, free = scored(asking(shots=1), "base/tiny", "arithmetic")
    assert set(free.response) != set(plain.response)


def test_a_chat_template_is_named_in_every_row(workspace):
    scores, samples = scored(asking(shots=1, chat_template=True), "base/tiny", "arithmetic")
    assert scores.template.str.fullmatch("[0-9a-f]{64}").all()
    assert samples.prompt_hash.notna().all()


def test_every_seed_that_params_take_can_be_evaluated_with(workspace):
    chosen = asking(shots=1)
    run = chosen.run.model_dump(mode="json") | {"seed": 2**63 - 1}
    scores, _ = scored(changed(chosen, run=run), "base/tiny", "arithmetic")
    assert set(scores["seed"]) == {2**63 - 1}
