// From what was pasted or chosen to passages: {text, encoding}, as `kalm rerank` reads them.

/** What the user can put right; the message says how. */
export class Problem extends Error {}

/**
 * Read passages: JSON lines or a JSON array if the text begins like one, else one passage a line.
 * @param {string} text what was pasted, or a file's content
 * @param {string} name of the file; "" for what was pasted
 */
export function readPassages(text, name = "") {
  const content = text.replace(/^\ufeff/, "");
  const isPlain = /\.txt$/i.test(name);
  if (!isPlain && /^\s*\[\s*\{/.test(content)) return readArray(content);
  if (!isPlain && (/\.(jsonl|ndjson|json)$/i.test(name) || /^\s*\{/.test(content))) return readLines(content, readObject);
  return readLines(content, (line) => ({ text: line }));
}

/** Return the text of a file, which must be UTF-8. */
export async function readFile(file, maxBytes) {
  if (file.size > maxBytes) {
    throw new Problem(`A file may have ${number(maxBytes)} bytes at most, but ${file.name} has ${number(file.size)}.`);
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Problem(`${file.name} must be UTF-8 text, one passage a line or JSON lines, but is not.`);
  }
}

function readLines(content, read) {
  const passages = [];
  content.split("\n").forEach((ended, index) => {
    const line = ended.replace(/\r$/, "");
    if (line.trim()) passages.push(read(line, `Line ${index + 1}`));
  });
  return passages;
}

function readArray(content) {
  return parse(content, "The text").map((row, index) => toPassage(row, `Object ${index + 1}`));
}

function readObject(line, place) {
  return toPassage(parse(line, place), place);
}

function parse(text, place) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Problem(`${place} must be JSON, because the text begins like it, but cannot be parsed.`);
  }
}

/** Title and text are joined by a space, as in BEIR. */
function toPassage(row, place) {
  const { text, title, kalm_encoding: encoding } = Object(row);
  if (typeof text !== "string") throw new Problem(`${place} must be a JSON object with a string under "text".`);
  const isTitled = typeof title === "string" && title !== "";
  const passage = { text: isTitled ? `${title} ${text}`.trim() : text };
  return typeof encoding === "string" ? { ...passage, encoding } : passage;
}

/** Return a number with separators. */
export function number(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
