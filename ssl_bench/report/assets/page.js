"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const CLOCKS = {step: "step", samples: "samples seen", epochs: "epoch", seconds: "training time (s)"};
const STROKES = {"": "solid", "2 3": "dotted", "7 3 2 3": "double"};
const FILTERED = ["problem", "data set", "batch size", "optimizer"];

/** A new element: attributes by name, "on..." handlers as functions, children as nodes or text. */
function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Text in which a number between ** is bold; other stars of a record's text stay as they are. */
function rich(text) {
  return text.replaceAll(" = ", "\u00a0=\u00a0").split(/\*\*(\d+\.\d+)\*\*/).map((part, index) => (index % 2 ? make("strong", {}, part) : part));
}

/** The colour and dashes of an optimizer or arm: the same in every chart. */
const look = (name) => (Object.hasOwn(data.looks, name) ? data.looks[name] : {color: 6, dash: ""});

// Theme ---------------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;

function applyTheme() {
  document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
}
dark.addEventListener("change", applyTheme);
document.getElementById("theme").addEventListener("click", () => {
  chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
});
applyTheme();

// Tables --------------------------------------------------------------------------------------------------------------

/** The sort key of a printed cell: its leading number, or its text; text sorts after numbers. */
function sortKey(text) {
  const found = text.replace(/\*\*/g, "").match(/^[+−-]?\d[\d,]*\.?\d*(e[+-]?\d+)?/i);
  return found ? [0, parseFloat(found[0].replace("−", "-").replace(/,/g, "")), text] : [text && text !== "–" ? 1 : 2, 0, text];
}

function compare(left, right) {
  return left[0] - right[0] || left[1] - right[1] || left[2].localeCompare(right[2]);
}

/** A table's elements; the explicit roles are needed because the phone layout turns rows into cards. */
function frame(label, heads, body) {
  const head = make("thead", {role: "rowgroup"}, make("tr", {role: "row"}, ...heads));
  const table = make("table", {role: "table", "aria-label": label, class: heads.length > 11 ? "dense" : null}, head, body);
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": label}, table);
}

/** A table to sort and filter; rows about one cell get a button that opens its runs. */
function renderTable(table) {
  const opens = table.keys.some(Boolean);
  const rows = table.rows.map((texts, index) => ({texts, key: table.keys[index], node: renderRow(table, texts, table.keys[index], opens)}));
  const body = make("tbody", {role: "rowgroup"}, ...rows.map((row) => row.node));
  const count = make("output", {class: "quiet", "aria-live": "polite"});
  const search = make("input", {type: "search", placeholder: "Filter rows: all words must match", "aria-label": `Filter the table ${table.title}`});
  const selects = table.columns.flatMap((name, column) => {
    const values = [...new Set(table.rows.map((row) => row[column]))];
    if (!FILTERED.includes(name) || values.length < 2) return [];
    values.sort((a, b) => compare(sortKey(a), sortKey(b)));
    const options = values.map((value) => make("option", {value}, value || "(none)"));
    const select = make("select", {"aria-label": `${name} in ${table.title}`}, make("option", {value: "\u0000"}, `${name}: all`), ...options);
    return [{column, select}];
  });
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.texts.join(" ").toLowerCase();
      const fits = words.every((word) => text.includes(word)) &&
        selects.every(({column, select}) => select.value === "\u0000" || row.texts[column] === select.value);
      row.node.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  search.addEventListener("input", filter);
  for (const {select} of selects) select.addEventListener("change", filter);
  filter();
  const heads = table.columns.map((name, column) => {
    const attributes = {scope: "col", role: "columnheader", class: table.numeric[column] ? "num" : null, "aria-sort": "none"};
    return make("th", attributes, make("button", {type: "button", onclick: () => sortBy(column)}, name));
  });
  function sortBy(column) {
    const rising = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head, index) => head.setAttribute("aria-sort", index !== column ? "none" : rising ? "ascending" : "descending"));
    const order = rows.map((row) => [sortKey(row.texts[column]), row]);
    order.sort(([a], [b]) => (a[0] !== b[0] ? a[0] - b[0] : rising ? compare(a, b) : compare(b, a)));  // text stays last
    body.append(...order.map(([, row]) => row.node));
  }
  const runs = opens ? [make("th", {scope: "col", role: "columnheader"}, "runs")] : [];
  return [
    make("div", {class: "controls"}, search, ...selects.map(({select}) => select), count),
    frame(table.title, [...runs, ...heads], body),
    table.notes.length ? make("details", {class: "notes", open: table.notes.length === 1 && table.notes[0].length < 120 ? "" : null}, make("summary", {}, "How to read this table"), ...table.notes.map((note) => make("p", {}, note))) : null,
  ];
}

