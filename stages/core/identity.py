"""The identity of the code behind a result: the modules it runs, without their comments and docstrings.

A recipe must run again when its code changes and only then. Its code is its stage's file and its method's
module with everything they import, directly or not, inside functions too, found by parsing and never by
importing. An import for types alone does not run, so it does not count. `stages/job` only reads params and
calls the stage function, so it counts for no artifact. What a module reads with `beside` counts as the module
does: a page's template, a folder of task files with the modules that these name.

Comments, docstrings, blank lines and blanks at line ends are cut out of the source and the rest is hashed
with its indentation. Neither the token stream nor `ast.dump` would do: both differ between versions of
Python.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder that holds `stages`."""
EXCLUDED = ("stages/job/",)
"""Code that cannot change an artifact."""
MODULE = re.compile(r"\bstages(?:\.\w+)+")
"""A module named in a data file, as a task's YAML names its functions."""
STRING_OR_COMMENT = re.compile(
    r'''"""(?:[^\\]|\\.)*?"""|'{3}(?:[^\\]|\\.)*?'{3}|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|#[^\n]*''',
    re.DOTALL,
)
"""A string or a comment, whichever begins first. Within an f-string Python 3.11 allows neither its own quotes
nor comments, and the project's sources are valid there."""
RECORDED = ("torch", "transformers", "lm-eval", "compressed-tensors", "peft", "datasets", "dvc", "prefect")
"""Packages whose versions are recorded with every run."""


def beside(module: str, name: str) -> Path:
    """Return the path of a data file or folder beside a module; its content counts as the module's code.

    Args:
        module: `__file__` of the caller.
        name: a literal, as it is read off the source.
    """
    return Path(module).parent / name


def versions() -> dict[str, str | None]:
    """Return the installed versions of the recorded packages, None for one that is not installed."""
    return {package: _version(package) for package in RECORDED}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a runner may lack the orchestrator
        return None


def of(stage: str, method: str | None = None, *, root: Path = ROOT) -> dict[str, str]:
    """Return the hash of every file behind a stage and one of its methods, by path, sorted.

    Args:
        stage: its name, such as `prune`; its file is `stages/prune.py`.
        method: the method's module, such as `stages.pruning.wanda`; None for a stage without methods.
    """
    excluded = () if stage == "validate" else EXCLUDED  # validate runs what the others only pass through
    todo = _files_of([f"stages.{stage}", *([method] if method else [])], root)
    hashes: dict[str, str] = {}
    while todo:
        file = todo.pop()
        if file not in hashes and not file.startswith(excluded):
            hashes[file], needed = _examine(file, root)
            todo += needed
    return dict(sorted(hashes.items()))


@cache
def digest(stage: str, method: str | None = None) -> str:
    """Return one hash for all of `of`, computed once a process."""
    return hashlib.sha256(text(of(stage, method)).encode()).hexdigest()


def forget() -> None:
    """Let `of` read the files again."""
    _examine.cache_clear()


def text(hashes: Mapping[str, str]) -> str:
    """Format hashes as the file under `data/code`, a line a file."""
    return "".join(f"{value}  {file}\n" for file, value in hashes.items())


