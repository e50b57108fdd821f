"""Lengths, prompts, times and peak memory of generation."""

import pytest
import torch

from stages.profiling import speed
from tests import families

pytestmark = pytest.mark.device

SETTINGS = {
    "candidates": ["base/tiny"], "batch_sizes": [1, 3], "prompt_tokens": 8, "new_tokens": 5, "warmup": 1,
    "repeats": 3, "threads": 1,
}  # fmt: skip


def settings() -> speed.Profile:
    """Settings as params hold them, with tuples for lists."""
    return speed.Profile(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in SETTINGS.items()}
    )


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_length_is_fixed_whatever_the_model_says(family, monkeypatch):
    """A model that predicts the end of text at once writes as many tokens, each after those before."""
    model = families.model(family)
    shapes: list[tuple[int, ...]] = []
    before = model.forward

    def forward(*args, **options):
        shapes.append(tuple(options["input_ids"].shape))
        out = before(*args, **options)
        out.logits[..., 257] = 1e4
        return out

    monkeypatch.setattr(model, "forward", forward)
    clock = speed.generate(model, torch.arange(12, device=model.device).reshape(2, 6), 5)
    assert shapes == [(2, 6), *[(2, 1)] * 4]
    assert len(clock) == 5 and clock == sorted(clock)


def test_greedy_tokens_are_those_of_generate():
    model = families.model("llama").float()
    prompts = torch.arange(12, device=model.device).reshape(2, 6)
    inputs: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, __, options: inputs.append(options["input_ids"]), with_kwargs=True
    )
    speed.generate(model, prompts, 5)
    written = torch.cat(inputs[1:], 1)
    options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 258}
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert torch.equal(written, expected[:, 6:10])


def test_times_are_split_at_the_first_token():
    (first, *_) = settings().runs(lambda: [2.0, 2.5, 3.0, 3.5, 6.0])
    assert first == {"repeat": 0, "seconds_to_first_token": 2.0, "seconds_per_token": 1.0}


def test_prompts_are_drawn_from_the_seed():
    profile = settings()
    assert torch.equal(profile.prompts(2, 50, 3), profile.prompts(2, 50, 3))
    assert not torch.equal(profile.prompts(2, 50, 3), profile.prompts(2, 50, 4))
    assert profile.prompts(2, 50, 3).shape == (2, 8)


def test_a_peak_forgets_memory_that_was_freed_before_it():
    device = torch.device("cpu")
    tensor = torch.ones(2**26)  # 256 MB
    high = speed.PeakMemory(device).bytes()
    del tensor
    low = speed.PeakMemory(device).bytes()
    assert high is not None and low is not None and high - low > 2**27
