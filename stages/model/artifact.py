"""A model artifact: a checkpoint folder that plain transformers loads, and what is known of it.

Every model the project makes is a folder `data/models/<stage>/<recipe>` with a config, safetensors, a
tokenizer, and `artifact.json`: its lineage, the recipes that made it, where the base came from, the
number grid its weights already lie on, and its exact size (see `stages.model.checkpoint`, which writes
them). Nothing in it varies from run to run.

Imported wherever params are read, so transformers, which takes seconds, is imported only when it is used.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD
from stages.core.reading import reading

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.core.run import Run
    from stages.core.schema import Recipe

log = logging.getLogger(__name__)


def load_record(artifact: str) -> dict[str, Any]:
    """The `artifact.json` of `<stage>/<recipe>`."""
    with reading(f"the record of {artifact}"):
        record: dict[str, Any] = json.loads((MODELS / artifact / RECORD).read_text())
    return record


def check_family(recipe: "Recipe") -> None:
    """Refuse a source of a family that the recipe's method says it does not serve; no weight is read.

    Raises:
        Refusal: by the names of the method and the family.
    """
    with reading(f"the config of {recipe.source}"):
        family = json.loads((MODELS / recipe.source / "config.json").read_text())["model_type"]
    if why := recipe.refuses.get(family):
        raise Refusal(f"{recipe.method} does not serve {family}, the family of {recipe.source}: {why}.")


def pretrained(what: str, path: Path, **options: Any) -> "PreTrainedModel":
    """A checkpoint as transformers loads it, every parameter read from its files.

    Args:
        what: as a refusal names it.
        options: of `from_pretrained`.

    Raises:
        Refusal: it cannot be read, or some parameter is not there or of another shape, for which
            transformers would draw numbers.
    """
    from transformers import AutoModelForCausalLM

    with reading(what):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    known = {name for name, _ in model.named_parameters()}
    if missing := sorted(known & set(info["missing_keys"])):
        raise Refusal(
            f"{what} has no {', '.join(missing[:8])}, which its config asks for; get it or its own "
            "config anew."
        )
    if info["mismatched_keys"]:
        raise Refusal(unlike(what, sorted(info["mismatched_keys"])))
    return model


def unlike(what: str, shapes: "list[tuple[str, torch.Size, torch.Size]]") -> str:
    """What is said of tensors given by name, their shape, and the shape that the config asks for."""
    told = [f"{name} of {list(found)} and not {list(asked)}" for name, found, asked in shapes]
    return f"{what} has {', '.join(told[:8])}, as its config asks for; get it or its own config anew."


def load_tokenizer(artifact: str) -> "PreTrainedTokenizerBase":
    """The artifact's tokenizer."""
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {artifact}"):
        return AutoTokenizer.from_pretrained(MODELS / artifact, local_files_only=True)


def attention(config: Any) -> str:
    """How attention of the config's family is computed: `sdpa`, or `eager` where its class has no such."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(family, "_supports_sdpa", True):
        return "sdpa"
    log.info("%s has no attention by torch's sdpa: eager is used", family.__name__)
    return "eager"


def load_config(artifact: str) -> Any:
    """The artifact's config."""
    from transformers import AutoConfig

    with reading(f"the config of {artifact}"):
        return AutoConfig.from_pretrained(MODELS / artifact, local_files_only=True)


def load_model(artifact: str, run: "Run", *, dequantize: bool) -> "PreTrainedModel":
    """The artifact's model in eval mode on the chosen device and in the chosen dtype.

    Args:
        dequantize: give plain weights where they are stored packed, to be compressed or trained further.
            False loads it exactly as any user of the checkpoint would.
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
    return model.to(run.resolved_device()).eval()
