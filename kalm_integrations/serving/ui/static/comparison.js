// The table of settings that were asked for: what encodings take, and how the same passages score.

import { number } from "./passages.js";
import { bytes, make, ranked, sizes } from "./result.js";

const MAX_ROWS = 10;
const MAX_NAME = 60;

/** Answers to one question under several settings. */
export class Comparison {
  #question = "";
  #answers = new Map();

  /** Add an answer; the answers to another question go. */
  add(question, answer) {
    if (question !== this.#question) this.#answers.clear();
    this.#question = question;
    this.#answers.set(`${answer.ratio} · ${answer.codec}`, answer);
  }

  /** Draw the table; rows are the best passages of the answer that is shown. */
  show(shown) {
    const byRatioAndSize = ([, one], [, other]) => one.ratio - other.ratio || sizes(other).total - sizes(one).total;
    const columns = [...this.#answers].sort(byRatioAndSize);
    const heads = columns.map(([name, answer]) => {
      const attributes = { scope: "col" };
      if (answer === shown) attributes["aria-current"] = "true";
      return make("th", attributes, name);
    });
    const rows = [
      row("Bytes a passage", columns, ([, answer]) => number(Math.round(sizes(answer).mean))),
      row("In all", columns, ([, answer]) => bytes(sizes(answer).total)),
      row("Times the text", columns, ([, answer]) => number(sizes(answer).total / Math.max(sizes(answer).text, 1), 1)),
    ];
    const best = ranked(shown).slice(0, MAX_ROWS);
    const scores = best.map((passage) =>
      row(`${passage.rank}. ${beginning(passage.text)}`, columns, ([, answer]) => {
        const there = answer.passages[passage.before - 1];
        const cell = [there.score.toFixed(4)];
        if (there.rank !== passage.rank) cell.push(make("span", { class: "elsewhere" }, ` at ${there.rank}`));
        return cell;
      }),
    );
    document.getElementById("settings").replaceChildren(
      make("caption", { class: "unseen" }, "Sizes and scores by ratio and codec"),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "ratio · codec"), ...heads)),
      make("tbody", {}, ...rows, ...scores),
    );
  }
}

function beginning(text) {
  const points = Array.from(text);
  return points.length > MAX_NAME ? `${points.slice(0, MAX_NAME).join("")} …` : text;
}

function row(name, columns, cell) {
  const cells = columns.map((column) => make("td", {}, ...[cell(column)].flat()));
  return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
}
