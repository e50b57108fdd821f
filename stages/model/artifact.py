"""A model artifact: a checkpoint folder that plain transformers loads, and a record of what it is.

Every model the project makes is a folder `data/models/<stage>/<recipe>` with a config, safetensors, a
tokenizer and `artifact.json`. The record holds the artifact's lineage and the recipes behind it, where its
base comes from, its numerics and its sizes; `stages.model.checkpoint` and `stages.model.stream` write it.
Nothing in it varies from run to run.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD, read_json, write_text
from stages.core.lazy import exempt_imported, importing, torch
from stages.core.memory import exhausted
from stages.core.reading import reading, reason
from stages.model.names import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.core.run import Run
    from stages.core.schema import Recipe

log = logging.getLogger(__name__)

ONE_FILE = 2**30
"""Bytes below which a checkpoint is a single file."""
RESTORE = "Download the checkpoint again or restore its config."
"""The way out of a checkpoint that does not fit its config."""

_DERIVED = ("inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached")
"""Last names of tensors that old checkpoints store and models compute by themselves."""

_CAUSAL_MASK = re.compile(r"(\.attn(\.attention)?\.bias|\.causal_mask)$")
"""The causal mask that old checkpoints of GPT-2, GPT-Neo, GPT-J and CodeGen store with their weights."""


class Unloadable(Refusal):
    """A checkpoint that was written and does not load; it has not been put in place."""


def load_record(artifact: str) -> dict[str, Any]:
    """Load the `artifact.json` of `<stage>/<recipe>`."""
    with reading(f"the record of {artifact}"):
        record: dict[str, Any] = read_json(MODELS / artifact / RECORD)
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the `artifact.json` in an artifact's folder, keys sorted."""
    write_text(folder / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")


def check_family(recipe: Recipe) -> None:
    """Refuse a source whose family the recipe's method does not serve; no weight is read.

    Raises:
        Refusal: the method does not serve the family.
    """
    with reading(f"the config of {recipe.source}"):
        family = read_json(MODELS / recipe.source / "config.json")["model_type"]
    if reason := recipe.refuses.get(family):
        raise Refusal(f"{recipe.method} does not serve {family}, the family of {recipe.source}: {reason}.")


def check_text_model(label: str, config: Any) -> None:
    """Refuse a model that has no text path to work on; no weight is read.

    The decoder of an encoder-decoder, such as Bart's, is refused too, although transformers loads it by
    itself: it has never read a text without its encoder, whose weights are dropped, and lm-eval would still
    ask it as an encoder-decoder.

    Raises:
        Refusal: transformers loads the config's family as no causal language model, or as an encoder-decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    listed = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    encoder_decoder = Refusal(
        f"{label} is {config.model_type}, which transformers loads as an encoder-decoder; use a "
        "decoder-only model, such as Llama or OPT."
    )
    if config.is_encoder_decoder:
        raise encoder_decoder
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not listed:
        return
    text = config.get_text_config()
    served = text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    if listed and not served:
        raise encoder_decoder
    if listed:
        raise Refusal(
            f"{label} is {config.model_type}, a decoder of another input than text, such as speech, around "
            f"{text.model_type}; use a checkpoint of {text.model_type} alone."
        )
    inner = f" It wraps {text.model_type}: use a checkpoint of that alone." if served else ""
    raise Refusal(
        f"{label} is {config.model_type}, which transformers does not load as a causal language model; use a "
        f"model that AutoModelForCausalLM loads.{inner}"
    )


def pretrained(label: str, path: Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint by transformers, with every parameter and stored buffer read from its files.

    transformers fills those that are missing or misshapen with random numbers, and leaves out tensors that
    the model has no place for, such as a bias or blocks that the config does not name; here they are refused.

    Args:
        label: the checkpoint's name in a refusal.
        options: of `from_pretrained`.

    Raises:
        Refusal: the checkpoint cannot be read, is no causal language model, some parameter or buffer is
            missing or of another shape, or some tensor of a plain checkpoint has no place in the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = options.get("config")
    if config is None:
        with reading(f"the config of {label}"):
            place = {name: options[name] for name in ("gguf_file",) if name in options}
            config = AutoConfig.from_pretrained(path, local_files_only=True, **place)
    check_text_model(label, config)
    with reading(label):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if missing := sorted(model.state_dict().keys() & info["missing_keys"]):
        raise Refusal(f"{label} lacks {', '.join(missing[:8])}, which its config asks for. {RESTORE}")
    if info["mismatched_keys"]:
        raise misshapen(label, sorted(info["mismatched_keys"]))
    packed = "gguf_file" in options or getattr(config, "quantization_config", None)
    unread = sorted(
        key for key in info["unexpected_keys"]
        if key.rpartition(".")[2] not in _DERIVED and not _CAUSAL_MASK.search(key)
    )  # fmt: skip
    if unread and not packed:
        raise Refusal(
            f"{label} holds {len(unread)} tensors that its config has no place for, so they would be left "
            f"out: {', '.join(unread[:8])}. {RESTORE} If the model is right without them, remove them from "
            "its files."
        )
    return model


def misshapen(label: str, tensors: Iterable[tuple[str, torch.Size, torch.Size]]) -> Refusal:
    """Return the refusal of a checkpoint with tensors of a wrong shape.

    Args:
        label: the checkpoint's name.
        tensors: (name, shape, shape that the config asks for).
    """
    shapes = [f"{name} is {list(shape)}, but its config asks for {list(due)}" for name, shape, due in tensors]
    return Refusal(f"{label}: {'; '.join(shapes[:8])}. {RESTORE}")


def check_loads(label: str, folder: Path) -> None:
    """Load a written checkpoint as its users will, before it counts.

    Up to `ONE_FILE` bytes it also answers a few tokens, which is when packed weights are unpacked. A larger
    one is loaded on the meta device: names, shapes and conversions are tried, and memory stays free.

    Raises:
        Unloadable: plain transformers fails on the checkpoint.
    """
    small = bytes_on_disk(folder) <= ONE_FILE
    try:
        model = pretrained(label, folder, dtype="auto", **({} if small else {"device_map": {"": "meta"}}))
        if small:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    except Exception as error:
        if exhausted(error):
            raise
        why = str(error) if isinstance(error, Refusal) else reason(error)
        raise Unloadable(
            f"plain transformers fails on the result, so it was not kept: {why} Leave this family's recipe "
            "out, or use another method."
        ) from error


def bytes_on_disk(folder: Path) -> int:
    """Return the size of a checkpoint's safetensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_tokenizer(artifact: str) -> PreTrainedTokenizerBase:
    """Load the artifact's tokenizer."""
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {artifact}"):
        return AutoTokenizer.from_pretrained(MODELS / artifact, local_files_only=True)


@importing()
def load_config(artifact: str) -> Any:
    """Load the artifact's config."""
    from transformers import AutoConfig

    with reading(f"the config of {artifact}"):
        return AutoConfig.from_pretrained(MODELS / artifact, local_files_only=True)


def as_written(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as whoever loads its config.json gets it: validated, special floats decoded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        config.to_json_file(file)
        return type(config).from_json_file(file)


def attention(config: Any) -> str:
    """Choose the attention of the config's family: `sdpa`, or `eager` if its class does not support that."""
    with importing():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # imports the family's modeling module
    exempt_imported()
    if getattr(family, "_supports_sdpa", True):
        return "sdpa"
    log.info("%s does not support torch's sdpa attention; eager attention is used", family.__name__)
    return "eager"


def load_model(artifact: str, run: Run, *, dequantize: bool) -> PreTrainedModel:
    """Load the artifact's model in eval mode, on the run's device and in its dtype.

    Args:
        dequantize: turn packed weights into plain ones, to be compressed or trained further, which no forward
            changes. False loads the checkpoint exactly as any user of it would.
    """
    config = load_config(artifact)
    if dequantize and getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    model = pretrained(
        artifact,
        MODELS / artifact,
        config=config,
        dtype=run.torch_dtype,
        attn_implementation=attention(config),
        use_safetensors=True,
    )
    if dequantize:
        check_names(artifact, model)
        never_rescale(model)
    return model.to(run.resolved_device()).eval()


def never_rescale(model: PreTrainedModel) -> None:
    """Let no forward of a model change its weights, as they are compared, streamed and saved.

    RWKV halves weights of later blocks at its first forward in eval mode, and its stream with them, so that
    float16 holds it. Its files hold whole weights, and with these its logits are the same.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            vars(module)["_rescale_layers"] = lambda: None
