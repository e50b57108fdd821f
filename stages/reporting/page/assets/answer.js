{
  const controls = byId("answer-controls");
  if (controls) {
    const { texts, answers, budgets } = data.answer;
    const { margin, kind, budget } = controls.elements;
    const megabytes = bytes => (bytes / 1e6).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
    const offer = () => fill(budget, [
      [budgets[kind.value].length, "any"],
      ...budgets[kind.value].map((bytes, place) => [place, `at most ${megabytes(bytes)} MB`]),
    ], budgets[kind.value].length);
    const show = () => {
      for (const part of document.querySelectorAll(".answer")) {
        const place = answers[part.dataset.reference][kind.value][margin.value][budget.value];
        part.querySelector("dl").replaceChildren(...texts[place].map(([head, candidate, text]) => make("div", {},
          make("dt", {}, head),
          candidate
            ? make("dd", {}, make("a", { href: "#" + data.anchors[candidate] }, short(candidate)), ": " + text)
            : make("dd", {}, text))));
      }
    };
    offer();
    show();
    kind.onchange = () => { offer(); show(); };
    margin.onchange = budget.onchange = show;
    controls.onsubmit = event => event.preventDefault();
  }
}
