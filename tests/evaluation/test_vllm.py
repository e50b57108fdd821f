"""Suites that vLLM answers: a stand-in gets the prompts of transformers, and rows say who answered."""

import os

import pandas as pd
import pytest
import torch

from stages.controls.candidates import Noise
from stages.core import backend
from stages.core.errors import Refusal
from stages.evaluation.graded import GradedSuite
from stages.evaluation.perplexity import PerplexitySuite
from stages.evaluation.stock import BenchmarkSuite
from stages.job import checks
from stages.job.params import Params
from tests import begins, engine, families
from tests.pipeline import do, download, params
from tests.scoring import changed, scored

PENALTY = {"repetition_penalty": 1.3}


@pytest.fixture
def vllm(monkeypatch, tmp_path_factory) -> engine.Engine:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return engine.install(monkeypatch, tmp_path_factory.mktemp("vllm"), families.DEVICE)


def asking(noise: dict[str, object] | None = None, **options: object) -> Params:
    """Params with one graded suite, its data downloaded."""
    suites = {"perplexity": {}, "graded": {"arithmetic": {"shots": 1, "batch_size": 3} | options}}
    chosen = changed(params("llama", {}), suites=suites, noise={"again": noise} if noise else {})
    chosen = chosen.model_copy(update={"run": chosen.run.model_copy(update={"dtype": "float32"})})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    return chosen


@pytest.mark.device
@pytest.mark.parametrize("begin", ["none", "bos"])
def test_vllm_gets_the_same_prompts_and_its_answers_count_the_same(begin, workspace, vllm):
    """The noise between the engines is a candidate: `noise/again` is answered by the other one."""
    chosen = asking({"source": "base/tiny", "backend": "vllm"}, penalties=PENALTY)
    for candidate in ("base/tiny", "noise/again"):
        begins.tokenizer(begin).save_pretrained(f"data/models/{candidate}")
    theirs, answers = scored(chosen, "noise/again", "arithmetic")
    (loaded,) = vllm.loaded
    assert (loaded["dtype"], loaded["seed"], loaded["max_model_len"]) == ("float32", chosen.run.seed, 256)
    assert loaded["max_num_seqs"] == 3 and loaded["model"] == "data/models/noise/again"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert vllm.modes == {0} and torch.get_deterministic_debug_mode() == 2
    assert all(one["max_tokens"] > 1 and "\n" in one["stop"] for one in vllm.settings)
    assert {one["repetition_penalty"] for one in vllm.settings} == {1.3}
    assert {ids[0] == 256 for ids in vllm.prompts} == {begin == "bos"}
    assert set(theirs["backend"]) == {f"vllm {engine.VERSION}"} and set(theirs["readout"]) == {"generation"}

    ours, responses = scored(chosen, "base/tiny", "arithmetic")
    assert len(vllm.loaded) == 1 and set(ours["backend"]) == {"transformers"}
    ours = ours[ours["readout"] == "generation"].reset_index(drop=True)
    responses = responses[responses["readout"] == "generation"]
    assert answers["response"].tolist() == responses["response"].tolist()
    assert answers["prompt_hash"].tolist() == responses["prompt_hash"].tolist()
    of_candidate = ["backend", "candidate", "source", "lineage"]
    pd.testing.assert_frame_equal(ours.drop(columns=of_candidate), theirs.drop(columns=of_candidate))


def test_a_suite_of_vllm_asks_for_generation_alone(workspace, vllm):
    chosen = asking({"source": "base/tiny", "backend": "transformers"}, backend="vllm")
    for candidate, answered in (("base/tiny", f"vllm {engine.VERSION}"), ("noise/again", "transformers")):
        if candidate != "base/tiny":
            do(chosen)
        scores, samples = scored(chosen, candidate, "arithmetic")
        assert set(scores["readout"]) == set(samples["readout"]) == {"generation"}
        assert set(scores["backend"]) == {answered}
    assert len(vllm.loaded) == 1
    assert scores["floor"].notna().all()


def test_an_engine_that_does_not_load_is_a_refusal(workspace, vllm):
    chosen = asking(backend="vllm")
    vllm.fails = "no kernel for 3 bits"
    with pytest.raises(Refusal, match=r"vLLM does not load base/tiny \(ValueError: no kernel for 3 bits\)"):
        scored(chosen, "base/tiny", "arithmetic")


