"""The packed file: what is read back is what was computed, at every width."""

import json

import pytest
import torch
from safetensors import safe_open

from stages.core.grid import Codes, bounds
from stages.core.packed import read_codes, write_packed
from tests import families


def random_codes(model, bits: int, group_size: int | None) -> dict[str, Codes]:
    generator = torch.Generator().manual_seed(bits)
    low, high = bounds(bits)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            rows, columns = module.weight.shape
            codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8)
            groups = columns // (group_size or columns)
            found[name] = Codes(
                codes, torch.rand(rows, groups, generator=generator).bfloat16(), bits, group_size
            )
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, None])
def test_codes_scales_and_size_on_disk(bits, group_size, tmp_path):
    model = families.model("llama")
    codes = random_codes(model, bits, group_size)
    assert len(codes) == 14
    write_packed(model, codes, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        for name, code in codes.items():
            assert torch.equal(read_codes(handle, name, tmp_path), code.codes)
            assert torch.equal(handle.get_tensor(f"{name}.weight_scale"), code.scale)
            words = handle.get_tensor(f"{name}.weight_packed")
            assert words.dtype == torch.int32
            assert words.numel() * 32 < code.codes.numel() * bits + 32 * len(code.codes) * (bits + 1)
            assert f"{name}.weight" not in handle.keys()  # noqa: SIM118 - it is no dict
        # The head is tied to the embedding, which is there once.
        assert "lm_head.weight" not in handle.keys()  # noqa: SIM118
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
