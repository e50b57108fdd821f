"""The progress of a run: what a terminal draws, what a pipe gets, and how long it says a run takes."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from flows import watch
from flows.graph import Stage
from flows.watch import Watch
from tests import project

BAR = "Likelihoods:  76%|███████▌  | 364/480 [00:10<00:03, 34.25it/s]"
GRAPH = {
    name: Stage(name, "", upstream, (f"data/provenance/prune/{name}.json",))
    for name, upstream in {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}.items()
}
DRAWN = f"""
import time
from flows.graph import Stage
from flows.watch import Watch
seen = Watch(plain=False)
with seen.shown():
    graph = {{name: Stage(name, "", (), ()) for name in "abc"}}
    seen.expect(graph, ["a", "b", "c"], 1, {{"a": 9, "b": 300, "c": 60}})
    seen.starts("a")
    seen.ends("a", 9.0)
    seen.starts("b")
    seen.hears("b", {BAR!r}, "prune b: ")
    seen.hears("b", "Custom kwargs can be passed to `--metadata`", "prune b: ")
    seen.hears("b", "prune b: 3 of 30 blocks are finished", "prune b: ")
    time.sleep(0.7)
    seen.ends("b", 300.0)
"""


def planned(width: float = 1, **seconds: float) -> Watch:
    """A run of four stages, two of them side by side, and the seconds that they are expected to take."""
    seen = Watch()
    seen.expect(GRAPH, list(GRAPH), width, seconds)
    seen.starts("a")
    return seen


def test_a_terminal_shows_stages_with_their_bars_and_the_time_left():
    leader, follower = pty.openpty()
    env = {**project.ENV, **project.importing(project.ROOT), "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", DRAWN], stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the terminal's other end has closed
            break
        shown += part
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\[1/3\] 0:0\d, about 6 min left", text), text
    assert re.search(r"b ━+[ ━╸╺]* +76 % Likelihoods 364/480 0:0\d of about 5:00", text), text
    assert "b | 3 of 30 blocks are finished" in text
    assert "Custom kwargs" not in text and "34.25it/s" not in text


def test_a_pipe_gets_lines_and_a_sign_of_life_where_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(watch, "SILENCE", 1.2)
    seen = Watch(plain=False)  # no terminal is there to draw on
    with seen.shown():
        seen.expect(GRAPH, list(GRAPH), 1, {"a": 30})
        seen.starts("a")
        assert not seen.hears("a", BAR, "prune a: ")
        assert not seen.hears("a", "Loading weights are loaded", "prune a: ")
        time.sleep(1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a | starts"
    sign = r"\[0/4\] 0:0\d, under a minute left, stages of kinds that never ran here: 3; "
    sign += r"a 76 % 0:0\d of about 0:30"
    assert len(lines) > 1 and all(re.fullmatch(sign, line) for line in lines[1:]), lines


@pytest.mark.parametrize(("width", "seconds"), [(1, 430), (2, 310), (9, 310)])
def test_the_time_left_is_shared_by_what_fits_but_no_less_than_the_longest_chain(width, seconds):
    left, unknown = planned(width, a=100, b=120, c=120, d=90)._left()
    assert left == pytest.approx(seconds, abs=0.5) and unknown == 0


def test_the_time_left_follows_the_pace_of_the_run():
    seen = planned(a=1000, b=120, c=120, d=90)
    seen.ends("a", 2000.0)
    seen.starts("b")
    seen.ends("b")  # restored from the cache, which says nothing of the pace
    assert seen._left()[0] == pytest.approx(1.94 * (120 + 90), abs=2)
    assert seen.headline() == "[2/4] 0:00, about 7 min left"


def test_the_start_of_short_stages_says_little_of_the_pace():
    seen = planned(a=0.3, b=0.3, c=1200, d=1200)
    for stage in ("a", "b"):
        seen.starts(stage)
        seen.ends(stage, 5.0)
    assert seen._left()[0] == pytest.approx(1.16 * 2400, rel=0.01)


def test_a_stage_that_runs_again_is_counted_once():
    seen = planned(a=100)
    seen.resumes("a")
    assert seen.headline().startswith("[0/4]")
    seen.starts("a")
    seen.ends("a", 100.0)
    assert seen.headline() == "[1/4] 0:00, stages of kinds that never ran here: 3"


def test_what_follows_a_bar_on_its_line_is_shown(capsys):
    seen = planned()
    glued = "prune a:  50%|█████     | 2/4 [00:01<00:01,  1.2it/s]prune a: so it is."
    assert seen.hears("a", glued, "prune a: ")
    assert capsys.readouterr().out.splitlines() == ["a | starts", "a | so it is."]
    assert seen._stages()[0][1:3] == (50, "2/4")
    assert not seen.hears("a", glued.removesuffix("prune a: so it is."), "prune a: ")


def test_all_that_a_foreign_command_prints_is_shown(capsys):
    assert Watch().hears("a", "any words", "") and not Watch().hears("a", "", "")
    assert capsys.readouterr().out == "a | any words\n"
