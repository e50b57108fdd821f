"""The identity of code: what changes it, and what does not."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core import identity
from tests import project

TOY = {
    "stages/__init__.py": "",
    "stages/prune.py": "from stages.core.base import run\nfrom stages.job.entry import entry\n",
    "stages/core/__init__.py": "",
    "stages/core/base.py": "def run():\n    from stages.core import late\n    return late.VALUE\n",
    "stages/core/late.py": "VALUE = 1\n",
    "stages/core/types.py": "X = int\n",
    "stages/core/unused.py": "Y = 2\n",
    "stages/job/__init__.py": "",
    "stages/job/entry.py": "import stages.methods.first, stages.methods.second\n",
    "stages/methods/__init__.py": "",
    "stages/methods/first.py": (
        "from typing import TYPE_CHECKING\n"
        "from stages.core.identity import beside\n"
        "from stages.core.base import run\n"
        "if TYPE_CHECKING:\n    from stages.core.types import X\n"
        'TASKS = beside(__file__, "tasks")\n'
    ),
    "stages/methods/second.py": "import stages.core.base\n",
    "stages/methods/tasks/one.yaml": "run: !function stages.methods.helper.work\n",
    "stages/methods/helper.py": "def work(): ...\n",
    "stages/core/identity.py": "def beside(module, name): ...\n",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def of(root: Path, method: str) -> dict[str, str]:
    identity.forget()
    return identity.of("prune", f"stages.methods.{method}", root=root)


def test_the_closure_is_what_runs(toy):
    assert set(of(toy, "first")) == {
        "stages/__init__.py", "stages/prune.py", "stages/core/__init__.py", "stages/core/base.py",
        "stages/core/late.py", "stages/core/identity.py", "stages/methods/__init__.py",
        "stages/methods/first.py", "stages/methods/tasks/one.yaml", "stages/methods/helper.py",
    }  # fmt: skip
    assert set(of(toy, "first")) - set(of(toy, "second")) == {
        "stages/core/identity.py", "stages/methods/first.py", "stages/methods/tasks/one.yaml",
        "stages/methods/helper.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("stages/core/late.py", {"first", "second"}),  # imported inside a function
        ("stages/prune.py", {"first", "second"}),
        ("stages/methods/first.py", {"first"}),
        ("stages/methods/tasks/one.yaml", {"first"}),
        ("stages/methods/helper.py", {"first"}),  # named in a data file
        ("stages/core/types.py", set()),  # for types alone
        ("stages/core/unused.py", set()),
        ("stages/job/entry.py", set()),
    ],
)
def test_an_edit_changes_those_who_run_it(toy, file, changes):
    before = {method: of(toy, method) for method in ("first", "second")}
    with (toy / file).open("a") as opened:
        opened.write("Z = 3\n")
    assert {method for method, hashes in before.items() if of(toy, method) != hashes} == changes


def test_a_new_method_changes_nobody(toy):
    before = of(toy, "first")
    (toy / "stages/methods/third.py").write_text("from stages.core.base import run\n")
    (toy / "stages/job/entry.py").write_text(TOY["stages/job/entry.py"] + "import stages.methods.third\n")
    assert of(toy, "first") == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1  # c\n", "x = 1\n"),
        ("# c\n\n\nx = 1\n", "x = 1\n"),
        ('def f():\n    """d"""\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    """d\n\n      more  \n    """\n    return 1\n', "def f():\n    return 1\n"),
        ('class A:\n    x: int\n    """of x"""\n', "class A:\n    x: int\n"),
        ('class A:\n    """d"""\nx = 1\n', "class A:\n    pass\nx = 1\n"),
        ('x = ("a"  # c\n     "b")\n', 'x = ("a"\n     "b")\n'),
        ("x = 1   \n", "x = 1\n"),
        ('"""é"""; x = 1  # é\n', '"""e"""; x = 1\n'),
    ],
)
def test_comments_docstrings_and_blanks_do_not_count(first, second):
    assert identity.bare(first) == identity.bare(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1\n", "x = 2\n"),
        ("if a:\n    b\nc\n", "if a:\n    b\n    c\n"),
        ('x = "# c"\n', 'x = "# d"\n'),
        ('x = """a\n\nb"""\n', 'x = """a\nb"""\n'),
        ('x = """a   \nb"""\n', 'x = """a\nb"""\n'),
        ('x = f"""a{y}   \nb"""\n', 'x = f"""a{y}\nb"""\n'),
        ('x = """# a\n# b"""\n', 'x = """# a\n# c"""\n'),
        (
            "x = 'a\x0cb'\ndef f():\n    'd'\n    return 1\n",
            "x = 'a\x0cb'\ndef g():\n    'd'\n    return 1\n",
        ),
        ("x = 'a\u2028b'\n", "x = 'a\u2028c'\n"),
    ],
)
def test_code_counts(first, second):
    assert identity.bare(first) != identity.bare(second)


