"""The scores of depth pruning, against slow references."""

import copy
import itertools
import math
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from stages.core.errors import Refusal
from stages.model.blocks import blocks, forward
from stages.pruning.depth import rank
from stages.pruning.depth.ablate import Ablation, ScoredRows
from stages.pruning.depth.observe import observe, stream_in
from tests.deep import WINDOWS, deep, loss, without, without_attention

pytestmark = [pytest.mark.numerics, pytest.mark.device]
TEXT = ScoredRows.of_text(WINDOWS)


def exact_shapley(value, players: list[int]) -> dict[int, float]:
    """The definition: the mean gain on joining any set, weighted by its size."""
    count = len(players)
    values = {}
    for player in players:
        rest = [other for other in players if other != player]
        values[player] = sum(
            (value(frozenset(have) | {player}) - value(frozenset(have)))
            / (count * math.comb(count - 1, len(have)))
            for n in range(count)
            for have in itertools.combinations(rest, n)
        )
    return values


def test_sampled_shapley_values_are_near_the_exact_ones():
    model = deep("llama", 4)
    ablation = Ablation(model, TEXT, 5, "block", "test")
    losses = {
        frozenset(c): loss(without(model, set(range(4)) - set(c)))
        for n in range(5)
        for c in itertools.combinations(range(4), n)
    }
    exact = exact_shapley(lambda have: -losses[have], [0, 1, 2, 3])
    sampled = rank.shapley(ablation, [0, 1, 2, 3], 2000, 0)
    spread = max(losses.values()) - min(losses.values())
    assert max(abs(sampled[n] - exact[n]) for n in exact) < 0.03 * spread
    total = losses[frozenset()] - losses[frozenset(range(4))]
    assert sum(sampled.values()) == pytest.approx(total, abs=1e-4)
    few = rank.shapley(ablation, [0, 1, 3], 3, 1)
    assert few == rank.shapley(ablation, [0, 1, 3], 3, 1) != rank.shapley(ablation, [0, 1, 3], 3, 2)
    assert set(few) == {0, 1, 3}


@pytest.mark.parametrize("target", ["block", "attention"])
def test_greedy_takes_what_a_search_by_hand_takes(target):
    model = deep("opt", 5)
    reference = without if target == "block" else without_attention
    removed: set[int] = set()
    order = []
    for _ in range(3):
        losses = {n: loss(reference(model, removed | {n})) for n in (1, 2, 4) if n not in removed}
        order.append(min(losses, key=losses.__getitem__))
        removed.add(order[-1])
    ranking = rank.greedy(Ablation(model, TEXT, 2, target, "test"), [1, 2, 4], 3, None)
    assert [step["removed"] for step in ranking.notes["steps"]] == order
    assert ranking.removed == tuple(sorted(removed))


def streams(model: nn.Module) -> list[torch.Tensor]:
    """The stream before every block and after the last, by transformers' own account."""
    bare = copy.deepcopy(model)
    bare.model.norm = nn.Identity()
    with torch.no_grad():
        return list(bare(input_ids=WINDOWS, output_hidden_states=True).hidden_states)


def test_block_influence_and_angles_are_the_papers_formulas():
    model = deep("llama", 5)
    states = [stream.double().numpy() for stream in streams(model)]

    def cosine(a, b):
        return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)) ** 0.5

    influence = rank.block_influence(model, WINDOWS, 2, "block")
    for number in range(5):
        expected = 1 - cosine(states[number], states[number + 1]).mean()
        assert influence[number] == pytest.approx(expected, abs=1e-6)
    for count in (1, 2, 3):
        distances = rank.angular(model, WINDOWS, 2, count)
        assert sorted(distances) == list(range(6 - count))
        for start in distances:
            cosines = cosine(states[start][:, -1], states[start + count][:, -1])
            expected = sum(math.acos(value) / math.pi for value in cosines) / len(cosines)
            assert distances[start] == pytest.approx(expected, abs=1e-5)


def test_block_influence_does_not_depend_on_the_scale_of_the_stream(monkeypatch):
    model = deep("llama", 4)
    plain = rank.block_influence(model, WINDOWS, 2, "block")

    def scaled(model, windows, batch_size, target, observer, label):
        def scaled_observer(number, before, after):
            observer(number, before * 2.0**100, after * 2.0**100)

        observe(model, windows, batch_size, target, scaled_observer, label)

    monkeypatch.setattr(rank, "observe", scaled)
    assert rank.block_influence(model, WINDOWS, 2, "block") == plain
    assert 0 < max(plain.values()) < 1


@pytest.mark.parametrize(
    ("family", "last"),
    [
        ("llama", lambda block: block.self_attn.o_proj),
        ("gemma3", lambda block: block.post_attention_layernorm),  # its input is not yet added
        ("gpt_neox", lambda block: block.attention.dense),
    ],
)
def test_the_influence_of_an_attention_is_that_of_what_it_adds(family, last):
    model = deep(family, 3)
    before: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for _, block in blocks(model):
            hooks.enter_context(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: before.append(stream_in(args, kwargs)), with_kwargs=True
                )
            )
            hooks.enter_context(last(block).register_forward_hook(lambda _, __, output: added.append(output)))
        forward(model, WINDOWS)
    influence = rank.block_influence(model, WINDOWS, 3, "attention")
    for number, (stream, plus) in enumerate(zip(before, added, strict=True)):
        cosine = nn.functional.cosine_similarity(stream.double(), (stream + plus).double(), dim=-1)
        assert influence[number] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)


def test_a_run_with_a_kept_block_stays():
    distances = {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.3}

    def removed(choices):
        return rank.closest_run(distances, rank.removable_runs(choices, 2), 2).removed

    assert removed([0, 1, 2, 3, 4]) == (1, 2)
    assert removed([0, 1, 3, 4]) == (3, 4)
    assert removed([2, 3, 4]) == (2, 3)  # a tie
    with pytest.raises(Refusal, match="keep leaves no run of 2 blocks"):
        removed([0, 2, 4])


def test_ties_fall_to_the_lower_block():
    assert rank.lowest_blocks({3: 0.0, 1: 0.0, 2: -1.0, 0: 0.0}, 2) == (0, 2)
