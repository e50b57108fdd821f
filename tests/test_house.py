"""The layers: imports run down only, names mean one thing, and dvc.yaml depends on identities of code."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
import yaml

from stages.core import identity
from stages.job import pieces
from tests import project
from tests.conftest import NEED_FLOWS

ROOT = project.ROOT
LAYERS = (
    "core", "model", "corpus", "compress", "sources", "pruning", "quantization", "recovery", "teaching",
    "controls", "evaluation", "profiling", "reporting", "job", "stage files", "flows",
)  # fmt: skip
"""From the lowest. The stage files lie in `stages/` itself, one a stage."""
FILES = sorted(
    file.relative_to(ROOT) for folder in ("stages", "flows") for file in (ROOT / folder).rglob("*.py")
)
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LIBRARIES = (
    "torch", "numpy", "pandas", "pyarrow", "transformers", "scipy", "lm_eval", "safetensors", "datasets",
    "peft", "matplotlib", "prefect", "dvc",
)  # fmt: skip


def layer(file: Path) -> str:
    if file.parts[0] == "flows":
        return "flows"
    return file.parts[1] if len(file.parts) > 2 else "stage files"


def imports(file: Path) -> Iterator[Path]:
    """Our own files that a file imports: at the top, inside functions, and for types alone."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not used here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] not in ("stages", "flows"):
                continue
            paths = [Path(*parts[:count]) for count in range(len(parts), 0, -1)]
            yield next(
                path.with_suffix(".py") if (ROOT / path.with_suffix(".py")).exists() else path / "__init__.py"
                for path in paths
                if (ROOT / path.with_suffix(".py")).exists() or (ROOT / path / "__init__.py").exists()
            )


def test_imports_run_down_only():
    assert {layer(file) for file in FILES} == set(LAYERS)
    upward = [
        f"{file} imports {other}"
        for file in FILES
        for other in imports(file)
        if LAYERS.index(layer(other)) > LAYERS.index(layer(file))
    ]
    assert not upward


def test_no_file_imports_itself_through_others():
    needs = networkx.DiGraph((file, other) for file in FILES for other in imports(file) if other != file)
    circles = [circle for circle in networkx.strongly_connected_components(needs) if len(circle) > 1]
    assert not circles, f"these files import each other in a circle: {circles}"


def test_tests_that_cannot_be_imported_without_dvc_or_prefect_are_left_out_there():
    def needs(file: Path) -> bool:
        tops = [
            node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [
            node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tops
        ]
        return any(name.split(".")[0] in ("prefect", "dvc", "dvc_render", "dvc_data") for name in names)

    tests = ROOT / "tests"
    files = [file.relative_to(tests) for file in tests.rglob("test_*.py") if needs(file)]
    assert len(files) > 5
    assert not [file for file in files if str(file) not in NEED_FLOWS and file.parts[0] not in NEED_FLOWS]


def test_nothing_is_imported_by_a_name_in_a_string():
    dynamic = re.compile(r"import_module|__import__\(|runpy")
    users = {str(file) for file in FILES if dynamic.search((ROOT / file).read_text())}
    assert users == {"stages/core/lazy.py"}


def test_no_two_files_share_a_name():
    stems = [file.stem for file in FILES if file.stem != "__init__"]
    assert sorted(stems) == sorted(set(stems))


def test_a_public_name_means_one_thing():
    where = defaultdict(list)
    for file in FILES:
        if str(file) == "flows/cli.py":  # a command is named like what it runs
            continue
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                where[node.name].append(str(file))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        where[target.id].append(str(file))
    public = {name: files for name, files in where.items() if not name.startswith("_")}
    shared = {"log", "P", "T"}  # a logger, type variables
    assert not {name: files for name, files in public.items() if len(files) > 1 and name not in shared}


def test_every_stage_has_a_file_and_every_stage_file_a_stage():
    stages = {file.stem for file in FILES if layer(file) == "stage files"} - {"__init__"}
    assert stages == set(pieces.STAGES)
    commands = {re.search(r"python -m stages\.(\w+)", entry["cmd"])[1] for entry in entries().values()}
    assert commands == stages


def entries() -> dict[str, dict]:
    return {name: stage.get("do", stage) for name, stage in GRAPH.items()}


def test_a_stage_depends_on_the_identity_of_its_code():
    known = {f"{stage}/{method}" for stage, method, _ in pieces.identified()}
    used = set()
    for name, entry in entries().items():
        stage = re.search(r"python -m stages\.(\w+)", entry["cmd"])[1]
        code = [dep.removeprefix("data/code/") for dep in entry["deps"] if dep.startswith("data/code/")]
        if stage == "code":
            assert entry["deps"] == ["stages"], "the identities are read off the sources"
            continue
        (own,) = code
        methods = {own} if "$" not in own else {name for name in known if name.startswith(f"{stage}/")}
        assert methods and methods <= known, name
        used |= methods
        assert not [dep for dep in entry["deps"] if dep.startswith("stages")], name
        assert "requirements.lock" in entry["deps"], name
        assert name == "validate" or "data/validated.json" in entry["deps"], name
    assert used == known


def test_methods_of_a_stage_have_names_of_their_own():
    names = [(stage, method) for stage, method, _ in pieces.identified()]
    assert len(names) == len(set(names))
    modules = [(stage, module) for stage, _, module in pieces.identified() if module]
    assert len(modules) == len(set(modules)), "a method is a file"


def test_no_method_needs_the_file_of_another():
    modules = {f"{module.replace('.', '/')}.py" for _, _, module in pieces.identified() if module}
    for stage, method, module in pieces.identified():
        if module and stage != "evaluate":
            others = set(identity.of(stage, module)) & modules - {f"{module.replace('.', '/')}.py"}
            assert not others, f"{stage}/{method} runs {others}"


def test_what_modules_read_beside_them_counts_as_code():
    """Every file in stages/ that is no module is claimed by a module's `beside`, or is DVC's."""
    claimed = {
        file
        for stage, _, module in pieces.identified()
        for file in identity.of(stage, module)
        if not file.endswith(".py")
    }
    others = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "stages").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    named = {file for file in others if file in (ROOT / "dvc.yaml").read_text()}
    assert others - named == claimed
    assert any(file.endswith(".yaml") for file in claimed) and any(file.endswith(".html") for file in claimed)