SOURCES = sorted(project.ROOT.glob("stages/**/*.py"))


@settings(max_examples=40)
@given(st.sampled_from(SOURCES), st.randoms(use_true_random=False))
def test_what_is_left_of_a_file_is_its_code(file, draw):
    """The syntax tree without docstrings is the same, and a comment after any line changes nothing."""
    source = file.read_text()
    bare = identity.bare(source)
    assert skeleton(bare) == skeleton(source)
    lines = source.splitlines()
    places = [number for number, line in enumerate(lines) if line.strip() and not inside(source, number + 1)]
    place = draw.choice(places) if places else 0
    more = "\n".join([*lines[: place + 1], "# a comment", "", *lines[place + 1 :]]) + "\n"
    try:
        ast.parse(more)
    except SyntaxError:  # after a line that goes on, as by a backslash
        return
    assert identity.bare(more) == bare


def inside(source: str, line: int) -> bool:
    """Whether a line, from 0, begins within a string."""
    return any(
        isinstance(node, ast.Constant | ast.JoinedStr) and node.lineno <= line < (node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
    )


def skeleton(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                each
                for each in body
                if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
                or not isinstance(each.value.value, str)
            ] or [ast.Pass()]
    return ast.dump(tree)


def test_a_name_given_to_beside_must_be_literal(toy):
    (toy / "stages/methods/first.py").write_text("NAME = 'tasks'\nbeside(__file__, NAME)\n")
    with pytest.raises(ValueError, match="the name given to beside"):
        of(toy, "first")


def test_a_relative_import_is_refused(toy):
    (toy / "stages/methods/first.py").write_text("from . import second\n")
    with pytest.raises(ValueError, match="only a full name is followed"):
        of(toy, "first")


def test_a_package_that_a_runner_lacks_has_no_version(monkeypatch):
    monkeypatch.setattr(identity, "RECORDED", ("torch", "no-such-package-anywhere"))
    versions = identity.versions()
    assert versions["torch"] and versions["no-such-package-anywhere"] is None


def newer_pythons() -> list[str]:
    """Interpreters from 3.12 on that run here, on the path or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = [path for minor in range(12, 20) if (path := shutil.which(f"python3.{minor}"))]
    named += [str(file) for file in sorted(pyenv.glob("3.1[2-9]*/bin/python"))]
    return [
        python for python in named if not subprocess.run([python, "-c", ""], capture_output=True).returncode
    ]


OTHERS = newer_pythons()


@pytest.mark.skipif(not OTHERS, reason="no newer Python is installed beside this one")
def test_every_python_has_the_same_identities():
    code = (
        "import json, pathlib, sys; sys.path.insert(0, '.')\n"
        "from stages.core.identity import bare\n"
        "files = sorted(pathlib.Path('stages').rglob('*.py'))\n"
        "print(json.dumps({str(f): bare(f.read_text()) for f in files}))"
    )
    ours = {str(file.relative_to(project.ROOT)): identity.bare(file.read_text()) for file in SOURCES}
    for python in OTHERS:
        done = subprocess.run(
            [python, "-c", code], cwd=project.ROOT, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == ours, python
