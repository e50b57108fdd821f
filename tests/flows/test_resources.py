"""Who runs when: nothing is handed out twice, everybody gets a turn, a stage sees its card alone."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import graph, machine, resources
from flows.graph import Stage
from flows.plan import Plan
from flows.resources import GIB, Need, Pool, need_of, pool_of
from stages.core.errors import Refusal
from stages.core.run import Run
from stages.job.pieces import STAGES
from tests import toy

RUN = Run(device="auto", dtype="float32", threads=2, seed=0, numerics="fast")

needs = st.builds(
    Need, threads=st.integers(1, 6), gib=st.floats(0, 10), card=st.booleans(), alone=st.booleans()
)
pools = st.builds(
    Pool, threads=st.integers(1, 4), gib=st.floats(1, 8) | st.just(math.inf),
    cards=st.lists(st.sampled_from("0123"), unique=True).map(tuple), jobs=st.none() | st.integers(1, 3),
)  # fmt: skip


@given(pools, st.lists(needs | st.integers(0, 9), max_size=40))
def test_the_pool_holds_its_limits_and_serves_everybody(pool, events):
    """An event is a stage that comes, or the number of a running stage that ends."""
    waiting, held = [], []
    first, before_first = None, set()

    def settle():
        nonlocal first, before_first
        held.extend(lease for lease in waiting if lease.granted.is_set())
        waiting[:] = [lease for lease in waiting if not lease.granted.is_set()]
        assert sum(lease.need.threads for lease in held) <= pool.threads
        assert sum(lease.need.gib for lease in held) <= pool.gib
        cards = [lease.card for lease in held if lease.need.card]
        assert len(set(cards)) == len(cards) and set(cards) <= set(pool.cards)
        assert all((lease.card is None) != lease.need.card for lease in held)
        assert len(held) == 1 or not any(lease.need.alone for lease in held)
        assert len(held) <= pool._jobs
        assert held or not waiting
        if first not in waiting[:1]:
            first, before_first = (waiting[0], set(held)) if waiting else (None, set())
        # Those who passed the first in line take nothing that it needs.
        assert first is None or before_first & set(held)

    for event in events:
        if isinstance(event, Need):
            waiting.append(pool.request(event))
        elif held:
            pool.release(held.pop(event % len(held)))
        settle()
    for _ in range(len(waiting) + len(held)):
        pool.release(held.pop(0))
        settle()
    assert not waiting and not held


def test_a_stage_on_the_cpu_passes_those_that_wait_for_a_card():
    pool = Pool(2, cards=("0",))
    first, second = pool.request(Need(card=True)), pool.request(Need(card=True))
    beside = pool.request(Need(threads=2))
    assert (first.card, second.card) == ("0", None)
    assert beside.granted.is_set() and beside.environment == {}
    pool.release(first)
    assert second.environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_memory_limits_how_many_run():
    pool = Pool(8, gib=10)
    leases = [pool.request(Need(gib=4)) for _ in range(3)]
    assert [lease.granted.is_set() for lease in leases] == [True, True, False]
    small = pool.request(Need(gib=2))
    assert not small.granted.is_set()  # it would delay the first in line
    pool.release(leases[0])
    assert leases[2].granted.is_set() and small.granted.is_set()


def test_more_than_there_is_runs_alone_and_is_never_refused():
    pool = Pool(2, gib=10, cards=("0",))
    small = pool.request(Need(gib=1))
    large = pool.request(Need(threads=64, gib=50))
    later = pool.request(Need(gib=1, card=True))
    assert [lease.granted.is_set() for lease in (small, large, later)] == [True, False, False]
    pool.release(small)
    assert large.granted.is_set() and not later.granted.is_set()
    pool.release(large)
    assert later.granted.is_set() and not large.beside


def test_who_ran_beside_another_knows_it():
    pool = Pool(2)
    one = pool.request(Need())
    assert not one.beside
    two = pool.request(Need())
    assert one.beside and two.beside


def test_leaving_the_line_lets_others_pass():
    pool = Pool(2)
    busy, large, small = pool.request(Need()), pool.request(Need(threads=2)), pool.request(Need())
    assert not small.granted.is_set()
    pool.release(large)
    assert small.granted.is_set() and busy.granted.is_set()


def stage(command, **more):
    return Stage(command, f"python -m stages.{command}", (), (), **more)


def test_what_a_stage_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = Pool(4, gib=40)
    made = Stage("prune@x", "python -m stages.prune 'x'", (), ("data/models/prune/x", "data/curves/x.csv"))
    score = Stage("score", "python -m stages.evaluate 'prune/x/news'", ("prune@x",), ())
    whole = {"prune@x": made, "score": score}

    def gib(stage):
        return need_of(stage, whole, pool, 2).gib

    assert need_of(score, whole, pool, 2) == Need(2, 20.0, card=True)  # nothing known: a share
    assert need_of(stage("noise y"), whole, pool, 2) == Need(1, 10.0)
    assert need_of(stage("profile y"), whole, pool, 2).alone
    Path("data/models/prune/x").mkdir(parents=True)
    with Path("data/models/prune/x/model").open("wb") as file:
        file.truncate(GIB)
    assert gib(score) == 5.0  # by what it reads
    score.record.parent.mkdir(parents=True)
    score.record.write_text(json.dumps({"state": "done", "peak_gib": 2.0}))
    assert gib(score) == 2.5  # as last time, with room
    score.record.write_text(json.dumps({"state": "failed", "peak_gib": 0.1}))
    assert gib(score) == 5.0
    score.record.write_text("{")
    assert gib(score) == 5.0
    assert gib(Stage("score", score.cmd, score.upstream, (), memory_gib=12)) == 12


def test_stages_that_compute_need_a_card():
    on_a_card = {name for name in STAGES if need_of(stage(f"{name} x"), {}, Pool(1), 1).card}
    assert on_a_card == {"prune", "quantize", "finetune", "teach", "evaluate", "profile"}


@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # raised while DVC plans
def test_a_stage_declares_its_memory_in_dvc_yaml(tmp_path, monkeypatch):
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = toy.YAML.replace("outs: [a.txt]", "outs: [a.txt]\n    meta: {memory_gib: 1.5}")
    Path("dvc.yaml").write_text(text)
    whole = graph.read_graph()
    assert (whole["a"].memory_gib, whole["b"].memory_gib) == (1.5, None)
    Path("dvc.yaml").write_text(text.replace("1.5", "1.5 GiB"))
    with pytest.raises(Refusal, match=r"a: meta\.memory_gib in dvc\.yaml is '1\.5 GiB'; write GiB"):
        graph.read_graph()


@pytest.mark.parametrize("value", ["12", -1, 0, True, math.nan, math.inf])
def test_declared_memory_is_a_number(value):
    with pytest.raises(Refusal, match=r"a: meta.memory_gib"):
        graph._declared("a", {"memory_gib": value})


@pytest.mark.parametrize(
    ("device", "resolved", "named", "cards"),
    [
        ("cpu", "cpu", "0,1", ()),
        ("auto", "cpu", "0,1", ()),
        ("auto", "cuda", "2,GPU-ab,3", ("2", "GPU-ab")),  # torch sees two of them
        ("cuda", "cuda", None, ("GPU-0", "GPU-1", "GPU-2", "GPU-3")),
        ("cuda:1", "cuda:1", None, ("",)),
        ("mps", "mps", None, ("",)),
    ],
)
def test_cards_are_handed_out_where_stages_compute_on_them(device, resolved, named, cards, monkeypatch):
    import torch

    monkeypatch.delenv(machine.VISIBLE, raising=False)
    if named is not None:
        monkeypatch.setenv(machine.VISIBLE, named)
    else:
        monkeypatch.setattr(machine, "cards", lambda: ("GPU-0", "GPU-1", "GPU-2", "GPU-3"))
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(machine, "threads", lambda: 10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Run, "resolved_device", lambda _: torch.device(resolved))
    pool = pool_of(RUN.model_copy(update={"device": device}))
    assert (pool.cards, pool.threads) == (cards, 10 - len(cards))  # a thread feeds each card


def test_torch_is_not_asked_where_there_is_no_driver(monkeypatch):
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    monkeypatch.setattr(Run, "resolved_device", lambda _: pytest.fail("asked"))
    assert pool_of(RUN).cards == ()


def run_all(run):
    with ThreadPoolExecutor(len(run.graph)) as threads:
        return {outcome.state for outcome in threads.map(run.advance, run.graph)}


def test_four_cards_serve_four_stages_and_the_cpu_runs_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"prune {i}" for i in range(8)] + [f"noise {i}" for i in range(4)] + ["profile a"]
    whole = {name: stage(name) for name in names}
    run = Plan(whole, Pool(2, cards=("0", "1", "GPU-ab", "MIG-cd")), stale=set(whole), todo=names)
    at_work, seen, lock = {}, [], threading.Lock()

    def repro(name, show, force, variables):
        with lock:
            at_work[name] = variables.get("CUDA_VISIBLE_DEVICES")
            seen.append(dict(at_work))
        time.sleep(0.05)
        with lock:
            del at_work[name]
        return 0, "Running stage"

    monkeypatch.setattr(run.children, "repro", repro)
    assert run_all(run) == {"ran"}
    for together in seen:
        cards = [card for name, card in together.items() if "noise" not in name]
        assert len(set(cards)) == len(cards) and None not in cards
        assert sum("noise" in name for name in together) <= 2
        assert "profile a" not in together or len(together) == 1
    assert max(sum(card is not None for card in together.values()) for together in seen) == 4
    assert any({name[:5] for name in together} == {"prune", "noise"} for together in seen)


COMMAND = """import os, pathlib, sys, time
kind, name = pathlib.Path(__file__).stem, sys.argv[1]
here = pathlib.Path("here")
here.mkdir(exist_ok=True)
(here / name).touch()
deadline = time.monotonic() + 90
while len(list(here.iterdir())) < 5:
    assert time.monotonic() < deadline, "not all five run at once"
    time.sleep(0.05)
