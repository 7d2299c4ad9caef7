"use strict";
// Shows the numbers of token_page.py: colours, the inspector, the filters. Computes nothing but exp(log p).
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.forms[0];
const inspector = document.getElementById("inspector");
const articles = [...document.querySelectorAll(".rollout")];
const texts = articles.map((article) => [...article.querySelectorAll(".text span")]);
const kinds = texts.map((spans) => spans.map((span) => span.className));
let current = null; // [rollout, token] in the inspector
let pointed = null; // [rollout, token] under the pointer
let pinned = false;

texts.forEach((spans, rollout) =>
  spans.forEach((span, token) => {
    span.at = [rollout, token];
    span.tabIndex = token === 0 ? 0 : -1; // one tab stop per rollout; the arrow keys move on from there
  }),
);

const objective = () => form.elements.objective.value;

function paint() {
  const chosen = objective();
  const byRegime = form.elements.colour.value === "regime";
  for (const legend of document.querySelectorAll(".legend")) {
    legend.hidden = legend.dataset.colour !== form.elements.colour.value;
  }
  texts.forEach((spans, rollout) => {
    const { regime, objectives } = data.rollouts[rollout];
    spans.forEach((span, token) => {
      const own = byRegime ? data.regimes[regime[token]] : colour(objectives[chosen].weight[token]);
      span.className = [kinds[rollout][token], own].filter(Boolean).join(" ");
    });
  });
  if (current) inspect(...current);
}

function colour(weight) {
  if (weight === null) return "broken";
  const step = Math.ceil(10 * Math.min(1, Math.abs(weight) / data.scale) - 1e-9);
  return step === 0 ? "" : (weight > 0 ? "p" : "n") + step;
}

// -- the inspector ----------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function number(x, digits = 3) {
  if (x === null) return "not finite";
  const text = Math.abs(x).toFixed(digits);
  return x < 0 && Number(text) !== 0 ? `−${text}` : text;
}
const signed = (x, digits) => (x > 0 ? "+" : "") + number(x, digits);
const probability = (x) => (x === null ? "not finite" : `${number(x)}  (p ${number(Math.exp(x))})`);

function inspect(rollout, token) {
  mark(rollout, token);
  current = [rollout, token];
  const row = data.rollouts[rollout];
  const chosen = row.objectives[objective()];
  const rows = [["student log p_S", probability(row.student[token])]];
  if (chosen.w) {
    const direction = signed(Math.sign(row.advantage), 0);
    rows.unshift(["advantage A", signed(row.advantage)], ["direction D = sign(A)", direction]);
  }
  const rest = [["student entropy", `${number(row.student_entropy[token])} nats`]];
  if (row.teacher) {
    rows.push(["teacher log p_T", probability(row.teacher[token])]);
    rows.push(["gap δ of the two", `${signed(row.delta[token])} nats`]);
    if (chosen.w) {
      const clipped = row.clipped[token];
      rows.push(["exp(D δ)", number(row.ratio[token])]);
      rows.push(["clip", clipped ? `to ${number(1 + clipped * data.clip, 2)}` : "not reached"]);
      rows.push(["magnitude w", number(chosen.w[token])]);
    }
    const ahead = row.offset[token];
    rest.push(["teacher entropy H", `${number(row.teacher_entropy[token])} nats`]);
    rest.push(["Ĥ", number(row.h[token])]);
    rest.push([`Ĥ^CL, W ${data.lookahead}`,
      `${number(row.h_ahead[token])}  (${ahead ? `${ahead} ahead` : "here"})`]);
    rest.push(["regime", data.regimes[row.regime[token]]]);
  }
  rest.push(["confidence ω", number(chosen.omega[token])]);
  const list = element("dl", { className: "number" });
  const add = ([name, value]) => list.append(element("dt", {}, name), element("dd", {}, value));
  rows.forEach(add);
  list.append(element("hr"));
  rest.forEach(add);
  const formula = chosen.w
    ? `= A ${signed(row.advantage)} × w ${number(chosen.w[token])} × ω ${number(chosen.omega[token])}`
    : "as the run recorded it";
  inspector.replaceChildren(
    element("h2", {}, shown(texts[rollout][token].textContent)),
    element("div", { className: "muted" }, `token ${token + 1} of ${row.length}`),
    element("div", { className: "weight" }, `weight ${signed(chosen.weight[token])}`),
    element("div", { className: "formula muted" }, formula),
    weights(row, token),
    list,
    element("p", { className: "hint" }, pinned
      ? "Pinned: click it again or press Escape to let go."
      : "Click pins a token; arrow keys step through them. Underlined: the lookahead, bold where its minimum lies."),
  );
}

