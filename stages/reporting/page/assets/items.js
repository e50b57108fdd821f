/* The items: unpacked once somebody asks for them, shown by Tabulator, whose cells hold text only. */
const items = { table: null, ready: null };

async function openItems() {
  items.ready ??= Promise.all([libraries, unpack("packed-items")]).then(async ([, text]) => {
    const { texts, measures } = JSON.parse(text);
    items.texts = texts;
    items.measures = new Map(measures.map(measure => [measure.measure, measure]));
    const narrow = innerWidth < 700;
    const lines = cell => make("div", { class: "clip", tabindex: "-1" }, cell.getValue() ?? "–");
    const column = (title, field, more) => ({ title, field, formatter: lines, ...more });
    items.table = new Tabulator("#items-table", {
      data: [], layout: "fitColumns", pagination: true, paginationSize: 10, paginationSizeSelector: [10, 25, 100],
      columnDefaults: { headerSortTristate: true, headerWordWrap: true }, placeholder: "No such items.", responsiveLayout: narrow ? "collapse" : false, responsiveLayoutCollapseStartOpen: true,
      columns: [
        { title: "item", field: "item", width: 80, responsive: 0 },
        { title: "level", field: "level", width: 110, responsive: 3 },
        column("asked", "prompt", { widthGrow: 4, minWidth: 200, responsive: 0 }),
        column("expected", "target", { widthGrow: 1, minWidth: 115, responsive: 2 }),
        column(`answer of ${data.charts.reference}`, "before", { widthGrow: 2, minWidth: 100, responsive: 2 }),
        column("answer of the candidate", "after", { widthGrow: 2, minWidth: 100, responsive: 2 }),
        { title: "score", field: "scores", width: 90, responsive: 2 },
        column("likelihoods", "likelihoods", { widthGrow: 2, minWidth: 120, responsive: 4 }),
      ],
    });
    await new Promise(built => items.table.on("tableBuilt", built));
    const grid = byId("items-table");
    grid.querySelector(".tabulator-tableholder").removeAttribute("tabindex");
    const renew = rove(grid, () => [[...grid.querySelectorAll(".tabulator-col")],
      ...[...grid.querySelectorAll(".tabulator-row")].map(row => [...row.querySelectorAll(".tabulator-cell")])]);
    items.table.on("renderComplete", renew);
    grid.addEventListener("keydown", event => {
      if (event.key === "Enter" && event.target.matches(".tabulator-col")) event.target.click();
    });
  });
  await items.ready;
}

/* What a candidate did with the questions of a measure, a dict an item. */
function itemRows(candidate, place) {
  const measure = items.measures.get(place), text = at => at < 0 ? null : items.texts[at];
  const ours = measure?.answers[candidate], base = measure?.answers[data.references[candidate]];
  if (!ours) return [];
  const higher = data.charts.measures[place].higher;
  const listed = (values, choices) => values ? values.map((value, at) => (choices ? `${text(choices[at])}: ` : "") + value.toFixed(2)).join("\n") : null;
  return measure.item.flatMap((item, at) => {
    if (ours.score[at] === null) return [];
    const before = base?.score[at] ?? null, after = ours.score[at];
    const change = before === null || before === after ? "" : (after > before) === higher ? "won" : "lost";
    const choices = measure.choices[at];
    const both = [base?.likelihoods?.[at], ours.likelihoods?.[at]];
    return [{
      item, change, level: text(measure.level[at]), prompt: text(measure.prompt[at]), target: text(measure.target[at]),
      before: base ? text(base.response[at]) : null, after: text(ours.response[at]),
      scores: before === null ? `${after}` : `${before} → ${after}`,
      likelihoods: both[0] && both[1] && !measure.numeric
        ? both[1].map((value, n) => `${choices ? text(choices[n]) + ": " : ""}${both[0][n].toFixed(2)} → ${value.toFixed(2)}`).join("\n")
        : measure.numeric ? null : listed(both[1], choices),
    }];
  });
}

async function showItems({ candidate, measure, level, change }) {
  const controls = byId("items-controls").elements;
  if (candidate !== undefined) controls.candidate.value = candidate;
  if (measure !== undefined) controls.measure.value = measure;
  if (change !== undefined) controls.change.value = change;
  byId("items").scrollIntoView();
  await listItems(level ?? "all");
  if (change === "flipped" && document.documentElement.dataset.items === "0") {  // none flipped: then all
    controls.change.value = "all";
    await listItems(level ?? "all");
  }
  byId("items-count").tabIndex = -1;
  byId("items-count").focus({ preventScroll: true });
}

async function listItems(level) {
  await openItems();
  const controls = byId("items-controls").elements;
  const rows = itemRows(controls.candidate.value, +controls.measure.value);
  const levels = [...new Set(rows.map(row => row.level))].filter(name => name && name !== "all");
  fill(controls.level, [["all", "all"], ...levels.map(name => [name, name])], levels.includes(level) ? level : "all");
  const words = controls.text.value.toLowerCase();
  const wanted = controls.change.value;
  const chosen = rows.filter(row =>
    (wanted === "all" || (wanted === "flipped" ? row.change : row.change === wanted)) &&
    (controls.level.value === "all" || row.level === controls.level.value) &&
    (!words || [row.prompt, row.target, row.before, row.after].some(text => text?.toLowerCase().includes(words))));
  byId("items-count").textContent = `${chosen.length} of ${rows.length} items`;
  await items.table.setData(chosen);
  document.documentElement.dataset.items = chosen.length;
}

{
  const form = byId("items-controls"), controls = form.elements;
  const names = Object.keys(data.anchors);
  fill(controls.candidate, names.map(name => [name, name]), names.find(name => name in data.references) ?? names[0]);
  fill(controls.measure, data.charts.measures.map((measure, place) => [place, measure.name]),
    Math.max(0, data.charts.measures.findIndex(measure => measure.higher)));
  form.onsubmit = event => event.preventDefault();
  form.oninput = () => listItems(controls.level.value);
  document.addEventListener("click", event => {
    const link = event.target.closest?.("a.number");
    if (!link) return;
    event.preventDefault();
    const candidate = link.closest("tr").dataset.candidate, measure = +link.dataset.measure;
    const right = data.charts.measures[measure].higher;
    showItems({ candidate, measure, level: link.dataset.level, change: candidate in data.references && right ? "flipped" : "all" });
  });
  new IntersectionObserver((seen, observer) => {
    if (!seen.some(entry => entry.isIntersecting)) return;
    observer.disconnect();
    if (!items.ready) listItems("all");
  }, { rootMargin: "400px" }).observe(byId("items"));
}
