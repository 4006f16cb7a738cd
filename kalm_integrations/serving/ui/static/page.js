// The page: what is asked, and what is shown.

import { Comparison } from "./comparison.js";
import { Problem, number, readFile, readPassages } from "./passages.js";
import { make, showResult, summarise } from "./result.js";

const EXAMPLE = {
  query: "What do plants need for photosynthesis?",
  passages: [
    "Photosynthesis was discovered step by step. Ingenhousz found in 1779 that plants need light.",
    "A factory needs workers and machines. Both of them cost money.",
    "Many plants are pollinated by bees. Without bees there would be fewer apples and cherries.",
    "Green plants make sugar from what is around them. For photosynthesis they need light, water and carbon dioxide.",
    "Carbon dioxide is a gas without colour. The air holds about 0.04 percent of it.",
  ],
};

const RETRY_MILLISECONDS = 700;

const byId = (id) => document.getElementById(id);
const comparison = new Comparison();
let facts = null;
let chosen = [];
let asking = null;
let isAsked = false;

/** Ask the service; what it refuses is a Problem with its reason. */
async function call(path, body, signal) {
  const headers = {};
  const key = byId("key").value;
  if (key && !/^[!-~]+$/.test(key)) throw new Problem("A key must be of printable ASCII characters without spaces.");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer. Start kalm ui again, or wait if it is busy, and ask once more.");
  }
  if (response.ok) return answer;
  const problem = new Problem(capitalised(String(answer.detail)));
  problem.status = response.status;
  throw problem;
}

/** Ask what there is to rank with, until the model is loaded. */
async function load() {
  try {
    facts = await call("facts");
  } catch (error) {
    if (error.status !== 503) report(error);
    // A key that is missing or wrong is asked for; the rest may come.
    if (error.status !== 401) setTimeout(load, RETRY_MILLISECONDS);
    return;
  }
  report(null);
  byId("model").textContent = `${facts.model}, kalm-integrations ${facts.version}`;
  fill("ratio", facts.ratios, facts.ratio);
  fill("codec", facts.codecs, facts.codec);
  const { collection } = facts;
  if (collection === null || !byId("collection-choice").hidden) return;
  const { name, n_passages: count, limit, first_stage: stage } = collection;
  const ranks = stage === null ? "" : `, of which the ${number(limit)} best by ${stage} are ranked`;
  byId("collection-name").textContent = `${name}: ${number(count)} passages${ranks}`;
  byId("collection-choice").hidden = false;
  document.querySelector("input[value=collection]").checked = true;
  showSource();
}

function fill(name, values, own) {
  const options = values.map((value) => make("option", { value }, value === own ? `${value} (as served)` : String(value)));
  byId(name).replaceChildren(...options);
  if (values.length) byId(name).value = own;
  byId(`${name}-field`).hidden = values.length === 0;
}

/** Show a problem, and go where it can be put right; null: there is none. */
function report(error, field = null) {
  for (const invalid of document.querySelectorAll("[aria-invalid]")) invalid.removeAttribute("aria-invalid");
  byId("problem").hidden = error === null;
  byId("problem").textContent = error === null ? "" : error.message;
  if (error !== null && error.status === 401) {
    byId("key-field").hidden = false;
    field = "key";
  }
  if (field !== null) {
    byId(field).setAttribute("aria-invalid", "true");
    byId(field).focus();
  }
}

/** Return the passages to rank; undefined: those that the service has. Throws a Problem. */
function passages(source) {
  if (source === "collection") return undefined;
  const given = source === "file" ? chosen : readPassages(byId("pasted").value);
  if (!given.length) throw new Problem("There are no passages yet: paste some, or choose a file.");
  if (facts && given.length > facts.max_documents) {
    const limit = number(facts.max_documents);
    throw new Problem(`At most ${limit} passages are ranked at a time, but there are ${number(given.length)}.`);
  }
  return given;
}

function source() {
  return document.querySelector("input[name=source]:checked").value;
}

/** Return what is asked, or null if something is missing, which is said. */
function question() {
  const query = byId("query").value;
  if (!query.trim()) {
    report(new Problem("Type a question first."), "query");
    return null;
  }
  try {
    return { query, passages: passages(source()), instruction: byId("instruction").value.trim() || null };
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    report(error, source() === "collection" ? null : source());
    return null;
  }
}

/** Ask under settings, one after the other; the last one's answer is shown. A new question ends an older one. */
async function ask(settings) {
  asking?.abort();
  const asked = question();
  if (asked === null) return;
  const own = new AbortController();
  asking = own;
  byId("results").setAttribute("aria-busy", "true");
  byId("ask").textContent = "Asking …";
  try {
    for (const setting of settings) {
      const started = performance.now();
      // Sentences take time, and are shown of the last answer only.
      const spans = setting === settings.at(-1) ? Number(byId("spans").value) : 0;
      const answer = await call("rank", { ...asked, ...setting, spans: spans || null }, own.signal);
      show(asked, answer, (performance.now() - started) / 1000);
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Problem)) throw error;
    report(error);
  } finally {
    if (asking === own) {
      byId("results").removeAttribute("aria-busy");
      byId("ask").textContent = "Ask";
    }
  }
}

function show(asked, answer, roundTrip) {
  report(null);
  isAsked = true;
  showResult(answer, roundTrip);
  byId("summary").textContent = summarise(answer, facts?.model ?? "the model");
  byId("comparison").hidden = answer.ratio === null;
  if (answer.ratio !== null) {
    comparison.add(JSON.stringify([asked, answer.passages.map((passage) => passage.name)]), answer);
    comparison.show(answer);
    byId("ratio").value = answer.ratio;
    byId("codec").value = answer.codec;
  }
  byId("results").hidden = false;
}

function setting() {
  return byId("ratio").value ? { ratio: Number(byId("ratio").value), codec: byId("codec").value } : {};
}

/** Return the settings of a select's options, the present one last, so that it stays what is shown. */
function settingsOf(name) {
  const present = setting();
  const values = [...byId(name).options].map(({ value }) => (name === "ratio" ? Number(value) : value));
  return [...values.filter((value) => value !== present[name]).map((value) => ({ ...present, [name]: value })), present];
}

function showSource() {
  byId("pasted-part").hidden = source() !== "pasted";
  byId("file-part").hidden = source() !== "file";
}

async function choose() {
  chosen = [];
  byId("file-note").textContent = "";
  const [file] = byId("file").files;
  if (!file) return;
  try {
    chosen = readPassages(await readFile(file, facts?.max_body_bytes ?? Infinity), file.name);
    byId("file-note").textContent = `${number(chosen.length)} passages`;
    report(null);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    report(error, "file");
  }
}

function askAgain() {
  if (isAsked) ask([setting()]);
}

function capitalised(message) {
  return message.charAt(0).toUpperCase() + message.slice(1);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask([setting()]);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask([setting()]);
  }
});
for (const name of ["ratio", "codec"]) {
  byId(name).addEventListener("change", askAgain);
  byId(`all-${name}s`).addEventListener("click", () => ask(settingsOf(name)));
}
byId("spans").addEventListener("change", askAgain);
for (const radio of document.querySelectorAll("input[name=source]")) radio.addEventListener("change", showSource);
byId("file").addEventListener("change", choose);
byId("key").addEventListener("change", load);
byId("example").addEventListener("click", () => {
  byId("query").value = EXAMPLE.query;
  byId("pasted").value = EXAMPLE.passages.join("\n");
  byId("query").focus();
});
showSource();
load();
