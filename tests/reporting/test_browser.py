"""The page in a headless Chromium: sorting, filtering, hovering, items; on a phone, in the dark, on paper."""

import base64
import shutil
import time
from pathlib import Path

import pytest

from tests.reporting.conftest import HOSTILE
from tests.reporting.opened import Page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if webdriver:  # as the skip above may end this file
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on the path (Debian: chromium-driver)"
)
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip


class Browser:
    """Chromium with one page open."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"user-data-dir={folder}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, page: Path, *, width: int = 1400, dark: bool = False) -> "Browser":
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())
        self.until("document.documentElement.dataset.drawn")
        return self

    def js(self, code: str):
        return self.driver.execute_script(code)

    def until(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"return {condition}"):
            assert time.monotonic() < end, f"{condition} did not come true: {self.driver.get_log('browser')}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys, one after another, where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def failed(self) -> list[str]:
        """Return the errors of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def shown(self) -> list[str]:
        """Return the candidates whose rows are visible, in order."""
        return self.js(
            "return [...document.querySelectorAll('#board tr[data-candidate]')]"
            ".filter(row => row.offsetParent).map(row => row.dataset.candidate)"
        )

    def choose(self, form: str, name: str, value: str) -> None:
        self.js(
            f"const e = document.getElementById('{form}').elements['{name}']; e.value = '{value}';"
            "e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true}));"
        )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def file(whole):
    return whole[1] / "data/report/index.html"


@pytest.fixture(scope="module")
def page(file):
    return Page(file.read_text())


@pytest.fixture
def wide(chromium, file):
    return chromium.open(file)


def test_nothing_fails_and_nothing_is_fetched(wide):
    wide.js("listItems('all')")
    wide.until("document.documentElement.dataset.items !== undefined")
    assert wide.failed() == []
    assert wide.js("return performance.getEntriesByType('resource').length") == 0


USE_EVERY_CONTROL = """
    const done = arguments[0], wait = () => new Promise(next => setTimeout(next, 100));
    const used = [];
    (async () => {
        for (const part of document.querySelectorAll("details")) part.open = true;
        await listItems("all");
        for (const control of document.querySelectorAll(".controls select, .controls input")) {
            const values = control.options ? [...control.options].map(option => option.value) : ["a", ""];
            for (const value of control.type === "checkbox" ? [0, 1] : [values.at(-1), values[0]]) {
                if (control.type === "checkbox") control.click();
                else {
                    control.value = value;
                    for (const kind of ["input", "change"])
                        control.dispatchEvent(new Event(kind, { bubbles: true }));
                }
                await wait();
            }
            used.push(control.name || control.id);
        }
        for (const button of document.querySelectorAll("th button")) button.click();
        for (const place of document.querySelectorAll("figure.live, #scatter")) {  /* as in a hidden frame */
            place.style.display = "none";
            dispatchEvent(new Event("resize"));
            await wait();
            place.style.display = "";
            dispatchEvent(new Event("resize"));
            await wait();
        }
        done(used);
    })();
"""


@pytest.mark.parametrize("width", [420, 1400])
def test_no_control_leaves_an_error_in_the_console(chromium, file, width):
    page = chromium.open(file, width=width)
    assert page.failed() == []
    page.driver.set_script_timeout(300)
    used = page.driver.execute_async_script(USE_EVERY_CONTROL)
    assert {"margin", "kind", "budget", "filter", "measure", "axis", "logx", "candidate", "level"} <= set(
        used
    )
    assert page.failed() == []
    plot = page.js("return document.querySelector('#scatter-plot svg').getBoundingClientRect().width")
    assert plot > width / 2, "a chart that was hidden is as wide as its place again"


def test_a_chart_that_is_drawn_again_lets_go_of_the_one_before(wide):
    wide.js("""
        window.placed = 0;
        const read = CanvasRenderingContext2D.prototype.getImageData;
        CanvasRenderingContext2D.prototype.getImageData = function (...of) {
            placed++;
            return read.apply(this, of);
        };
    """)

    def resized():
        """Count how often labels are placed when the window changes."""
        wide.js("placed = 0; dispatchEvent(new Event('resize'))")
        time.sleep(0.5)
        return wide.js("return placed")

    def width(pixels):
        wide.js(f"document.getElementById('scatter-plot').style.width = '{pixels}px'")

    width(900)
    once = resized()
    assert once > 0
    for axis in ("ideal", "latency", "disk"):
        wide.choose("scatter-controls", "axis", axis)
        time.sleep(0.5)
    width(800)
    assert resized() == once


