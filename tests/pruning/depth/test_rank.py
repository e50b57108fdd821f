"""The scores that depth pruning goes by, against slow references."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

from stages.core.errors import Refusal
from stages.model.blocks import blocks, forward
from stages.pruning.depth import rank
from stages.pruning.depth.ablate import Ablation, ScoredRows
from stages.pruning.depth.remove import remove_blocks
from tests import families
from tests.deep import WINDOWS, deep, logits, loss, without, without_attention


@pytest.mark.parametrize("target", ["block", "attention"])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_leaving_one_out_is_a_model_without_it(family, target):
    model = deep(family, 3)
    before = logits(model)
    found = rank.perplexity(Ablation(model, ScoredRows.of_text(WINDOWS), 2, target, "test"), [0, 1, 2])
    reference = without if target == "block" else without_attention
    for number, value in found.items():
        assert value == pytest.approx(loss(reference(model, {number})), abs=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 3
    assert torch.equal(logits(model), before)


def test_any_sets_in_one_go_are_what_they_are_alone():
    model = deep("gemma3", 4)
    sets = [frozenset(c) for n in range(5) for c in itertools.combinations(range(4), n)]
    found = Ablation(model, ScoredRows.of_text(WINDOWS), 3, "block", "test").losses(sets)
    for out in sets:
        assert found[out] == pytest.approx(loss(without(model, out)), abs=1e-5)


def exact_shapley(value, players: list[int]) -> dict[int, float]:
    """The definition: the mean gain on joining any set, weighted by its size."""
    count = len(players)
    found = {}
    for one in players:
        rest = [other for other in players if other != one]
        found[one] = sum(
            (value(frozenset(have) | {one}) - value(frozenset(have)))
            / (count * math.comb(count - 1, len(have)))
            for n in range(count)
            for have in itertools.combinations(rest, n)
        )
    return found


def test_sampled_shapley_values_near_the_exact_ones():
    model = deep("llama", 4)
    ablation = Ablation(model, ScoredRows.of_text(WINDOWS), 5, "block", "test")
    losses = {
        frozenset(c): loss(without(model, set(range(4)) - set(c)))
        for n in range(5)
        for c in itertools.combinations(range(4), n)
    }
    exact = exact_shapley(lambda have: -losses[have], [0, 1, 2, 3])
    found = rank.shapley(ablation, [0, 1, 2, 3], 2000, 0)
    spread = max(losses.values()) - min(losses.values())
    assert max(abs(found[n] - exact[n]) for n in exact) < 0.03 * spread
    assert sum(found.values()) == pytest.approx(losses[frozenset()] - losses[frozenset(range(4))], abs=1e-4)
    few = rank.shapley(ablation, [0, 1, 3], 3, 1)
    assert few == rank.shapley(ablation, [0, 1, 3], 3, 1) != rank.shapley(ablation, [0, 1, 3], 3, 2)
    assert set(few) == {0, 1, 3}


@pytest.mark.parametrize("target", ["block", "attention"])
def test_greedy_takes_what_a_search_by_hand_takes(target):
    model = deep("opt", 5)
    reference = without if target == "block" else without_attention
    gone: set[int] = set()
    order = []
    for _ in range(3):
        tried = {n: loss(reference(model, gone | {n})) for n in (1, 2, 4) if n not in gone}
        order.append(min(tried, key=tried.__getitem__))
        gone.add(order[-1])
    found = rank.greedy(Ablation(model, ScoredRows.of_text(WINDOWS), 2, target, "test"), [1, 2, 4], 3, None)
    assert [step["removed"] for step in found.notes["steps"]] == order
    assert found.removed == tuple(sorted(gone))


def streams(model: nn.Module) -> list[torch.Tensor]:
    """The stream before every block and after the last, by transformers' own account."""
    bare = copy.deepcopy(model)
    bare.model.norm = nn.Identity()
    with torch.no_grad():
        return list(bare(input_ids=WINDOWS, output_hidden_states=True).hidden_states)


