"use strict";
// The contents of the panels about a character: each function returns elements for values that are computed elsewhere.

const LIKELIEST = 10; // candidates in a list
const STRONGEST = 8; // units in a list

const hint = (text) => el("p", { class: "muted small" }, text);
const visible = (text) => text.replaceAll("\n", "↵");

// Return the likeliest candidates with two bars each: `before` and `after` are probabilities by id. `chosen` is the id
// of the character in the text; `choose(id)` is called for another one.
function candidateList(characters, before, after, chosen, choose) {
  const ids = largest(before, LIKELIEST);
  if (!ids.includes(chosen)) ids.push(chosen);
  const top = Math.max(...ids.map((id) => Math.max(before[id], after[id])));
  const rows = ids.map((id) => {
    const own = id === chosen, c = characters[id];
    const chances = `${percent(before[id])}, ${after[id] ? `${percent(after[id])} after filters` : "filtered out"}`;
    const action = own ? "this is the character of the text" : "rewrite from here";
    return el("li", {}, el("button", {
      type: "button", class: `candidate${own ? " own" : ""}${after[id] ? "" : " out"}`,
      "aria-label": `${spoken(c)}: ${chances}; ${action}`, onclick: () => own || choose(id),
    },
    el("span", { class: "glyph prose", "aria-hidden": "true" }, glyph(c)),
    el("span", { class: "bars" }, bar("before", before[id] / top), bar("after", after[id] / top)),
    el("span", { class: "figures", "aria-hidden": "true" },
      el("span", {}, percent(before[id])), el("b", {}, after[id] ? percent(after[id]) : "—"))));
  });
  const key = [["before", "the model’s probability"], ["after", "after temperature and filters"]];
  return [
    el("p", { class: "key" }, key.map(([kind, name]) => el("span", {}, el("i", { class: `swatch ${kind}` }), name))),
    el("ol", { class: "candidates" }, rows),
    hint("Choose another character to rewrite the text from here."),
  ];
}

// Return a button with a small chart of the attention of a head, or of the mean of all heads.
function headButton(name, weights, chosen, description, choose) {
  const width = 64, shown = peaks(weights, width), highest = Math.max(...shown);
  const height = (w) => Math.max(0.4, (w / highest) * 22).toFixed(1);
  const bars = shown.map((w, t) => `M${width - shown.length + t + 0.5} 24v-${height(w)}`).join("");
  const all = name === null;
  return el("button", {
    type: "button", role: "radio", class: `head${all ? " mean" : ""}`, title: name ?? "Mean of all heads",
    "aria-label": `${name ?? "Mean of all heads"}: ${description}`,
    "aria-checked": String(chosen), tabindex: chosen ? 0 : -1, onclick: choose,
  }, all ? el("span", { class: "row-name" }, "all heads") : null,
  svg("svg", { viewBox: `0 0 ${width} 25`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { d: bars })));
}

// Return the five characters before `index` with the most attention; `first` is the index of the first weight.
function attentionPlaces(sheet, index, { first, weights }) {
  const around = (from, to) => visible(sheet.string(Math.max(0, from), to));
  const rows = largest(weights, 5).map((t) => {
    const at = first + t, mark = el("mark", {}, glyph(sheet.character(at)));
    const quote = [around(at - 8, at), mark, around(at + 1, Math.min(index, at + 9))];
    return el("li", {}, el("span", { class: "quote prose", dir: "auto" }, quote),
      el("span", { class: "muted" }, `${index - at} back`), el("b", {}, percent(weights[t])));
  });
  return el("ol", { class: "places", "aria-label": "Characters with the most attention" }, rows);
}

// Return a table of the predictions after each block, the logit lens; `own` is the id of the character in the text.
function lensTable(lens, characters, own) {
  const guess = (id, p) => el("span", { class: `guess prose${id === own ? " own" : ""}`, "--p": p },
    glyph(characters[id]), el("small", {}, percent(p)));
  const rows = lens.map((logits, layer) => {
    const p = softmax(logits);
    return el("tr", {}, el("th", { scope: "row" }, String(layer + 1)),
      el("td", {}, el("div", { class: "guesses" }, largest(p, 5).map((id) => guess(id, p[id])))),
      el("td", { class: "number" }, percent(p[own])));
  });
  const head = [["", "block"], ["", "likeliest characters"], ["number", spoken(characters[own])]];
  return el("table", { class: "lens" }, el("caption", {}, "What the model would predict if it ended after a block"),
    el("thead", {}, el("tr", {}, head.map(([kind, name]) => el("th", { scope: "col", class: kind }, name)))),
    el("tbody", {}, rows));
}

// Return the units with the largest activations: {layer, unit, value}, the largest first.
function strongestUnits(units) {
  const all = units.flatMap((values, layer) =>
    largest(values.map(Math.abs), STRONGEST).map((unit) => ({ layer, unit, value: values[unit] })));
  return all.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, STRONGEST);
}

function unitList(strongest, chosen, choose) {
  const top = Math.abs(strongest[0].value) || 1;
  const rows = strongest.map((entry) => el("li", {}, el("button", {
    type: "button", class: `unit${entry.value < 0 ? " negative" : ""}`, onclick: () => choose(entry),
    "aria-pressed": String(sameUnit(entry, chosen)),
  },
  el("span", {}, unitName(entry)), el("span", { class: "bars" }, bar("after", Math.abs(entry.value) / top)),
  el("b", {}, fixed(entry.value)))));
  return el("section", {}, el("h3", { class: "label" }, "Units that react most when the model reads it"),
    el("ol", { class: "units" }, rows), hint("Choose a unit to shade the text by its activation."));
}

const sameUnit = (a, b) => a?.layer === b?.layer && a?.unit === b?.unit;
const unitName = ({ layer, unit }) => `block ${layer + 1}, unit ${unit}`;
const headName = ({ layer, head }) => `block ${layer + 1}, head ${head + 1}`;

// Return the copied runs of a text, the longest first, each with its place in the training text.
function copiedList(sheet, corpus) {
  const { runs } = sheet, written = sheet.length - sheet.given;
  if (!runs.length) return hint("No run of 12 or more characters of the written text occurs in the training text.");
  const covered = new Set(runs.flatMap(({ start, length }) => Array.from({ length }, (_, i) => start + i))).size;
  const ordered = [...runs].sort((a, b) => b.length - a.length), quote = (text) => text.replaceAll("\n", " ↵ ");
  const rows = ordered.slice(0, 40).map(({ start, source, text }) => {
    const line = corpus.slice(0, source).split("\n").length, end = source + text.length;
    return el("li", {}, el("button", { type: "button", class: "run", onclick: () => sheet.select(start) },
      el("span", { class: "quote prose", dir: "auto" }, `…${quote(corpus.slice(Math.max(0, source - 30), source))}`,
        el("mark", {}, quote(text)), `${quote(corpus.slice(end, end + 30))}…`),
      el("span", { class: "muted small" }, `${text.length} characters, line ${whole(line)} of the training text`)));
  });
  return [el("p", { class: "small" }, `${percent(covered / written)} of the written text are runs of 12 and more ` +
    `characters that occur in the training text. The longest has ${ordered[0].text.length}.`),
  el("ol", { class: "runs" }, rows)];
}
