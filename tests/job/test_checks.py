"""What is wrong between well-formed parts of params.yaml, each case on its own."""

import pytest

from stages.core.consent import ALLOW
from stages.core.errors import Refusal
from stages.job import checks
from stages.job.load import checked_params, load
from tests import project


@pytest.fixture
def raw(tmp_path):
    project.write_inputs(tmp_path / "inputs")
    return project.params(tmp_path / "inputs")


def refusal(raw) -> str:
    with pytest.raises(Refusal) as caught:
        checked_params(raw)
    return str(caught.value)


def test_the_sweep_of_the_tests_is_sound(raw):
    assert checked_params(raw).models["tiny"].in_features == (32, 64)


def test_a_noise_candidate_must_differ_in_its_batch_size(raw):
    raw["noise"]["tiny-batch-3"]["batch_size"] = raw["suites"]["perplexity"]["news"]["batch_size"]
    assert "noise.tiny-batch-3.batch_size: 2 is already the batch size of suite(s) news" in refusal(raw)


def test_rounding_alone_makes_a_noise_candidate(raw):
    raw["noise"]["tiny-batch-3"] = {"source": "base/tiny", "rounding": {"size": 2.0**-9, "seed": 0}}
    assert checked_params(raw).noise["tiny-batch-3"].rounding.size == 2.0**-9
    raw["noise"]["tiny-batch-3"] = {"source": "base/tiny"}
    assert "nothing differs from its source; give it a batch_size, a dtype, a backend or rounding" in refusal(
        raw
    )


def repeats_of_wanda(raw) -> list[str]:
    """Add two draws of wanda-50 and name all three as repeats."""
    names = ["prune/wanda-50"]
    for draw in (1, 2):
        recipe = raw["prune"]["wanda-50"]
        name = f"wanda-50-draw-{draw}"
        raw["prune"][name] = {**recipe, "calibration": {**recipe["calibration"], "seed": draw}}
        names.append(f"prune/{name}")
    raw["evaluate"]["candidates"] += names[1:]
    raw["report"]["noise"] = {"wanda": names}
    return names


def test_repeats_are_recipes_that_differ_in_seeds_alone(raw):
    names = repeats_of_wanda(raw)
    assert checked_params(raw).report.noise["wanda"] == tuple(names)
    raw["quantize"] |= {
        f"g-{draw}": {
            **raw["quantize"]["wanda-50-gptq-w4g32"], "source": name,
            "calibration": raw["prune"][name.removeprefix("prune/")]["calibration"],
        }
        for draw, name in enumerate(names)
    }  # fmt: skip
    chained = [f"quantize/g-{draw}" for draw in range(3)]
    raw["evaluate"]["candidates"] += chained
    raw["report"]["noise"]["gptq"] = chained
    assert checked_params(raw).report.noise["gptq"] == tuple(chained)
    raw["prune"]["wanda-50-draw-2"]["sparsity"] = 0.6
    found = refusal(raw)
    assert "report.noise.wanda: prune/wanda-50-draw-2 and prune/wanda-50 differ in more than seeds" in found
    assert "report.noise.gptq: quantize/g-2 and quantize/g-0 differ in more than seeds" in found


def test_repeats_are_evaluated_distinct_and_named_once(raw):
    names = repeats_of_wanda(raw)
    raw["prune"]["wanda-50-draw-2"] = raw["prune"]["wanda-50-draw-1"]
    raw["report"]["noise"]["again"] = [*names[:2], "prune/wanda-90"]
    found = refusal(raw)
    assert "report.noise.wanda: some of these are equal in every setting; give each another seed" in found
    assert "report.noise.again: prune/wanda-50 is in wanda already; list each candidate once" in found
    assert "report.noise.again: 'prune/wanda-90' is not among evaluate.candidates" in found
    raw["report"]["noise"] = {"wanda": names[:2]}
    assert "report.noise.wanda: a list given; allowed: three candidates or more" in refusal(raw)


def test_portable_numerics_are_fp32_on_the_cpu(raw):
    raw["run"] |= {"numerics": "portable", "device": "cpu"}
    assert "numerics portable needs dtype float32 and device cpu or auto, not bfloat16 and cpu" in refusal(
        raw
    )
    raw["run"]["dtype"] = "float32"
    assert checked_params(raw).run.numerics == "portable"
    raw["noise"]["tiny-half"] = {"source": "base/tiny", "dtype": "bfloat16"}
    assert "noise.tiny-half.dtype: bfloat16 given; numerics portable is fp32" in refusal(raw)
    raw["run"]["device"] = "cuda"
    assert "not float32 and cuda" in refusal(raw)


