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
