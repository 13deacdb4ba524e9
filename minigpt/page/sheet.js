"use strict";
// A text on the page, one element for each grapheme: it grows, is shaded, and lets a reader select a character.

// Largest number of logits that a sheet keeps. Later characters are computed again when they are selected.
const MAX_STORED_LOGITS = 1 << 23;

class Sheet {
  // `onSelect(sheet, index)` is called with the selected character, -1 for none.
  constructor(model, label, onSelect) {
    Object.assign(this, { model, onSelect });
    this.text = el("div", {
      class: "text prose", role: "listbox", tabindex: 0, "aria-label": label, "aria-orientation": "horizontal",
      "data-empty": "Press Write.",
      onclick: (event) => this.click(event), onkeydown: (event) => this.press(event),
    });
    this.stats = el("p", { class: "stats muted" });
    this.clear();
  }

  // Remove all characters. For each character: its id, surprisal in bits, first character of its context, logits.
  clear() {
    Object.assign(this, { ids: [], bits: [], starts: [], logits: [], runs: [], selected: -1 });
    // Characters of the reader, those before the writer began, and random numbers of the seed that were used.
    Object.assign(this, { given: 0, promptLength: 0, drawn: 0, speed: null });
    Object.assign(this, { clusters: [], clusterOf: [], shadeValue: null });
    this.text.replaceChildren();
    this.text.removeAttribute("aria-activedescendant");
  }

  get length() {
    return this.ids.length;
  }

  character(index) {
    return this.model.characters[this.ids[index]];
  }

  string(from = 0, to = this.length) {
    let text = "";
    for (let i = from; i < to; i++) text += this.character(i);
    return text;
  }

  // Add a character; flush() shows it.
  append(id, { bits = null, start = null, logits = null } = {}) {
    this.ids.push(id);
    this.bits.push(bits);
    this.starts.push(start);
    this.logits.push(this.length * this.model.gpt.vocabSize <= MAX_STORED_LOGITS ? logits : null);
  }

