"use strict";
// The comparison of experiments. The losses of a pair are compared segment by segment: a segment is one character, or
// several of a long text. A difference is the loss of the second experiment minus that of the first, in nats.

const facts = JSON.parse($("facts").textContent);
const WINDOW = 2500; // characters of the text on the screen
const STRETCH = 250; // characters in which a model gains, a divisor of WINDOW
const FULL = 1.5; // nats: a character with this difference or more has the strongest shade
const SHOWN = 14; // characters in the list of those that make the difference

// Return the losses in nats: two little-endian bytes each in thousandths, in base64.
function unpack(encoded) {
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 2 }, (_, n) => view.getUint16(2 * n, true) / 1000);
}

const losses = facts.nats.map(unpack);
const characters = facts.text === null ? [] : Array.from(facts.text);

function showResults() {
  $("title").textContent = facts.names.join(" and ");
  $("noscript").remove();
  $("verdicts").append(...facts.pairs.map(({ verdict }) => el("li", {}, verdict)));
  const row = ([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell)));
  const head = el("tr", {}, el("td", {}), facts.names.map((name) => el("th", { scope: "col" }, name)));
  $("results").append(el("thead", {}, head), el("tbody", {}, facts.results.map(row)),
    el("tbody", { class: "params" }, facts.params.map(row)));
}

// Without the evaluation before the training, which would flatten the rest.
function showCurves() {
  const known = facts.histories.map((rows) => rows.filter((row) => row.step > 0));
  if (!known.some((rows) => rows.length > 1)) {
    return $("curves").append("No training has two evaluations after step 0, so there is no curve.");
  }
  const series = known.map((rows) => ({ points: rows.map((row) => [row.step, row.val_loss]) }));
  const label = "Validation loss at each evaluation of " + facts.names.join(" and ");
  const chart = lineChart(() => ({ label, xName: "step", yName: "nats per character", series }));
  $("curves").append(chart, lineKey(facts.names));
  chart.draw();
}

// A pair of experiments: the differences of their losses, and how the page shows them.
class Pair {
  constructor({ models: [first, second] }) {
    this.names = [facts.names[first], facts.names[second]];
    this.losses = [losses[first], losses[second]];
    this.differences = this.losses[1].map((nats, n) => nats - this.losses[0][n]);
  }

  // Which model predicts better, as the class that gives the color.
  side(difference) {
    return difference > 0 ? "first" : "second";
  }

  key() {
    const name = (side, text) => el("span", {}, el("i", { class: `swatch ${side}` }), `${text} is better`);
    return el("p", { class: "key" }, name("first", this.names[0]), name("second", this.names[1]));
  }

  // Return bars to the left and to the right: [name, difference, hidden text after the name].
  bars(rows) {
    const top = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-9);
    return el("dl", { class: "signed" }, rows.map(([name, value, more = ""]) => el("div", { title: more },
      el("dt", {}, name, el("span", { class: "hidden" }, ` ${more}`)), bar(this.side(value), Math.abs(value) / top),
      el("dd", {}, signed(value, 4)))));
  }

  // What a difference is, in a sentence.
  definition() {
    return `Loss of ${this.names[1]} minus loss of ${this.names[0]}: below 0, ${this.names[1]} is better.`;
  }

  showParts() {
    const size = this.differences.length, parts = Math.min(facts.batches, size);
    const rows = Array.from({ length: parts }, (_, n) => {
      const [begin, end] = [n, n + 1].map((k) => Math.floor((k * size) / parts));
      return [String(n + 1), mean(Array.from(this.differences.subarray(begin, end)))];
    });
    $("parts").replaceChildren(el("h3", { class: "label" }, `In ${parts} consecutive parts of the text`), this.key(),
      this.bars(rows), el("p", { class: "muted small" }, `${this.definition()} In nats per character. `,
        "The interval follows from these parts: the more they agree, the narrower it is."));
  }

  // The characters that contribute most to the difference: their sum of differences, divided by all characters.
  showCharacters() {
    if (!characters.length) return;
    const sums = new Map();
    characters.forEach((c, n) => {
      const [total, count] = sums.get(c) ?? [0, 0];
      sums.set(c, [total + this.differences[n], count + 1]);
    });
    const rows = [...sums].sort((a, b) => Math.abs(b[1][0]) - Math.abs(a[1][0])).slice(0, SHOWN);
    const more = (c, [total, times]) =>
      `${spoken(c)}, ${plural(times, "time")}, ${signed(total / times, 3)} nats each`;
    $("characters").replaceChildren(el("h3", { class: "label" }, "The characters behind the difference"), this.key(),
      this.bars(rows.map(([c, found]) => [glyph(c), found[0] / characters.length, more(c, found)])),
      el("p", { class: "muted small" }, "Contribution to the difference: all characters together give the whole."));
  }
}

const signed = (value, digits) => (value > 0 ? "+" : value < 0 ? "−" : "") + fixed(Math.abs(value), digits);