@cache
def _examine(file: str, root: Path) -> tuple[str, list[str]]:
    """Return a file's hash, and the project's files that it imports or reads itself."""
    source = (root / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        tree = ast.parse(source)
        code, needed = _bare(source, tree), _imported(tree, root) + _read_by(tree, file, root)
    else:
        code, needed = source, _files_of(MODULE.findall(source), root)
    return hashlib.sha256(code.encode()).hexdigest()[:16], needed


def _blocks(node: ast.AST, *, types: bool) -> Iterator[list[ast.AST]]:
    """Yield every list of statements below a node; those under `if TYPE_CHECKING` only where `types`."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(node, field, None)
        if isinstance(block, list) and (types or field != "body" or not _for_types(node)):
            yield block
            for child in block:
                yield from _blocks(child, types=types)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imported(tree: ast.AST, root: Path) -> list[str]:
    """Return the files that a module imports, at its top or inside functions."""
    names: list[str] = []
    for block in _blocks(tree, types=False):
        for node in block:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"relative import of {node.module or '.'}: only a full name is followed")
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return _files_of(names, root)


def _read_by(tree: ast.AST, file: str, root: Path) -> list[str]:
    """Return the files behind every call `beside(__file__, "name")`."""
    files: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or "beside" not in (
            getattr(node.func, "id", None),
            getattr(node.func, "attr", None),
        ):
            continue
        named = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "name")]
        name = getattr(named[0], "value", None) if named else None
        if not isinstance(name, str):
            raise ValueError(f"{file}: the name given to beside must be a literal string")
        path = root / Path(file).parent / name
        if not path.exists():
            raise ValueError(f"{file}: beside names {name}, which does not exist")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [str(p.relative_to(root)) for p in inside if p.is_file() and p.parent.name != "__pycache__"]
    return files


def _files_of(names: Iterable[str], root: Path) -> list[str]:
    """Return the files of dotted names and of the packages around them.

    A name may continue into a module, to what is defined there.
    """
    files: list[str] = []
    for name in names:
        parts = name.split(".")
        if parts[0] != "stages":
            continue
        for count in range(1, len(parts) + 1):
            path = Path(*parts[:count])
            if (root / path / "__init__.py").exists():
                files.append(f"{path}/__init__.py")
            elif (root / path).with_suffix(".py").exists():
                files.append(f"{path}.py")
                break
    return files


def bare(source: str) -> str:
    """Return Python source without comments, docstrings, blank lines and blanks at line ends.

    A docstring that is a whole body becomes `pass`.
    """
    return _bare(source, ast.parse(source))


def _bare(source: str, tree: ast.AST) -> str:
    lines = [line.encode() for line in source.split("\n")]  # splitlines also ends lines at form feeds
    comments, strings = _scan(source)
    cuts = [(line, column, line, len(lines[line]), b"") for line, column in comments]
    for text, only in _docstrings(tree):
        first, last = text.lineno - 1, (text.end_lineno or 0) - 1
        cuts.append((first, text.col_offset, last, text.end_col_offset or 0, b"pass" if only else b""))
        strings -= set(range(first + 1, last + 1))
    for first, start, last, end, instead in sorted(cuts, reverse=True):  # columns are in bytes
        if first == last:
            lines[first] = lines[first][:start] + instead + lines[first][end:]
        else:
            lines[first], lines[last] = lines[first][:start] + instead, lines[last][end:]
            lines[first + 1 : last] = [b""] * (last - first - 1)
    kept = [
        line if number + 1 in strings else line.rstrip()
        for number, line in enumerate(lines)
        if number in strings or line.strip()
    ]
    return "".join(f"{line.decode()}\n" for line in kept)


def _docstrings(tree: ast.AST) -> Iterator[tuple[ast.Constant, bool]]:
    """Yield every string that is a statement, and whether it is the only one of its block."""
    for block in _blocks(tree, types=True):
        for statement in block:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value, len(block) == 1 and value.col_offset > 0


def _scan(source: str) -> tuple[list[tuple[int, int]], set[int]]:
    """Return where comments begin, (line, column in bytes), and the lines that begin within a string."""
    comments: list[tuple[int, int]] = []
    strings: set[int] = set()
    line = at = 0
    for match in STRING_OR_COMMENT.finditer(source):
        line += source.count("\n", at, match.start())
        at = match.start()
        if match[0].startswith("#"):
            begin = source.rfind("\n", 0, at) + 1
            comments.append((line, len(source[begin:at].encode())))
        else:
            strings.update(range(line + 1, line + 1 + match[0].count("\n")))
    return comments, strings