  // Show the characters that were added. The last grapheme grows if a mark follows it.
  flush() {
    if (this.clusterOf.length === this.length) return;
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const last = this.clusters.at(-1), added = document.createDocumentFragment();
    let first = last ? last.first : 0;
    for (const part of graphemes(this.string(first))) {
      const cluster = last && first === last.first ? last : this.makeCluster(first, part, added);
      cluster.count = [...part].length;
      cluster.element.textContent = part;
      for (let i = 0; i < cluster.count; i++) this.clusterOf[first + i] = cluster;
      if (this.shadeValue) this.shadeCluster(cluster);
      first += cluster.count;
    }
    this.text.append(added);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  makeCluster(first, part, parent) {
    const blank = BLANKS[part];
    const label = blank && blank[1]; // a screen reader is silent about a blank
    const element = el("span", { class: "c", role: "option", "aria-selected": "false", "aria-label": label });
    if (first < this.given) element.classList.add("given");
    if (part === "\n") element.classList.add("newline");
    const cluster = { first, count: 0, element, number: this.clusters.length };
    element.cluster = cluster;
    this.clusters.push(cluster);
    parent.append(element);
    return cluster;
  }

  // Keep the first `length` characters.
  truncate(length) {
    if (length >= this.length) return;
    if (this.selected >= length) this.select(-1);
    for (const list of [this.ids, this.bits, this.starts, this.logits]) list.length = length;
    while (this.clusters.length && this.clusters.at(-1).first + this.clusters.at(-1).count > length) {
      const cluster = this.clusters.pop();
      cluster.element.remove();
      this.clusterOf.length = cluster.first;
    }
    this.runs = [];
    this.flush();
  }

  // Return the text with its notes, for restore(). The logits are left out, because those of a long text take up 32 MB.
  snapshot() {
    const { ids, bits, starts, given, promptLength, drawn } = this;
    return { ids: [...ids], bits: [...bits], starts: [...starts], given, promptLength, drawn };
  }

  restore({ ids, bits, starts, given, promptLength, drawn, logits = [] }) {
    this.clear();
    Object.assign(this, { given, promptLength, drawn });
    ids.forEach((id, i) => this.append(id, { bits: bits[i], start: starts[i], logits: logits[i] ?? null }));
    this.flush();
  }

  // ------------------------------------------------------------------------------------------------------- shading

  // Shade the text: `value(index)` is in [-1, 1], or null for a character without a value. Surprise does not depend on
  // the selection: a text that is shaded by it stays so.
  shade(kind, value) {
    const done = this.text.dataset.shade === kind && (kind === "plain" || (kind === "surprise" && this.shadeValue));
    if (done) return;
    this.text.dataset.shade = kind;
    this.shadeValue = value;
    for (const cluster of this.clusters) this.shadeCluster(cluster);
  }

  // A grapheme of several characters has the sum of their values: its surprisal is that of all of them.
  shadeCluster({ first, count, element }) {
    let total = 0;
    for (let i = first; i < first + count; i++) total += (this.shadeValue && this.shadeValue(i)) || 0;
    const strength = Math.min(1, Math.abs(total));
    if (strength < 0.02) element.style.removeProperty("--s");
    else element.style.setProperty("--s", strength.toFixed(3));
    element.classList.toggle("negative", total < -0.02);
    element.classList.toggle("strong", strength > 0.6);
  }

  // Underline the graphemes of the runs {start, length}.
  underline(runs) {
    this.runs = runs;
    for (const { element } of this.clusters) element.classList.remove("copied");
    for (const { start, length } of runs) {
      for (let i = start; i < start + length; i++) this.clusterOf[i]?.element.classList.add("copied");
    }
  }

  // ----------------------------------------------------------------------------------------------------- selection

  select(index) {
    const before = this.clusterOf[this.selected]?.element;
    if (before) {
      before.classList.remove("selected");
      before.setAttribute("aria-selected", "false");
      before.removeAttribute("id");
    }
    this.selected = index;
    const element = this.clusterOf[index]?.element;
    if (element) {
      element.classList.add("selected");
      element.setAttribute("aria-selected", "true");
      element.id = `${this.text.id}-selected`;
      this.text.setAttribute("aria-activedescendant", element.id);
    } else {
      this.text.removeAttribute("aria-activedescendant");
    }
    this.onSelect(this, index);
    element?.scrollIntoView({ block: "nearest" }); // last, because the inspector may appear above the text
  }

  click(event) {
    const cluster = event.target.cluster;
    if (!cluster || !getSelection().isCollapsed) return; // the reader marked some text
    this.select(cluster.first + cluster.count - 1);
  }

  press(event) {
    if (event.altKey || event.metaKey || !this.length) return;
    const at = this.selected < 0 ? null : this.selected, backwards = at !== null && this.runsBackwards(at);
    const moves = {
      ArrowRight: () => (backwards ? at - 1 : (at ?? -1) + 1),
      ArrowLeft: () => (backwards ? at + 1 : (at ?? this.length) - 1),
      ArrowUp: () => this.lineFrom(at ?? this.length - 1, -1),
      ArrowDown: () => this.lineFrom(at ?? 0, 1),
      Home: () => (event.ctrlKey || at === null ? 0 : this.lineEnd(at, -1)),
      End: () => (event.ctrlKey || at === null ? this.length - 1 : this.lineEnd(at, 1)),
    };
    if (event.key === "Escape") this.select(-1);
    else if (Object.hasOwn(moves, event.key)) this.select(Math.max(0, Math.min(this.length - 1, moves[event.key]())));
    else return;
    event.preventDefault();
  }

  // Whether the text runs from right to left at character `index`. A space or a digit has the direction of the letter
  // before, or of the first one.
  runsBackwards(index) {
    const isLetter = (i) => /\p{L}/u.test(this.character(i));
    let at = index;
    while (at > 0 && !isLetter(at)) at--;
    while (at < this.length - 1 && !isLetter(at)) at++;
    return isRightToLeft(this.character(at));
  }

  // Return the character nearest to character `index` on the line above (-1) or below (1).
  lineFrom(index, step) {
    const from = this.clusterOf[index], here = from.element.getBoundingClientRect();
    let best = null, line = null;
    for (let n = from.number + step; n >= 0 && n < this.clusters.length; n += step) {
      const box = this.clusters[n].element.getBoundingClientRect();
      if (Math.abs(box.bottom - here.bottom) < here.height / 2) continue;
      if (line !== null && Math.abs(box.bottom - line) > here.height / 2) break;
      line = box.bottom;
      const distance = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
      if (!best || distance < best.distance) best = { distance, cluster: this.clusters[n] };
    }
    return best ? best.cluster.first + best.cluster.count - 1 : index;
  }

  // Return the first (-1) or last (1) character of the line of character `index`.
  lineEnd(index, step) {
    const here = this.clusterOf[index].element.getBoundingClientRect();
    let { number } = this.clusterOf[index];
    while (this.clusters[number + step]) {
      const box = this.clusters[number + step].element.getBoundingClientRect();
      if (Math.abs(box.bottom - here.bottom) > here.height / 2) break;
      number += step;
    }
    const { first, count } = this.clusters[number];
    return step < 0 ? first : first + count - 1;
  }
}
