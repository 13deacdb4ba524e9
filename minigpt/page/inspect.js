"use strict";
// The inspector: it reads the text again to find out why the model chose a character, and shades the text.

// The computations of a model at each character of one context. They are kept, so that a neighbor appears immediately.
class ContextReader {
  constructor(gpt) {
    Object.assign(this, { gpt, cache: gpt.makeCache(), start: 0, probes: [] });
  }

  // Read character `index` of `ids`, in the context that begins at `start`, and return {attention, lens, units,
  // logits}; null if `isCurrent` turned false in a pause. Several calls in a row share their `slices`.
  async read(ids, index, start, isCurrent = () => true, slices = new Slices()) {
    const kept = start === this.start ? Math.min(this.probes.length, index - start + 1) : 0;
    let same = 0;
    while (same < kept && this.cache.ids[same] === ids[start + same]) same++;
    if (same > index - start) return this.probes[index - start];
    if (same < this.probes.length) {
      if (!this.cache.truncate(same)) {
        this.cache.clear();
        same = 0;
      }
      this.probes.length = same;
    }
    this.start = start;
    while (this.probes.length <= index - start) {
      const probe = {};
      probe.logits = this.gpt.forward(ids[start + this.probes.length], this.cache, probe);
      this.probes.push(probe);
      if (!slices.due) continue;
      await slices.pause();
      if (!isCurrent()) return null;
    }
    return this.probes[index - start];
  }
}

class Inspector {
  constructor(desk) {
    Object.assign(this, { desk, sheet: null, index: -1, probes: null, head: null, unit: null, strongest: null });
    this.turn = 0; // a computation ends early if a later one has begun
    this.copiedTurn = 0;
    this.activations = new Map(); // of the chosen unit, by sheet
    this.readers = new Map(desk.models.map((model) => [model, new ContextReader(model.gpt)]));
    this.tabs = new Tabs($("panels"), () => this.refresh());
    for (const radio of document.getElementsByName("shade")) {
      radio.addEventListener("change", () => this.setShading(radio.value));
    }
    onPress($("previous"), () => this.sheet.select(Math.max(0, this.index - 1)));
    onPress($("next"), () => this.sheet.select(Math.min(this.sheet.length - 1, this.index + 1)));
    $("heat").addEventListener("input", () => {
      desk.settings.inputs.temperature.value = $("heat").value;
      desk.settings.changed();
    });
    Object.assign(desk.listeners, {
      select: (sheet, index) => this.select(sheet, index),
      settings: () => this.settingsChanged(),
      text: () => this.textChanged(),
    });
    this.settingsChanged();
    this.setShading("surprise");
    this.refresh();
  }

  // --------------------------------------------------------------------------------------------- selected character

  select(sheet, index) {
    for (const other of this.desk.sheets) if (index >= 0 && other !== sheet && other.selected >= 0) other.select(-1);
    if (index < 0 && this.sheet && this.sheet !== sheet) return;
    // Another model may have fewer heads and units.
    if (sheet.model !== this.sheet?.model) this.head = this.unit = null;
    Object.assign(this, { sheet, index });
    if (index >= 0) this.announce();
    this.refresh();
  }

  announce() {
    const { sheet, index } = this, bits = sheet.bits[index];
    const chance = index ? bits !== null && `${fixed(bits, 1)} bits` : "not predicted";
    $("announcer").textContent = [spoken(sheet.character(index)), chance].filter(Boolean).join(", ");
  }

  settingsChanged() {
    const { temperature } = this.desk.settings.values;
    $("heat").max = Math.max(2, temperature);
    $("heat").value = temperature;
    $("heat-value").textContent = temperature;
    if (this.index >= 0) this.showCandidates();
  }

  async textChanged() {
    this.findCopied();
    // The shades of attention and of a unit are those of a selected character.
    const { shading, sheets: [first] } = this.desk;
    const needsOne = ["attention", "unit"].includes(shading);
    if (needsOne && this.index < 0 && first.length) return first.select(first.length - 1);
    await this.refresh();
  }