def test_a_suite_must_not_score_the_file_that_recipes_learn_from(raw):
    raw["datasets"]["all-news"] = {**raw["datasets"]["news"], "calibration": 0.0}
    raw["suites"]["perplexity"]["all-news"] = raw["suites"]["perplexity"]["news"]
    assert "suites.perplexity.all-news: it would score the very file" in refusal(raw)


def test_a_graded_suite_must_not_score_items_that_recipes_learn_from(raw):
    (level,) = raw["datasets"]["arithmetic"]["levels"]
    raw["datasets"]["drill"] = {
        **raw["datasets"]["arithmetic"], "train": 4, "seed": 7, "levels": [{**level, "name": "sums"}],
    }  # fmt: skip
    assert "drill" in checked_params(raw).datasets
    raw["prune"]["wanda-50"]["calibration"] = {**raw["prune"]["wanda-50"]["calibration"], "dataset": "drill"}
    assert (
        "suites.graded.arithmetic: it would score items that recipes learn from as datasets.drill"
        in refusal(raw)
    )
    raw["datasets"]["drill"]["levels"][0]["digits"] = 2
    assert "drill" in checked_params(raw).datasets


@pytest.mark.parametrize("options", [None, 2, 4])
def test_the_same_rules_with_other_options_are_the_same_items(raw, options):
    rules = {
        "kind": "classification", "seed": 0, "test": 4, "train": 4, "fewshot": 1,
        "levels": [{"name": "four", "chains": 4}],
    }  # fmt: skip
    raw["datasets"]["rules"] = rules
    raw["datasets"]["drill"] = rules | {"levels": [{"name": "drill", "chains": 4, "options": options}]}
    raw["suites"]["graded"]["rules"] = raw["suites"]["graded"]["arithmetic"]
    raw["prune"]["wanda-50"]["calibration"] = {**raw["prune"]["wanda-50"]["calibration"], "dataset": "drill"}
    assert "suites.graded.rules: it would score items that recipes learn from as datasets.drill" in refusal(
        raw
    )
    raw["datasets"]["drill"]["levels"][0]["chains"] = 5
    assert "drill" in checked_params(raw).datasets


LOGITS = {"source": "base/tiny", "method": "logits", "dataset": "news", "batch_size": 2}


def test_training_settings_are_held_against_the_kind_of_data_set(raw):
    raw["datasets"]["arithmetic"]["train"] = 4
    raw["datasets"]["words"] = {
        "kind": "benchmark", "source": "hub:org/words@" + "0" * 40, "config": "main",
    }  # fmt: skip
    raw["teach"] = {"taught": LOGITS}
    train = raw["finetune"]["wanda-50-lora"]["train"]
    for dataset, options, message in (
        (
            "arithmetic",
            {"difficulty": "ad"},
            "difficulty: there is no 'ad'; did you mean 'add'? allowed: add.",
        ),
        ("arithmetic", {"split": "train"}, "arithmetic is graded items, which has no use for split"),
        ("words", {"difficulty": "add"}, "words is a benchmark, which has no use for difficulty"),
        ("words", {"prompt": "ask"}, "words is a benchmark, so split, completion must be given"),
        (
            "taught",
            {"chat_template": True},
            "taught is made by a teacher, in tokens already, which has no use",
        ),
        (
            "tought",
            {},
            "there is no 'tought'; did you mean 'taught'? allowed: arithmetic, news, speeches, taught",
        ),
    ):
        raw["finetune"]["wanda-50-lora"]["train"] = train | {"dataset": dataset} | options
        assert message in refusal(raw)


def test_distillation_is_from_a_data_set_that_has_logits(raw):
    raw["datasets"]["arithmetic"]["train"] = 4
    answers = {"method": "answers", "dataset": "arithmetic", "max_new_tokens": 4}
    raw["teach"] = {"taught": LOGITS, "answered": LOGITS | answers}
    raw["finetune"]["wanda-50-lora"]["distillation"] = {}
    raw["finetune"]["wanda-50-lora"]["train"] = {"dataset": "answered"}
    assert "answered holds no teacher's logits" in refusal(raw) and "allowed: taught." in refusal(raw)
    raw["finetune"]["wanda-50-lora"]["train"] = {"dataset": "taught"}
    assert checked_params(raw).finetune["wanda-50-lora"].distillation.weight == 1.0


