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
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder that holds `stages`."""
EXCLUDED = ("stages/job/",)
"""What counts for no artifact."""
MODULE = re.compile(r"\bstages(?:\.\w+)+")
"""A module named in a data file, as a task's YAML names its functions."""
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
    starts = _named([f"stages.{stage}", *([method] if method else [])], root)
    excluded = () if stage == "validate" else EXCLUDED  # validate runs what the others only pass through
    return {file: _hash(root, file) for file in closure(starts, root, excluded)}


@cache
def digest(stage: str, method: str | None = None) -> str:
    """Return one hash for all of `of`, computed once a process."""
    return hashlib.sha256(text(of(stage, method)).encode()).hexdigest()


def text(hashes: Mapping[str, str]) -> str:
    """Format hashes as the file under `data/code`, a line a file."""
    return "".join(f"{value}  {file}\n" for file, value in hashes.items())


def closure(starts: Iterable[str], root: Path = ROOT, excluded: tuple[str, ...] = EXCLUDED) -> list[str]:
    """Return all files that the files `starts` need to run, these included, sorted.

    Args:
        excluded: beginnings of paths that are left out, with all that only they need.
    """
    seen: set[str] = set()
    todo = list(starts)
    while todo:
        file = todo.pop()
        if file not in seen and not file.startswith(excluded):
            seen.add(file)
            todo += needed(file, root)
    return sorted(seen)


@cache
def needed(file: str, root: Path = ROOT) -> tuple[str, ...]:
    """Return the project's files that `file` itself imports or reads."""
    source = (root / file).read_text(encoding="utf-8")
    if not file.endswith(".py"):
        return tuple(dict.fromkeys(_named(MODULE.findall(source), root)))
    tree = ast.parse(source)
    files = [f for node in _running(tree) for f in _imported(node, root) + _read(node, file, root)]
    return tuple(dict.fromkeys(files))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a syntax tree's nodes but those under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _running(other)
        else:
            yield from _running(child)


def _imported(node: ast.AST, root: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return _named([alias.name for alias in node.names], root)
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(
                f"relative import of {node.module or '.'}: write the full name, as only that is followed"
            )
        return _named([f"{node.module}.{alias.name}" for alias in node.names], root)
    return []


def _read(node: ast.AST, file: str, root: Path) -> list[str]:
    """Return the files behind a call `beside(__file__, "name")`."""
    if not isinstance(node, ast.Call) or "beside" not in (
        getattr(node.func, "id", None),
        getattr(node.func, "attr", None),
    ):
        return []
    name = node.args[1]
    if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        raise ValueError(f"{file}: the name given to beside must be a literal string")
    path = root / Path(file).parent / name.value
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [str(p.relative_to(root)) for p in inside if p.is_file() and p.parent.name != "__pycache__"]


def _named(names: Iterable[str], root: Path) -> list[str]:
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


@cache
def _hash(root: Path, file: str) -> str:
    content = (root / file).read_bytes()
    if file.endswith(".py"):
        content = bare(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def bare(source: str) -> str:
    """Return Python source without comments, docstrings, blank lines and blanks at line ends.

    A docstring that is a whole body becomes `pass`.
    """
    lines = [line.encode() for line in source.splitlines()]
    comments, strings = _tokens(source)
    cuts = [(line, column, line, len(lines[line]), b"") for line, column in comments]
    for text, only in _docstrings(ast.parse(source)):
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
    """Yield every string that is a statement, and whether it is the only one of its class or function."""
    for node in ast.walk(tree):
        if not isinstance(body := getattr(node, "body", None), list):  # a lambda's is an expression
            continue
        for statement in body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value, len(body) == 1 and not isinstance(node, ast.Module)


def _tokens(source: str) -> tuple[list[tuple[int, int]], set[int]]:
    """Return where comments begin, (line, column in bytes), and the lines that begin within a string."""
    comments: list[tuple[int, int]] = []
    strings: set[int] = set()
    opened: list[int] = []
    # Since 3.12 an f-string is several tokens, from FSTRING_START to FSTRING_END.
    start, end = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append((token.start[0] - 1, len(token.line[: token.start[1]].encode())))
        elif token.type == tokenize.STRING:
            strings.update(range(token.start[0], token.end[0]))
        elif token.type == start:
            opened.append(token.start[0])
        elif token.type == end:
            strings.update(range(opened.pop(), token.end[0]))
    return comments, strings