  // Show the selected character again, after the selection, the text, or the choice of a panel.
  async refresh() {
    const turn = ++this.turn, isCurrent = () => turn === this.turn, { sheet, index } = this;
    const some = index >= 0 && index < (sheet?.length ?? 0);
    $("selected").hidden = !some;
    $("inspector-hint").hidden = some;
    $("inspector").classList.toggle("empty", !some);
    this.probes = null;
    $("inspector").setAttribute("aria-busy", String(some));
    if (some) await this.showSelected(isCurrent);
    else for (const name of ["candidates", "panel-attention", "panel-inside"]) $(name).replaceChildren();
    if (!isCurrent()) return;
    $("inspector").setAttribute("aria-busy", "false");
    this.shadeAll();
    if (some && this.desk.shading === "unit") await this.shadeUnit();
    if (isCurrent()) await this.scoreRest(isCurrent);
  }

  // Show the panels. The candidates of a written character are known; the rest is computed when it is needed.
  async showSelected(isCurrent) {
    const { sheet, index } = this, panel = this.tabs.current;
    this.showHead();
    if (sheet.logits[index]) this.showCandidates();
    if (sheet.logits[index] && panel === "candidates" && !["attention", "unit"].includes(this.desk.shading)) return;
    const probes = await this.probe(sheet, index, isCurrent);
    if (!isCurrent()) return;
    this.probes = probes;
    if (probes.before) this.score(sheet, index, probes.before.logits);
    this.showHead();
    this.showCandidates();
    this.showAttention();
    this.showInside();
  }

  // Return {before, after}: the computations at the character before, which predict the selected one, and at itself.
  async probe(sheet, index, isCurrent) {
    const reader = this.readers.get(sheet.model);
    const start = sheet.starts[index] ?? this.startOf(sheet, index);
    const before = index > start ? await reader.read(sheet.ids, index - 1, start, isCurrent) : null;
    // The writer read the character to predict the next one, so in the context of that one.
    const own = sheet.starts[index + 1] ?? this.startOf(sheet, index + 1);
    const after = isCurrent() ? await reader.read(sheet.ids, index, own, isCurrent) : null;
    return { before, after };
  }

  startOf(sheet, index) {
    const overflow = sheet.writer?.sampling.overflow ?? this.desk.settings.values.overflow;
    return contextStart(index, sheet.promptLength, sheet.model.config, overflow);
  }

  // Note the surprisal of a character that no writer has predicted, and shade it.
  score(sheet, index, logits) {
    if (sheet.bits[index] !== null) return;
    sheet.bits[index] = surprisal(logits, sheet.ids[index]);
    sheet.shadeCluster(sheet.clusterOf[index]);
    if (sheet === this.sheet && index === this.index) this.announce();
  }

  // Score the characters of the prompts.
  async scoreRest(isCurrent) {
    const slices = new Slices();
    for (const sheet of this.desk.sheets) {
      for (let i = 1; i < sheet.length && !this.desk.running; i++) {
        if (sheet.bits[i] !== null) continue;
        const start = sheet.starts[i] ?? this.startOf(sheet, i);
        const reader = this.readers.get(sheet.model);
        const read = i > start && (await reader.read(sheet.ids, i - 1, start, isCurrent, slices));
        if (!isCurrent()) return;
        if (read) this.score(sheet, i, read.logits);
      }
    }
  }

  showHead() {
    const { sheet, index } = this, c = sheet.character(index), bits = sheet.bits[index], logits = sheet.logits[index];
    const rank = logits && 1 + logits.reduce((count, z) => count + (z > logits[sheet.ids[index]]), 0);
    const chance = bits === null ? "not predicted" : `${fixed(bits)} bits, probability ${percent(2 ** -bits)}`;
    const place = `character ${whole(index + 1)} of ${whole(sheet.length)}${rank ? `, rank ${rank}` : ""}`;
    const several = this.desk.models.length > 1;
    $("inspector-title").textContent = several ? `The character of ${sheet.model.name}` : "The selected character";
    $("selected-glyph").textContent = glyph(c);
    $("selected-facts").replaceChildren(
      el("div", {}, `${spoken(c)} `, codePoint(c) === spoken(c) ? "" : el("span", { class: "muted" }, codePoint(c))),
      el("div", {}, index ? chance : "the first character is not predicted"), el("div", { class: "muted" }, place));
  }

  // ----------------------------------------------------------------------------------------------------- the panels

  showCandidates() {
    const { sheet, index } = this, logits = sheet.logits[index] ?? this.probes?.before?.logits;
    if (index && logits) {
      const choose = (id) => this.desk.branch(sheet, index, id);
      const after = this.filtered(logits, this.desk.settings.values);
      $("candidates").replaceChildren(
        ...candidateList(sheet.model.characters, softmax(logits), after, sheet.ids[index], choose));
    } else {
      $("candidates").replaceChildren(index ? "" : hint(
        "The model predicts a character from the ones before it, so the first has no candidates."));
    }
  }