def test_a_data_set_must_not_be_made_from_itself(raw):
    raw["teach"] = {"taught": LOGITS | {"source": "finetune/wanda-50-lora"}}
    assert "taught" in checked_params(raw).teach
    raw["finetune"]["wanda-50-lora"]["train"] = {"dataset": "taught"}
    assert "teach.taught: a cycle, its teacher or its data set is made from itself" in refusal(raw)
    raw["teach"] = {"taught": LOGITS | {"dataset": "again"}, "again": LOGITS | {"dataset": "taught"}}
    assert "teach.taught: a cycle" in refusal(raw) and "teach.again: a cycle" in refusal(raw)


def test_a_suite_must_not_score_what_a_taught_data_set_was_made_of(raw):
    raw["teach"] = {"taught": LOGITS}
    raw["finetune"]["wanda-50-lora"]["train"] = {"dataset": "taught"}
    raw["prune"]["wanda-50"]["calibration"] = {"dataset": "speeches", "num_samples": 4, "sequence_length": 32}
    raw["quantize"]["wanda-50-gptq-w4g32"]["calibration"] = raw["prune"]["wanda-50"]["calibration"]
    raw["datasets"]["all-news"] = {**raw["datasets"]["news"], "calibration": 0.0}
    raw["suites"]["perplexity"]["all-news"] = raw["suites"]["perplexity"]["news"]
    assert "it would score the very file that recipes learn from as datasets.news" in refusal(raw)


def test_a_suite_must_not_score_the_split_that_recipes_learn_from(raw):
    raw["datasets"]["words"] = {
        "kind": "benchmark", "source": "hub:org/words@" + "0" * 40, "config": "main",
    }  # fmt: skip
    raw["suites"]["benchmark"]["words"] = {"task": "words", "shots": 0, "batch_size": 2}
    pair = {"dataset": "words", "prompt": "ask", "completion": "reply", "num_samples": 4}
    raw["finetune"]["wanda-50-lora"]["train"] = pair | {"split": "test"}
    assert "recipes learn from split test of datasets.words, which it may score" in refusal(raw)
    raw["finetune"]["wanda-50-lora"]["train"] = pair | {"split": "train"}
    assert checked_params(raw).finetune["wanda-50-lora"].train.split == "train"


def test_readouts_are_those_that_the_suite_can_ask(raw, monkeypatch):
    suite = raw["suites"]["graded"]["arithmetic"]
    suite["readouts"] = ["likelihood", "likelihood"]
    assert "readouts names one twice: likelihood, likelihood" in refusal(raw)
    suite["readouts"] = ["likelihood"]
    contrast = {
        "test": "contrast", "claim": "x", "expect": "below",
        "readouts": [{"suite": "arithmetic", "metric": "exact_match"}],
        "sides": [{"weight": 1, "candidate": "prune/wanda-50"}],
    }  # fmt: skip
    raw["studies"] = {
        "x": {"claim": "x", "source": "x", "profile": "laptop", "hypotheses": {"one": contrast}}
    }
    assert "arithmetic has no metric 'exact_match'; allowed: acc, entropy" in refusal(raw)
    contrast["readouts"][0]["metric"] = "acc"
    assert checked_params(raw).suites.graded["arithmetic"].readouts == ("likelihood",)
    monkeypatch.setattr("stages.job.checks.suites.installed", lambda: True)
    suite["backend"] = "vllm"
    assert "vLLM cannot answer this suite: it asks for likelihoods" in refusal(raw)
    raw["studies"] = {}
    suite["readouts"] = ["generation"]
    assert checked_params(raw)
    suite |= {"readouts": ["likelihood"], "thinking": {"budgets": [8], "temperature": 0}}
    assert "set readouts to [generation], or leave it out" in refusal(raw)