pathlib.Path(name).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # raised while DVC plans
def test_each_of_four_stages_sees_a_card_of_its_own(tmp_path, monkeypatch):
    """Commands that DVC runs; each waits until all are there, four with a card and one without."""
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("__init__", "prune", "noise"):
        (tmp_path / f"stages/{name}.py").write_text("" if name == "__init__" else COMMAND)
    runs = {"a": "prune", "b": "prune", "c": "prune", "d": "prune", "e": "noise"}
    lines = [
        f"  {name}: {{cmd: python -m stages.{kind} {name}, outs: [{name}]}}" for name, kind in runs.items()
    ]
    (tmp_path / "dvc.yaml").write_text("\n".join(["stages:", *lines, ""]))
    whole = graph.read_graph()
    run = Plan(whole, Pool(1, cards=("3", "1", "GPU-ab", "MIG-cd")), stale=set(whole), todo=list(whole))
    assert run_all(run) == {"ran"}
    seen = {name: Path(name).read_text() for name in runs}
    assert {seen[name] for name in "abcd"} == {"3", "1", "GPU-ab", "MIG-cd"} and seen["e"] == "none"


def test_a_stage_that_may_need_more_memory_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = {"prune x": stage("prune x", memory_gib=100)}
    run = Plan(whole, Pool(2, gib=10), stale=set(whole), todo=list(whole))
    monkeypatch.setattr(run.children, "repro", lambda *_: (0, "Running stage"))
    assert run_all(run) == {"ran"}
    assert "prune x | may need 100.0 GiB, more than the 10.0 GiB of memory" in capsys.readouterr().out


def test_a_pool_says_what_it_has():
    assert str(Pool(3, 20.04)) == "CPU threads: 3, memory: 20.0 GiB"
    assert str(Pool(3, 20, ("0", "1"), 4)).endswith("20.0 GiB, cards: 2, stages at most: 4")
    assert resources.Pool(4, 8).share(3) == 6.0