  // Return the distribution from which a character would be drawn, with the settings as they are now.
  filtered(logits, sampling) {
    const { sheet, index } = this, context = sheet.model.config.block_size;
    const ids = sheet.ids.slice(Math.max(0, index - context), index);
    const adjusted = sampling.repetition_penalty === 1 ? logits : penalize(logits, ids, sampling.repetition_penalty);
    if (!sampling.temperature) return Float64Array.from(adjusted, (_, id) => Number(id === argmax(adjusted)));
    const probabilities = filterProbabilities(adjusted, sampling), total = sum(probabilities);
    return Float64Array.from(probabilities, (p) => p / total);
  }

  // Return the attention of a head, or the mean of all, to the characters before the selected one: {first, weights}.
  attention(head = this.head) {
    const before = this.probes?.before;
    if (!before) return null;
    const maps = head ? [before.attention[head.layer][head.head]] : before.attention.flat();
    const weights = maps[0].map((_, t) => mean(maps.map((map) => map[t])));
    return { first: this.index - weights.length, weights };
  }

  showAttention() {
    const panel = $("panel-attention"), { before } = this.probes;
    if (!before) return panel.replaceChildren(hint("No character comes before this one."));
    const heads = before.attention[0].length, focused = panel.contains(document.activeElement);
    const rows = before.attention.map((row, layer) => [
      el("span", { class: "row-name muted", "aria-hidden": "true" }, `block ${layer + 1}`),
      row.map((_, head) => this.headButton({ layer, head }))]);
    panel.replaceChildren(
      hint("Where each head looked to predict this character: earlier characters on the left, the last one on the " +
        "right. Choose a head to shade the text."),
      el("div", { class: "scroll" }, el("div", {
        class: "heads", role: "radiogroup", "aria-label": "Heads", "--heads": heads,
        onkeydown: (event) => this.moveHead(event, heads),
      }, this.headButton(null), rows)),
      attentionPlaces(this.sheet, this.index, this.attention()));
    if (focused) panel.querySelector("[aria-checked=true]").focus();
  }

  headButton(head) {
    const { first, weights } = this.attention(head), [best] = largest(weights, 1);
    const description = `most on ${spoken(this.sheet.character(first + best))}, ${weights.length - best} back`;
    const chosen = head?.layer === this.head?.layer && head?.head === this.head?.head;
    return headButton(head && headName(head), weights, chosen, description, () => this.chooseHead(head));
  }

  chooseHead(head) {
    if (!this.probes) return; // the panel still shows the character before
    this.head = head;
    this.showAttention();
    $("panel-attention").querySelector("[aria-checked=true]").focus();
    this.setShading("attention");
  }