def test_an_engine_on_another_device_is_a_refusal(workspace, vllm, monkeypatch):
    from vllm import platforms

    chosen = asking(backend="vllm")
    monkeypatch.setattr(platforms.current_platform, "device_type", "tpu")
    with pytest.raises(Refusal, match=r"this vLLM computes on tpu; set run\.device: tpu"):
        scored(chosen, "base/tiny", "arithmetic")


def of(options: dict[str, object], kind: str = "graded", **noise: object) -> str:
    """The refusal of params with such a suite and noise candidate."""
    name = {"perplexity": "news", "graded": "arithmetic"}[kind]
    least = {"perplexity": {"windows": 2}, "graded": {"shots": 1}}[kind]
    with pytest.raises(Refusal) as refused:
        changed(
            params("llama", {}), suites={kind: {name: least | options}},
            noise={"again": {"source": "base/tiny"} | noise} if noise else {},
        )  # fmt: skip
    return str(refused.value)


def test_vllm_is_refused_by_name_where_it_is_not_installed(workspace, monkeypatch):
    monkeypatch.setattr(checks.suites, "installed", lambda: False)
    monkeypatch.setattr(checks, "installed", lambda: False)
    missing = "vllm is not installed here; install the extra prunequant[vllm], or leave backend out"
    assert f"suites.graded.arithmetic.backend: {missing}" in of({"backend": "vllm"})
    assert f"noise.again.backend: {missing}" in of({}, backend="vllm")


def test_what_vllm_cannot_answer_is_refused_with_the_reason(workspace, vllm):
    assert f"suites.perplexity.news.backend: vLLM cannot answer this suite: {backend.LIKELIHOOD}" in of(
        {"backend": "vllm"}, "perplexity"
    )
    thinking = {"thinking": {"budgets": [0, 4], "draws": 1, "temperature": 0.0}}
    assert f"vLLM cannot answer this suite: {backend.FORCED}" in of({"backend": "vllm"} | thinking)
    ngrams = {"penalties": {"no_repeat_ngram_size": 2}}
    assert "vLLM has no no_repeat_ngram_size; leave backend out" in of({"backend": "vllm"} | ngrams)


def test_a_noise_candidate_must_differ_in_every_suite(workspace, vllm):
    alike = "suite(s) news would be answered by the engine and at the batch size of its source"
    assert alike in of({"batch_size": 2}, "perplexity", backend="vllm")
    assert alike in of({"batch_size": 2}, "perplexity", backend="vllm", batch_size=2)
    assert "suite(s) arithmetic would be answered" in of({"batch_size": 2}, backend="transformers")
    assert "noise.again: nothing differs" in of({}, source="base/tiny")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_type": "multiple_choice"}, backend.LIKELIHOOD),
        ({}, None),
        ({"generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0}}, None),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, backend.DRAWN),
        ({"generation_kwargs": {"temperature": 0.7}}, backend.DRAWN),
        ({"generation_kwargs": {"num_beams": 4}}, "vLLM has no num_beams"),
    ],
)
def test_a_benchmark_is_refused_if_any_of_its_tasks_is(options, reason, monkeypatch):
    suite = BenchmarkSuite(task="a-task")
    monkeypatch.setattr(BenchmarkSuite, "stock", lambda self, functions: [("one", {}), ("two", options)])
    assert suite.refuses_vllm() == reason


def test_a_likelihood_suite_keeps_its_engine_for_a_noise_candidate_of_vllm(vllm):
    from stages.evaluate import backend_of

    perplexity, graded = PerplexitySuite(windows=2), GradedSuite(shots=0)
    with pytest.raises(Refusal, match="vLLM cannot answer suite news: it asks for likelihoods"):
        backend_of({"backend": "vllm"}, perplexity, "news")
    assert backend_of({"backend": "vllm", "batch_size": 5}, perplexity, "news") == "transformers"
    assert backend_of({"backend": "vllm", "batch_size": 5}, graded, "arithmetic") == "vllm"
    assert backend_of({"responder": "dot"}, GradedSuite(shots=0, backend="vllm"), "a") == "transformers"
    assert Noise(source="base/tiny", backend="vllm").backend == "vllm"
