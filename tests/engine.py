"""A stand-in for vLLM that generates with transformers and keeps the calls, as vLLM runs on few machines.

It has what lm-eval takes of vLLM's public interface, and answers greedily as vLLM would in exact arithmetic.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = "0.33.0"
FIELDS = {
    "max_tokens", "stop", "temperature", "repetition_penalty", "skip_special_tokens",
    "spaces_between_special_tokens", "prompt_logprobs", "detokenize",
}  # fmt: skip
"""The fields of vLLM's SamplingParams that a request may set; vLLM refuses any that it does not know."""


class SamplingParams:
    """The settings of a request."""

    def __init__(self, **settings: Any) -> None:
        if unknown := settings.keys() - FIELDS:
            raise TypeError(f"Unexpected keyword argument {sorted(unknown)}")
        self.settings = settings


@dataclass
class Engine:
    """What was asked of vLLM."""

    device: str
    loaded: list[dict[str, Any]] = field(default_factory=list)
    """The arguments of each engine."""
    prompts: list[list[int]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    """The settings of each prompt."""
    modes: set[int] = field(default_factory=set)
    """torch's modes of determinism while vLLM worked."""
    fails: str = ""
    """Why no engine loads."""


class LLM:
    """An engine; `record` keeps what it is asked."""

    record: ClassVar[Engine]

    def __init__(self, **options: Any) -> None:
        self.record.modes.add(torch.get_deterministic_debug_mode())
        self.record.loaded.append(options)
        if self.record.fails:
            raise ValueError(self.record.fails)
        dtype = getattr(torch, options["dtype"])
        model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
        self.model = model.to(self.record.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options["model"])
        limits = SimpleNamespace(max_model_len=options["max_model_len"])
        self.llm_engine = SimpleNamespace(model_config=limits)

    def generate(self, prompts: Any, sampling_params: Any, **_: Any) -> list[Any]:
        self.record.modes.add(torch.get_deterministic_debug_mode())
        return [self._answer(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: dict[str, list[int]], params: SamplingParams) -> Any:
        ids, wanted = prompt["prompt_token_ids"], params.settings
        self.record.prompts.append(ids)
        self.record.settings.append(wanted)
        assert wanted["temperature"] == 0
        out = self.model.generate(
            torch.tensor([ids], device=self.record.device), max_new_tokens=wanted["max_tokens"],
            do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
            repetition_penalty=wanted.get("repetition_penalty", 1.0),
        )  # fmt: skip
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=False)
        for stop in wanted["stop"]:
            text = text.split(stop)[0]
        return SimpleNamespace(outputs=[SimpleNamespace(text=text)])


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, device: str) -> Engine:
    """Put the stand-in in vLLM's place, with the metadata of a package in `folder`; return its record."""
    engine = Engine(device)
    monkeypatch.setattr(LLM, "record", engine, raising=False)
    parts = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type=device)},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **_: None},
        "vllm.tokenizers": {
            "get_tokenizer": lambda path, *, tokenizer_mode, **options: AutoTokenizer.from_pretrained(
                path, **options
            )
        },
    }  # fmt: skip
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        module.__path__ = []
        module.__spec__ = SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    about = folder / f"vllm-{VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    monkeypatch.syspath_prepend(folder)
    return engine
