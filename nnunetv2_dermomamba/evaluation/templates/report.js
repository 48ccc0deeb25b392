"use strict";

const { metrics, labels, cases } = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("toolbar");
const gallery = document.getElementById("gallery");
const viewer = document.getElementById("viewer");
const SVG = "http://www.w3.org/2000/svg";
const BINS = 20;
let shown = []; // the cases that pass the filter, in order
let opened = -1; // index into shown

// ---- values ----

const metricOf = (key) => metrics.find((metric) => metric.key === key);
const valueOf = (item, key) => item.values[form.label.value][key] ?? null; // in shown units; null where undefined
const format = (value) => (value === null ? "–" : value.toFixed(2));
const withUnit = (metric, value) => (value === null ? "–" : `${format(value)} ${metric.unit}`);

/** Cases that were not scored come before the worst, undefined values after the best. */
function badness(item, metric) {
  if (item.status !== "scored" && valueOf(item, metric.key) === null) return Infinity;
  const value = valueOf(item, metric.key);
  if (value === null) return -Infinity;
  return metric.smallIsGood ? value : -value;
}

function passes(item) {
  if (form.status.value && item.status !== form.status.value) return false;
  if (!item.name.toLowerCase().includes(form.name.value.trim().toLowerCase())) return false;
  const low = form.low.valueAsNumber;
  const high = form.high.valueAsNumber;
  if (Number.isNaN(low) && Number.isNaN(high)) return true;
  const value = valueOf(item, form.metric.value);
  return value !== null && !(value < low) && !(value > high);
}

function compare(a, b) {
  const byName = a.name.localeCompare(b.name, "en", { numeric: true });
  if (form.sort.value === "name") return byName;
  const metric = metricOf(form.sort.value);
  const [first, second] = [badness(a, metric), badness(b, metric)];
  if (first === second) return byName;
  return form.order.value === "worst" ? (first > second ? -1 : 1) : first < second ? -1 : 1;
}

// ---- elements ----

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svgElement(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(item) {
  const size = { width: item.width, height: item.height };
  const svg = svgElement("svg", { class: "drawing", viewBox: `0 0 ${item.width} ${item.height}`, role: "img", "aria-label": item.name });
  svg.append(svgElement("rect", { ...size, class: "ground", fill: "none" }));
  if (item.picture) svg.append(svgElement("image", { ...size, href: item.picture, preserveAspectRatio: "none" }));
  for (const [index, kind] of ["truth", "prediction"].entries()) {
    const d = item.contours[form.label.value][index];
    if (d) svg.append(svgElement("g", { class: kind }, svgElement("path", { d, class: "casing" }), svgElement("path", { d, class: "outline" })));
  }
  return svg;
}

// ---- gallery ----

const pictures = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const picture = target.firstElementChild;
      if (!isIntersecting) picture.replaceChildren();
      else if (!picture.firstChild) picture.append(drawing(cases[target.dataset.index]));
    }
  },
  { rootMargin: "800px" },
);

const cards = cases.map((item, index) => {
  const text = element("span", { class: "text" }, element("span", { class: "name", title: item.name }, item.name), element("span", { class: "value" }));
  const card = element("button", { type: "button", class: "card", "data-index": index, "data-status": item.status }, element("span", { class: "picture" }), text);
  pictures.observe(card);
  return card;
});

function update() {
  const metric = metricOf(form.sort.value === "name" ? form.metric.value : form.sort.value);
  shown = cases.filter(passes).sort(compare);
  const order = new Map(cases.map((item, index) => [item, cards[index]]));
  gallery.replaceChildren(
    ...shown.map((item) => {
      const card = order.get(item);
      const value = item.status === "scored" ? withUnit(metric, valueOf(item, metric.key)) : item.status;
      card.querySelector(".value").textContent = value;
      card.setAttribute("aria-label", `${item.name}, ${metric.title} ${value}`);
      return card;
    }),
  );
  document.getElementById("count").textContent = `${shown.length} of ${cases.length} cases`;
  document.getElementById("nothing").hidden = shown.length > 0;
  form.order.disabled = form.sort.value === "name";
}

function changeClass() {
  for (const card of cards) card.firstElementChild.replaceChildren();
  for (const card of cards) {
    pictures.unobserve(card);
    pictures.observe(card);
  }
  drawHistograms();
}

function showContours() {
  document.body.classList.toggle("no-truth", !form.truth.checked);
  document.body.classList.toggle("no-prediction", !form.prediction.checked);
}

// ---- distributions ----

/** A metric's values, those of undefined ones left out. */
const valuesOf = (metric) => cases.map((item) => valueOf(item, metric.key)).filter((value) => value !== null);

/** Where the axis of these values would start and end; the few distances far beyond the rest go into the last bar. */
function niceRange(unit, values) {
  if (unit === "%") return [Math.min(95, Math.floor(Math.min(...values) / 5) * 5), 100];
  const usual = [...values].sort((a, b) => a - b)[Math.floor(0.98 * (values.length - 1))];
  const step = 10 ** Math.floor(Math.log10(Math.max(usual, 1)));
  return [0, Math.ceil((1.05 * usual) / step) * step || 1];
}

