/* The scatter and the curves, drawn by Vega-Lite as SVG with texts. Colours are Okabe and Ito's. */
{
  const { measures, axes, families, points, fronts, sweeps, reference, blocks, recovery } = data.charts;
  const colours = { dense: "currentColor", pruned: "#0072B2", quantized: "#D55E00", "pruned and quantized": "#CC79A7", recovered: "#009E73" };
  const shapes = { dense: "diamond", pruned: "circle", quantized: "square", "pruned and quantized": "cross", recovered: "triangle-up" };
  const narrow = () => innerWidth < 700;
  const config = {
    background: "transparent", font: "system-ui, DejaVu Sans, sans-serif",
    axis: { labelColor: "currentColor", titleColor: "currentColor", gridColor: "#88888840", domainColor: "#888", tickColor: "#888", labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12 }, view: { stroke: "#88888860" },
  };
  /* A chart keeps its width while its place has none, as in a hidden frame: Vega cannot place labels on no width. */
  function keepWidth(vega) {
    const width = vega.signals.find(signal => signal.name === "width");
    Object.assign(width, { init: "containerSize()[0] || 200", on: [{ events: "window:resize", update: "containerSize()[0] || width" }] });
    return vega;
  }

  /* Draw a chart in place of the one before, which would go on drawing whenever the window changes. */
  const drawn = new Map();
  function draw(place, spec, patch = vega => vega) {
    const before = drawn.get(place.id);
    const now = (async () => {
      (await before?.catch(() => null))?.finalize();
      return vegaEmbed(place, spec, { renderer: "svg", actions: false, patch: vega => keepWidth(patch(vega)) });
    })();
    drawn.set(place.id, now);
    return now;
  }
  const percent = (value, ratio) => value === null ? "–" : ratio ? `×${value.toPrecision(4)}` : `${(100 * value).toFixed(1)} %`;
  const title = measure => `${measure.name}, ${measure.ratio ? "times" : "share of"} ${reference}'s`;

  function rowsOf(place, axis) {
    const measure = measures[place];
    return points.flatMap((point, index) => {
      const score = point.scores[place];
      if (!score || score[0] === null || score[0] === undefined || (axis && point[axis] === null)) return [];
      const [share, low, high, value, verdict] = score;
      const of = [percent(share, measure.ratio), low === null ? "" : `${percent(low, measure.ratio)} to ${percent(high, measure.ratio)}`];
      const about = [`${of[0]} of ${reference}`, of[1] && `95 %: ${of[1]}`, verdict, axis && `${axes[axis]}: ${point[axis].toPrecision(4)}`];
      return [{ told: `${point.candidate}: ${about.filter(Boolean).join("; ")}`, index, candidate: point.candidate, name: point.short, family: point.family, size: axis && point[axis], share, low: low ?? share, high: high ?? share,
        text: of[0], interval: of[1], value, verdict }];
    });
  }

  /* From the lowest interval to the highest, and the base's own 1. */
  function domainOf(rows, log) {
    const ends = [1, ...rows.flatMap(row => [row.low, row.high])].filter(value => Number.isFinite(value) && (!log || value > 0));
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    return log ? [low / 1.12, high * 1.12] : [low - .05 * (high - low || 1), high + .05 * (high - low || 1)];
  }
  const scaleOf = (domain, log) => log ? { type: "log", domain, nice: false, clamp: true } : { type: "linear", domain, zero: false, nice: false };

  function drawScatter() {
    const { measure: chosen, axis: against, logx, logy } = byId("scatter-controls").elements;
    const place = +chosen.value, measure = measures[place], axis = against.value;
    const rows = rowsOf(place, axis);
    const positive = rows.every(row => row.low > 0);
    const floor = Math.min(...rows.filter(row => row.low > 0).map(row => row.low));
    const log = logy.checked && rows.every(row => row.share > 0);
    if (log && !positive) for (const row of rows) row.low = Math.max(row.low, Math.min(floor, row.share / 4));
    const domain = domainOf(rows, log);
    const edges = fronts[axis][place].map(front => rows.filter(row => front.includes(row.index)).sort((a, b) => a.size - b.size));
    const tooltip = [["candidate", "candidate"], ["text", `of ${reference}`], ["interval", "95 %"], ["value", "score"], ["verdict", "verdict"], ["size", axes[axis]]]
      .map(([field, name]) => ({ field, title: name, type: "nominal", ...(field === "value" || field === "size" ? { type: "quantitative", format: ".4~g" } : {}) }));
    const y = field => ({ field, type: "quantitative", title: title(measure), scale: scaleOf(domain, log), axis: { format: measure.ratio ? ".3~g" : ".0%" } });
    const x = { field: "size", type: "quantitative", title: axes[axis], scale: { type: logx.checked ? "log" : "linear", nice: true, padding: 12, ...(logx.checked ? {} : { zero: false }) }, axis: { tickCount: narrow() ? 5 : 10 } };
    const color = { field: "family", type: "nominal", title: null, scale: { domain: families, range: families.map(f => colours[f]) }, legend: { orient: "top", columns: narrow() ? 2 : 5 } };
    const spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v5.json", width: "container", height: narrow() ? 380 : 440, config,
      description: `${title(measure)} against ${axes[axis]}`,
      layer: [
        { data: { values: [{}] }, mark: { type: "rule", aria: false, strokeDash: [2, 3], color: "#888" }, encoding: { y: { datum: 1, type: "quantitative" } } },
        ...edges.map(front => ({ data: { values: front }, mark: { type: "line", aria: false, interpolate: "step-after", strokeDash: [6, 4], color: "#888" }, encoding: { x, y: y("share") } })),
        { data: { values: rows }, mark: { type: "rule", aria: false, strokeWidth: 1.5, opacity: .7 }, encoding: { x, y: y("low"), y2: { field: "high" }, color } },
        { data: { values: rows }, name: "dots", mark: { type: "point", filled: true, size: 90, opacity: 1, cursor: "pointer" }, encoding: { x, y: y("share"), tooltip,
          color,
          shape: { field: "family", type: "nominal", title: null, scale: { domain: families, range: families.map(f => shapes[f]) } },
          description: { field: "told" } } },
      ],
    };
    /* Vega places the names where they cover nothing, and leaves out those for which there is no room. */
    const label = vega => {
      vega.marks.find(mark => mark.name === "dots_marks").encode.update.ariaRole = { value: "button" };
      vega.marks.push({
        type: "text", name: "names", from: { data: "dots_marks" }, interactive: false, aria: false,
        encode: { enter: { text: { field: "datum.name" }, fill: { value: "currentColor" }, fontSize: { value: narrow() ? 10 : 12 } } },
        transform: [{ type: "label", size: { signal: "[width, height]" }, anchor: ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left", "bottom-left"],
          offset: [6, 6, 6, 6, 5, 5, 5, 5], avoidMarks: spec.layer.slice(0, -1).map((_, at) => `layer_${at}_marks`), padding: 0 }],
      });
      return vega;
    };
    const all = rowsOf(place, null).length;
    byId("scatter-point").textContent = rows.length < all ? `${all - rows.length} of ${all} models have no point, as their ${axes[axis]} is unknown.` : "";
    return draw(byId("scatter-plot"), spec, label).then(({ view }) => {
      view.addEventListener("click", (event, item) => openPoint(item));
      renewPoints();
    });
  }

  /* The points are one tab stop, from the smallest model to the largest; Enter opens a point's items, as a click does. */
  const plot = byId("scatter-plot"), itemOf = path => path.__data__;
  const renewPoints = rove(plot, () => [[...plot.querySelectorAll(".dots_marks path")].sort((a, b) => itemOf(a).x - itemOf(b).x || itemOf(b).y - itemOf(a).y)]);
  const openPoint = item => { if (item?.datum?.candidate) showItems({ candidate: item.datum.candidate, measure: +byId("scatter-controls").elements.measure.value }); };
  plot.addEventListener("focusin", ({ target }) => { byId("scatter-point").textContent = target.getAttribute("aria-label"); });
  plot.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    openPoint(itemOf(event.target));
  });

  function drawDose() {
    const place = +byId("dose-controls").elements.measure.value, measure = measures[place];
    const known = new Map(rowsOf(place, null).map(row => [row.candidate, row]));
    const rows = sweeps.flatMap(({ name, dose, points: steps }) => steps.filter(([, candidate]) => known.has(candidate))
      .map(([value, candidate]) => ({ ...known.get(candidate), series: name, kind: dose, dose: value })));
    const kinds = [...new Set(rows.map(row => row.kind))];
    const log = measure.ratio;
    const charts = kinds.map(kind => {
      const chosen = rows.filter(row => row.kind === kind);
      const x = { field: "dose", type: "quantitative", title: kind, scale: { zero: false, padding: 20, reverse: kind === "bits" }, axis: { values: [...new Set(chosen.map(row => row.dose))] } };
      const y = field => ({ field, type: "quantitative", title: title(measure), scale: scaleOf(domainOf(rows, log), log), axis: { format: log ? ".3~g" : ".0%" } });
      const color = { field: "series", type: "nominal", title: null, scale: { range: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"] }, legend: { orient: "top", columns: narrow() ? 1 : 3, labelLimit: 300 } };
      return { $schema: "https://vega.github.io/schema/vega-lite/v5.json", width: "container", height: 300, config, data: { values: chosen }, description: `${title(measure)} by ${kind}`,
        layer: [
          { mark: { type: "rule", strokeWidth: 1.5 }, encoding: { x, y: y("low"), y2: { field: "high" }, color } },
          { mark: { type: "line", point: { size: 70 } }, encoding: { x, y: y("share"), color, tooltip: [{ field: "candidate" }, { field: "text", title: `of ${reference}` }, { field: "interval", title: "95 %" }, { field: "verdict" }] } },
        ] };
    });
    const folder = byId("dose-plot");
    folder.replaceChildren(...charts.map((_, at) => make("div", { class: "plot", id: `dose-plot-${at}` })));
    return Promise.all(charts.map((chart, at) => draw(folder.children[at], chart)));
  }

  /* One line a name, broken where a value is missing; a click in the legend brings it out. */
  function drawLines(id, rows, x, y, tooltip) {
    const names = new Set(rows.map(row => row.name));
    return draw(byId(id), {
      $schema: "https://vega.github.io/schema/vega-lite/v5.json", width: "container", height: 300, config, data: { values: rows }, description: `${y.title} by ${x.title}`,
      params: [{ name: "chosen", select: { type: "point", fields: ["name"] }, bind: "legend" }],
      mark: { type: "line", point: { size: 30 } },
      encoding: {
        x: { type: "quantitative", ...x }, y: { type: "quantitative", ...y }, tooltip,
        color: { field: "name", type: "nominal", sort: null, title: null, scale: { scheme: names.size > 10 ? "tableau20" : "tableau10" }, legend: { orient: "top", columns: narrow() ? 2 : 5, labelLimit: 220 } },
        opacity: { condition: { param: "chosen", value: 1 }, value: .12 },
      },
    });
  }

  const kinds = { error: "error of the block's output", sparsity: "share of zeros" };
  function drawBlocks() {
    const column = byId("block-controls").elements.column.value;
    const drawn = new Set(blocks.filter(row => row[column] !== null).map(row => row.name));
    const rows = blocks.filter(row => drawn.has(row.name)), last = Math.max(...rows.map(row => row.block));
    const step = Math.ceil((last + 1) / (narrow() ? 8 : 20)), numbers = Array.from({ length: Math.floor(last / step) + 1 }, (_, at) => at * step);
    const x = { field: "block", title: "block", axis: { values: numbers, format: "d" }, scale: { domain: [0, last], nice: false } };
    const y = { field: column, title: kinds[column], axis: { format: column === "error" ? ".3~g" : ".0%" }, scale: { zero: true } };
    return drawLines("block-plot", rows, x, y,
      [{ field: "artifact", title: "candidate" }, { field: "block" }, { field: column, title: kinds[column], format: column === "error" ? ".3~g" : ".1%" }]);
  }
  const drawRecovery = () => drawLines("recovery-plot", recovery,
    { field: "tokens", title: "tokens trained on", axis: { format: "~s" }, scale: { nice: false } }, { field: "loss", title: "held-out loss, nats", axis: { format: ".3~f" }, scale: { zero: false } },
    [{ field: "artifact" }, { field: "tokens", format: ",d" }, { field: "loss", format: ".4f" }]);

  const offered = measures.map((measure, place) => [place, measure.name]);
  const scatter = byId("scatter-controls"), dose = byId("dose-controls");
  fill(scatter.elements.measure, offered, 0);
  fill(scatter.elements.axis, Object.entries(axes));
  scatter.onchange = drawScatter;
  scatter.onsubmit = event => event.preventDefault();
  if (dose) {
    fill(dose.elements.measure, offered, 0);
    dose.onchange = drawDose;
    dose.onsubmit = event => event.preventDefault();
  }
  const block = byId("block-controls");
  if (block) {
    fill(block.elements.column, Object.entries(kinds).filter(([column]) => blocks.some(row => row[column] !== null)));
    block.onchange = drawBlocks;
    block.onsubmit = event => event.preventDefault();
  }
  libraries.then(() => Promise.all([measures.length && drawScatter(), dose && drawDose(), block && drawBlocks(), recovery.length && drawRecovery()]))
    .then(() => document.documentElement.dataset.drawn = "yes");
}