def test_shots_show_steps_only_of_items_that_have_some(raw):
    suite = raw["suites"]["graded"]["arithmetic"]
    suite |= {"chain_of_thought": True, "shots": 1}
    assert "set thinking and at least 1 shot" in refusal(raw)
    suite |= {"thinking": {"budgets": [8], "temperature": 0}, "shots": 0}
    assert "set thinking and at least 1 shot" in refusal(raw)
    suite["shots"] = 1
    assert checked_params(raw).suites.graded["arithmetic"].chain_of_thought
    raw["datasets"]["arithmetic"] = {
        "kind": "brackets", "seed": 0, "test": 4, "levels": [{"name": "deep", "depth": 4, "closed": 1}],
    }  # fmt: skip
    assert (
        "suites.graded.arithmetic.chain_of_thought: datasets.arithmetic is of kind brackets, whose items "
        "have no steps to show; allowed: arithmetic, classification."
    ) in refusal(raw)


def test_two_evaluations_must_not_share_a_stage_name(raw):
    raw["datasets"]["old-news"] = {**raw["datasets"]["speeches"]}
    raw["suites"]["perplexity"]["old-news"] = raw["suites"]["perplexity"]["news"]
    raw["prune"]["wanda"] = raw["prune"]["wanda-50"]
    raw["prune"]["wanda-old"] = raw["prune"]["wanda-50"]
    raw["evaluate"]["candidates"] += ["prune/wanda", "prune/wanda-old"]
    assert "both be stage perplexity@prune/wanda-old-news" in refusal(raw)


def test_group_size_is_left_to_the_stage_when_linears_are_ignored(raw):
    raw["quantize"]["rtn-w4g32"] |= {"group_size": 64, "ignore": ["self_attn.q_proj"]}
    assert checked_params(raw).quantize["rtn-w4g32"].group_size == 64


def test_a_changed_path_is_found(raw, tmp_path):
    checked = checked_params(raw)
    assert list(checks.changed_paths(checked)) == []
    (tmp_path / "inputs" / "news.txt").write_text("other words\n")
    (change,) = checks.changed_paths(checked)
    assert change.startswith("datasets.news.sha256: ")
    assert "write this hash if its content is what you want" in change


def test_a_changed_path_of_nltks_data_is_found(raw, tmp_path):
    inputs = tmp_path / "inputs"
    words = {"kind": "benchmark", "source": f"path:{inputs}", "config": "."}
    nltk = {"source": f"path:{inputs}", "file": "news.txt", "sha256": "1" * 64}
    raw["datasets"]["words"] = {**words, "sha256": project.sha256(inputs), "nltk_data": nltk}
    (change,) = checks.changed_paths(checked_params(raw))
    assert change.startswith("datasets.words.nltk_data.sha256: ")
    raw["datasets"]["words"]["nltk_data"]["file"] = "missing.zip"
    (change,) = checks.changed_paths(checked_params(raw))
    assert change.startswith("datasets.words.nltk_data: ")
    assert "has no missing.zip; correct the path" in change


@pytest.mark.parametrize("number", ["5e-4", "1e-05"])
def test_numbers_are_read_as_dvc_reads_them(raw, tmp_path, number):
    project.write(tmp_path, raw)
    file = tmp_path / "params.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.001", f"learning_rate: {number}"))
    assert load(file).finetune["wanda-50-lora"].learning_rate == float(number)


def test_a_name_given_twice_is_refused(raw, tmp_path):
    project.write(tmp_path, raw)
    file = tmp_path / "params.yaml"
    file.write_text(file.read_text() + "\nnoise: {}\n")
    with pytest.raises(Refusal, match="is not YAML"):
        load(file)


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (
            {},
            "noise.tiny-batch-3: nothing differs from its source; give it a batch_size, a dtype",
        ),
        ({"dtype": "bfloat16"}, "noise.tiny-batch-3.dtype: bfloat16 is already run.dtype"),
        ({"dtype": "float32"}, None),
        ({"dtype": "float32", "batch_size": 2}, None),
    ],
)
def test_a_noise_candidate_may_differ_in_its_dtype(variant, sentence, raw):
    raw["noise"]["tiny-batch-3"] = {"source": "base/tiny", **variant}
    if sentence is None:
        assert checked_params(raw).noise["tiny-batch-3"].dtype == "float32"
    else:
        assert sentence in refusal(raw)


def test_a_floor_stands_beside_a_base_and_is_no_source(raw):
    raw["floor"]["dot"] = {"source": "prune/wanda-50", "responder": "dot"}
    assert "floor.dot.source: 'prune/wanda-50' given; allowed: base/<model>" in refusal(raw)
    raw["floor"]["dot"] = {"source": "base/tiny", "responder": "dots"}
    assert "floor.dot.responder: 'dots' given; allowed: uniform, longest-choice" in refusal(raw)


