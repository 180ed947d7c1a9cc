"use strict";
const { adapters, tokens, blocks } = JSON.parse(document.getElementById("data").textContent);
const answer = tokens.findIndex((token) => token.answer);  // -1: the answer is empty
const largest = Math.max(1e-9, ...blocks.flatMap((block) => block.cells.map((cell) => cell.size)));
const table = document.querySelector("table"), scroller = document.querySelector(".scroller");

// Helpers. All text goes through append(), so none is parsed as HTML.
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
function fill(id, ...children) {  // a panel never shrinks, so that the page does not jump under the pointer
  const node = document.getElementById(id);
  node.replaceChildren(...children);
  node.style.minHeight = Math.max(parseFloat(node.style.minHeight) || 0, node.offsetHeight) + "px";
}
function marked(label) {  // marks for invisible characters are paler than the text
  const parts = label.split(/([·↵⇥]|‹[^›]*›)/).filter(Boolean);
  return parts.map((part) => parts.length > 1 && /^([·↵⇥]|‹.*›)$/.test(part) ? make("span", "mark", part) : part);
}
function chip(label) {
  const node = make("span", "chip", ...marked(label));
  node.title = label;
  return node;
}
function bare(label) { return label.replace(/^·(?=.)/, ""); }
function share(node, value) {
  node.style.setProperty("--share", 100 * Math.min(1, value) + "%");
  return node;
}
function percent(value) {
  const p = 100 * value;
  if (p > 0 && p < 0.01) return "<0.01%";
  if (p > 99.9 && p < 100) return ">99.9%";
  return p.toFixed(p === 0 ? 0 : p < 1 ? 2 : p < 10 || (p > 99 && p < 100) ? 1 : 0) + "%";
}
function bars(gates) {  // a bar per gate, and a gap between adapters
  const paths = { track: "", open: "" };
  let x = 0;
  const bar = (kind, height) => { paths[kind] += "M" + x + " 100v-" + height + "h.8v" + height + "z"; };
  for (const values of Object.values(gates)) {
    if (x) x += 0.8;
    for (const w of values) { bar("track", 100); bar("open", Math.max(3, 100 * w)); x += 1; }
  }
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of [["viewBox", "0 0 " + Math.max(1, x - 0.2) + " 100"], ["preserveAspectRatio", "none"], ["class", "bars"]])
    svg.setAttribute(name, value);
  for (const [kind, d] of Object.entries(paths)) {
    const path = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
  }
  return svg;
}

// The grid: row 0 has the tokens, then there is a row per block, then how much the next token changed.
function place(node, row, i, description) {
  const { label, answer, edited } = tokens[i];
  Object.assign(node.dataset, { row, i });
  node.tabIndex = -1;
  node.setAttribute("aria-label", bare(label) + ", " + (edited ? description : "not edited"));
  node.classList.toggle("answer", answer);
  node.classList.toggle("plain", !edited);
  return node;
}
function line(tag, className, head, cells) {
  const row = make("tr", className, head);
  cells.forEach((cell, i) => row.append(...(i === answer ? [make(tag, "gap"), cell] : [cell])));
  return row;
}
function rowHead(text, title) {
  const node = make("th", "", text);
  node.scope = "row";
  node.title = title;
  return node;
}
function partHead(className, text, span) {
  const node = make("th", className, make("span", "", text));
  node.colSpan = span;
  return node;
}
function spoken(gates) {
  return Object.entries(gates).map(([name, w]) => ", " + name + " gates " + w.map((x) => x.toFixed(2)).join(" ")).join("");
}
function blockCell(cell, row, i, block) {
  const acts = Object.keys(cell.gates).length > 0, size = percent(cell.size);
  const node = acts ? make("td", "cell", bars(cell.gates), make("b", "", size)) : make("td", "cell");
  node.style.setProperty("--tint", acts ? 3 + 47 * cell.size / largest + "%" : "0%");
  return place(node, row, i, block.label + (acts ? ": update " + size + spoken(cell.gates) : ": not edited here"));
}
function movedCell(token, row, i) {
  const moved = percent(token.moved), meter = make("span", "meter", share(make("i"), token.moved));
  return place(token.edited ? make("td", "move", meter, make("b", "", moved)) : make("td", "move"), row, i, "next token moved " + moved);
}
function draw() {
  const prompt = answer < 0 ? tokens.length : answer;
  const parts = make("tr", "part", make("th"), partHead("", "prompt", prompt));
  if (answer >= 0) parts.append(make("th", "gap"), partHead("answer", "answer", tokens.length - prompt));
  const chips = tokens.map((token, i) => place(make("th", "", chip(token.label)), 0, i, "edited"));
  const body = make("tbody", "", ...blocks.map((block, b) => line("td", "", rowHead(block.label, block.name),
    block.cells.map((cell, i) => blockCell(cell, b + 1, i, block)))));
  body.append(line("td", "", rowHead("next token", "How much of the next token's probability the edits moved"),
    tokens.map((token, i) => movedCell(token, blocks.length + 1, i))));
  table.append(make("thead", "", parts, line("th", "chips", make("th", "corner"), chips)), body);
}

