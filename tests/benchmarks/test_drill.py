"""The drill: what it draws, what it counts, that it sees damage, and five kills."""

import json
import os
import signal
import subprocess
import sys

import pytest

from benchmarks import drill, variants
from benchmarks.drill import BARE, FLOW, MARK, SIGNALS, VICTIMS, Drill, Round
from benchmarks.variants import SIZES, VARIANTS, Variants
from flows.process import GUARD
from tests import finished as sweep

NAMES = list(VARIANTS)
ROUND = Round(0, "base", "base", False, ())


def test_a_round_is_drawn_from_its_seed_and_all_draws_occur():
    rounds = [drill.draw(0, number, NAMES) for number in range(300)]
    assert rounds == [drill.draw(0, number, NAMES) for number in range(300)]
    assert rounds[7] != drill.draw(1, 7, NAMES)
    assert all(drawn.start != drawn.goal for drawn in rounds)
    steps = [step for drawn in rounds for step in drawn.steps]
    hits = {(step.command, hit.victim, hit.signal) for step in steps for hit in step.hits}
    for command, victims in VICTIMS.items():
        for victim in victims:
            kinds = {"all": {"KILL"}, "disk": {"full"}}.get(victim, set(SIGNALS))
            assert {kind for where, what, kind in hits if (where, what) == (command, victim)} == kinds
    assert {step.edit for step in steps} == {"", "comment", *NAMES}
    assert {len(step.hits) for step in steps} == {1, 2, 3}
    assert all(step.hits == tuple(sorted(step.hits, key=lambda hit: hit.moment)) for step in steps)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ([sys.executable, "/bin/prunequant", "run"], "flow"),
        ([*GUARD, sys.executable, "-m", "dvc", "repro", "--single-item", "a"], "guard"),
        ([*GUARD, sys.executable, "-m", "uvicorn", "--factory", "prefect"], "server's guard"),
        ([sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", "a"], "dvc"),
        (list(BARE), "dvc"),
        (["/bin/sh", "-c", "python -m stages.prune 'a'"], ""),
        (["python", "-m", "stages.prune", "a"], "stage"),
        ([sys.executable, "-m", "uvicorn", "prefect.server.api.server:create_app"], "server"),
        ([], ""),
    ],
)
def test_a_command_line_tells_the_part(command, role):
    assert drill.role_of(command) == role


def test_the_table_counts_kills_and_those_that_broke_no_rule():
    def row(hit, violations, victim="stage"):
        kills = [{"victim": victim, "signal": "KILL"}] if hit else []
        return {"steps": [{"kills": kills}], "violations": violations}

    shown = drill.table([row(True, []), row(True, ["x"]), row(False, []), row(True, [], "disk")])
    assert shown.title == "3 kills in 4 rounds, recovered / all"
    counts = dict(zip(shown.columns[0].cells, shown.columns[1].cells, strict=True))
    assert {victim: count for victim, count in counts.items() if count} == {"stage": "1 / 2", "disk": "1 / 1"}


def test_only_processes_of_the_folder_are_ended(tmp_path):
    marks = [tmp_path / "a/rounds/0001", tmp_path / "ab"]
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours, other = (subprocess.Popen(sleep, env={**os.environ, MARK: str(mark)}) for mark in marks)
    try:
        assert drill.end(str(tmp_path / "a"))
        assert ours.wait(5) == -signal.SIGKILL and other.poll() is None
        assert not drill.end(str(tmp_path / "a"))
    finally:
        other.kill()
        other.wait()


def test_a_second_drill_and_one_of_other_code_are_refused(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        drill.fcntl.flock(file, drill.fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another drill works in"), drill.prepared(tmp_path, "short"):
            pass
    (tmp_path / "origin.json").write_text('"of other stages"')
    with pytest.raises(SystemExit, match="of another --size"), drill.prepared(tmp_path, "short"):
        pass


@pytest.fixture
def inspected(copy, finished, tmp_path, monkeypatch):
    """A round that has ended in a copy of the finished project."""
    monkeypatch.setattr(Variants, "reference", lambda self, variant: finished)
    done = Drill(ROUND, Variants(tmp_path / "drill", SIZES["short"]))
    done.at, done.env = copy, sweep.environment(copy)
    return done


@pytest.mark.drill
def test_damage_is_seen(inspected):
    inspected._inspect()
    assert inspected.violations == []
    before = inspected._finished()
    assert set(before) == sweep.STAGES
    at = inspected.at
    (at / "data/report/index.html").write_text("other")
    (at / "data/provenance/prune/wanda-50.json").unlink()
    (at / "data/models/.wanda-50.7").touch()
    (at / "data/scratch/left").touch()
    (at / "data/runs/prune/.wanda-50.json.7").touch()
    (at / ".dvc/tmp/rwlock").write_text('{"write": {"a": {"pid": 7}}, "read": {}}')
    lock = (at / "dvc.lock").read_text()
    (at / "dvc.lock").write_text(lock.replace("sparsity: 0.5", "sparsity: 0.25", 1))
    record = variants.record(at, "tidy", variants.entries(at)["tidy"])
    os.utime(record, (1e9, 1e9))
    stopped = variants.record(at, "report", variants.entries(at)["report"])
    stopped.write_text(json.dumps(json.loads(stopped.read_text()) | {"state": "failed"}))
    inspected._compare(before, "it")
    inspected._inspect()
    seen = "\n".join(inspected.violations)
    for words in (
        "it computed tidy again", "dvc.lock differs at prune@magnitude-50", "index.html: other bytes",
        "data/provenance/prune/wanda-50.json: lost", "data/models/.wanda-50.7: left over",
        "data/scratch/left: left over", "data/runs/prune/.wanda-50.json.7: left over",
        "prunequant check: ", "prune.magnitude-50 in params.yaml", "dvc status: ", "rwlock holds",
    ):  # fmt: skip
        assert words in seen, seen
    assert "it computed report again" not in seen


@pytest.mark.drill
def test_five_kills(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--size", "short", "--variants", "base", "rate", "--kills"]
    drill.main([*arguments, "3"])
    first = [json.loads(text) for text in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    drill.main([*arguments, "5"])  # continues
    rows = [json.loads(text) for text in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert rows[: len(first)] == first
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert sum(len(step["kills"]) for row in rows for step in row["steps"]) >= 5
    assert {step["command"] for row in rows for step in row["steps"]} <= {FLOW[-1], BARE[-1]}
    assert not any(row["violations"] for row in rows)
    assert "recovered / all" in capsys.readouterr().out
    assert not drill.living(str(tmp_path)) and not list((tmp_path / "rounds").glob("*"))
