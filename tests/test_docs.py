"""The documentation: pages are in the menu, links of the README lead somewhere, DVC reads its YAML."""

import re
import tomllib
from io import StringIO

import pytest
from ruamel.yaml import YAML

from flows.manual import params_page
from stages.job.editors import json_schema
from tests import project

DOCS = project.ROOT / "docs"
SITE = tomllib.loads((project.ROOT / "zensical.toml").read_text())["project"]


def listed(entries):
    """The pages of a menu."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else listed(value)


def anchors(text):
    """The anchors of a page's headings, as git hosts make them."""
    words = (heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"[^\w-]", "", word) for word in words}


def test_every_page_is_in_the_menu_once():
    pages = sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))
    assert sorted(listed(SITE["nav"])) == pages


def test_links_of_the_readme_lead_to_a_file_and_a_heading():
    text = (project.ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = project.ROOT / (path or "README.md")
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_the_site_takes_nothing_from_a_network():
    assert SITE["theme"]["font"] is False
    assert "offline" in SITE["plugins"], "without it the search needs a web server"
    assert [script["path"] for script in SITE["extra"]["polyfills"]] == ["vendor/iframe-worker.js"]
    assert (DOCS / "vendor/iframe-worker.js").exists() and (DOCS / "vendor/LICENSE").exists()


def test_the_page_of_settings_is_current():
    page = (DOCS / "params.md").read_text()
    assert page == params_page(json_schema()), "run `prunequant schema --markdown > docs/params.md`"


def test_the_page_of_settings_has_every_class_and_links_to_its_headings():
    schema = json_schema()
    page = params_page(schema)
    headings = re.findall(r"^##+ (.+)$", page, re.M)
    assert len(headings) == len(set(headings))
    assert {*schema["properties"]} < {*headings}
    assert {"prune: wanda", "quantize: gptq", "Shared: Calibration"} < {*headings}
    assert {*re.findall(r"\]\(#([^)]+)\)", page)} <= anchors(page)
    tables = re.findall(r"^\| setting \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.M)
    assert len(tables) >= len(schema["$defs"])


def test_texts_of_settings_are_shown_as_they_are():
    schema = {
        "required": [], "properties": {"one": {"$ref": "#/$defs/One", "description": "A <b> of *x*."}},
        "$defs": {
            "One": {
                "required": ["size"],
                "properties": {
                    "size": {"type": "integer", "minimum": 1, "description": "`a|b`, c_d | <script>"},
                    "way": {"anyOf": [{"enum": ["a", True]}, {"type": "null"}], "default": None},
                },
            }
        },
    }  # fmt: skip
    page = params_page(schema)
    assert r"A &lt;b> of \*x\*." in page and "It may be left out." in page
    assert r"| `size` * | integer, at least 1 |  | `a\|b`, c\_d \| &lt;script> |" in page
    assert "| `way` | `a` or `true` or `null` | `null` |  |" in page


def test_readme_and_the_landing_page_say_the_same_answer():
    answers = [
        re.search(r"For SmolLM2-135M-Instruct the answer is: .*?quantized\s+models", page.read_text(), re.S)
        for page in (project.ROOT / "README.md", project.ROOT / "docs/index.md")
    ]
    assert all(answers)
    assert len({" ".join(answer[0].split()) for answer in answers}) == 1


BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{number}")
    for file in [project.ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL))
    if file.stem != "operations"  # its blocks are Prefect's, which DVC does not read
]


def yaml(kind):
    """A parser of DVC's; a block may show two ways to write one key."""
    parser = YAML(typ=kind)
    parser.allow_duplicate_keys = True
    return parser


@pytest.mark.parametrize("block", BLOCKS)
def test_dvc_reads_every_yaml_of_the_docs_and_its_editor_keeps_it_readable(block):
    """Inside braces DVC reads no value with a colon, and its editor drops the quotes of one."""
    kept = StringIO()
    yaml("rt").dump(yaml("rt").load(block), kept)
    assert yaml("safe").load(kept.getvalue()) == yaml("safe").load(block)