def test_block_influence_and_angles_are_the_papers_formulas():
    model = deep("llama", 5)
    seen = [one.double().numpy() for one in streams(model)]

    def cosine(a, b):
        return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)) ** 0.5

    influence = rank.block_influence(model, WINDOWS, 2, "block")
    for number in range(5):
        assert influence[number] == pytest.approx(1 - cosine(seen[number], seen[number + 1]).mean(), abs=1e-6)
    for count in (1, 2, 3):
        found = rank.angular(model, WINDOWS, 2, count)
        assert sorted(found) == list(range(6 - count))
        for start in found:
            each = cosine(seen[start][:, -1], seen[start + count][:, -1])
            expected = sum(math.acos(value) / math.pi for value in each) / len(each)
            assert found[start] == pytest.approx(expected, abs=1e-5)


def test_block_influence_is_of_angles_whatever_the_stream_is_multiplied_by(monkeypatch):
    model = deep("llama", 4)
    plain = rank.block_influence(model, WINDOWS, 2, "block")
    seen = rank.observe

    def loud(model, windows, batch_size, target, see, label):
        seen(
            model, windows, batch_size, target,
            lambda number, before, after: see(number, before * 2.0**100, after * 2.0**100), label,
        )  # fmt: skip

    monkeypatch.setattr(rank, "observe", loud)
    assert rank.block_influence(model, WINDOWS, 2, "block") == plain
    assert 0 < max(plain.values()) < 1


@pytest.mark.parametrize(
    ("family", "added"),
    [
        ("llama", lambda block: block.self_attn.o_proj),
        ("gemma3", lambda block: block.post_attention_layernorm),  # what it is handed is not yet added
        ("gpt_neox", lambda block: block.attention.dense),
    ],
)
def test_an_attentions_influence_is_that_of_what_it_adds(family, added):
    model = deep(family, 3)
    seen: dict[int, list[torch.Tensor]] = {}
    handles = []
    for number, (_, block) in enumerate(blocks(model)):
        seen[number] = []
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: seen[number].append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
        )
        handles.append(
            added(block).register_forward_hook(
                lambda _, __, output, number=number: seen[number].append(output)
            )
        )
    forward(model, WINDOWS)
    for handle in handles:
        handle.remove()
    found = rank.block_influence(model, WINDOWS, 3, "attention")
    for number, (before, plus) in seen.items():
        expected = (
            1 - nn.functional.cosine_similarity(before.double(), (before + plus).double(), dim=-1).mean()
        )
        assert found[number] == pytest.approx(float(expected), abs=1e-6)


def test_the_run_that_goes_holds_no_kept_block():
    distances = {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.3}

    def goes(choices):
        return rank.closest_run(distances, rank.removable_runs(choices, 2), 2).removed

    assert goes([0, 1, 2, 3, 4]) == (1, 2)
    assert goes([0, 1, 3, 4]) == (3, 4)
    assert goes([2, 3, 4]) == (2, 3)  # a tie
    with pytest.raises(Refusal, match="keep leaves no run of 2 blocks"):
        goes([0, 2, 4])


def test_ties_fall_to_the_lower_block():
    assert rank.lowest_blocks({3: 0.0, 1: 0.0, 2: -1.0, 0: 0.0}, 2) == (0, 2)


def test_blocks_that_return_more_than_the_stream():
    config = GPTJConfig(
        vocab_size=259, n_embd=32, n_layer=3, n_head=4, rotary_dim=8, n_positions=64, bos_token_id=256,
        eos_token_id=257, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = rank.perplexity(Ablation(model, ScoredRows.of_text(WINDOWS), 2, "block", "test"), [0, 1, 2])
    for number, value in found.items():
        left = copy.deepcopy(model)
        remove_blocks(left, {number})
        assert value == pytest.approx(loss(left), abs=1e-5)
