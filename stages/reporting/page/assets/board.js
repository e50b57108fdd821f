/* Sort every table whose headings can be clicked: by data-v, else by the text, in columns of numbers by its first number. */
for (const table of document.querySelectorAll("table.sort")) {
  for (const [place, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      closeRows(table);
      const cells = row => row.cells[place];
      const [first] = table.tBodies[0].rows, named = head.classList.contains("text") && first && !("v" in cells(first).dataset);
      const value = row => {
        const number = parseFloat(cells(row).dataset.v ?? cells(row).textContent.replaceAll(",", "").replaceAll("\u2212", "-"));
        return isNaN(number) ? Infinity : down ? -number : number;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => {
        if (named) return (down ? -1 : 1) * cells(a).textContent.localeCompare(cells(b).textContent, "en", { numeric: true });
        const [left, right] = [value(a), value(b)];
        return left === right ? 0 : left - right;
      }));
    };
  }
}

function closeRows(table) {
  for (const row of table.querySelectorAll(".open-row")) {
    const recipe = byId(row.dataset.of);
    recipe.append(row.querySelector(".inside"));
    document.querySelector(`a.open[href="#${row.dataset.of}"]`).setAttribute("aria-expanded", "false");
    row.remove();
  }
}

{
  const table = byId("board");
  const rows = [...table.tBodies[0].rows];
  const toggle = (link, open) => {
    const id = link.hash.slice(1), row = link.closest("tr");
    const there = row.nextElementSibling?.classList.contains("open-row");
    closeRows(table);
    if (there && !open) return;
    const cell = make("td", { colspan: row.cells.length }, byId(id).querySelector(".inside"));
    const opened = make("tr", { class: "open-row", "data-of": id }, cell);
    row.after(opened);
    link.setAttribute("aria-expanded", "true");
  };
  for (const link of table.querySelectorAll("a.open")) {
    link.setAttribute("aria-expanded", "false");
    link.onclick = event => { event.preventDefault(); toggle(link); };
  }
  /* Other links to a candidate, such as the answer's, open its row. */
  document.addEventListener("click", event => {
    const link = event.target.closest?.("a[href^='#c']");
    if (!link || link.classList.contains("open") || !/^#c\d+$/.test(link.hash)) return;
    event.preventDefault();
    const name = table.querySelector(`a.open[href="${link.hash}"]`);
    byId("filter").value = "";
    filter();
    toggle(name, true);
    name.closest("tr").scrollIntoView({ block: "center" });
    name.focus({ preventScroll: true });
  });

  table.setAttribute("role", "grid");
  for (const cell of table.querySelectorAll("[role=cell]")) cell.setAttribute("role", "gridcell");
  const renew = rove(table, () => [[...table.tHead.querySelectorAll("button")],
    ...[...table.tBodies[0].rows].filter(row => row.dataset.candidate).map(row => [...row.querySelectorAll("a")])]);

  const shown = byId("shown");
  function filter() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    closeRows(table);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      count += !row.hidden;
    }
    renew();
    shown.textContent = count === rows.length ? "" : `${count} of ${rows.length}`;
  }
  byId("filter").oninput = filter;

  const textOf = head => [...head.querySelector("button").childNodes].map(node => node.textContent).join(" ");
  const list = byId("columns").querySelector("div");
  for (const head of table.tHead.rows[0].cells) {
    const key = head.dataset.key;
    if (!key) continue;
    const box = make("input", { type: "checkbox" });
    const apply = () => {
      for (const cell of table.querySelectorAll(`[data-key="${key}"]`)) cell.hidden = !box.checked;
      renew();
    };
    box.checked = !("off" in head.dataset);
    box.onchange = apply;
    apply();
    list.append(make("label", {}, box, " " + textOf(head)));
  }
  /* A phone shows cards without headings. */
  const heads = [...table.tHead.rows[0].cells];
  fill(byId("sort"), heads.map((head, place) => [place, textOf(head)]));
  byId("sort").onchange = () => heads[byId("sort").value].querySelector("button").click();
  document.addEventListener("keydown", event => { if (event.key === "Escape") byId("columns").open = false; });
}

for (const table of document.querySelectorAll("table.heat")) {
  table.setAttribute("role", "grid");
  rove(table, () => [...table.tBodies[0].rows].map(row => [...row.querySelectorAll("a")]));
}
