"""dvc.yaml against the code: what a stage imports is what it depends on, and nothing else of ours."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
FREE = "stages/job/params.py"  # names every method; see its docstring
REGISTRY = {  # how a method's file is known: the field that names it, or its class
    "model": ("download", r"^    format: Literal"),
    "dataset": ("download", r"^    kind: Literal"),
    "prune": ("prune", r"^    method: Literal"),
    "quantize": ("quantize", r"^    method: Literal"),
    "teach": ("teach", r"^    method: Literal"),
    "finetune": ("finetune", r"^    method: Literal"),
    "perplexity": ("evaluate", r"^class PerplexitySuite"),
    "graded": ("evaluate", r"^class GradedSuite"),
    "benchmark": ("evaluate", r"^class BenchmarkSuite"),
    "noise": ("noise", r"^class .*Method"),
    "floor": ("floor", r"^class .*Method"),
    "profile": ("profile", r"^class Profile"),
}
METHODS = {
    stage: sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "stages" / folder).glob("*.py")
        if re.search(pattern, path.read_text(), re.M)
    )
    for stage, (folder, pattern) in REGISTRY.items()
}


def imports(file: str) -> set[str]:
    """Our own modules that a file imports when it runs, lazily or not, but not for types alone."""
    tree = ast.parse((ROOT / file).read_text())
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in typing
            and (node.module or "").startswith("stages")
        ):
            base = (node.module or "").replace(".", "/")
            for alias in node.names:
                inner = f"{base}/{alias.name}.py"
                found.add(inner if (ROOT / inner).exists() else f"{base}.py")
    return {file for file in found if (ROOT / file).exists()}


def closure(start: set[str]) -> set[str]:
    seen, todo = set(), set(start)
    while todo:
        file = todo.pop()
        if file not in seen and file != FREE:
            seen.add(file)
            todo |= imports(file)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_dependencies_are_the_imports(name):
    stage = GRAPH[name].get("do", GRAPH[name])
    module = re.search(r"python -m (stages\.\w+)", stage["cmd"]).group(1)
    main = module.replace(".", "/") + "/__main__.py"
    own = {dep for dep in stage["deps"] if dep.endswith(".py") and "$" not in dep}
    methods = METHODS[name]
    if any("$" in dep and dep.endswith(".py") for dep in stage["deps"]):
        own |= set(methods)
    assert own == closure({main, *methods})
    # A recipe depends on its own method's file alone, so no method may need another's.
    for method in methods:
        assert not closure({method}) & set(methods) - {method}, method
    assert "requirements.lock" in stage["deps"]
    assert "data/validated.json" in stage["deps"]


def test_every_method_file_was_found():
    counts = {stage: len(files) for stage, files in METHODS.items()}
    assert counts == {
        "model": 2, "dataset": 8, "prune": 9, "quantize": 9, "teach": 2, "finetune": 4,
        "perplexity": 1, "graded": 1, "benchmark": 1, "noise": 0, "floor": 0, "profile": 1,
    }  # fmt: skip


def test_no_stage_hides_an_output_from_the_run_cache():
    assert "cache: false" not in (ROOT / "dvc.yaml").read_text()
    assert "persist: true" not in (ROOT / "dvc.yaml").read_text()