def test_a_program_runs_only_where_the_environment_allows_it(raw, monkeypatch):
    raw["prune"]["steps"] = {
        **raw["prune"]["wanda-50"], "method": "stepwise", "max_rise": 0.5, "held_out": 1,
        "policy": {"kind": "command", "command": ["decide", "--fast"]},
    }  # fmt: skip
    said = "prune.steps.policy: it runs the program 'decide' on this machine"
    monkeypatch.delenv(ALLOW, raising=False)
    assert said in refusal(raw) and f"set {ALLOW}=1" in refusal(raw)
    monkeypatch.setenv(ALLOW, "yes")
    assert said in refusal(raw)
    monkeypatch.setenv(ALLOW, "1")
    assert checked_params(raw).prune["steps"].policy.command == ("decide", "--fast")


EXACT = {"suite": "arithmetic", "metric": "exact_match"}


def of_study(raw, **hypotheses):
    raw["studies"] = {"s": {"claim": "c", "source": "s", "profile": "laptop", "hypotheses": hypotheses}}
    return raw


def a_trend(**changes):
    candidates = ["base/tiny", "prune/wanda-50", "prune/magnitude-50"]
    settings = {"test": "trend", "claim": "c", "readout": EXACT, "candidates": candidates, "expect": "falls"}
    return settings | changes


@pytest.mark.parametrize(
    ("hypothesis", "message"),
    [
        (a_trend(candidates=["base/tiny", "noise/x", "prune/wanda-5"]), "did you mean 'prune/wanda-50'?"),
        (a_trend(candidates=["base/tiny"]), "a trend needs three conditions or more, not 1"),
        (a_trend(readout=EXACT | {"suite": "sums"}), "there is no suite 'sums'; allowed: arithmetic, news."),
        (a_trend(readout=EXACT | {"level": "sub"}), "arithmetic has no level 'sub'; allowed: add, all."),
        (a_trend(readout=EXACT | {"budget": 8}), "arithmetic has no budget 8; allowed: none"),
        (a_trend(readout=EXACT | {"metric": "accuracy"}), "arithmetic has no metric 'accuracy'"),
        (a_trend(readout={"suite": "news", "metric": "acc"}), "news has no metric 'acc'"),
        (a_trend(x={"column": "sparsty"}), "x.column: 'sparsty' given; allowed: sparsity, blocks_removed"),
        (a_trend(x={"values": [1.0]}), "x.values: 1 given for 3 conditions"),
        (a_trend(x={"values": [0.3, 0.1, 0.3]}), "x.values: a number is given twice"),
        (a_trend(x={}), "give either column or values"),
        (a_trend(control="b"), "there is no hypothesis 'b' in this study"),
        (a_trend(control="a"), "a cycle, a <- a"),
        (a_trend(reference="base/small"), "'base/small' is not among evaluate.candidates"),
        (a_trend(test="trends"), "'trends' given; did you mean 'trend'? allowed: contrast, correlation"),
        (a_trend(budgets=[1, 2, 3], levels=["add"]), "a trend runs along one of them"),
        (a_trend(weight=1.0), "no such field"),
    ],
)  # fmt: skip
def test_a_hypothesis_names_what_exists(raw, hypothesis, message):
    assert checked_params(of_study(raw, a=a_trend())).studies["s"].hypotheses["a"].test == "trend"
    said = refusal(of_study(raw, a=hypothesis))
    assert message in said and "studies.s.hypotheses.a" in said


def test_a_readout_may_say_all_that_tells_its_score(raw):
    exact = EXACT | {"readout": "generation", "task": "arithmetic"}
    text = {"suite": "news", "metric": "perplexity", "readout": "likelihood", "task": "perplexity-news"}
    for readout in (exact, text):
        assert checked_params(of_study(raw, a=a_trend(readout=readout))).studies["s"].hypotheses["a"].claim