// The validation text, one window at a time, shaded by which model predicts each character better.
class Reader {
  constructor() {
    this.sheet = el("div", {
      class: "text still prose", tabindex: 0, role: "listbox", "aria-label": "Validation text, by character",
      "aria-orientation": "horizontal",
    });
    this.status = el("p", { class: "stats", role: "status" });
    this.place = el("input", {
      type: "range", min: 0, max: Math.max(0, Math.ceil(characters.length / WINDOW) - 1), value: 0,
      "aria-label": "Place in the text",
      oninput: () => this.show(Number(this.place.value)),
    });
    this.buttons = el("div", { class: "actions" });
    this.sheet.addEventListener("click", (event) => this.select(event.target));
    this.sheet.addEventListener("keydown", (event) => {
      const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      if (!step) return;
      event.preventDefault();
      this.select(this.selected ? this.selected[step] : this.sheet.firstElementChild);
    });
    $("text").append(this.buttons, el("div", { class: "slider" }, this.place), this.status, this.sheet);
  }

  open(pair) {
    this.pair = pair;
    const jump = (text, sign) => {
      const at = this.extreme(sign), button = el("button", { type: "button" }, text);
      enable(button, at !== null);
      onPress(button, () => {
        this.show(Math.floor(at / WINDOW));
        this.select(this.sheet.children[at % WINDOW]);
      });
      return button;
    };
    this.buttons.replaceChildren(
      jump(`Where ${pair.names[0]} gains most`, 1), jump(`Where ${pair.names[1]} gains most`, -1),
      pair.key(), el("span", { class: "muted small" }, `strongest shade: ${FULL} nats or more`));
    this.show(Number(this.place.value));
  }

  // Return the start of the stretch with the largest mean difference of this sign, null if none has this sign.
  extreme(sign) {
    const { differences } = this.pair, stretches = Math.max(1, Math.floor(differences.length / STRETCH));
    const means = Array.from({ length: stretches }, (_, n) =>
      sign * mean(Array.from(differences.subarray(n * STRETCH, (n + 1) * STRETCH))));
    const [best] = largest(means, 1);
    return means[best] > 0 ? best * STRETCH : null;
  }

  show(window) {
    this.place.value = window;
    this.selected = null;
    this.first = window * WINDOW;
    const shown = characters.slice(this.first, this.first + WINDOW);
    this.sheet.scrollTop = 0;
    this.sheet.replaceChildren(...shown.map((c, n) => {
      const difference = this.pair.differences[this.first + n];
      const strength = Math.min(1, Math.abs(difference) / FULL);
      const kind = `c ${this.pair.side(difference)}${c === "\n" ? " newline" : ""}${strength > 0.3 ? " strong" : ""}`;
      return el("span", {
        class: kind, role: "option", "aria-label": BLANKS[c]?.[1], "--s": (strength * 0.85).toFixed(2),
      }, c);
    }));
    this.sheet.removeAttribute("aria-activedescendant");
    const average = mean(Array.from(this.pair.differences.subarray(this.first, this.first + shown.length)));
    const last = this.first + shown.length;
    const place = `Characters ${whole(this.first + 1)} to ${whole(last)} of ${whole(characters.length)}`;
    this.place.setAttribute("aria-valuetext", place);
    this.status.textContent = `${place}: ${signed(average, 4)} nats on average. Select a character for its losses.`;
  }

  select(span) {
    if (!span?.classList.contains("c")) return;
    this.selected?.classList.remove("selected");
    this.selected?.removeAttribute("id");
    this.selected = span;
    span.classList.add("selected");
    span.id = "selected";
    this.sheet.setAttribute("aria-activedescendant", span.id);
    span.scrollIntoView({ block: "nearest" });
    const at = this.first + Array.prototype.indexOf.call(this.sheet.children, span);
    const each = this.pair.names.map((name, n) => `${name} ${fixed(this.pair.losses[n][at], 3)}`).join(", ");
    this.status.textContent = `${spoken(characters[at])}, character ${whole(at + 1)}: ${each} nats`;
  }
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = () => (document.documentElement.dataset.theme = dark.matches ? "dark" : "light");
  dark.addEventListener("change", setTheme);
  setTheme();
  showResults();
  showCurves();
  const reader = characters.length ? new Reader() : null;
  if (!reader) $("text").append("The text is not shown: it is too long, or data/prepared is not that of the results.");
  const show = (n) => {
    const pair = new Pair(facts.pairs[n]);
    pair.showParts();
    pair.showCharacters();
    reader?.open(pair);
  };
  if (facts.pairs.length > 1) {
    const names = ({ models }) => models.map((model) => facts.names[model]).join(" and ");
    const options = facts.pairs.map((pair, n) => el("option", { value: n }, names(pair)));
    $("choice").append(
      el("label", { for: "models" }, "Compare"),
      el("select", { id: "models", onchange: (event) => show(event.target.value) }, options));
  }
  show(0);
}

start();
