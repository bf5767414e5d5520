
// --- the page -------------------------------------------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

const SIGNS = { correct: "✓", wrong: "×", no_answer: "–", error: "!", timeout: "…", memory: "▲", forbidden: "■" };

const chip = (verdict) => html("span", { class: "chip", "data-sign": SIGNS[verdict] || "?", style: `--chip: var(--verdict-${verdict})` },
  data.verdicts[verdict] || verdict);

const tokenCount = ({ tokens }) => (tokens === null ? "" : html("span", {}, tokens === 1 ? "1 token" : `${thousands(tokens)} tokens`));

const unbroken = (text) => text.replace(/^\n(?=.)/, ""); // a program's first token begins with the line break after the line `def solution():`

const runTime = (seconds) => (seconds < 1 ? `${plain(1000 * seconds)} ms` : `${plain(seconds)} s`);

const END = "⟨end⟩"; // the end-of-text token has no text of its own

function why(answer) {
  const isSaid = answer.value === null || answer.reason.includes(answer.value);
  return html("p", { class: "why" }, isSaid ? "" : html("b", {}, answer.value), isSaid ? "" : " · ", answer.reason,
    answer.cut ? " · cut off at the length limit" : "");
}

// --- theme ----------------------------------------------------------------------------------------------------------

function remembered(key, value) { // a page opened from disk may be denied storage
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch { return null; }
}
const root = document.documentElement;
if (remembered("reftune-theme")) root.dataset.theme = remembered("reftune-theme");
$("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  remembered("reftune-theme", root.dataset.theme);
});

document.querySelectorAll("[data-chart] svg").forEach((canvas) => makeReadable(canvas, data.charts[canvas.closest("[data-chart]").dataset.chart]));

// --- the same problem, side by side ---------------------------------------------------------------------------------

function startProblems({ methods, rows, total }) {
  const right = (row, index) => row.answers[index].verdict === "correct";
  const solved = (row) => methods.filter((_, index) => right(row, index)).length;
  const filters = [{ name: "all problems", keep: () => true }];
  if (methods.length > 1) {
    filters.push({ name: "methods disagree", keep: (row) => solved(row) > 0 && solved(row) < methods.length });
    methods.forEach((method, index) => filters.push({ name: `only ${method.label} solves it`, keep: (row) => right(row, index) && solved(row) === 1 }));
    methods.forEach((method, index) => filters.push({ name: `only ${method.label} fails`, keep: (row) => !right(row, index) && solved(row) === methods.length - 1 }));
  }
  filters.push({ name: "no method solves it", keep: (row) => solved(row) === 0 });
  const kept = filters.map((filter) => ({ ...filter, rows: rows.filter(filter.keep) })).filter((filter) => filter.rows.length);
  kept.forEach((filter, index) => $("problem-filter").append(html("option", { value: index }, `${filter.name} (${filter.rows.length})`)));
  $("problem-filter").value = String(Math.max(0, kept.findIndex((filter) => filter.name === "methods disagree")));
  $("problems-count").textContent = rows.length < total ? `${thousands(rows.length)} of ${thousands(total)} problems are on this page. Problems on which methods disagree were chosen first. All problems are in the run folder’s eval/.` : "";

  let found = [], place = 0;
  const search = () => {
    const words = $("problem-search").value.toLowerCase();
    found = kept[Number($("problem-filter").value)].rows.filter((row) => !words || textOf(row).includes(words));
    place = 0;
    present();
  };
  const textOf = (row) => [row.id, row.question, row.gold, ...row.answers.map((answer) => `${answer.text} ${answer.reason}`)].join("\n").toLowerCase();
  const present = () => {
    const row = found[place];
    $("problem-place").textContent = row ? `${thousands(place + 1)} of ${thousands(found.length)}` : "none";
    $("problem-prev").disabled = !row || place === 0;
    $("problem-next").disabled = !row || place === found.length - 1;
    $("problem").replaceChildren(...(row ? problemParts(row) : [html("p", { class: "meta" }, "No problem matches.")]));
  };
  const problemParts = (row) => [
    html("p", { class: "question" }, row.question),
    html("p", { class: "meta" }, "right answer ", html("b", {}, row.gold), ` · ${row.id}`),
    html("div", { class: "answers" }, row.answers.map((answer, index) => html("div", { class: "card", style: `--accent: var(${methods[index].colour})` },
      html("header", {}, html("b", {}, methods[index].label), chip(answer.verdict), tokenCount(answer)),
      html("pre", { tabindex: 0 }, unbroken(answer.text)), why(answer)))),
  ];
  const step = (by) => { place = Math.max(0, Math.min(found.length - 1, place + by)); present(); };
  $("problem-prev").addEventListener("click", () => step(-1));
  $("problem-next").addEventListener("click", () => step(1));
  $("problem-filter").addEventListener("change", search);
  $("problem-search").addEventListener("input", search);
  $("problem-controls").addEventListener("submit", (event) => event.preventDefault());
  search();
}

// --- sampled solutions ----------------------------------------------------------------------------------------------

const PAGE = 12;

