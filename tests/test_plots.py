"""The page of `dvc plots show`: complete without a network."""

import configparser
import re

from dvc_render.html import HTML
from dvc_render.vega import VegaRenderer

from deploy import vendor
from tests import project

PAGE = project.ROOT / ".dvc/vega/page.html"
VEGA = [f"{name}-{package.version}" for name, package in vendor.PACKAGES.items() if name.startswith("vega")]


def test_the_page_needs_no_network():
    text = PAGE.read_text()
    assert VegaRenderer.SCRIPTS.count("https://") == 3, "which DVC's own page loads"
    filled = HTML(text).with_scripts(VegaRenderer.SCRIPTS).with_element("<p>a plot</p>").embed()
    assert "<p>a plot</p>" in filled and "{plot_divs}" not in filled and "{refresh_tag}" not in filled
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=", filled)
    for package in VEGA:
        assert f"/* {package} */" in filled


def test_dvcs_config_names_it_and_it_has_its_licence():
    config = configparser.ConfigParser()
    config.read(project.ROOT / ".dvc/config")
    assert project.ROOT / ".dvc" / config["plots"]["html_template"] == PAGE
    licence = (PAGE.parent / "LICENSE").read_text()
    assert all(package in licence for package in VEGA) and "Redistribution" in licence
