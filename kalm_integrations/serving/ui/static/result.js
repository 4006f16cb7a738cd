// Draws an answer. Texts are put in as text only: passages may hold anything.

import { number } from "./passages.js";

const STATUSES = {
  stored: "its encoding came with it",
  cached: "its encoding was in memory",
  found: "its encoding was in the store",
  missing: "encoded now",
  stale: "its encoding was of another text or model",
  corrupt: "its encoding was damaged",
};

/** Characters; longer texts are cut until somebody wants all. */
const LONG = 500;

/** P(yes) from which on a sentence is shaded, and shaded more. */
const SHADES = [0.05, 0.25, 0.5, 0.75];

/** Return a new element with attributes and children; strings become text. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Return a size such as 7.3 kB. */
export function bytes(size) {
  let unit = "B";
  for (const larger of ["kB", "MB", "GB"]) {
    if (size < 1000) break;
    size /= 1000;
    unit = larger;
  }
  return unit === "B" ? `${number(Math.round(size))} B` : `${number(size, 1)} ${unit}`;
}

/** Return the passages of an answer, best first, each with its place before. */
export function ranked(answer) {
  const placed = answer.passages.map((passage, index) => ({ ...passage, before: index + 1 }));
  return placed.sort((one, other) => one.rank - other.rank);
}

/** Return the sizes of an answer's encodings. */
export function sizes(answer) {
  const add = (field) => answer.passages.reduce((sum, passage) => sum + passage[field], 0);
  return { total: add("n_bytes"), text: add("n_text_bytes"), mean: add("n_bytes") / answer.passages.length };
}

/** Return one sentence about an answer. */
export function summarise(answer, model) {
  const n = answer.passages.length;
  const encoded = answer.passages.filter((passage) => passage.status === "missing").length;
  const moved = answer.passages.filter((passage, index) => passage.rank !== index + 1).length;
  const what = `${number(n)} ${n === 1 ? "passage" : "passages"} ranked by ${model} in ${milliseconds(answer.seconds.total)}`;
  return `${what}: ${number(encoded)} encoded now, ${number(n - encoded)} found, ${number(moved)} changed places.`;
}

/** Draw an answer into the page. */
export function showResult(answer, roundTrip) {
  const { total, text, mean } = sizes(answer);
  showFacts([
    ["Encode", milliseconds(answer.seconds.encode)],
    ["Score", milliseconds(answer.seconds.score)],
    ["Total", `${milliseconds(answer.seconds.total)}, ${milliseconds(roundTrip)} in the browser`],
    ["Encodings", countStatuses(answer)],
    ["Stored size", `${bytes(total)} in all, ${bytes(mean)} a passage, ${number(total / Math.max(text, 1), 1)} × the text`],
  ]);
  const byScore = answer.first_stage === null ? "in the order in which they came" : `the best by ${answer.first_stage}`;
  document.getElementById("before-note").textContent = `${number(answer.passages.length)} passages, ${byScore}`;
  document.getElementById("after-note").textContent = answer.passages.some((passage) => passage.spans)
    ? "P(yes) and margin, logit(yes) − logit(no); sentences are shaded by their own P(yes)"
    : "P(yes) and margin, logit(yes) − logit(no)";
  document.getElementById("before").replaceChildren(...answer.passages.map(beforeItem));
  document.getElementById("after").replaceChildren(...ranked(answer).map(afterItem));
}

function showFacts(facts) {
  const rows = facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  document.getElementById("numbers").replaceChildren(...rows);
}

function countStatuses(answer) {
  const counts = new Map();
  for (const { status } of answer.passages) counts.set(status, (counts.get(status) ?? 0) + 1);
  return [...counts].map(([status, count]) => `${number(count)} ${status}`).join(", ");
}

function beforeItem(passage, index) {
  const change = move(index + 1, passage.rank);
  const link = make("a", { href: `#after-${passage.rank}`, title: "Show it in the new order" }, `→ ${passage.rank}`);
  link.append(make("span", { class: "unseen" }, ` is its new place, ${change.said}`));
  return make(
    "li",
    { class: "before" },
    make("span", { class: "place", "aria-hidden": "true" }, String(index + 1)),
    make("span", { class: "clipped" }, passage.text),
    make("span", { class: `move ${change.kind}` }, link),
  );
}

function afterItem(passage) {
  const change = move(passage.before, passage.rank);
  const head = make(
    "p",
    { class: "head" },
    make("span", { class: "place", "aria-hidden": "true" }, String(passage.rank)),
    make("span", { class: `move ${change.kind}`, title: `It was ${passage.before} before` }, change.sign),
    make("span", { class: "unseen" }, change.said),
    make("strong", { class: "score" }, passage.score.toFixed(4)),
    make("span", { class: "margin" }, signed(passage.margin)),
    meter(passage.score),
  );
  const facts = [`${passage.status}: ${STATUSES[passage.status]}`, bytes(passage.n_bytes)];
  if (passage.name !== null) facts.unshift(passage.name);
  if (passage.window !== null) {
    const [start, end] = passage.window;
    facts.push(`best window: characters ${number(start + 1)} to ${number(end)}`);
  }
  const foot = make("p", { class: "hint" }, facts.join(" · "));
  return make("li", { id: `after-${passage.rank}`, tabindex: "-1" }, head, ...text(passage), foot);
}

/** Return the text's parts: those with a score say it, and the better ones are shaded. */
function shaded({ text, spans }) {
  if (spans === null) return [text];
  // Positions count code points, not JavaScript's units.
  const points = Array.from(text);
  const parts = [];
  let place = 0;
  for (const { start, end, score } of spans) {
    parts.push(points.slice(place, start).join(""));
    const level = SHADES.filter((least) => score >= least).length;
    const said = score.toFixed(2);
    const attributes = { class: `sentence level-${level}`, title: `P(yes) of this sentence: ${said}` };
    if (level) attributes["data-score"] = said;
    parts.push(make(level ? "mark" : "span", attributes, points.slice(start, end).join("")));
    place = end;
  }
  parts.push(points.slice(place).join(""));
  return parts;
}

function meter(score) {
  const element = make("meter", { min: "0", max: "1", "aria-label": "P(yes)" });
  element.value = score;
  return element;
}

/** Return the text, and a button that shows all of it if it is long. */
function text(passage) {
  const paragraph = make("p", { class: "text" }, ...shaded(passage));
  if (passage.text.length <= LONG || passage.spans !== null) return [paragraph];
  paragraph.classList.add("clipped", "many");
  const button = make("button", { type: "button", class: "more", "aria-expanded": "false" }, "Show all of it");
  button.addEventListener("click", () => {
    const isWhole = !paragraph.classList.toggle("clipped");
    button.setAttribute("aria-expanded", String(isWhole));
    button.textContent = isWhole ? "Show less" : "Show all of it";
  });
  return [paragraph, button];
}

function move(before, after) {
  if (before === after) return { kind: "same", sign: "=", said: "at the same place" };
  const places = Math.abs(before - after);
  const [kind, arrow] = after < before ? ["up", "▲"] : ["down", "▼"];
  return { kind, sign: `${arrow} ${places}`, said: `${kind} by ${places}` };
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

function milliseconds(seconds) {
  const n = 1000 * seconds;
  return `${number(n, n < 10 ? 1 : 0)} ms`;
}
