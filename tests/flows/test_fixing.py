"""`prunequant check --fix`: the hashes it writes are those that the download checks; nothing else changes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from stages.core.files import sha256
from stages.job.load import load_verified
from tests import finished, project

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def check(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(workspace):
    """A folder whose params lack the hash of the model and of a text, which has a comment."""
    values = finished.params(Path("inputs"))
    del values["models"]["tiny"]["sha256"]
    values["datasets"]["news"]["sha256"] = "todo"
    project.write(workspace, values)
    file = workspace / "params.yaml"
    file.write_text(file.read_text().replace("  news:\n", "  news:  # ours\n", 1))
    return workspace


def test_a_missing_hash_is_answered_with_the_right_one(folder):
    said = check(code=2)
    model, news = sha256(Path("inputs/tiny")), sha256(Path("inputs/news.txt"))
    assert (
        f"models.tiny.sha256: this hash is missing; write {model}, or `prunequant check --fix` writes it."
        in said
    )
    assert f"datasets.news.sha256: 'todo' is no sha256; write {news}, or" in said
    assert "2 problem(s)" in said and "64" not in said.replace(model, "").replace(news, "")


def test_a_published_file_without_a_hash_is_one_problem(folder):
    Path("m.gguf").write_bytes(b"GGUF")
    values = project.read(folder)
    values["models"]["theirs"] = {"source": "path:.", "format": "packed", "file": "m.gguf"}
    project.write(folder, values)
    lines = [line for line in check(code=2).splitlines() if "theirs" in line]
    assert (
        len(lines) == 1
        and f"models.theirs.sha256: this hash is missing; write {sha256(Path('m.gguf'))}" in lines[0]
    )


def test_fix_writes_them_and_keeps_comments(folder):
    said = check("--fix")
    assert "models.tiny.sha256 was missing and is written. datasets.news.sha256 was missing" in said
    params = load_verified()
    assert params.models["tiny"].sha256 == sha256(Path("inputs/tiny"))
    text = Path("params.yaml").read_text()
    assert (
        "  news:  # ours\n" in text
        and f"file: news.txt\n    sha256: {params.datasets['news'].sha256}\n" in text
    )
    assert "was missing" not in check("--fix")
    assert Path("params.yaml").read_text() == text


def test_fix_adds_a_line_and_leaves_the_others(folder):
    file = folder / "params.yaml"
    text = file.read_text().replace("news:  # ours\n", "news:    # ours,   as it is\n", 1)
    news = sha256(Path("inputs/news.txt"))
    file.write_text(text)
    check("--fix")
    lines = file.read_text().splitlines()
    added = [line for line in lines if line not in text.splitlines()]
    assert sorted(added) == sorted([f"    sha256: {sha256(Path('inputs/tiny'))}", f"    sha256: {news}"])
    assert [line for line in lines if line not in added] == [
        line for line in text.splitlines() if "todo" not in line
    ]


def test_zeros_stand_for_a_hash_to_come(folder):
    file = folder / "params.yaml"
    file.write_text(file.read_text().replace("sha256: todo", f"sha256: '{'0' * 64}'"))
    assert "datasets.news.sha256: '000" in check(code=2)
    check("--fix")
    assert load_verified().datasets["news"].sha256 == sha256(Path("inputs/news.txt"))


def test_an_entry_in_braces_gets_its_hash_too(folder):
    values = project.read(folder)
    project.write(folder, values)
    file = folder / "params.yaml"
    model = values["models"]["tiny"]
    braces = f"{{source: '{model['source']}', format: safetensors, in_features: [32, 64]}}"
    start = file.read_text().index("  tiny:")
    end = file.read_text().index("datasets:")
    text = file.read_text()
    file.write_text(f"{text[:start]}  tiny: {braces}\n{text[end:]}")
    check("--fix")
    assert load_verified().models["tiny"].sha256 == sha256(Path("inputs/tiny"))


def test_an_entry_with_settings_from_an_anchor_gets_its_hash_too(folder):
    file = folder / "params.yaml"
    text = file.read_text().replace("  news:  # ours\n", "  news: &news  # ours\n", 1)
    more = "  more:\n    <<: *news\n    calibration: 0.25\n"
    file.write_text(text.replace("    sha256: todo\n", "").replace("prune:", f"{more}prune:", 1))
    check("--fix")
    params = load_verified()
    assert params.datasets["more"].sha256 == params.datasets["news"].sha256 == sha256(Path("inputs/news.txt"))


def test_every_source_that_cannot_be_hashed_is_named(folder):
    values = project.read(folder)
    values["datasets"]["news"]["file"] = "nope.txt"
    values["datasets"]["others"] = {**values["datasets"]["news"], "file": "neither.txt"}
    project.write(folder, values)
    before = (folder / "params.yaml").read_text()
    said = check("--fix", code=2)
    assert "datasets.news: " in said and "nope.txt" in said and "datasets.others: " in said
    assert "No hash was written." in said and (folder / "params.yaml").read_text() == before


def test_the_hash_of_nothing_is_never_proposed(own_inputs):
    (own_inputs / "void").mkdir()
    (own_inputs / "void.txt").write_text("")
    for section, name, source, file in (
        ("models", "tiny", "path:inputs/void", None), ("datasets", "news", "path:inputs", "void.txt")
    ):  # fmt: skip
        values = finished.params(Path("inputs").resolve())
        entry = values[section][name]
        entry |= {"source": source, **({"file": file} if file else {})}
        for digest in (None, "1a" * 32):
            entry["sha256"] = digest
            project.write(Path(), values)
            before = Path("params.yaml").read_text()
            for arguments in ([], ["--fix"]):
                said = check(*arguments, code=2)
                assert "is empty; correct the path" in said and EMPTY not in said
            assert Path("params.yaml").read_text() == before


def test_a_changed_text_is_not_accepted_unasked(folder):
    check("--fix")
    text = Path("params.yaml").read_text().replace(sha256(Path("inputs/news.txt")), "1a" * 32)
    Path("params.yaml").write_text(text)
    assert "write this hash if its content is what you want" in check("--fix", code=2)
    assert Path("params.yaml").read_text() == text


def test_a_name_that_contradicts_its_setting_is_a_warning(workspace):
    values = finished.params(Path("inputs"))
    values["prune"]["wanda-50"]["sparsity"] = 0.6
    values["quantize"]["gptq-w4g32"]["bits"] = 3
    project.write(workspace, values)
    said = check()
    assert "warning: prune.wanda-50: its name says 50, but its sparsity is 0.6; rename it" in said
    assert "warning: quantize.gptq-w4g32: its name says w4g32, but its bits is 3; rename it" in said
    assert said.count("warning") == 2


def test_check_compares_the_widths_of_models(folder):
    check("--fix")
    values = project.read(folder)
    values["models"]["tiny"]["in_features"] = [32, 96]
    project.write(folder, values)
    assert "models.tiny.in_features is [32, 96], but the model has [32, 64]" in check(code=2)
