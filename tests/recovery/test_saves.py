"""Checkpoints of a training: the last complete one is read, and others go."""

import torch

from stages.recovery.saves import Checkpoints

STATE = {"w": torch.arange(6.0).view(2, 3).T, "steps": torch.tensor(3)}


def test_the_last_checkpoint_is_kept_and_read(tmp_path):
    checkpoints = Checkpoints(tmp_path / "recipe/key", 2)
    assert checkpoints.last() is None
    (tmp_path / "recipe/key").mkdir(parents=True)
    (tmp_path / "recipe/key/.step-000001.safetensors.123").touch()  # a killed write
    for step in (2, 4):
        checkpoints.save(step, STATE, [{"step": step}])
    state, progress = checkpoints.last()
    assert progress == [{"step": 4}]
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    files = sorted(file.name for file in (tmp_path / "recipe/key").iterdir())
    assert files == ["step-000004.json", "step-000004.safetensors"]
    checkpoints.clear()
    assert not (tmp_path / "recipe").exists()


def test_tensors_without_their_json_are_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "recipe/key", 2)
    checkpoints.save(2, STATE, [])
    (tmp_path / "recipe/key/step-000002.json").unlink()
    assert checkpoints.last() is None
