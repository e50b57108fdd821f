"""Bring the libraries of the pages from npm: the report's, Vega for `dvc plots show`, a script for the site.

Run by `make vendor`, which needs npm's registry; what it writes is committed, so nothing needs a network or
Node afterwards. Each package is checked against its sha256 before anything is taken from it.
"""

import hashlib
import io
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "stages" / "reporting" / "page" / "vendor"
"""The report's libraries, minified, and their licences."""
PLOTS = ROOT / ".dvc" / "vega"
"""The page of `dvc plots show`, and its licences."""
SITE = ROOT / "docs" / "vendor"
"""What the site's search stands on where it is opened from a disk, as browsers start no worker there."""


@dataclass(frozen=True)
class Package:
    """A package of npm and the files taken from it."""

    version: str
    sha256: str
    files: tuple[str, ...]


PACKAGES = {
    "vega": Package(
        "5.33.1",
        "1b8504b6731c5311be3269c4d84ca996a5cc293bc772283293ede20c490e16c3",
        ("build/vega.min.js",),
    ),
    "vega-lite": Package(
        "5.23.0",
        "e4cbfdd8f6f1abe381c59cd558fd6a559c12b1496bfdf2e0c3295263a40fe4da",
        ("build/vega-lite.min.js",),
    ),
    "vega-embed": Package(
        "6.29.0",
        "ecf1ee709c2bac9e0a4ead6908114b05b62c71493e10a8a4308109bb070f8eb1",
        ("build/vega-embed.min.js",),
    ),
    "tabulator-tables": Package(
        "6.5.3",
        "a3aeb833e5cf924c8a686fa6748c1070c5fde8e605e0b1734000c35b78571a9b",
        ("dist/js/tabulator.min.js", "dist/css/tabulator_simple.min.css"),
    ),
}
"""In the order in which a page loads them; DVC's page takes Vega's three."""
WORKER = Package(
    "1.0.4", "e8c5d12d87829c503afba01d67772ea9f4aba5b7ae57a0c98e1917711030efbb", ("shim/index.js", "LICENSE")
)
PLOT_PAGE = """<!DOCTYPE html>
<html>
<head>
    {{refresh_tag}}
    <title>Plots</title>
{scripts}
    <style>table {{ border-spacing: 15px; }}</style>
</head>
<body>
    {{plot_divs}}
</body>
</html>
"""
"""DVC replaces {refresh_tag} and {plot_divs}; it would put addresses of a network at {scripts}."""


def main() -> None:
    """Write the folders."""
    scripts: list[str] = []
    licences: dict[str, str] = {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        titled = f"{name}-{package.version}"
        with _fetched(name, package) as archive:
            members = {member.name: member for member in archive.getmembers()}
            for file in package.files:
                text = archive.extractfile(members[f"package/{file}"]).read().decode()
                text = re.sub(
                    r"\s*(//# sourceMappingURL=\S*|/\*# sourceMappingURL=.*?\*/)\s*$", "", text
                ).strip()
                (FOLDER / Path(file).name).write_text(f"/* {titled} */\n{text}\n", encoding="utf-8")
                if name.startswith("vega"):
                    # Inside a page, the end of a script's tag ends the script, also in the middle of a text.
                    inside = text.replace("</script", "<\\/script")
                    scripts.append(f"    <script>/* {titled} */\n{inside}\n    </script>")
            # Vega's package has no licence file; its repository's is Vega-Lite's.
            if licence := members.get("package/LICENSE"):
                licences[titled] = archive.extractfile(licence).read().decode().strip()
    _write_licences(FOLDER, licences)
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / "page.html").write_text(PLOT_PAGE.format(scripts="\n".join(scripts)), encoding="utf-8")
    _write_licences(PLOTS, {name: text for name, text in licences.items() if name.startswith("vega")})
    SITE.mkdir(parents=True, exist_ok=True)
    with _fetched("iframe-worker", WORKER) as archive:
        for file, target in zip(WORKER.files, ("iframe-worker.js", "LICENSE"), strict=True):
            (SITE / target).write_bytes(archive.extractfile(f"package/{file}").read())


def _write_licences(folder: Path, licences: dict[str, str]) -> None:
    listed = "\n\n".join(f"{name}\n\n{text}\n" for name, text in licences.items())
    (folder / "LICENSE").write_text(f"vega-{PACKAGES['vega'].version} and {listed}", encoding="utf-8")


def _fetched(name: str, package: Package) -> tarfile.TarFile:
    address = f"https://registry.npmjs.org/{name}/-/{name}-{package.version}.tgz"
    with urllib.request.urlopen(address) as answer:
        content = answer.read()
    if (actual := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise SystemExit(
            f"{address}: its sha256 is {actual}, not {package.sha256}; nothing of it was written."
        )
    return tarfile.open(fileobj=io.BytesIO(content))


if __name__ == "__main__":
    main()