function weights(row, token) {
  const table = element("div", { className: "weights" });
  for (const { id, name } of data.objectives) {
    const w = row.objectives[id].weight[token];
    const bar = element("i");
    const half = (50 * Math.min(1, Math.abs(w) / data.scale)).toFixed(2);
    bar.style.width = `${half}%`;
    bar.style[w < 0 ? "right" : "left"] = "50%";
    bar.style.background = `rgb(var(--${w < 0 ? "negative" : "positive"}))`;
    const className = id === objective() ? "chosen" : "";
    table.append(
      element("span", { className }, name),
      element("span", { className: "bar" }, bar),
      element("span", { className: `number ${className}` }, signed(w)),
    );
  }
  return table;
}

// A token of white space alone would be invisible in the inspector.
const shown = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "part of a character";

function mark(rollout, token) {
  for (const old of document.querySelectorAll(".current, .ahead")) old.classList.remove("current", "ahead", "nearest");
  const row = data.rollouts[rollout];
  texts[rollout][token].classList.add("current");
  if (!row.teacher) return;
  for (let k = 1; k <= data.lookahead && token + k < row.length; k++) {
    texts[rollout][token + k].classList.add("ahead");
    if (k === row.offset[token]) texts[rollout][token + k].classList.add("nearest");
  }
}

// -- pointer and keyboard ---------------------------------------------------------------------------------------

const main = document.querySelector("main");
main.addEventListener("pointerover", (event) => {
  if (!event.target.at) return;
  pointed = event.target.at;
  if (!pinned) inspect(...pointed);
});
main.addEventListener("click", (event) => {
  if (!event.target.at) return;
  pin(!(pinned && String(current) === String(event.target.at)));
  inspect(...event.target.at);
});
main.addEventListener("focusin", (event) => {
  if (event.target.at && event.target.matches(":focus-visible")) inspect(...event.target.at);
});
main.addEventListener("keydown", (event) => {
  if (!event.target.at) return;
  const [rollout, token] = event.target.at;
  const last = texts[rollout].length - 1;
  const to = { ArrowLeft: token - 1, ArrowRight: token + 1, Home: 0, End: last }[event.key];
  if (to === undefined || to < 0 || to > last) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  texts[rollout][to].tabIndex = 0;
  texts[rollout][to].focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !pinned) return;
  pin(false);
  inspect(...pointed);
});

function pin(on) {
  pinned = on;
  document.body.classList.toggle("pinned", on);
  if (current) inspect(...current);
}

// -- filters ----------------------------------------------------------------------------------------------------

function filter() {
  const { reward, shortest, longest, group, count } = form.elements;
  const most = longest.value === "" ? Infinity : Number(longest.value);
  let tokens = 0;
  let visible = 0;
  for (const [i, article] of articles.entries()) {
    const { right, length } = data.rollouts[i];
    article.hidden =
      (reward.value !== "" && right !== (reward.value === "right")) ||
      length < Number(shortest.value) ||
      length > most ||
      (group.value !== "" && article.parentElement.dataset.group !== group.value);
    if (!article.hidden) {
      visible += 1;
      tokens += length;
    }
  }
  for (const section of document.querySelectorAll(".group")) {
    section.hidden = !section.querySelector(".rollout:not([hidden])");
  }
  document.querySelector(".empty").hidden = visible > 0;
  count.value = `${visible} of ${articles.length} rollouts, ${tokens.toLocaleString("en")} tokens`;
}

form.addEventListener("input", (event) => (event.target.type === "radio" ? paint() : filter()));
form.addEventListener("submit", (event) => event.preventDefault());

paint();
filter();
const first = [(row) => row.length && row.advantage, (row) => row.length].map((f) => data.rollouts.findIndex(f));
const start = first.find((i) => i >= 0);
if (start !== undefined) inspect(start, 0);
