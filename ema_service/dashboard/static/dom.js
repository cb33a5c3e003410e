// Building blocks of a page.
//
// Everything that came from the service enters a page as text (textContent), never as markup: the names of runs and
// tensors are a stranger's words. Nodes are kept and changed in place, so that focus and selection survive.

import { NOTHING } from "./words.js";

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** Write a text. Writing the same text again would throw away the reader's selection. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A text that may be long: shown whole where there is room, and wrapped anywhere. */
export const name = (text) => element("bdi", "name-text", text);

/**
 * Fill a table's body with rows of texts and nodes. A cell is told by its column's heading where there is no room for
 * columns. `key`: a text that differs where a row differs; rows that are the same stay as they are.
 */
export function fill(table, rows, key = (row) => row.map((cell) => cell.textContent ?? cell).join("\u0000")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    if (row.dataset.key === key(cells)) return;
    row.dataset.key = key(cells);
    row.replaceChildren(...cells.map((content, j) => cell(content, headings[j])));
  });
}

function cell(content, heading) {
  const made = element("td", heading.className, content);
  made.dataset.label = heading.textContent;
  return made;
}

/** A table without rows. headings: texts, or [text, class]. */
export function table(label, headings) {
  const made = element("table", "inner");
  made.setAttribute("aria-label", label);
  const row = made.createTHead().insertRow();
  for (const heading of headings) {
    const [text, className] = Array.isArray(heading) ? heading : [heading, ""];
    const th = element("th", className, text);
    th.scope = "col";
    row.append(th);
  }
  made.append(element("tbody"));
  return made;
}

/** Fill a <dl> with pairs of term and text; a pair whose text is null is left out. */
export function facts(list, pairs) {
  const shown = pairs.filter(([, text]) => text !== null);
  while (list.children.length > shown.length) list.lastChild.remove();
  shown.forEach(([term, text], i) => {
    const pair = list.children[i] ?? list.appendChild(element("div", "", element("dt"), element("dd")));
    say(pair.firstChild, term);
    say(pair.lastChild, text ?? NOTHING);
  });
}

/** A line to copy, with a button that copies it. */
export function line(text, label = "Copy") {
  const code = element("code", "", text);
  const button = element("button", "copy", label);
  button.type = "button";
  button.setAttribute("aria-label", `Copy: ${text.split("\n")[0]}`);
  button.addEventListener("click", async () => {
    await copy(text, code);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  const pre = element("pre", "", code);
  pre.tabIndex = 0;
  return element("div", "line", pre, button);
}

// The clipboard is for secure pages only; elsewhere the line is selected, and the keyboard copies it.
async function copy(text, code) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  getSelection().selectAllChildren(code);
  return document.execCommand("copy");
}