  // Move between the heads with the arrow keys; the mean of all is above the first row.
  moveHead(event, heads) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads, ArrowUp: -heads }[event.key];
    if (!step) return;
    event.preventDefault();
    const count = heads * this.sheet.model.config.n_layer;
    const at = this.head ? this.head.layer * heads + this.head.head : -1;
    const to = at < 0 ? Math.min(0, step - 1) : at + step;
    if (to >= count) return;
    this.chooseHead(to < 0 ? null : { layer: Math.floor(to / heads), head: to % heads });
  }

  showInside() {
    const { sheet, index } = this, { before, after } = this.probes;
    this.strongest = after && strongestUnits(after.units);
    $("panel-inside").replaceChildren(
      before ? lensTable(before.lens, sheet.model.characters, sheet.ids[index]) : "",
      after ? unitList(this.strongest, this.unit, ({ layer, unit }) => this.chooseUnit({ layer, unit })) : "");
  }

  chooseUnit(unit) {
    if (!this.probes) return;
    this.unit = unit;
    this.showInside();
    $("panel-inside").querySelector("[aria-pressed=true]")?.focus();
    this.setShading("unit");
  }

  // -------------------------------------------------------------------------------------------------------- shading

  setShading(kind) {
    this.desk.shading = kind;
    for (const radio of document.getElementsByName("shade")) radio.checked = radio.value === kind;
    const needs = kind === "attention" || kind === "unit", [first] = this.desk.sheets;
    if (needs && this.index < 0 && first.length) return first.select(first.length - 1);
    if (needs && this.index >= 0 && !this.probes) return this.refresh();
    return kind === "unit" ? this.shadeUnit() : this.shadeAll();
  }

  // Compute the activation of the chosen unit for the whole text, and shade the part that is known.
  async shadeUnit() {
    const { sheet } = this, unit = this.unit ?? this.strongest?.[0], turn = this.turn;
    if (!sheet || !unit) return;
    const known = this.activations.get(sheet);
    if (!sameUnit(known, unit) || known.text !== sheet.string()) await this.readUnit(sheet, unit);
    if (turn === this.turn) this.shadeAll();
  }

  async readUnit(sheet, { layer, unit }) {
    const { gpt, config } = sheet.model, cache = gpt.makeCache(), slices = new Slices(), values = [];
    const entry = { layer, unit, values, text: sheet.string() };
    this.activations.set(sheet, entry);
    for (let i = 0; i < sheet.length; i++) {
      if (i % config.block_size === 0) cache.clear();
      const probe = {};
      gpt.forward(sheet.ids[i], cache, probe);
      values.push(probe.units[layer][unit]);
      if (!slices.due) continue;
      this.shadeAll();
      await slices.pause();
      if (this.activations.get(sheet) !== entry) return;
      if (sheet.string() !== entry.text) return this.activations.delete(sheet);
    }
    this.shadeAll(); // the last slice, if another character was selected meanwhile
  }

  // Return the values to shade a text by, {first, weights}; null if there are none.
  weightsOf(sheet, kind) {
    if (sheet !== this.sheet || this.index < 0) return null;
    if (kind === "attention") return this.attention();
    const known = kind === "unit" && this.activations.get(sheet);
    return known && known.values.length ? { first: 0, weights: known.values } : null;
  }

  shadeAll() {
    const kind = this.desk.shading;
    let from = "0", to = kind === "surprise" ? "8 bits or more" : "";
    for (const sheet of this.desk.sheets) {
      const shown = this.weightsOf(sheet, kind);
      const highest = shown ? shown.weights.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1 : 1;
      if (kind === "surprise") sheet.shade(kind, (i) => sheet.bits[i] / 8);
      else sheet.shade(kind, shown && ((i) => shown.weights[i - shown.first] / highest));
      if (shown && kind === "attention") {
        to = `${percent(highest)}, ${this.head ? headName(this.head) : "mean of all heads"}`;
      }
      if (shown && kind === "unit") {
        if (shown.weights.some((value) => value < 0)) from = fixed(-highest);
        to = `${fixed(highest)}, ${unitName(this.activations.get(sheet))}`;
      }
    }
    const ramp = el("span", { class: `ramp${from === "0" ? "" : " signed"}`, "aria-hidden": "true" });
    $("legend").dataset.shade = kind;
    $("legend").replaceChildren(...(to ? [from, ramp, to] : []));
  }

  // --------------------------------------------------------------------------------------------------- copied text

  // Look for runs of the written text in the training text, and underline them.
  async findCopied() {
    const { corpus } = this.desk.facts, turn = ++this.copiedTurn, slices = new Slices();
    if (!corpus) return;
    // The text is that of the first model. Another one has read the same text if it knows the same characters.
    const [{ model }] = this.desk.sheets, known = String(model.characters);
    const sheets = this.desk.sheets.filter((sheet) => sheet.length && String(sheet.model.characters) === known);
    for (const sheet of sheets) {
      const text = sheet.string(sheet.given), places = []; // the character that each UTF-16 unit belongs to
      for (let i = sheet.given; i < sheet.length; i++) places.push(...Array(sheet.character(i).length).fill(i));
      const runs = [];
      for (const run of copiedRuns(text, corpus)) {
        if (slices.due) await slices.pause();
        if (turn !== this.copiedTurn || this.desk.running) return; // the end of a new text starts another search
        if (!run) continue;
        const start = places[run.start], length = places[run.start + run.length - 1] - start + 1;
        runs.push({ start, length, source: run.source, text: text.slice(run.start, run.start + run.length) });
      }
      sheet.underline(runs);
    }
    const heading = (sheet) => (sheets.length > 1 ? el("h3", { class: "label" }, sheet.model.name) : "");
    $("panel-copied").replaceChildren(...sheets.flatMap((sheet) => [heading(sheet), copiedList(sheet, corpus)].flat()));
  }
}
