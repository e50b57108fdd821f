"""What kills and full disks leave behind is cleared away."""

import errno
import shutil
from pathlib import Path

from flows import mend
from flows.plan import Plan
from flows.resources import Pool
from stages.job.locked import locked_stages
from tests import toy


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


def test_a_result_comes_back_even_if_dvc_cannot_read_the_graph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.make(tmp_path)
    assert toy.dvc("repro", "a").returncode == 0
    stages = locked_stages()
    Path("dvc.yaml").write_text("broken: [")
    Path("a.txt").unlink()
    shutil.rmtree("data/code")
    assert toy.dvc("checkout").returncode
    for name in ("code", "a"):
        mend.restore(stages[name])
    assert Path("a.txt").read_text() == Path("data/code/x").read_text() == "x\n"
    shutil.rmtree(".dvc/cache")
    Path("a.txt").unlink()
    mend.restore(stages["a"])  # nothing to bring back
    assert not Path("a.txt").exists()


def test_a_full_disk_keeps_no_run_from_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.make(tmp_path)
    assert toy.dvc("repro", "a").returncode == 0
    run = Plan(toy.GRAPH, Pool(1))
    run.lock.begin()
    run._begun.add("a")
    Path("a.txt").unlink()
    tried = []

    def full(*arguments, **options):
        tried.append(arguments[0])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dvc_data.hashfile.checkout.checkout", full)
    run.stop()
    assert tried == [str(tmp_path / "a.txt")] and run.children.stopped.is_set()
