"use strict";

// --- elements; text always goes in as text --------------------------------------------------------------------------

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
  if (unit === "percent") return (100 * value).toFixed(1) + " %";
  if (unit === "seconds") return value > 0 && value < 0.001 ? "<0.001 s" : plain(value) + " s";
  return plain(value);
}
function tickText(value, unit, isLast) {
  if (unit === "percent") return plain(Math.round(1e4 * value) / 100) + (isLast ? " %" : "");
  return plain(value) + (unit === "seconds" && isLast ? " s" : "");
}
const short = (value) => (value >= 10000 ? `${plain(value / 1000)}k` : thousands(value));
const thousands = (value) => Math.round(value).toLocaleString("en");

function niceTicks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function runningMean(values, window) {
  const half = Math.floor(window / 2);
  return values.map((value, index) => {
    const around = values.slice(Math.max(0, index - half), index + half + 1).filter((near) => near !== null);
    return value === null || !around.length ? value : around.reduce((sum, near) => sum + near, 0) / around.length;
  });
}

// --- one chart ------------------------------------------------------------------------------------------------------

const MANY_POINTS = 40; // beyond this a line is drawn pale, with its running mean on top

function drawChart(figure, chart) {
  const width = Math.floor(figure.clientWidth);
  if (width < 40) return;
  figure.querySelectorAll("svg, .keys, .tip").forEach((old) => old.remove());
  const isHero = figure.classList.contains("hero");
  const plot = layOut(chart, width, isHero ? Math.max(250, Math.min(420, width * 0.44)) : 185, isHero);
  const canvas = svg("svg", { height: plot.height, viewBox: `0 0 ${width} ${plot.height}`, role: "img", tabindex: 0,
    "aria-label": describe(chart) });
  drawAxes(canvas, chart, plot);
  (chart.kind === "area" ? drawAreas : drawLines)(canvas, chart, plot);
  figure.append(canvas);
  if (chart.kind === "area") figure.append(areaKeys(chart));
  else if (chart.series.length > 1 && !plot.isNamed) figure.append(lineKeys(chart));
  makeReadable(figure, canvas, chart, plot);
}

function stacked(chart) {
  const base = chart.series[0].x.map(() => 0);
  return chart.series.map((series) => {
    const low = base.slice();
    series.y.forEach((value, index) => { base[index] += value || 0; });
    return { series, low, high: base.slice() };
  });
}

// A lone spike would flatten the rest: it leaves the frame at the top, and its value can be read.
function withoutSpikes(values) {
  const sorted = [...values].sort((one, other) => one - other);
  const usual = sorted[Math.floor(0.98 * (sorted.length - 1))], highest = sorted[sorted.length - 1];
  return sorted.length > MANY_POINTS && usual > 0 && highest > 4 * usual ? 1.5 * usual : highest;
}

