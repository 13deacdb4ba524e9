"use strict";
// Small functions of the interface: elements, numbers, characters, and work in slices of time.

const $ = (id) => document.getElementById(id);

// Return an element. Attributes that start with "on" are listeners, and with "--" properties of its style.
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

// Return an element of SVG.
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// Whether a button can be used. It keeps the focus when it cannot, unlike with `disabled`.
function enable(button, enabled) {
  button.setAttribute("aria-disabled", String(!enabled));
}

// Call `action` on Ctrl Enter, or Command Enter, while the element `view` is shown.
function onSubmitKey(view, action) {
  document.addEventListener("keydown", (event) => {
    const pressed = event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat;
    if (pressed && !$(view).hidden) action();
  });
}

// Call `action` when a button that can be used is pressed.
function onPress(button, action) {
  button.addEventListener("click", (event) => {
    if (button.getAttribute("aria-disabled") !== "true") action(event);
  });
}

// A row of tabs and its panels, one of which is shown: arrow keys move between them.
class Tabs {
  constructor(list, onShow = () => {}) {
    Object.assign(this, { list, onShow });
    list.addEventListener("click", (event) => event.target.role === "tab" && this.show(event.target));
    list.addEventListener("keydown", (event) => {
      const tabs = this.tabs, at = tabs.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -at, End: tabs.length - 1 - at }[event.key];
      if (step === undefined || at < 0) return;
      event.preventDefault();
      this.show(tabs[(at + step + tabs.length) % tabs.length]).focus();
    });
  }

  get tabs() {
    return [...this.list.querySelectorAll("[role=tab]")].filter((tab) => !tab.hidden);
  }

  get current() {
    return this.tabs.find((tab) => tab.getAttribute("aria-selected") === "true").id.replace("tab-", "");
  }

  show(tab) {
    for (const other of this.tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
      $(other.getAttribute("aria-controls")).hidden = other !== tab;
    }
    this.onShow(this.current);
    return tab;
  }
}

// ------------------------------------------------------------------------------------------------------- numbers

const whole = (n) => n.toLocaleString("en", { maximumFractionDigits: 0 });
const plural = (n, name) => `${whole(n)} ${name}${n === 1 ? "" : "s"}`;

function fixed(n, digits = 2) {
  return n.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function percent(p) {
  if (p > 0 && p < 0.001) return "< 0.1 %";
  return `${p > 0 && p < 0.0995 ? fixed(p * 100, 1) : whole(p * 100)} %`;
}

function sum(values) {
  let total = 0;
  for (const value of values) total += value;
  return total;
}

function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? sum(known) / known.length : null;
}

// Return the probabilities of all characters, float64.
function softmax(logits) {
  const highest = logits.reduce((a, b) => Math.max(a, b));
  const powers = Float64Array.from(logits, (z) => Math.exp(z - highest));
  const total = sum(powers);
  return powers.map((p) => p / total);
}

// Return the surprisal of the character `id` in bits: -log2 of its probability.
function surprisal(logits, id) {
  const highest = logits.reduce((a, b) => Math.max(a, b));
  let total = 0;
  for (const z of logits) total += Math.exp(z - highest);
  return (Math.log(total) + highest - logits[id]) / Math.LN2;
}

// Return the indices of the `count` largest values, the largest first.
function largest(values, count) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
}

// Return the largest value of each of at most `count` groups of neighbors, which end with the last value.
function peaks(values, count) {
  const size = Math.ceil(values.length / count), groups = Math.ceil(values.length / size);
  const end = (n) => values.length - (groups - n) * size;
  return Array.from({ length: groups }, (_, n) => Math.max(...values.slice(Math.max(0, end(n)), end(n + 1))));
}

// Return two to six round numbers between `low` and `high`, or `low` alone if they are equal.
function ticks(low, high) {
  if (!(high > low)) return [low];
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
  return found;
}

// ------------------------------------------------------------------------------------------------------ characters

const segmenter = globalThis.Intl?.Segmenter && new Intl.Segmenter(undefined, { granularity: "grapheme" });