/** The axis that all metrics of a unit share, so that their distributions can be compared. */
function rangeOf(unit) {
  const values = metrics.filter((metric) => metric.unit === unit).map(valuesOf).filter((some) => some.length);
  const [lows, highs] = [0, 1].map((end) => values.map((some) => niceRange(unit, some)[end]));
  return [Math.min(...lows), Math.max(...highs)];
}

function countsOf(metric) {
  const [low, high] = rangeOf(metric.unit);
  const counts = new Array(BINS).fill(0);
  for (const value of valuesOf(metric)) counts[Math.min(BINS - 1, Math.floor(((value - low) / (high - low)) * BINS))] += 1;
  return counts;
}

function histogram(metric, counts, most) {
  const [low, high] = rangeOf(metric.unit);
  const values = valuesOf(metric);
  const largest = Math.max(...values);
  const svg = svgElement("svg", { viewBox: `0 0 ${BINS} 100`, preserveAspectRatio: "none" });
  for (const [bin, count] of counts.entries()) {
    if (!count) continue;
    const edges = [bin, bin + 1].map((edge) => low + ((high - low) * edge) / BINS);
    const [from, to] = [edges[0], bin === BINS - 1 ? Math.max(edges[1], largest) : edges[1]];
    const size = Math.max(2, (98 * count) / most);
    const name = `${metric.title} ${format(from)} to ${format(to)} ${metric.unit}: ${count} images`;
    const bar = svgElement("g", { tabindex: "0", role: "button", "aria-label": name },
      svgElement("title", {}, name),
      svgElement("rect", { class: "column", x: bin + 0.06, y: 100 - size, width: 0.88, height: size }),
      svgElement("rect", { class: "hit", x: bin, y: 0, width: 1, height: 100 }));
    const choose = () => filterBy(metric, from, to);
    bar.addEventListener("click", choose);
    bar.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    });
    svg.append(bar);
  }
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const x = Math.min(1, (mean - low) / (high - low)) * BINS;
  svg.append(svgElement("line", { x1: x, x2: x, y1: 0, y2: 100 }));
  return element("figure", { class: "histogram" },
    element("figcaption", {}, element("span", {}, metric.title), element("span", {}, withUnit(metric, mean))),
    svg,
    element("div", { class: "axis" }, element("span", {}, String(low)), element("span", {}, `${largest > high ? "≥ " : ""}${high} ${metric.unit}`)));
}

function drawHistograms() {
  const defined = metrics.filter((metric) => valuesOf(metric).length);
  const counts = defined.map(countsOf);
  const most = Math.max(...counts.flat());
  document.getElementById("tallest").textContent = most;
  document.getElementById("histograms").replaceChildren(...defined.map((metric, index) => histogram(metric, counts[index], most)));
}

function filterBy(metric, low, high) {
  const rounded = (value) => Number(value.toFixed(4));
  form.metric.value = metric.key;
  form.sort.value = metric.key;
  form.low.value = rounded(low);
  form.high.value = rounded(high);
  update();
  document.getElementById("cases").scrollIntoView();
}

// ---- one case, large ----

function open(index) {
  if (index < 0 || index >= shown.length) return;
  opened = index;
  const item = shown[index];
  document.getElementById("viewer-name").textContent = item.name;
  document.getElementById("viewer-position").textContent = `${index + 1} of ${shown.length}`;
  document.getElementById("viewer-drawing").replaceChildren(drawing(item));
  document.getElementById("viewer-message").textContent = [item.message, item.note].filter(Boolean).join(" ");
  const rows = metrics.map((metric) => element("tr", {}, element("th", { scope: "row" }, metric.title), element("td", {}, withUnit(metric, valueOf(item, metric.key)))));
  document.getElementById("viewer-values").replaceChildren(element("table", {}, element("tbody", {}, ...rows)));
  document.getElementById("previous").disabled = index === 0;
  document.getElementById("next").disabled = index === shown.length - 1;
  if (!viewer.open) viewer.showModal();
}

gallery.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (card) open(shown.indexOf(cases[card.dataset.index]));
});
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") open(opened - 1);
  if (event.key === "ArrowRight") open(opened + 1);
});
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close();
});
viewer.addEventListener("close", () => {
  const card = cards[cases.indexOf(shown[opened])];
  card?.focus();
  card?.scrollIntoView({ block: "nearest" });
});
document.getElementById("previous").addEventListener("click", () => open(opened - 1));
document.getElementById("next").addEventListener("click", () => open(opened + 1));
document.getElementById("close").addEventListener("click", () => viewer.close());

// ---- start ----

function options(select, entries) {
  select.append(...entries.map(([value, text]) => element("option", { value }, text)));
}

options(form.label, labels.map((label) => [label, label]));
document.getElementById("class-choice").hidden = labels.length === 1;
options(form.status, [...new Set(cases.map((item) => item.status))].map((status) => [status, status]));
options(form.metric, metrics.map((metric) => [metric.key, `${metric.title}, ${metric.unit}`]));
options(form.sort, [...metrics.map((metric) => [metric.key, metric.title]), ["name", "name"]]);
form.label.addEventListener("change", changeClass);
form.addEventListener("input", () => {
  showContours();
  update();
});
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("clear").addEventListener("click", () => {
  form.reset();
  changeClass();
  showContours();
  update();
});
drawHistograms();
update();