// The panels: everything about one token.
function candidate(change, said) {
  const pair = make("div", "pair", share(make("i"), change.before), share(make("i"), change.after));
  const numbers = make("div", "numbers", percent(change.before) + " → ", make("b", "", percent(change.after)));
  return make("div", "candidate" + (said ? " said" : ""), chip(change.label), pair, numbers);
}
function showNext(i) {
  const token = tokens[i], next = tokens[i + 1];
  fill("next-title", "What comes after “", ...marked(bare(token.label)), "”");
  fill("next-hint", token.edited
    ? "Probability of the next token: grey without the edits, coloured with them." + (next ? " Framed: the actual next token." : "")
    : "Neither this token nor an earlier one is edited, so the next token is unchanged.");
  const grown = token.changes.filter((change) => change.after > change.before);
  const shrunk = token.changes.filter((change) => change.after <= change.before).reverse();
  fill("next", ...[["more likely with the edits", grown], ["less likely with the edits", shrunk]].flatMap(([title, list]) =>
    list.length ? [make("h3", "", title), ...list.map((change) => candidate(change, next && change.id === next.id))] : []));
}
function gateColumns(name, values) {
  const columns = values.map((w) => make("div", "", make("span", "", share(make("i"), w)), w.toFixed(2)));
  return [...(adapters.length > 1 ? [make("p", "hint", name)] : []), make("div", "gates", ...columns)];
}
function showInside(i, row) {
  fill("inside-title", "What the blocks do to “", ...marked(bare(tokens[i].label)), "”");
  fill("inside-hint", tokens[i].edited ? "Each gate, from 0 (closed) to 1 (open), and the norm of the resulting update."
    : "Nothing: it is before the edited part of the prompt.");
  fill("inside", ...(tokens[i].edited ? blocks : []).map((block, b) => {
    const { size, gates } = block.cells[i];
    const title = make("h3", "", block.label, make("span", "", "update " + percent(size) + " of the hidden vector"));
    title.title = block.name;
    return make("div", "block" + (b + 1 === row ? " on" : ""), title, ...Object.entries(gates).flatMap(([name, w]) => gateColumns(name, w)));
  }));
}

// Pointing shows a cell; clicking, focus and the arrow keys select it.
let selected = [0, (answer < 0 ? tokens.length : answer) - 1];
function find(row, i) { return table.querySelector("[data-row='" + row + "'][data-i='" + i + "']"); }
function placeOf(event) {
  const node = event.target.closest("[data-i]");
  return node && [Number(node.dataset.row), Number(node.dataset.i)];
}
function show(row, i) {
  table.querySelectorAll(".here").forEach((node) => node.classList.remove("here"));
  find(0, i).classList.add("here");
  find(row, i).classList.add("here");
  showNext(i);
  showInside(i, row);
}
function select(row, i) {
  find(...selected).tabIndex = -1;
  find(...selected).removeAttribute("aria-selected");
  selected = [row, i];
  find(row, i).tabIndex = 0;
  find(row, i).setAttribute("aria-selected", "true");
  show(row, i);
}
function move(key) {
  const [row, i] = selected, end = tokens.length - 1;
  const to = { ArrowRight: [row, i + 1], ArrowLeft: [row, i - 1], ArrowDown: [row + 1, i], ArrowUp: [row - 1, i], Home: [row, 0], End: [row, end] }[key];
  return to && find(...to);
}
draw();
const [, i, row] = location.hash.match(/^#(\d+)(?:\.(\d+))?$/) || [];  // #4.2 opens token 4 in the second block
select(...(i && find(row || 0, i) ? [Number(row || 0), Number(i)] : selected));
scroller.scrollLeft = find(...selected).offsetLeft - scroller.clientWidth / 2;
table.addEventListener("pointerover", (event) => { if (placeOf(event)) show(...placeOf(event)); });
table.addEventListener("pointerleave", () => show(...selected));
table.addEventListener("focusin", (event) => { if (placeOf(event)) select(...placeOf(event)); });
table.addEventListener("click", (event) => { if (placeOf(event)) find(...placeOf(event)).focus(); });
table.addEventListener("keydown", (event) => {
  const node = move(event.key);
  if (!node) return;
  event.preventDefault();
  node.focus();
  node.scrollIntoView({ block: "nearest", inline: "center" });
});