function renderRow(table, texts, key, opens) {
  const cells = texts.map((text, column) => {
    const state = /^(\d+ )?(diverged|collapsed|at chance)|^✗$|^behind$/.test(text) ? "bad" : /^(✓|ahead)$/.test(text) ? "good" : "";
    const kind = [table.numeric[column] ? "num" : "", text.length > 18 ? "long" : text.length < 15 ? "short" : "", state];
    const name = {role: "cell", "data-label": table.columns[column]};
    return make("td", {...name, class: kind.filter(Boolean).join(" ") || null}, ...(text ? rich(text) : []));
  });
  if (!opens) return make("tr", {role: "row"}, ...cells);
  const label = key ? `Open the runs of ${data.cells[key].title}` : null;
  const button = key ? make("button", {type: "button", class: "open", "aria-label": label, onclick: () => openCell(key)}, "open") : null;
  return make("tr", {role: "row"}, make("td", {role: "cell"}, ...(button ? [button] : [])), ...cells);
}

// Charts --------------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9 * step; value += step) found.push(Math.abs(value) < 1e-12 * step ? 0 : value);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += Math.max(1, Math.ceil((high - low) / 5))) found.push(power);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4 || (size && size < 1e-3)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(+value.toPrecision(4));
}

/**
 * A line chart as a figure.
 * series: [{name, color (0-6), dash?, x, y, low?, high?, lost?}], arrays of equal length with null for gaps; low and high
 * draw a band, or with "bars" an error bar at each point; lost marks a point with a cross.
 * logs: both axes are logarithmic, with a tick at each x; logX: only the horizontal one.
 */