def test_nothing_in_job_counts_for_an_artifact():
    for stage, method, module in pieces.identified():
        job = [file for file in identity.of(stage, module) if file.startswith("stages/job/")]
        assert bool(job) == (stage == "validate"), f"{stage}/{method}"


COMPUTING = ("torch", "numpy", "random", "transformers", "stages.core.lazy", "os.environ", "os.putenv")
"""What decides results: libraries that compute, and the environment that they read."""


def test_job_touches_nothing_that_results_depend_on():
    """Device, threads, seeds and determinism are set in core, and what computes is used below `job`."""
    wrong = []
    for file in sorted((ROOT / "stages/job").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            wrong += [
                f"{file.name}: {name}"
                for name in names
                if f"{name}.".startswith(tuple(f"{w}." for w in COMPUTING))
            ]
    assert not wrong


def test_stage_files_import_nothing_from_job_but_the_entry():
    for file in FILES:
        if layer(file) == "stage files" and file.stem != "__init__":
            taken = {str(other) for other in imports(file) if layer(other) == "job"}
            assert taken == {"stages/job/entry.py"}, file


def test_no_stage_hides_an_output_from_the_run_cache():
    text = (ROOT / "dvc.yaml").read_text()
    assert "cache: false" not in text and "persist: true" not in text


def modules_after(code: str, cwd: Path) -> set[str]:
    """The top-level packages that a fresh interpreter has imported after `code`."""
    code += "\nimport sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env={**project.ENV, **project.importing(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("stage", sorted(pieces.STAGES))
def test_a_stage_file_imports_no_heavy_library(stage):
    """`python -m stages.<stage> --help`, and with it the reading of params, imports no library of seconds."""
    heavy = set(LIBRARIES)
    if stage == "report":
        heavy -= {"numpy", "pandas", "pyarrow", "scipy", "matplotlib"}
    assert not modules_after(f"import stages.{stage}", ROOT) & heavy


def test_rows_of_unequal_length_share_a_forward_in_few_places():
    """Each asks `sharing`, `batching` or `switch_lengths` whether a longer row would change the others."""
    pads = re.compile(r"pad_sequence\(|tokenizer\.pad\(|\] \* \(\w+ - len\(")
    assert {str(file) for file in FILES if pads.search((ROOT / file).read_text())} == {
        "stages/corpus/decoding.py",  # generate_rows, by `batching`
        "stages/corpus/padding.py",  # fills up what was generated
        "stages/corpus/rows.py",  # only `predictions` runs such a batch, by `sharing`
        "stages/evaluation/shared.py",  # by `batching`, and one row at a time where `sharing` says so
        "stages/pruning/depth/tasks.py",  # `Ablation`, by `sharing`
    }
