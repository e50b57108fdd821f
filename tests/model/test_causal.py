"""Models that look ahead, which transformers loads as causal language models, against those that do not."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.core.errors import Refusal
from stages.evaluation.shared import SharedPrefixLM
from stages.model.causal import check_causal
from tests import families, generators

_SIZE = {"vocab_size": families.VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_BERT = _SIZE | {"intermediate_size": 64, "max_position_embeddings": 64}
AHEAD = {
    "bert": _BERT,
    "electra": _BERT | {"embedding_size": 32},
    "ernie": _BERT,
    "megatron-bert": _BERT,
    "rembert": _BERT | {"input_embedding_size": 32, "output_embedding_size": 32},
    "roformer": _BERT | {"embedding_size": 32},
    "big_bird": _BERT,
    "xlm": {"vocab_size": families.VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
}


def model(family: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **AHEAD[family], **options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", AHEAD)
def test_models_that_look_ahead_are_refused(family, dtype):
    with pytest.raises(Refusal, match=f"this {family} model looks ahead: .* set is_decoder: true"):
        check_causal(model(family, dtype))


def test_a_model_that_reads_any_length_and_looks_ahead_is_refused():
    """The config of XLNet says that it has -1 positions."""
    config = AutoConfig.for_model(
        "xlnet", vocab_size=families.VOCAB, d_model=32, n_layer=2, n_head=2, d_inner=64
    )
    with pytest.raises(Refusal, match="this xlnet model looks ahead"):
        check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


@pytest.mark.parametrize("family", ["bert", "electra", "rembert"])
def test_the_way_out_of_the_refusal_is_one(family):
    check_causal(model(family, is_decoder=True))


@pytest.mark.parametrize("name", generators.NAMES)
def test_models_that_generate_are_not_refused(name):
    check_causal(generators.model(name))
    check_causal(generators.model(name).bfloat16())


def test_mixtures_are_not_refused_for_their_rounding():
    for dtype in (torch.float32, torch.bfloat16):
        check_causal(families.mixture(4).to(dtype))


def test_a_dead_model_is_not_refused():
    dead = families.model("llama")
    for parameter in dead.parameters():
        parameter.data.zero_()
    check_causal(dead)


def test_no_suite_scores_a_model_that_looks_ahead():
    with pytest.raises(Refusal, match="looks ahead"):
        SharedPrefixLM(pretrained=model("bert"), tokenizer=families.tokenizer(), batch_size=2)