def test_points_are_reached_and_opened_by_keyboard(wide):
    told = "return document.activeElement.getAttribute('aria-label')"
    wide.js("document.querySelector('#scatter-controls [name=logy]').focus()")
    wide.press(Keys.TAB)
    seen = [wide.js(told)]
    for _ in range(9):
        wide.press(Keys.ARROW_RIGHT)
        seen.append(wide.js(told))
    assert {text.split(":")[0] for text in seen} == set(wide.shown())
    sizes = [float(text.rsplit(": ")[-1]) for text in seen]
    assert sizes == sorted(sizes)
    assert wide.js("return document.getElementById('scatter-point').textContent") == seen[-1]
    wide.press(Keys.HOME)
    assert wide.js(told) == seen[0]
    wide.press(Keys.ARROW_DOWN)
    assert wide.js(told) == seen[1]
    wide.press(Keys.ARROW_UP)
    assert wide.js(told) == seen[0]
    wide.press(Keys.TAB)
    assert not wide.js("return document.getElementById('scatter-plot').contains(document.activeElement)")
    ActionChains(wide.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert wide.js(told) == seen[0], "the way back leads to the same point"
    wide.press(Keys.ENTER)
    wide.until("document.activeElement.id === 'items-count'")
    chosen = wide.js("return document.getElementById('items-controls').elements.candidate.value")
    assert chosen == seen[0].split(":")[0]


def test_every_table_is_one_tab_stop_and_arrows_move_in_it(wide):
    wide.js("listItems('all')")
    wide.until("document.querySelector('#items-table .tabulator-cell')")
    stops = (
        "[...document.querySelector('{}').querySelectorAll('a, button, [tabindex]')]"
        ".filter(e => e.tabIndex >= 0 && e.getClientRects().length).length"
    )
    for grid in ("#board", "table.heat", "#items-table .tabulator-header", "#scatter-plot"):
        assert wide.js(f"return {stops.format(grid)}") == 1, grid
    assert wide.js(f"return {stops.format('#items-table .tabulator-tableholder')}") == 0
    named = (
        "return [...document.querySelectorAll('[role=grid]')].map(e => e.ariaLabel || e.caption?.textContent)"
    )
    assert len(wide.js(named)) >= 4 and all(wide.js(named))
    here = "return document.activeElement.closest('[data-candidate]')?.dataset.candidate"
    where = "return document.activeElement.dataset.measure"
    wide.js("document.querySelector('#filter').focus()")
    wide.press(Keys.TAB, Keys.TAB, Keys.ARROW_DOWN)
    wide.press(*[Keys.ARROW_RIGHT] * 3)  # the badge of the speed, and two scores
    assert (wide.js(here), wide.js(where)) == ("base/smollm2", "1")
    wide.press(Keys.ARROW_DOWN)
    assert (wide.js(here), wide.js(where)) == ("prune/magnitude-50", "1"), "in the same column"
    wide.driver.find_element("id", "filter").send_keys("rtn-w3g64")
    wide.press(Keys.TAB, Keys.TAB, Keys.ARROW_DOWN)
    assert wide.js(here) == "quantize/rtn-w3g64", "a hidden row is no stop"


def test_headings_of_items_are_whole_and_sort_by_keyboard(wide):
    wide.js("listItems('all')")
    wide.until("document.querySelector('#items-table .tabulator-cell')")
    cut = wide.js(
        "return [...document.querySelectorAll('#items-table .tabulator-col-title')]"
        ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
    )
    assert cut == []
    wide.js("document.querySelector('#items-table .tabulator-col[tabindex=\"0\"]').focus()")
    wide.press(Keys.ENTER, Keys.ARROW_RIGHT)
    assert (
        wide.js("return document.querySelector('#items-table [aria-sort=ascending]').textContent") == "item"
    )
    assert wide.js("return document.activeElement.textContent") == "level"
    wide.press(Keys.ARROW_DOWN)
    assert wide.js("return document.activeElement.getAttribute('role')") == "gridcell"


def test_a_heading_sorts_and_sorts_back(wide):
    sizes = "return [...document.querySelectorAll('#board td[data-key=disk]')].map(cell => +cell.dataset.v)"
    head = wide.driver.find_element("css selector", "#board th[data-key=disk] button")
    head.send_keys("\n")  # by keyboard
    assert wide.js(sizes) == sorted(wide.js(sizes)) and len(wide.js(sizes)) == 10
    head.click()
    assert wide.js(sizes) == sorted(wide.js(sizes), reverse=True)
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


def test_the_filter_keeps_rows_with_all_its_words(wide):
    wide.driver.find_element("id", "filter").send_keys("quantized 3g64")
    assert wide.shown() == ["quantize/rtn-w3g64", "quantize/gptq-w3g64"]
    assert wide.js("return document.getElementById('shown').textContent") == "2 of 10"


def test_columns_are_chosen(wide):
    visible = "return !!document.querySelector('#board td[data-key=removed]').offsetParent"
    assert not wide.js(visible)
    wide.js("document.querySelector('#columns').open = true")
    wide.driver.find_element("xpath", "//*[@id='columns']//label[contains(., 'removed')]/input").click()
    assert wide.js(visible)


def test_a_row_opens_its_recipe_and_commands(wide):
    name = wide.driver.find_element("css selector", "tr[data-candidate='quantize/gptq-w4g64'] a.open")
    name.send_keys("\n")
    text = wide.driver.find_element("css selector", ".open-row").text
    for needed in (
        "base/smollm2 → quantize/gptq-w4g64", "prunequant run quantize/gptq-w4g64",
        "prunequant export quantize/gptq-w4g64", 'from_pretrained("data/models/quantize/gptq-w4g64")',
        "group_size: 64",
    ):  # fmt: skip
        assert needed in text, needed
    assert name.get_attribute("aria-expanded") == "true"
    name.send_keys("\n")
    assert not wide.driver.find_elements("css selector", ".open-row")


def test_controls_show_the_answers_that_python_gave(wide, page):
    answers = page.data["answer"]
    (reference,) = answers["answers"]
    said = (
        "return [...document.querySelectorAll('.answer dl > div')]"
        ".map(part => part.innerText.replace(/\\s+/g, ' '))"
    )

    def expected(kind, margin, budget):
        return [
            f"{head} {candidate.split('/')[1] + ': ' if candidate else ''}{text}"
            for head, candidate, text in answers["texts"][answers["answers"][reference][kind][margin][budget]]
        ]

    before = wide.js(said)  # as Python wrote it
    last = len(answers["budgets"]["bytes_on_disk"])
    margin = int(wide.js("return document.querySelector('[name=margin]').value"))
    assert before == expected("bytes_on_disk", margin, last)
    for kind, at, budget in (
        ("bytes_on_disk", 0, last), ("bytes_on_disk", 4, last), ("bytes_ideal", 5, 1), ("bytes_ideal", 2, 0),
    ):  # fmt: skip
        wide.choose("answer-controls", "kind", kind)
        wide.choose("answer-controls", "margin", str(at))
        wide.choose("answer-controls", "budget", str(budget))
        assert wide.js(said) == expected(kind, at, budget)


def test_an_answer_is_that_of_the_controls_when_a_page_opens(chromium, file, tmp_path):
    text = file.read_text()
    assert text.count('value="2" selected') == 1
    other = tmp_path / "restored.html"
    other.write_text(
        text.replace('value="2" selected', 'value="2"').replace('value="4">', 'value="4" selected>', 1)
    )
    first = chromium.open(other).js("return document.querySelector('.answer dl').innerText")
    chromium.choose("answer-controls", "margin", "4")
    assert "10 %" in first and chromium.js("return document.querySelector('.answer dl').innerText") == first


def test_columns_of_words_and_of_odd_numbers_sort(wide):
    wide.js("""
        const table = document.querySelector("#numbers table.sort");
        [...document.querySelectorAll("details")].forEach(part => part.open = true);
        window.heads = [...table.tHead.rows[0].cells];
        window.column = name => heads.findIndex(head => head.textContent.startsWith(name));
        window.sorted = name => {
            heads[column(name)].querySelector("button").click();
            return [...table.tBodies[0].rows].map(row => row.cells[column(name)].innerText.trim());
        };
    """)
    words = wide.js("return sorted('verdict')")
    assert words == sorted(words, key=str.lower) and len(set(words)) > 2
    p = [text for text in wide.js("return sorted('p,')") if text != "–"]
    small = [text.startswith("p <") for text in p]
    assert any(small) and not all(small) and small == sorted(small, reverse=True)
    ratios = [
        float(text.split()[0].replace(",", "")) for text in wide.js("return sorted('times')") if text != "–"
    ]
    assert ratios == sorted(ratios)


def test_a_point_tells_its_name_and_axes_can_be_chosen(wide):
    points = wide.driver.find_elements("css selector", "#scatter-plot .mark-symbol.dots_marks path")
    assert len(points) == 10
    wide.js("document.getElementById('scatter').scrollIntoView()")
    ActionChains(wide.driver).move_to_element(points[1]).perform()
    wide.until("document.querySelector('#vg-tooltip-element.visible')")
    tip = wide.driver.find_element("id", "vg-tooltip-element").text
    assert "prune/magnitude-50" in tip and "worse" in tip
    wide.choose("scatter-controls", "axis", "latency")
    wide.until("document.querySelector('#scatter-plot').textContent.includes('milliseconds a token')")
    wide.until("document.querySelectorAll('#scatter-plot .mark-symbol.dots_marks path').length === 2")


def test_a_number_opens_its_items(wide):
    number = wide.driver.find_element(
        "css selector", "tr[data-candidate='prune/wanda-50'] a.number[data-level=all]"
    )
    wide.driver.execute_script("arguments[0].click()", number)
    wide.until("document.querySelector('#items-table .tabulator-row')")
    flipped = int(wide.js("return document.documentElement.dataset.items"))
    controls = "document.getElementById('items-controls').elements"
    assert wide.js(f"return {controls}.candidate.value") == "prune/wanda-50"
    counts = {"flipped": flipped}
    for change in ("won", "lost"):
        wide.js("delete document.documentElement.dataset.items")
        wide.choose("items-controls", "change", change)
        wide.until("document.documentElement.dataset.items")
        counts[change] = int(wide.js("return document.documentElement.dataset.items"))
    assert counts["lost"] > 0 and counts["lost"] + counts["won"] == flipped
    cells = "[...document.querySelectorAll('#items-table [tabulator-field=scores].tabulator-cell')]"
    assert set(wide.js(f"return {cells}.map(cell => cell.textContent)")) == {"1 → 0"}
    text = wide.driver.find_element("id", "items-table").text
    assert HOSTILE in text and "question " in text, "the answer is text, not a script"
    assert wide.js("return document.querySelectorAll('script[src]').length") == 0


def test_a_number_without_flipped_items_opens_all_of_them(wide):
    controls = "document.getElementById('items-controls').elements"
    wide.js("showItems({candidate: 'base/smollm2', change: 'flipped'})")
    wide.until(f"{controls}.change.value === 'all' && +document.documentElement.dataset.items > 0")
    assert wide.js("return document.getElementById('items-count').textContent").split()[0] != "0"


def test_blocks_and_recovery_are_drawn(wide):
    lines = "document.querySelectorAll('#{} .mark-line path').length"
    errors = [c for c in wide.shown() if any(name in c for name in ("wanda", "gptq")) and "lora" not in c]
    wide.until(f"{lines.format('block-plot')} === {len(errors)}")
    assert wide.js(f"return {lines.format('recovery-plot')}") == 1
    wide.choose("block-controls", "column", "sparsity")
    wide.until("document.getElementById('block-plot').textContent.includes('share of zeros')")
    pruned = [c for c in wide.shown() if any(name in c for name in ("50", "gptq"))]
    wide.until(f"{lines.format('block-plot')} === {len(pruned)}")


def test_a_phone_has_every_score_on_its_screen(chromium, file):
    phone = chromium.open(file, width=420)
    assert phone.js("return document.documentElement.scrollWidth") <= 420
    ends = phone.js(
        "return [...document.querySelectorAll('#board td, .heat td, .answer dd, #scatter-plot svg')]"
        ".map(e => e.getBoundingClientRect()).filter(box => box.width).map(box => [box.left, box.right])"
    )
    assert len(ends) > 100
    assert min(left for left, _ in ends) >= 0 and max(right for _, right in ends) <= 420
    phone.js("const s = document.getElementById('sort'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    assert phone.shown()[0].startswith("quantize/")


def test_dark_is_dark(chromium, file):
    dark = chromium.open(file, dark=True)
    colour = "return getComputedStyle(document.querySelector('{}')).{}.match(/\\d+/g).slice(0, 3).map(Number)"
    assert max(dark.js(colour.format("body", "backgroundColor"))) < 60
    assert min(dark.js(colour.format("#scatter-plot .role-axis-title text", "fill"))) > 180
    assert min(dark.js(colour.format("#board td", "color"))) > 180


def test_it_prints_with_its_table_and_chart(wide):
    pdf = base64.b64decode(wide.driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF") and 2 <= pdf.count(b"/Type /Page\n") <= 15
    wide.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        hidden = "return getComputedStyle(document.getElementById('items')).display"
        assert wide.js(hidden) == "none"
        assert (
            wide.js("return document.querySelector('#scatter-plot svg').getBoundingClientRect().width") > 300
        )
    finally:
        wide.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