function startSamples({ methods, rows, total }) {
  const state = { verdicts: new Set(), id: null, shown: PAGE };
  const least = (row) => (row.logprobs ? Math.min(...row.logprobs.filter((logprob) => logprob !== null)) : 0);
  const orders = {
    new: (one, other) => other.step - one.step,
    old: (one, other) => one.step - other.step,
    long: (one, other) => (other.tokens || 0) - (one.tokens || 0),
    slow: (one, other) => (other.program_s || 0) - (one.program_s || 0),
    unsure: (one, other) => least(one) - least(other),
  };
  $("sample-slow").hidden = !rows.some((row) => row.program_s); // solutions in natural language are not run
  const used = [...new Set(rows.map((row) => row.method))];
  $("sample-method").append(html("option", { value: "" }, "all"), ...used.map((index) => html("option", { value: index }, methods[index].label)));
  for (const verdict of Object.keys(data.verdicts)) {
    const count = rows.filter((row) => row.verdict === verdict).length;
    if (count) $("sample-verdicts").append(html("button", { type: "button", "aria-pressed": "false", "data-verdict": verdict, onclick: toggle },
      chip(verdict), html("span", {}, thousands(count))));
  }
  $("samples-count").textContent = rows.length < total ? `${thousands(rows.length)} of ${thousands(total)} logged samples are on this page; the files stages/*/samples.jsonl have all of them.` : "";

  function toggle(event) {
    const { verdict } = event.currentTarget.dataset, isOn = !state.verdicts.has(verdict);
    if (isOn) state.verdicts.add(verdict); else state.verdicts.delete(verdict);
    event.currentTarget.setAttribute("aria-pressed", String(isOn));
    search();
  }
  const textOf = (row) => `${row.id}\n${row.question}\n${row.text}\n${row.reason}\n${row.value}`.toLowerCase();
  function matches() {
    const words = $("sample-search").value.toLowerCase(), method = $("sample-method").value;
    const from = Number($("sample-from").value || 0), to = Number($("sample-to").value || Infinity);
    return rows.filter((row) => (!state.verdicts.size || state.verdicts.has(row.verdict)) && (method === "" || row.method === Number(method))
      && row.step >= from && row.step <= to && (state.id === null || row.id === state.id) && (!words || textOf(row).includes(words)))
      .sort(orders[$("sample-order").value]);
  }
  function search() { state.shown = PAGE; present(); }
  function present() {
    const found = matches();
    $("sample-found").textContent = `${thousands(found.length)} solution${found.length === 1 ? "" : "s"}`;
    $("sample-one").hidden = state.id === null;
    $("sample-one").textContent = `× only ${state.id}`;
    $("sample-list").replaceChildren(...found.slice(0, state.shown).map(card));
    $("sample-more").hidden = found.length <= state.shown;
  }
  function card(row) {
    const { label, colour } = methods[row.method];
    const again = rows.filter((other) => other.id === row.id && other.method === row.method).length;
    return html("article", { class: "card", style: `--accent: var(${colour})` },
      html("header", {}, html("b", {}, label), html("span", {}, `step ${thousands(row.step)}`), chip(row.verdict),
        row.reward === null ? "" : html("span", {}, `reward ${plain(row.reward)}`), tokenCount(row),
        row.program_s ? html("span", {}, `ran ${runTime(row.program_s)}`) : ""),
      html("p", { class: "question" }, row.question), solution(row), why(row),
      html("footer", {}, html("span", {}, `right answer ${row.gold}`), surest(row),
        again > 1 && state.id === null ? html("button", { type: "button", onclick: () => followProblem(row) }, `all ${again} attempts at this problem`) : ""));
  }
  function followProblem({ id, method }) {
    state.id = id;
    $("sample-method").value = String(method);
    $("sample-order").value = "old";
    search();
    $("samples").scrollIntoView();
    $("sample-one").focus({ preventScroll: true });
  }
  function solution(row) {
    if (!row.pieces || !$("sample-shade").checked) return html("pre", { tabindex: 0 }, unbroken(row.text));
    return html("pre", { tabindex: 0 }, row.pieces.map((piece, index) => token(index ? piece : unbroken(piece), row.logprobs[index])));
  }
  function token(piece, logprob) {
    if (logprob === null) return piece;
    const doubt = Math.min(1, -logprob / 3); // full shade if the probability is below 5%
    if (piece === "") piece = END;
    const indent = piece.trim() ? piece.match(/^\s*/)[0] : "";
    return [indent, html("span", { class: "token", style: `background: rgba(var(--shade), ${(0.6 * doubt).toFixed(2)})`,
      title: `probability ${Math.exp(logprob).toFixed(2)}` }, piece.slice(indent.length))];
  }
  function surest(row) {
    if (!row.logprobs || !row.logprobs.length) return "";
    const index = row.logprobs.indexOf(least(row));
    return index < 0 ? "" : html("span", {}, `least sure of “${row.pieces[index].trim() || END}” (${(100 * Math.exp(row.logprobs[index])).toFixed(0)}%)`);
  }
  for (const id of ["sample-method", "sample-order", "sample-shade"]) $(id).addEventListener("change", search);
  for (const id of ["sample-from", "sample-to", "sample-search"]) $(id).addEventListener("input", search);
  $("sample-more").addEventListener("click", () => { state.shown += PAGE; present(); });
  $("sample-one").addEventListener("click", () => { state.id = null; search(); });
  $("sample-controls").addEventListener("submit", (event) => event.preventDefault());
  search();
}

for (const [name, start] of [["problems", startProblems], ["samples", startSamples]]) {
  if (data[name].rows.length) start(data[name]);
  else document.querySelectorAll(`[data-needs="${name}"]`).forEach((node) => { node.hidden = true; });
}

// --- a run that has not finished ------------------------------------------------------------------------------------

if ($("pause")) setInterval(() => { if (!$("pause").checked) location.reload(); }, 30_000);
