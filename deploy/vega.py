"""Write the page that `dvc plots show` fills in, with Vega inside it, so that plots open without a network.

Run by `make vega`, which needs npm's registry; the page is committed. Each package is checked against its
sha256 before anything is taken from it.
"""

import hashlib
import io
import tarfile
import urllib.request
from pathlib import Path

PACKAGES = {
    "vega-5.33.1": "1b8504b6731c5311be3269c4d84ca996a5cc293bc772283293ede20c490e16c3",
    "vega-lite-5.23.0": "e4cbfdd8f6f1abe381c59cd558fd6a559c12b1496bfdf2e0c3295263a40fe4da",
    "vega-embed-6.29.0": "ecf1ee709c2bac9e0a4ead6908114b05b62c71493e10a8a4308109bb070f8eb1",
}
"""`<name>-<version>` and the sha256 of the package, in the order in which a page loads them."""
FOLDER = Path(__file__).parents[1] / ".dvc" / "vega"
PAGE = """<!DOCTYPE html>
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
    """Write `.dvc/vega/page.html` and the licences."""
    scripts, licences = [], []
    for package, expected in PACKAGES.items():
        name = package.rpartition("-")[0]
        address = f"https://registry.npmjs.org/{name}/-/{package}.tgz"
        with urllib.request.urlopen(address) as answer:
            content = answer.read()
        if (actual := hashlib.sha256(content).hexdigest()) != expected:
            raise SystemExit(f"{address}: its sha256 is {actual}, not {expected}; nothing was written.")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {member.name: member for member in archive.getmembers()}
            script = archive.extractfile(files[f"package/build/{name}.min.js"]).read().decode()
            # Vega's package has no licence file; its repository's is Vega-Lite's.
            if licence := files.get("package/LICENSE"):
                licences.append(f"{package}\n\n{archive.extractfile(licence).read().decode().strip()}\n")
        # Inside a page, the end of a script's tag ends the script, also in the middle of a text.
        inside = script.replace("</script", "<\\/script").strip()
        scripts.append(f"    <script>/* {package} */\n{inside}\n    </script>")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "page.html").write_text(PAGE.format(scripts="\n".join(scripts)), encoding="utf-8")
    (FOLDER / "LICENSE").write_text("vega-5.33.1 and " + "\n\n".join(licences), encoding="utf-8")


if __name__ == "__main__":
    main()