function layOut(chart, width, height, isHero) {
  const isArea = chart.kind === "area";
  const nameRoom = 14 + 7.2 * Math.max(...chart.series.map((series) => series.label.length));
  const isNamed = !isArea && (isHero ? width > 560 : chart.series.length > 1 && nameRoom < (width > 420 ? 0.36 : 0.26) * width);
  const margin = { top: 14, right: isNamed ? nameRoom : 6, bottom: 24 };
  const xs = chart.series.flatMap((series) => series.x);
  let ys = isArea ? stacked(chart).flatMap((layer) => layer.high)
    : chart.series.flatMap((series) => [...series.y, ...(series.low || []), ...(series.high || [])]);
  ys = ys.filter((value) => value !== null);
  let low = Math.min(...ys), high = isArea ? Math.max(...ys) : withoutSpikes(ys);
  if (chart.floor !== null && high > chart.floor) low = Math.max(low, chart.floor);
  if (chart.zero) { low = Math.min(0, low); high = Math.max(0, high); }
  if (high === low) high = low + (Math.abs(low) || 1);
  if ((!chart.zero || low < 0) && low !== chart.floor) low -= (high - low) * 0.05;
  const ticks = niceTicks(low, high, isHero ? 6 : 4);
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : high - low;
  if (!isArea) high = Math.max(high, low + step) + (high - low) * 0.04;
  const lastX = Math.max(...xs), leastX = Math.min(...xs);
  const firstX = !chart.log_x && leastX < 0.1 * lastX ? 0 : leastX;
  const scale = chart.log_x ? Math.log : Number;
  const gutter = 8 + 6.6 * Math.max(...ticks.map((tick, index) => tickText(tick, chart.unit, index === ticks.length - 1).length));
  const inner = { left: gutter, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  return {
    width, height, inner, ticks: ticks.filter((tick) => tick <= high), firstX, lastX, isHero, isNamed,
    x: (value) => inner.left + (inner.right - inner.left) * (scale(value) - scale(firstX)) / ((scale(lastX) - scale(firstX)) || 1),
    y: (value) => inner.bottom - (inner.bottom - inner.top) * (value - low) / (high - low),
  };
}

function drawAxes(canvas, chart, plot) {
  plot.ticks.forEach((tick, index) => {
    const y = Math.round(plot.y(tick)) + 0.5;
    canvas.append(svg("line", { class: tick === 0 ? "base" : "grid", x1: plot.inner.left, x2: plot.inner.right, y1: y, y2: y }),
      svg("text", { x: 0, y: y + 4 }, tickText(tick, chart.unit, index === plot.ticks.length - 1)));
  });
  const count = Math.max(3, Math.floor((plot.inner.right - plot.inner.left) / 110)), write = plot.width > 560 ? thousands : short;
  const ticks = chart.log_x ? [1, 2, 5, 10, 20, 50, 100, 200, 500].filter((tick) => tick >= plot.firstX && tick <= plot.lastX)
    : niceTicks(plot.firstX, plot.lastX, count);
  const wide = (text) => text.length * 6.6;
  const gap = ticks.length > 1 ? plot.x(ticks[ticks.length - 1]) - plot.x(ticks[ticks.length - 2]) : plot.width;
  let free = Infinity; // written from the right; what would collide is left out, the axis name first
  [...ticks.entries()].reverse().forEach(([index, tick]) => {
    const x = plot.x(tick), named = `${write(tick)} ${chart.x_label}`;
    const isNamed = index === ticks.length - 1 && Math.max(wide(named) / 2, x + wide(named) - plot.width) + wide(write(tick)) / 2 + 6 < gap;
    const label = isNamed ? named : write(tick);
    const left = Math.min(x - wide(label) / 2, plot.width - wide(label));
    if (left + wide(label) + 6 > free) return;
    free = left;
    canvas.append(svg("text", { x: left, y: plot.height - 5 }, label));
  });
}

const pathOf = (points) => points.reduce((path, point) => {
  if (point === null) return { d: path.d, pen: "M" };
  return { d: path.d + path.pen + point[0].toFixed(1) + " " + point[1].toFixed(1), pen: "L" };
}, { d: "", pen: "M" }).d;

const linePoints = (series, values, plot) => values.map((value, index) => (value === null ? null : [plot.x(series.x[index]), plot.y(value)]));

function bandPath(series, low, high, plot) {
  const known = series.x.map((_, index) => index).filter((index) => low[index] !== null && high[index] !== null);
  const upper = known.map((index) => [plot.x(series.x[index]), plot.y(high[index])]);
  const lower = known.map((index) => [plot.x(series.x[index]), plot.y(low[index])]).reverse();
  return pathOf([...upper, ...lower]) + "Z";
}

function drawLines(canvas, chart, plot) {
  const clip = `clip-${chart.key.replace(/\W/g, "-")}`;
  canvas.append(svg("clipPath", { id: clip }, svg("rect", { x: 0, y: 0, width: plot.width, height: plot.inner.bottom + 1 })));
  const ends = [];
  for (const series of chart.series) {
    const colour = `var(${series.colour})`;
    if (series.low) canvas.append(svg("path", { class: "band", "clip-path": `url(#${clip})`, d: bandPath(series, series.low, series.high, plot), style: `fill: ${colour}` }));
    const isNoisy = series.y.length > MANY_POINTS && !plot.isHero && !chart.exact;
    const smooth = isNoisy ? runningMean(series.y, Math.max(3, Math.round(series.y.length / 16))) : series.y;
    if (isNoisy) canvas.append(svg("path", { class: "raw", "clip-path": `url(#${clip})`, d: pathOf(linePoints(series, series.y, plot)), style: `stroke: ${colour}` }));
    const points = linePoints(series, smooth, plot);
    canvas.append(svg("path", { class: "line", "clip-path": `url(#${clip})`, d: pathOf(points), style: `stroke: ${colour}` }));
    const last = points.filter(Boolean).pop();
    if (last) ends.push({ x: last[0], y: last[1], series, colour });
  }
  for (const series of chart.series) if (series.mark !== null) drawChosen(canvas, series, plot);
  if (plot.isNamed) drawNames(canvas, ends, plot);
}

function drawChosen(canvas, series, plot) {
  const [x, y] = [plot.x(series.x[series.mark]), plot.y(series.y[series.mark])];
  canvas.append(svg("circle", { class: "chosen", cx: x, cy: y, r: 5, style: `stroke: var(${series.colour})` },
    svg("title", {}, `${series.label}: the chosen model, ${show(series.y[series.mark], "percent")}`)));
}

function drawNames(canvas, allEnds, plot) {
  const height = 15, isEarly = (end) => plot.isHero && end.x < plot.inner.left + 0.7 * (plot.inner.right - plot.inner.left);
  for (const end of allEnds.filter(isEarly)) { // others start where it ends: the name goes to the free side
    const fits = end.x - 10 - 7.2 * end.series.label.length > plot.inner.left;
    canvas.append(svg("text", { class: "name", x: end.x - (fits ? 10 : 0), y: end.y - 10, "text-anchor": fits ? "end" : "start", style: `fill: ${end.colour}` },
      end.series.label));
  }
  const ends = allEnds.filter((end) => !isEarly(end));
  ends.sort((one, other) => one.y - other.y);
  ends.forEach((end, index) => { end.at = index ? Math.max(end.y, ends[index - 1].at + height) : Math.max(end.y, plot.inner.top); });
  const over = ends.length ? ends[ends.length - 1].at - plot.inner.bottom : 0;
  if (over > 0) [...ends].reverse().forEach((end, index, all) => { end.at = index ? Math.min(end.at, all[index - 1].at - height) : end.at - over; });
  for (const end of ends) canvas.append(svg("text", { class: "name", x: end.x + 8, y: end.at + 4, style: `fill: ${end.colour}` }, end.series.label));
}

function drawAreas(canvas, chart, plot) {
  for (const layer of stacked(chart)) {
    canvas.append(svg("path", { d: bandPath(layer.series, layer.low, layer.high, plot),
      style: `fill: var(${layer.series.colour}); stroke: var(--paper); stroke-width: .6` }));
  }
}

function areaKeys(chart) {
  const present = chart.series.filter((series) => series.y.some((value) => value > 0));
  return html("ul", { class: "keys" }, present.map((series) => {
    const last = series.y.filter((value) => value !== null).pop();
    return html("li", {}, html("i", { style: `background: var(${series.colour})` }), `${series.label} ${show(last, chart.unit)}`);
  }));
}

function lineKeys(chart) {
  return html("ul", { class: "keys" }, chart.series.map((series) => html("li", {}, html("i", { style: `background: var(${series.colour})` }), series.label)));
}

function describe(chart) {
  const parts = chart.series.map((series) => {
    const known = series.y.filter((value) => value !== null);
    return `${series.label} from ${show(known[0], chart.unit)} to ${show(known[known.length - 1], chart.unit)}`;
  });
  return `${chart.title}. ${parts.join("; ")}. Arrow keys read values.`;
}

// --- reading values off ---------------------------------------------------------------------------------------------

function makeReadable(figure, canvas, chart, plot) {
  const xs = [...new Set(chart.series.flatMap((series) => series.x))].sort((one, other) => one - other);
  const cross = svg("line", { class: "cross", y1: plot.inner.top, y2: plot.inner.bottom, visibility: "hidden" });
  const tip = html("div", { class: "tip", role: "status", hidden: true });
  canvas.append(cross);
  figure.append(tip);
  let place = -1;
  const hide = () => { place = -1; tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  const read = (index) => {
    place = Math.max(0, Math.min(xs.length - 1, index));
    const x = plot.x(xs[place]);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, x);
    cross.setAttribute("visibility", "visible");
    tip.hidden = false;
    tip.replaceChildren(html("div", {}, html("span", {}, chart.x_label), html("b", {}, thousands(xs[place]))), ...tipRows(chart, xs[place]));
    const left = x + 14 + tip.offsetWidth > figure.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${canvas.getBoundingClientRect().top - figure.getBoundingClientRect().top + 8}px`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const at = event.clientX - canvas.getBoundingClientRect().left;
    read(xs.reduce((best, x, index) => (Math.abs(plot.x(x) - at) < Math.abs(plot.x(xs[best]) - at) ? index : best), 0));
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