// Return the parts of a text that the eye sees as one: a letter with its marks, a syllable of Devanagari.
function graphemes(text) {
  if (segmenter) return Array.from(segmenter.segment(text), ({ segment }) => segment);
  return text.match(/\r\n|\P{M}\p{M}*|\p{M}+/gsu) ?? [];
}

const codePoint = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const BLANKS = {
  "\n": ["↵", "newline"], " ": ["␣", "space"], "\t": ["⇥", "tab"], "\u00a0": ["⍽", "no-break space"],
};

// Return a visible form of a character: a sign for a blank, the code point of a control, a dotted circle below a mark.
function glyph(c) {
  if (BLANKS[c]) return BLANKS[c][0];
  if (/^\p{M}/u.test(c)) return `\u25cc${c}`;
  return /^[\p{C}\p{Z}]/u.test(c) ? codePoint(c) : c;
}

// Return the name of a character for a sentence or a screen reader.
function spoken(c) {
  return BLANKS[c]?.[1] ?? (/^[\p{C}\p{Z}\p{M}]/u.test(c) ? codePoint(c) : `“${c}”`);
}

const isRightToLeft = (c) => /\p{Script=Hebrew}|\p{Script=Arabic}|\p{Script=Syriac}|\p{Script=Thaana}/u.test(c);

// Return a sentence about the characters of a text that a model has never seen; "" if there are none.
function describeUnknown(text, ids) {
  const unknown = [...new Set(text)].filter((c) => !ids.has(c));
  if (!unknown.length) return "";
  const name = (c) => (glyph(c) === codePoint(c) ? codePoint(c) : `${glyph(c)} (${codePoint(c)})`);
  const rest = unknown.length > 6 ? ` and ${unknown.length - 6} more` : "";
  return `${unknown.slice(0, 6).map(name).join(", ")}${rest}: unknown to the model, not in its training text.`;
}

// Return the first character of the context from which character `index` of a text is predicted, by the rules of
// Writer.read for a text that began with `promptLength` characters. The writer reads only the end of a prompt that is
// longer than the context. Before that end, many characters share a context, so that all are soon read.
function contextStart(index, promptLength, config, overflow) {
  const context = config.block_size;
  if (overflow === "roll") {
    // A character depends on no earlier one than this. Rounded, so that neighbours are read from the same start.
    const window = Math.min(config.attention_window || context, context);
    const reach = config.n_layer * (window + config.mlp_conv - 1) + config.embd_conv;
    return Math.max(0, Math.floor((index - reach) / context) * context);
  }
  const first = Math.max(0, promptLength - context);
  if (index > first && overflow === "slide") return Math.max(first, index - context);
  const begin = index > first ? first : 0;
  const half = Math.max(1, Math.floor(context / 2)), kept = context - half + 1;
  return begin + kept * Math.max(0, Math.ceil((index - begin - context) / kept));
}

// Yield the runs of at least `minimum` characters that occur in `corpus`: {start, length, source}. A run is the longest
// from its start, and together they cover all copied characters.
function* copiedRuns(text, corpus, minimum = 12) {
  for (let start = 0; start + minimum <= text.length; ) {
    let length = minimum, source = corpus.indexOf(text.slice(start, start + length));
    if (source < 0) {
      start++;
      yield null; // a place to pause
      continue;
    }
    for (let at = source; at >= 0; at = corpus.indexOf(text.slice(start, start + length + 1), at + 1)) {
      source = at;
      while (start + length < text.length && text[start + length] === corpus[at + length]) length++;
      if (start + length === text.length) break;
    }
    yield { start, length, source };
    start += length - minimum + 1;
  }
}

// --------------------------------------------------------------------------------------------------- slices of time

// Pauses for a long computation: the page draws and takes input between its slices.
class Slices {
  constructor(milliseconds = 14) {
    this.milliseconds = milliseconds;
    this.channel = new MessageChannel(); // setTimeout waits at least 4 ms, a quarter of the time
    this.begin = performance.now();
  }

  get due() {
    return performance.now() - this.begin > this.milliseconds;
  }

  async pause() {
    await new Promise((resolve) => {
      this.channel.port1.onmessage = resolve;
      this.channel.port2.postMessage(null);
    });
    this.begin = performance.now();
  }
}
