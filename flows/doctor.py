"""Doctor: check everything that a run depends on before one starts.

Each check gives one finding: what it looked at, what it saw, and what to do if that is no good. Nothing is
changed.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from flows import machine, workspace
from stages.core import half_products
from stages.core.errors import Refusal
from stages.core.files import SCRATCH
from stages.job.locked import LOCK

ROOM = 5.0
"""GiB that should be free: the default job takes 4."""
MEMORY = 3.0
"""GiB that should be free: a stage of the default job takes 2.6."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""CPU features that decide how fast bf16 is, and in which order kernels add."""


class Finding(NamedTuple):
    """What one check saw."""

    subject: str
    state: Literal["ok", "warning", "problem"]
    text: str
    """What it saw and, unless that is ok, what to do."""


def examine() -> list[Finding]:
    """Run every check; one that fails unexpectedly is a problem of its subject, and the others still run."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:
            subject = check.__name__.strip("_")
            findings.append(Finding(subject, "problem", " ".join(f"{type(error).__name__}: {error}".split())))
    return findings


def _git() -> Iterator[Finding]:
    if not shutil.which("git"):
        yield Finding("git", "problem", "there is no git; install it")
        return
    if _run("git", "rev-parse", "--git-dir") is None:
        yield Finding("git", "problem", "this folder is not in a git repository; clone the project")
    elif not (_run("git", "config", "user.email") and _run("git", "config", "user.name")):
        text = "no identity, so `dvc exp run` cannot commit; set git config user.name and user.email"
        yield Finding("git", "warning", text)
    else:
        changes = len((_run("git", "status", "--porcelain") or "").splitlines())
        yield Finding(
            "git", "ok", f"on {_run('git', 'rev-parse', '--short', 'HEAD')}, {changes} files changed"
        )


def _dvc() -> Iterator[Finding]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo()
    except DvcException as error:
        yield Finding("dvc", "problem", f"{error}; run this in the root of a prunequant project")
        return
    cache = Path(repo.cache.local.path)
    writable = os.access(next(folder for folder in [cache, *cache.parents] if folder.exists()), os.W_OK)
    yield Finding(
        "dvc cache", "ok" if writable else "problem", f"{cache}{'' if writable else ' is not writable'}"
    )
    remote = repo.config["core"].get("remote")
    if not remote:
        yield Finding("dvc remote", "warning", "none is the default; `dvc remote add -d` to share results")
        return
    url = str(repo.config["remote"][remote]["url"])
    if "://" in url or Path(url).exists():
        yield Finding("dvc remote", "ok", f"{remote}: {url}")
    else:
        yield Finding("dvc remote", "warning", f"{remote}: {url} does not exist yet; `dvc push` creates it")


def _lock() -> Iterator[Finding]:
    from stages.job import provenance
    from stages.job.locked import locked_stages

    if not LOCK.exists():
        yield Finding("dvc.lock", "ok", "there is none yet: nothing has run")
        return
    try:
        wrong = provenance.disagreements(locked_stages())
    except Refusal as refusal:
        yield Finding("dvc.lock", "problem", str(refusal))
        return
    if wrong:
        text = f"{', '.join(wrong)} were computed from other inputs than it says; `prunequant run` mends that"
        yield Finding("dvc.lock", "problem", text)
    else:
        yield Finding("dvc.lock", "ok", "agrees with every result")


def _params() -> Iterator[Finding]:
    from flows.resources import pool_of
    from stages.job.entry import outdated
    from stages.job.load import load

    try:
        params = load()
    except Refusal as refusal:
        yield Finding("params.yaml", "problem", str(refusal))
        return
    yield Finding("params.yaml", "ok", f"sound, {len(params.recipes())} recipes")
    if names := outdated():
        yield Finding("data/code", "warning", f"{len(names)} identities are outdated; `dvc repro code`")
    else:
        yield Finding("data/code", "ok", "knows the code")
    wanted, there = params.run.threads, machine.threads()
    if wanted > there:
        text = f"run.threads is {wanted}, but this process has {there}; lower it"
        yield Finding("device", "warning", text)
    else:
        try:
            pool = pool_of(params.run)
        except Refusal as refusal:
            yield Finding("device", "problem", str(refusal))
            return
        stages = f"{max(1, pool.threads // wanted)} at a time with {wanted} CPU threads each"
        stages = f"1 on each of {len(pool.cards)} cards" if pool.cards else stages
        yield Finding("device", "ok", f"{params.run.device}: stages that compute run {stages}")


def _machine() -> Iterator[Finding]:
    """Show what this process may use, by its affinity, its control groups and `CUDA_VISIBLE_DEVICES`."""
    cores = os.cpu_count() or 1
    yield Finding("threads", "ok", f"{machine.threads()} CPU threads of the machine's {cores}")
    gib, total = machine.memory() / 2**30, psutil.virtual_memory().total / 2**30
    text = f"{gib:.1f} GiB free of the machine's {total:.1f}"
    if gib < MEMORY:
        yield Finding("memory", "warning", f"{text}; the default job takes {MEMORY}: end other programs")
    else:
        yield Finding("memory", "ok", text)
    yield Finding("cards", "ok", ", ".join(machine.cards()) or "none")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 2**30
    text = f"{free:.1f} GiB free"
    if free < ROOM:
        yield Finding("disk", "warning", f"{text}; `dvc gc --workspace` drops what no recipe needs")
    else:
        yield Finding("disk", "ok", text)


def _versions() -> Iterator[Finding]:
    if not Path("requirements.lock").exists():
        text = "there is no requirements.lock; run this in the root of a prunequant project"
        yield Finding("versions", "problem", text)
        return
    if other := other_versions():
        yield Finding("versions", "warning", f"{other}; results may differ: pip install -r requirements.lock")
    else:
        yield Finding("versions", "ok", f"Python {platform.python_version()}, those of requirements.lock")


def other_versions() -> str:
    """Compare the installed packages with requirements.lock; return up to five that differ, in words."""
    wanted = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", Path("requirements.lock").read_text(), re.M))
    other = []
    for name, version in wanted.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        if installed.partition("+")[0] != version.partition("+")[0]:
            other.append(f"{name} {installed} instead of {version}")
    return ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")


def _processor() -> Iterator[Finding]:
    info = Path("/proc/cpuinfo")
    words = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    has = ", ".join(flag for flag in FLAGS if flag in words) or "no feature that matters here"
    slow = half_products.slow()
    how = f"; products of {' and '.join(slow)} are computed in float32, as it has no instructions for them"
    yield Finding("processor", "ok", f"{platform.machine()}, {has}{how if slow else ''}")


def _prefect() -> Iterator[Finding]:
    from flows.server import configure, why_silent

    configure()
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    home = Path(PREFECT_HOME.value())
    nearest = next(folder for folder in [home, *home.parents] if folder.exists())
    if not os.access(nearest, os.W_OK):
        text = f"{home} is not writable; set PREFECT_HOME to a folder that is, or use `dvc repro`"
        yield Finding("prefect", "problem", text)
        return
    url = PREFECT_API_URL.value()
    if not url:
        yield Finding("prefect", "ok", f"no server configured: a run starts a temporary one in {home}")
        return
    if reason := why_silent():
        text = f"the server {url} does not serve us ({reason}); mend that, or unset PREFECT_API_URL"
        yield Finding("prefect", "problem", text)
    else:
        yield Finding("prefect", "ok", f"the server {url} answers")


def _leftovers() -> Iterator[Finding]:
    kept = [file for file in SCRATCH.rglob("*") if file.is_file()] if SCRATCH.exists() else []
    size = sum(file.stat().st_size for file in kept) / 2**30
    orphans = [] if workspace.busy() else workspace.orphans(str(Path.cwd()))
    if orphans:
        names = ", ".join(sorted(orphans))
        text = f"{names} still run, but nobody waits for them; `prunequant run` ends them"
        yield Finding("leftovers", "warning", text)
    if kept:
        text = f"{len(kept)} files in {SCRATCH}, {size:.2f} GiB: killed stages continue from them"
        yield Finding("leftovers", "warning", text)
    if not kept and not orphans:
        yield Finding("leftovers", "ok", "none of killed runs")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _git, _dvc, _params, _lock, _disk, _machine, _versions, _processor, _prefect, _leftovers,
)  # fmt: skip


def _run(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()
