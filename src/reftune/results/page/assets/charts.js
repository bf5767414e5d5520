"use strict";

// --- elements; text is always inserted as text, never as HTML -------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function add(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const html = (name, attributes, ...children) => add(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) => add(document.createElementNS(SVG, name), attributes, children);

// --- numbers --------------------------------------------------------------------------------------------------------

function plain(value) {
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return powerOfTen(value);
  const rounded = size >= 100 ? Math.round(value) : Number(value.toPrecision(3));
  return rounded.toLocaleString("en", { maximumFractionDigits: 5 }).replace("-", "−");
}
function powerOfTen(value) {
  const [mantissa, exponent] = value.toExponential(1).split("e-");
  const raised = [...exponent].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  return `${mantissa.replace(/\.0$/, "").replace("-", "−")}·10⁻${raised}`;
}
function show(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "percent") return (100 * value).toFixed(1) + "%";
  if (unit === "seconds") return value > 0 && value < 0.001 ? "<0.001 s" : plain(value) + " s";
  return plain(value);
}
const thousands = (value) => Math.round(value).toLocaleString("en");

// --- reading values from a chart ------------------------------------------------------------------------------------

function makeReadable(canvas, chart) {
  const box = canvas.parentElement, width = canvas.viewBox.baseVal.width;
  const [left, right, first, last] = canvas.dataset.x.split(" ").map(Number), [top, bottom] = canvas.dataset.y.split(" ");
  const scale = canvas.dataset.log ? Math.log : Number;
  const placed = (value) => left + (right - left) * (scale(value) - scale(first)) / ((scale(last) - scale(first)) || 1);
  const xs = [...new Set(chart.series.flatMap((series) => series.x))].sort((one, other) => one - other);
  const cross = svg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
  const tip = html("div", { class: "tip", role: "status", hidden: true });
  canvas.append(cross);
  box.append(tip);
  let place = -1;
  const hide = () => { place = -1; tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  const read = (index) => {
    place = Math.max(0, Math.min(xs.length - 1, index));
    const x = placed(xs[place]), shown = x * canvas.clientWidth / width;
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x);
    cross.setAttribute("visibility", "visible");
    tip.hidden = false;
    tip.replaceChildren(html("div", {}, html("span", {}, chart.x_label), html("b", {}, thousands(xs[place]))), ...tipRows(chart, xs[place]));
    tip.style.left = `${Math.max(0, shown + 14 + tip.offsetWidth > box.clientWidth ? shown - 14 - tip.offsetWidth : shown + 14)}px`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect(), at = (event.clientX - frame.left) * width / frame.width;
    read(xs.reduce((best, x, index) => (Math.abs(placed(x) - at) < Math.abs(placed(xs[best]) - at) ? index : best), 0));
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const jump = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") hide();
    if (jump === undefined) return;
    event.preventDefault();
    read(place + jump);
  });
}

function tipRows(chart, x) {
  return chart.series.map((series) => {
    const index = nearest(series.x, x);
    if (index === null || series.y[index] === null) return null;
    return html("div", {}, html("span", { style: `color: var(${series.colour})` }, series.label), html("b", {}, show(series.y[index], chart.unit)));
  }).filter(Boolean);
}

function nearest(xs, x) {
  if (x < xs[0] || x > xs[xs.length - 1]) return null;
  return xs.reduce((best, value, index) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? index : best), 0);
}