function chart(title, xLabel, series, {range = null, logs = false, logX = logs, bars = false} = {}) {
  const [width, height, left, right, top, bottom] = [420, 230, 52, logX ? 24 : 10, 10, 36];
  const all = series.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]).filter((y) => y !== null);
  const xs = series.flatMap((line) => line.x).filter((x) => x !== null);
  const caption = make("figcaption", {}, title);
  if (!all.length) return make("figure", {}, caption, make("p", {class: "quiet"}, "not recorded"));
  const positive = all.filter((y) => y > 0);
  const log = logs || (!range && !bars && positive.length === all.length && Math.max(...all) / Math.min(...all) > 50);
  const scale = log ? Math.log10 : (value) => value;
  let [y0, y1] = range ?? [Math.min(...all.map(scale)), Math.max(...all.map(scale))];
  if (!range) { const pad = (y1 - y0) * 0.05 || Math.abs(y1) * 0.1 || 1; [y0, y1] = [y0 - pad, y1 + pad]; }
  const xScale = logX ? Math.log10 : (value) => value;
  let [x0, x1] = [Math.min(...xs.map(xScale)), Math.max(...xs.map(xScale))];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  const px = (x) => left + ((xScale(x) - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (y) => height - bottom - ((scale(y) - y0) / (y1 - y0)) * (height - top - bottom);
  const ends = series.map((line) => `${line.name}: ${short(line.y.findLast((y) => y !== null) ?? NaN)} at the end`);
  const svg = make("svg:svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} against ${xLabel}. ${ends.join("; ")}`});
  for (const tick of log ? logTicks(y0, y1).map((power) => 10 ** power) : ticks(y0, y1, 5)) {
    svg.append(make("svg:line", {class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick)}));
    svg.append(make("svg:text", {x: left - 6, y: py(tick) + 4, "text-anchor": "end"}, short(tick)));
  }
  for (const tick of logX ? new Set(xs) : ticks(x0, x1, 5)) {
    svg.append(make("svg:text", {x: px(tick), y: height - bottom + 15, "text-anchor": "middle"}, logX ? String(tick) : short(tick)));
  }
  svg.append(make("svg:text", {x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle"}, xLabel));
  for (const [place, line] of series.entries()) {
    const points = line.x.map((x, index) => index).filter((index) => line.x[index] !== null && line.y[index] !== null);
    const at = (ys, shift = 0) => points.map((index) => `${(px(line.x[index]) + shift).toFixed(1)},${py(ys[index]).toFixed(1)}`);
    const color = `var(--s${line.color % 7})`;
    const aside = bars ? 5 * (place - (series.length - 1) / 2) : 0;  // so that no bar hides another
    for (const index of bars ? points : []) {
      const [x, y, high, low] = [px(line.x[index]) + aside, py(line.y[index]), py(line.high[index]), py(line.low[index])];
      svg.append(make("svg:path", {d: `M${x - 3} ${high}h6m-3 0V${low}m-3 0h6`, stroke: color, fill: "none", "stroke-width": 1.3}));
      if (line.lost[index]) svg.append(make("svg:path", {class: "lost", d: `M${x - 5} ${y - 5}l10 10m0 -10l-10 10`}, make("svg:title", {}, "a run diverged, collapsed or stayed at chance")));
    }
    if (line.low && !bars) svg.append(make("svg:polygon", {points: [...at(line.low), ...at(line.high).reverse()].join(" "), fill: color, opacity: 0.15}));
    for (const index of points.length <= 8 ? points : []) svg.append(make("svg:circle", {cx: px(line.x[index]) + aside, cy: py(line.y[index]), r: bars ? 3.2 : 2.5, fill: color}));
    svg.append(make("svg:polyline", {points: at(line.y, aside).join(" "), fill: "none", stroke: color, "stroke-width": 1.6, "stroke-linejoin": "round", "stroke-dasharray": line.dash || null}));
  }
  const readout = make("output");
  caption.append(readout);
  const cursor = make("svg:line", {class: "cursor", y1: top, y2: height - bottom, visibility: "hidden"});
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * (x1 - x0);
    const first = series[0];
    const nearest = first.x.reduce((best, value, index) => (Math.abs(xScale(value) - x) < Math.abs(xScale(first.x[best]) - x) ? index : best), 0);
    cursor.setAttribute("x1", px(first.x[nearest]));
    cursor.setAttribute("x2", px(first.x[nearest]));
    cursor.setAttribute("visibility", "visible");
    readout.textContent = `${short(first.x[nearest])}: ${series.map((line) => short(line.y[nearest] ?? NaN)).join(" | ")}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  return make("figure", {}, caption, svg);
}

/** Names with their lines; an empty name is an unused colour. Without looks the colours are in order. */
function legend(names, looks = names.map((_, index) => ({color: index, dash: ""}))) {
  return make("ul", {class: "legend"}, ...names.flatMap((name, index) => (name ? [make("li", {},
    make("i", {style: `border-top: 3px ${STROKES[looks[index].dash] ?? "dashed"} var(--s${looks[index].color % 7})`}), name)] : [])));
}

/** The claims' charts: a title, a legend and a row of charts for each group. */
function chartGroups(groups) {
  return groups.flatMap(({title, names, charts}) => {
    const looks = names.map((name, color) => (Object.hasOwn(data.looks, name) ? look(name) : {color, dash: ""}));
    const lines = (series) => series.map((line) => ({...line, ...(looks[line.color] ?? {})}));
    return [make("h4", {}, title), legend(names, looks),
      make("div", {class: "charts small"}, ...charts.map((one) => chart(one.title, one.x, lines(one.series), {logs: one.log})))];
  });
}

// A cell's runs -------------------------------------------------------------------------------------------------------

/** A run's curve on a clock: only steps and seconds are stored; the other clocks follow from the steps. */
function onClock(run, curve, clock) {
  if (clock === "seconds") return curve.seconds;
  const factor = clock === "samples" ? run.images_per_step : clock === "epochs" ? 1 / run.steps_per_epoch : 1;
  return curve.step.map((step) => step * factor);
}

/** The lines of two cells: each in its optimizer's colour, the second one dashed. */
function pairLooks(cell, other) {
  return [{color: look(cell.arm).color, dash: ""}, {color: look(other.arm).color, dash: "5 3"}];
}

/** The curves of a cell's runs, a colour a seed; with another cell beside it the colours of both optimizers. */
function cellCharts(cell, clock, other) {
  const [own, beside] = other ? pairLooks(cell, other) : [];
  const both = [...cell.runs.map((run, index) => ({run, color: index, dash: "", name: `seed ${run.seed}`, ...own})),
    ...(other?.runs ?? []).map((run) => ({run, name: `beside: seed ${run.seed}`, ...beside}))];
  const lines = (kind, name) => both.flatMap(({run, ...line}) => {
    const curve = run[kind][name];
    return curve ? [{...curve, ...line, x: onClock(run, curve, clock)}] : [];
  });
  const names = (kind) => [...new Set(both.flatMap(({run}) => Object.keys(run[kind])))];
  const charts = names("metrics").map((name) => chart(data.labels[name] ?? name, CLOCKS[clock], lines("metrics", name)));
  const layers = names("layers").map((name) => chart(data.labels[name] ?? name, CLOCKS[clock], lines("layers", name)));
  return [
    make("div", {class: "charts"}, ...charts),
    layers.length ? make("h3", {}, "Layers: the median, and the band from the smallest to the largest") : null,
    make("div", {class: "charts"}, ...layers),
  ].filter((node) => node !== null);
}

/** A small table without sorting or filters. */
function plainTable(label, {columns, rows}) {
  const single = {columns, numeric: columns.map(() => false)};
  const heads = columns.map((name) => make("th", {scope: "col", role: "columnheader"}, name));
  return frame(label, heads, make("tbody", {role: "rowgroup"}, ...rows.map((row) => renderRow(single, row, "", false))));
}

/** What ssl-bench analyze measured of a run: its tables, and how it was measured. */
function analysisOf(run) {
  if (!run.analysis) return [];
  return [make("details", {}, make("summary", {}, `Sharpness and gradient noise of seed ${run.seed}`),
    ...run.analysis.tables.flatMap((table) => [make("h4", {}, table.title), plainTable(`${table.title} of seed ${run.seed}`, table)]),
    make("h4", {}, "How it was measured"), make("pre", {tabindex: "0"}, JSON.stringify(run.analysis.settings, null, 2)))];
}

/** What a run's record says of itself; runs share what is alike. */
function provenance(run) {
  return Object.fromEntries(Object.entries(run.provenance).map(([name, index]) => [name, data.shared[index]]));
}

function openCell(key) {
  const cell = data.cells[key];
  const dialog = document.getElementById("cell");
  const charts = make("div", {"aria-live": "polite"});
  const names = make("div", {});
  function draw() {
    const other = data.cells[beside.value];
    names.replaceChildren(other ? legend([cell.title, other.title], pairLooks(cell, other)) : legend(cell.runs.map((run) => `seed ${run.seed}`)));
    charts.replaceChildren(...cellCharts(cell, clock.value, other));
  }
  const clock = make("select", {id: "clock", onchange: draw}, ...Object.entries(CLOCKS).map(([value, label]) => make("option", {value}, label)));
  const beside = make("select", {id: "beside", onchange: draw}, make("option", {value: ""}, "nothing"),
    ...Object.entries(data.cells).filter(([name]) => name !== key).map(([value, {title}]) => make("option", {value}, title)));
  document.getElementById("cell-title").textContent = cell.title;
  document.getElementById("cell-body").replaceChildren(
    plainTable("Runs", cell.runs_table),
    make("h3", {}, "Curves"),
    make("div", {class: "controls"}, make("label", {for: "clock"}, "against"), clock, make("label", {for: "beside"}, "beside"), beside),
    names,
    charts,
    ...cell.runs.flatMap(analysisOf),
    make("details", {open: ""}, make("summary", {}, "Recipe"), make("pre", {tabindex: "0"}, JSON.stringify(cell.recipe, null, 2))),
    ...cell.runs.map((run) => make("details", {}, make("summary", {}, `Provenance of seed ${run.seed}`), make("pre", {tabindex: "0"}, JSON.stringify(provenance(run), null, 2)))),
  );
  draw();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  history.replaceState(null, "", `#cell-${key}`);
}

document.getElementById("cell").addEventListener("close", () => history.replaceState(null, "", location.pathname));

// The page ------------------------------------------------------------------------------------------------------------

function section(id, short, title, ...children) {
  document.getElementById("toc").append(make("li", {}, make("a", {href: `#${id}`}, short)));
  document.getElementById("main").append(make("section", {id, "aria-labelledby": `${id}-title`}, make("h2", {id: `${id}-title`}, title), ...children));
}

const EXTRA = {
  sensitivity: () => effortCharts(),
  profiles: () => {
    const lines = Object.entries(data.profiles.shares).map(([name, y]) => ({name, ...look(name), x: data.profiles.gaps, y: y.map((share) => 100 * share)}));
    if (!lines.length) return [];
    return [legend(lines.map((line) => line.name), lines), make("div", {class: "charts"}, chart("share of settings (%)", "points behind the best", lines, {range: [0, 102]}))];
  },
};

/** The expected best of k learning rates, one chart for each setting with more than one rate. */
function effortCharts() {
  const names = [...new Set(data.effort.flatMap((setting) => Object.keys(setting.curves)))];
  const charts = data.effort.map(({title, curves}) => chart(title, "k learning rates tried: expected best top-1 (%)",
    Object.entries(curves).map(([name, y]) => ({name, ...look(name), y, x: y.map((_, index) => index + 1)}))));
  return charts.length ? [make("details", {}, make("summary", {}, "Best of k, as curves"), legend(names, names.map(look)), make("div", {class: "charts"}, ...charts))] : [];
}

/** The first picture: each optimizer's best accuracy against the batch size. */
function overview() {
  const names = [...new Set(data.overview.flatMap(({series}) => series.map((line) => line.name)))];
  const charts = data.overview.map(({title, series}) => chart(title, "best top-1 (%) against the batch size", series.map((line) => ({...line, ...look(line.name)})), {logX: true, bars: true}));
  return [legend(names, names.map(look)), make("div", {class: "charts"}, ...charts),
    make("p", {class: "quiet"}, "Each optimizer at the best of its variants and learning rates; bars: 95% intervals over seeds; ×: a run diverged, collapsed or stayed at chance there.")];
}

document.getElementById("answer").textContent = data.answer;
document.getElementById("header").append(...data.header.map(([label, text]) => make("li", {}, make("strong", {}, `${label}: `), label === "Command" ? make("code", {}, text) : text)));
document.getElementById("overview").append(...overview());
document.getElementById("counts").textContent = data.counts;
document.getElementById("scope").append(...data.scope.map((text) => make("li", {}, text)));
for (const table of data.tables) section(table.name, table.short, table.title, ...renderTable(table).filter(Boolean), ...(EXTRA[table.name]?.() ?? []));
if (data.claims.length) section("claims", "Claims", "Claims of the paper, checked", ...data.claims.map((claim) => make("article", {class: "claim"},
  make("h3", {style: "margin-top: 0"}, `(${claim.letter}) ${claim.title} `, make("span", {class: `verdict ${{supported: "good", contradicted: "bad"}[claim.verdict] ?? "quiet"}`}, claim.verdict)),
  make("p", {}, make("strong", {}, "The paper: "), claim.says),
  make("p", {}, make("strong", {}, "Estimated: "), claim.rule),
  make("p", {}, make("strong", {}, "The runs: "), claim.finding),
  claim.charts.length ? make("details", {}, make("summary", {}, `Curves (${claim.charts.length} settings and learning rates)`), ...chartGroups(claim.charts)) : null,
  claim.table.rows.length ? make("details", {}, make("summary", {}, `Evidence, row by row (${claim.table.rows.length})`), ...renderTable(claim.table).filter(Boolean)) : null)));
if (data.errata.length) section("errata", "Errata", "Errata of the paper", make("ul", {}, ...data.errata.map((text) => make("li", {}, text))));
if (data.figures.length) section("figures", "Figures", "Figures", make("div", {class: "plates"}, ...data.figures.map((plate) => make("figure", {},
  make("figcaption", {}, make("a", {href: plate.link}, plate.title)),
  plate.image ? make("a", {href: plate.link}, make("img", {src: plate.image, alt: plate.title, loading: "lazy"})) : null,
  make("p", {class: "quiet"}, plate.caption)))));
section("skipped", "Skipped", "Skipped", data.skipped.length
  ? make("ul", {}, ...data.skipped.map((reason) => make("li", {}, reason)))
  : make("p", {class: "quiet"}, "Nothing: every record below the folder was read."));

function follow() {
  const key = location.hash.match(/^#cell-([0-9a-f]+)$/)?.[1];
  if (key && data.cells[key]) openCell(key);
  else if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
window.addEventListener("hashchange", follow);
follow();
