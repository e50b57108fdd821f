"""Shared inputs: tiny checkpoints of every family and made-up text, written once a session."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

from stages.core import half_products
from stages.core.errors import Refusal
from stages.core.run import Run
from tests import families, project
from tests import finished as sweep

hypothesis.settings.register_profile("tests", deadline=None)  # a slow or busy machine is no failure
hypothesis.settings.load_profile("tests")


LACKING = [name for name in ("prefect", "dvc", "reasoning_gym", "jsonschema") if find_spec(name) is None]
if not (project.ROOT / "flows").is_dir():
    LACKING.append("flows")
"""Packages that a machine which only computes may lack; tests that need one are skipped there."""
NEED_FLOWS = ["flows", "benchmarks/test_drill.py", "test_plots.py", "test_sections.py"]
"""Tests that import what a machine which only computes may lack."""
collect_ignore = [*NEED_FLOWS] if {"prefect", "dvc", "flows"} & {*LACKING} else []
collect_ignore += ["job/test_editors.py"] if "jsonschema" in LACKING else []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests compute elsewhere than on the CPU."""
    parser.addoption("--device", default=families.DEVICE, help="where the tests compute, such as cuda")


def pytest_report_header() -> str | None:
    """Name what this machine lacks, as the reason why tests are skipped or left out."""
    if not LACKING:
        return None
    left_out = f"; left out: {', '.join(collect_ignore)}" if collect_ignore else ""
    return f"this machine lacks {', '.join(LACKING)}: tests that need them are skipped{left_out}"


def pytest_configure(config: pytest.Config) -> None:
    """Set the device before params are built.

    Raises:
        pytest.UsageError: this machine lacks it.
    """
    families.DEVICE = config.getoption("device")
    try:
        _run().resolved_device()
    except (Refusal, ValueError) as error:
        raise pytest.UsageError(f"--device {families.DEVICE}: {error}") from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of the CPU elsewhere, and put files that run a whole project first.

    Those take longest, and no worker must end with them.
    """
    longest = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in longest)
    for item in items:
        if families.DEVICE != "cpu" and (mark := item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason=f"only on the CPU: {mark.args[0]}"))


@contextmanager
def _skipping() -> Iterator[None]:
    """Skip a test that needs a package of `LACKING`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in LACKING:
            pytest.skip(f"this machine lacks {error.name}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Skip a test whose fixture needs a package that this machine lacks."""
    with _skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that needs a package that this machine lacks."""
    with _skipping():
        return (yield)


def _run() -> Run:
    return Run(device=families.DEVICE, dtype="bfloat16", threads=1, seed=0, numerics="fast")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where to put the tensors of a test; on a card every switch is set as in a stage."""
    return _run().start() if families.DEVICE != "cpu" else torch.device("cpu")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint a family and two texts; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("news", 1), ("speeches", 2)):
        (folder / f"{name}.txt").write_text(project.text(seed))
    for family in families.ALL:
        families.save(family, folder / family)
    (folder / "tiny").symlink_to(folder / "llama")
    return folder


@pytest.fixture(autouse=True)
def one_thread(device: torch.device) -> None:
    """Compute with one thread, as processes share the cores and sums need one order; bf16 as in stages."""
    torch.set_num_threads(1)
    half_products.widen(half_products.slow())


@pytest.fixture
def workspace(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder to work in, the shared inputs under `inputs/`."""
    logging.disable(logging.WARNING)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").symlink_to(inputs)
    return tmp_path


@pytest.fixture
def own_inputs(workspace: Path, inputs: Path) -> Path:
    """The workspace's `inputs/` as a folder of links, to add checkpoints to."""
    own = workspace / "inputs"
    own.unlink()
    own.mkdir()
    for shared in inputs.iterdir():
        (own / shared.name).symlink_to(shared.resolve())
    return own


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """A small project that `dvc repro` has brought up to date; copy it, do not write to it."""
    pytest.importorskip("dvc")
    folder = sweep.make(tmp_path_factory.mktemp("finished") / "project", inputs)
    assert sweep.repro(folder) == sweep.STAGES
    project.commit(folder, "run")
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished project, to change."""
    return sweep.copy(finished, tmp_path / "project")


@pytest.fixture(scope="session")
def edited(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> tuple[Path, set[str]]:
    """The finished project after one recipe was edited and run, committed; and the stages that ran."""
    folder = sweep.copy(finished, tmp_path_factory.mktemp("edited") / "project")
    sweep.edit(folder, "quantize.gptq-w4g32.bits", 3)
    ran = sweep.repro(folder)
    project.commit(folder, "three bits")
    return folder, ran
