"use strict";
document.documentElement.classList.add("js");
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

/* Make an element; texts never become HTML. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (chosen !== undefined) select.value = chosen;
}

/* Make many targets one tab stop; arrow keys, Home and End move among them. `rowsOf` returns them as rows.
   Returns what must be called after targets came, went or were hidden. */
function rove(root, rowsOf) {
  const rows = () => rowsOf().map(row => row.filter(target => target.getClientRects().length)).filter(row => row.length);
  const stopAt = chosen => { for (const target of rowsOf().flat()) target.setAttribute("tabindex", target === chosen ? 0 : -1); };
  const renew = () => {
    const targets = rows().flat();
    stopAt(targets.find(target => target.getAttribute("tabindex") === "0") ?? targets[0]);
  };
  const cellOf = target => target.closest("td, th")?.cellIndex;
  const moves = {
    ArrowRight: (row, at) => row[at + 1], ArrowLeft: (row, at) => row[at - 1], Home: row => row[0], End: row => row.at(-1),
    ArrowDown: (row, at, below) => below === null ? row[at + 1] : beside(row[at], at, below),
    ArrowUp: (row, at, below, above) => above === null ? row[at - 1] : beside(row[at], at, above),
  };
  const beside = (target, at, row = []) =>
    row.find(other => cellOf(other) !== undefined && cellOf(other) === cellOf(target)) ?? row[Math.min(at, row.length - 1)];
  root.addEventListener("focusin", ({ target }) => { if (rowsOf().flat().includes(target)) stopAt(target); });
  root.addEventListener("keydown", event => {
    const table = rows(), place = table.findIndex(row => row.includes(event.target));
    if (place < 0 || !(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const row = table[place];
    const alone = table.length === 1;  // then up and down go along it too
    moves[event.key](row, row.indexOf(event.target), alone ? null : table[place + 1], alone ? null : table[place - 1])?.focus();
  });
  renew();
  return renew;
}

/* Unpack gzip in base64, the content of an element of the page. */
async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const libraries = unpack("packed-libraries").then(text => {
  document.head.append(Object.assign(document.createElement("script"), { textContent: text }));
});
const short = candidate => candidate.split("/").pop();