def test_all_mistakes_of_studies_are_said_at_once(raw):
    raw["report"]["reference"] = "base/none"
    said = refusal(of_study(raw, a=a_trend(expect="sinks"), b=a_trend(readout=EXACT | {"metric": "x"})))
    assert "3 problem(s)" in said
    for part in ("report.reference: 'base/none'", "hypotheses.a.expect: 'sinks' given", "no metric 'x'"):
        assert part in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": [{"weight": 1.0}]}, "give either candidate or curve"),
        ({"at": {"by": "tokens", "value": 3.0}}, "at goes with a curve or budgets"),
        ({"expect": "within"}, "within needs a bound above 0"),
        ({"zero": "base/tiny"}, "zero goes with measure retention"),
        ({"sides": [{"weight": 1.0, "curve": ["base/tiny"]}]}, "must"),
        ({"sides": [{"weight": 0.0, "candidate": "base/tiny"}]}, "a weight of 0 leaves it out of the sum"),
        ({"readouts": [EXACT | {"weight": 0.0}]}, "a weight of 0 leaves it out of the sum"),
        ({"sides": [{"weight": 1.0, "candidate": "base/tiny"}] * 2}, "sides: two are the same"),
        ({"readouts": [EXACT, EXACT | {"weight": -1.0}]}, "readouts, timings: two are the same"),
        (
            {"measure": "retention", "readouts": [{"suite": "news", "metric": "perplexity"}]},
            "perplexity has no floor",
        ),
        ({"readouts": [EXACT | {"readout": "likelihood"}]}, "leave it out, or say generation"),
        ({"readouts": [EXACT | {"task": "sums"}]}, "leave it out, or say arithmetic"),
        ({"readouts": [EXACT | {"counted": "exact_match"}]}, "has no counted 'exact_match'; leave it out"),
        (
            {
                "sides": [{"weight": 1.0, "curve": ["base/tiny", "prune/wanda-50"]}],
                "at": {"by": "tokens", "value": 3.0},
            },
            "arithmetic has no metric 'tokens'",
        ),
        (
            {
                "sides": [{"weight": 1.0, "curve": ["base/tiny"] * 2}],
                "at": {"by": "bytes_ideal", "value": 3.0},
            },
            "the curve names a point twice",
        ),
    ],
)
def test_a_contrast_that_contradicts_itself_is_refused(raw, changes, message):
    sides = [{"weight": 1.0, "candidate": "prune/wanda-50"}, {"weight": -1.0, "candidate": "base/tiny"}]
    contrast = {"test": "contrast", "claim": "c", "sides": sides, "readouts": [EXACT], "expect": "below"}
    assert "a" in checked_params(of_study(raw, a=contrast)).studies["s"].hypotheses
    assert message in refusal(of_study(raw, a=contrast | changes))


def test_a_data_set_may_have_several_suites(raw):
    raw["suites"]["graded"]["direct"] = {"shots": 0, "batch_size": 2}
    raw["suites"]["perplexity"]["long-news"] = raw["suites"]["perplexity"]["news"] | {"sequence_length": 48}
    assert "suites.graded.direct: it scores datasets.direct, and there is none" in refusal(raw)
    raw["suites"]["datasets"] = {"direct": "arithmetic", "long-news": "news"}
    chosen = checked_params(raw)  # recipes read the other part of news
    assert "base/tiny/direct" in chosen.evaluations()
    assert chosen.suites.dataset_of("direct") == "arithmetic"
    level = a_trend(readout=EXACT | {"suite": "direct", "level": "add"})
    assert checked_params(of_study(raw, a=level)).studies["s"].hypotheses["a"].claim == "c"
    assert "direct has no level 'hard'" in refusal(
        of_study(raw, a=a_trend(readout=EXACT | {"suite": "direct", "level": "hard"}))
    )


def test_what_a_hypothesis_measures_must_be_measured(raw):
    slower = {
        "test": "contrast", "claim": "c", "unit": "repeat", "expect": "above",
        "sides": [{"weight": 1.0, "candidate": "prune/wanda-50"}],
        "timings": [{"figure": "seconds_per_token", "batch_size": 1}],
    }  # fmt: skip
    said = refusal(of_study(raw, a=slower))
    assert "'prune/wanda-50' is not among profile.candidates" in said
    raw["profile"]["candidates"] = ["prune/wanda-50"]
    assert checked_params(of_study(raw, a=slower)).studies["s"].hypotheses["a"].measured()
    other = slower | {"timings": [{"figure": "seconds_per_token", "batch_size": 3}]}
    assert "batch size 3 is not among profile.batch_sizes; allowed: 1, 2" in refusal(of_study(raw, a=other))
    both = of_study(raw, a=slower, b=a_trend(control="a"))
    assert "hypotheses.b.control: a reads measurements" in refusal(both)
