"""What kills and full disks leave behind is cleared away."""

from flows import mend


def test_files_that_were_left_half_written_are_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = [
        "data/results/base/x/.gquKTP27Jf8tyo9irDUHsA.tmp", "data/provenance/x/.pu-VM_EH3imUClxe5JQ18Q.tmp",
        "data/runs/prune/.wanda-50.json.4711", ".dvc/tmp/.dvc.lock.good.4711", ".dvc.lock.4711",
    ]  # fmt: skip
    whole = [
        "data/results/base/x/scores.parquet", "data/datasets/x/.gitattributes", "data/datasets/x/a.tmp",
        ".dvc/tmp/rwlock", ".env.2024", "dvc.lock",
    ]  # fmt: skip
    for name in half + whole:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    mend.clear_away()
    assert sorted(
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()
    ) == sorted(whole)
