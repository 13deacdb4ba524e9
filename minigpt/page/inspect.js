"use strict";
// The panels about the selected character: candidates, attention, what happens inside, and copied text.

// What a model computes at each character of one context. It is kept, so that a neighbour is shown immediately.
class ContextReader {
  constructor(gpt) {
    Object.assign(this, { gpt, cache: gpt.makeCache(), start: 0, probes: [] });
  }

  // Read character `index` of `ids`, in the context that begins at `start`, and return {attention, lens, units, logits};
  // null if `isCurrent` turned false in a pause.
  async read(ids, index, start, isCurrent = () => true) {
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
    const slices = new Slices();
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
    Object.assign(this, { desk, sheet: null, index: -1, turn: 0, head: null, unit: null, unitValues: new Map() });
    this.readers = new Map(desk.models.map((model) => [model, new ContextReader(model.gpt)]));
    this.tabs = new Tabs($("panels"), () => this.refresh());
    for (const radio of document.getElementsByName("shade")) {
      radio.addEventListener("change", () => this.setShading(radio.value));
    }
    onPress($("previous"), () => this.sheet.select(Math.max(0, this.index - 1)));
    onPress($("next"), () => this.sheet.select(Math.min(this.sheet.length - 1, this.index + 1)));
    desk.listeners.select = (sheet, index) => this.select(sheet, index);
    $("heat").addEventListener("input", () => desk.settings.set({ ...desk.settings.values, temperature: Number($("heat").value) }));
    desk.listeners.settings = () => this.settingsChanged();
    desk.listeners.text = () => this.textChanged();
    this.settingsChanged();
    this.setShading("surprise");
    this.refresh();
  }

  // ----------------------------------------------------------------------------------------------- what is selected

  select(sheet, index) {
    for (const other of this.desk.sheets) if (index >= 0 && other !== sheet && other.selected >= 0) other.select(-1);
    if (index < 0 && this.sheet && this.sheet !== sheet) return;
    Object.assign(this, { sheet, index });
    this.refresh();
  }

  // Show the selected character again, after the selection, the text, a setting, or the choice of a panel.
  async refresh() {
    const turn = ++this.turn, isCurrent = () => turn === this.turn, { sheet, index } = this;
    const some = index >= 0 && index < (sheet?.length ?? 0);
    $("selected").hidden = !some;
    $("inspector-hint").hidden = some;
    $("inspector").classList.toggle("empty", !some);
    this.probes = null;
    if (some) await this.showSelected(isCurrent);
    else for (const name of ["candidates", "panel-attention", "panel-inside"]) $(name).replaceChildren();
    if (!isCurrent()) return;
    this.shadeAll();
    if (some && this.desk.shading === "unit") await this.shadeUnit();
    if (isCurrent()) await this.scoreRest(isCurrent);
  }

  settingsChanged() {
    const { temperature } = this.desk.settings.values;
    $("heat").value = temperature;
    $("heat-value").textContent = temperature;
    if (this.index >= 0) this.showCandidates();
  }

  async showSelected(isCurrent) {
    const { sheet, index } = this, needed = this.tabs.current !== "candidates" || ["attention", "unit"].includes(this.desk.shading);
    this.showHead();
    if (sheet.logits[index]) this.showCandidates();
    if (sheet.logits[index] && !needed) return;
    const probes = await this.probe(sheet, index, isCurrent);
    if (!isCurrent()) return;
    this.probes = probes;
    if (probes.before) this.learn(sheet, index, probes.before.logits);
    this.showHead();
    this.showCandidates();
    this.showAttention();
    this.showInside();
  }

  // Return what the model computed before the selected character, from which it predicts it, and when it reads it.
  async probe(sheet, index, isCurrent) {
    const reader = this.readers.get(sheet.model), context = sheet.model.config.block_size;
    const start = sheet.starts[index] ?? this.startOf(sheet, index);
    const before = index > start ? await reader.read(sheet.ids, index - 1, start, isCurrent) : null;
    // A full context has no place for the character itself.
    const own = index - start < context ? start : index - Math.floor(context / 2);
    const after = isCurrent() ? await reader.read(sheet.ids, index, own, isCurrent) : null;
    return { before, after, start };
  }

  startOf(sheet, index) {
    const overflow = sheet.writer?.sampling.overflow ?? this.desk.settings.values.overflow;
    return contextStart(index, sheet.promptLength, sheet.model.config, overflow);
  }

  learn(sheet, index, logits) {
    if (sheet.bits[index] !== null) return;
    sheet.bits[index] = surprisal(logits, sheet.ids[index]);
    sheet.shadeCluster(sheet.clusterOf[index]);
  }

  showHead() {
    const { sheet, index } = this, c = sheet.character(index), bits = sheet.bits[index], logits = sheet.logits[index];
    $("selected-glyph").textContent = glyph(c);
    const rank = logits && 1 + logits.reduce((count, z) => count + (z > logits[sheet.ids[index]]), 0);
    const lines = [
      [`${spoken(c)} `, el("span", { class: "muted" }, codePoint(c))],
      [bits === null ? (index ? "…" : "the first character is not predicted") : `${fixed(bits)} bits, probability ${percent(2 ** -bits)}`],
      [el("span", { class: "muted" }, `character ${whole(index + 1)} of ${whole(sheet.length)}${rank ? `, candidate ${rank}` : ""}`)],
    ];
    $("selected-facts").replaceChildren(...lines.map((line) => el("div", {}, line)));
    $("announcer").textContent = `${spoken(c)}, ${bits === null ? "not predicted" : `${fixed(bits, 1)} bits`}`;
  }

  // ----------------------------------------------------------------------------------------------------- candidates

  showCandidates() {
    const { sheet, index } = this, logits = sheet.logits[index] ?? this.probes?.before?.logits;
    const panel = $("candidates");
    if (!index || !logits) {
      panel.replaceChildren(el("p", { class: "muted" }, "The model predicts each character from the ones before it, so the first has no candidates."));
      return;
    }
    const sampling = this.desk.settings.values, chosen = sheet.ids[index];
    const before = softmax(logits), after = this.drawn(logits, sampling);
    const ids = largest(logits, 10);
    if (!ids.includes(chosen)) ids.push(chosen);
    const top = Math.max(...ids.map((id) => Math.max(before[id], after[id])));
    const rows = ids.map((id) => {
      const c = sheet.model.characters[id], own = id === chosen;
      const label = `${spoken(c)}: ${percent(before[id])}, ${after[id] ? `${percent(after[id])} after filters` : "filtered out"}`;
      return el("li", {}, el("button", {
        type: "button", class: `candidate${own ? " own" : ""}${after[id] ? "" : " out"}`,
        "aria-label": own ? `${label}; this is the character of the text` : `${label}; rewrite from here`,
        onclick: () => own || this.desk.branch(sheet, index, id),
      },
        el("span", { class: "glyph prose", "aria-hidden": "true" }, glyph(c)),
        el("span", { class: "bars", "aria-hidden": "true" },
          el("span", { class: "bar before", "--w": before[id] / top }), el("span", { class: "bar after", "--w": after[id] / top })),
        el("span", { class: "figures", "aria-hidden": "true" }, el("span", {}, percent(before[id])), el("b", {}, after[id] ? percent(after[id]) : "—"))));
    });
    panel.replaceChildren(
      el("p", { class: "key" }, [["before", "the model’s probability"], ["after", "after temperature and filters"]].map(([kind, name]) => el("span", {}, el("i", { class: `swatch ${kind}` }), name))),
      el("ol", { class: "candidates" }, rows),
      el("p", { class: "muted small" }, "Choose another character to rewrite the text from here."));
  }

  // Return the distribution that a character is drawn from, with the settings as they are now.
  drawn(logits, sampling) {
    const { sheet, index } = this, context = sheet.model.config.block_size;
    const ids = sheet.ids.slice(Math.max(0, index - context), index);
    const adjusted = sampling.repetition_penalty === 1 ? logits : penalize(logits, ids, sampling.repetition_penalty);
    if (!sampling.temperature) return Float64Array.from(adjusted, (_, id) => Number(id === argmax(adjusted)));
    const probabilities = filterProbabilities(adjusted, sampling), total = sum(probabilities);
    return Float64Array.from(probabilities, (p) => p / total);
  }

  // ------------------------------------------------------------------------------------------------------ attention

  // Return the attention of the chosen head to the characters before the selected one: {first, weights}.
  attention(head = this.head) {
    const before = this.probes?.before;
    if (!before) return null;
    const maps = head ? [before.attention[head.layer][head.head]] : before.attention.flat();
    const weights = maps[0].map((_, t) => mean(maps.map((map) => map[t])));
    return { first: this.index - weights.length, weights };
  }

  showAttention() {
    const panel = $("panel-attention"), before = this.probes.before;
    if (!before) return panel.replaceChildren(el("p", { class: "muted" }, "No character comes before this one."));
    const heads = before.attention[0].length, focused = panel.contains(document.activeElement);
    const cell = (head, name) => this.attentionCell(head, name);
    const grid = el("div", { class: "heads", role: "radiogroup", "aria-label": "Heads", "--heads": heads, onkeydown: (event) => this.moveHead(event, heads) },
      cell(null, "Mean of all heads"),
      before.attention.map((row, layer) => [el("span", { class: "row-name muted", "aria-hidden": "true" }, `block ${layer + 1}`),
        row.map((_, head) => cell({ layer, head }, `Block ${layer + 1}, head ${head + 1}`))]));
    panel.replaceChildren(
      el("p", { class: "muted small" }, "Where each head looked to predict this character: earlier characters on the left, the last one on the right. Choose a head to shade the text."),
      el("div", { class: "scroll" }, grid), this.attentionList());
    if (focused) panel.querySelector("[aria-checked=true]").focus();
  }

  attentionCell(head, name) {
    const { weights } = this.attention(head), chosen = head?.layer === this.head?.layer && head?.head === this.head?.head;
    const shown = weights.slice(-64), highest = weights.reduce((a, b) => Math.max(a, b)), width = 64, offset = width - shown.length;
    const bars = Array.from(shown, (w, t) => `M${offset + t + 0.5} 24v${-Math.max(0.4, (w / highest) * 22).toFixed(1)}`).join("");
    const [best] = largest(weights, 1);
    return el("button", {
      type: "button", role: "radio", class: `head${head ? "" : " mean"}`, "aria-checked": String(chosen), tabindex: chosen ? 0 : -1,
      "aria-label": `${name}: most on ${spoken(this.sheet.character(this.index - weights.length + best))}, ${weights.length - best} back`,
      title: name, onclick: () => this.chooseHead(head),
    }, head ? null : el("span", { class: "row-name" }, "all heads"),
      svg("svg", { viewBox: `0 0 ${width} 25`, preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { d: bars })));
  }

  chooseHead(head) {
    this.head = head;
    this.showAttention();
    $("panel-attention").querySelector("[aria-checked=true]").focus();
    this.setShading("attention");
  }

  moveHead(event, heads) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads, ArrowUp: -heads }[event.key];
    if (!step) return;
    event.preventDefault();
    const count = heads * this.sheet.model.config.n_layer, at = this.head ? this.head.layer * heads + this.head.head : -1;
    const to = at < 0 ? (step > 0 ? 0 : -1) : at + step;
    if (to >= count) return;
    this.chooseHead(to < 0 ? null : { layer: Math.floor(to / heads), head: to % heads });
  }

  attentionList() {
    const { first, weights } = this.attention(), { sheet } = this;
    const rows = largest(weights, 5).map((t) => {
      const at = first + t, around = (from, to) => sheet.string(Math.max(0, from), to).replaceAll("\n", "↵");
      return el("li", {}, el("span", { class: "quote prose", dir: "auto" }, around(at - 8, at), el("mark", {}, glyph(sheet.character(at))), around(at + 1, Math.min(this.index, at + 9))),
        el("span", { class: "muted" }, `${this.index - at} back`), el("b", {}, percent(weights[t])));
    });
    return el("ol", { class: "places", "aria-label": "Characters with the most attention" }, rows);
  }

  // --------------------------------------------------------------------------------------------------------- inside

  showInside() {
    const panel = $("panel-inside"), { before, after } = this.probes;
    panel.replaceChildren(before ? this.lens(before.lens) : "", after ? this.unitList(after.units) : "");
  }

  // What the model would have predicted after each block.
  lens(lens) {
    const { sheet, index } = this, own = sheet.ids[index];
    const rows = lens.map((logits, layer) => {
      const p = softmax(logits);
      const cells = largest(p, 5).map((id) => el("span", { class: `guess prose${id === own ? " own" : ""}`, "--p": p[id], title: percent(p[id]) }, glyph(sheet.model.characters[id]), el("small", {}, percent(p[id]))));
      return el("tr", {}, el("th", { scope: "row" }, `${layer + 1}`), el("td", {}, el("div", { class: "guesses" }, cells)), el("td", { class: "number" }, percent(p[own])));
    });
    return el("table", { class: "lens" },
      el("caption", {}, "What the model would predict if it ended after a block"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "block"), el("th", { scope: "col" }, "likeliest characters"), el("th", { scope: "col", class: "number" }, spoken(sheet.character(index))))),
      el("tbody", {}, rows));
  }

  // The feed-forward units that react most to the character.
  unitList(units) {
    const all = units.flatMap((values, layer) => largest(values.map(Math.abs), 8).map((unit) => ({ layer, unit, value: values[unit] })));
    const strongest = all.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 8), top = Math.abs(strongest[0].value) || 1;
    this.strongest = strongest[0];
    const rows = strongest.map(({ layer, unit, value }) => {
      const chosen = this.unit?.layer === layer && this.unit?.unit === unit;
      return el("li", {}, el("button", {
        type: "button", class: `unit${value < 0 ? " negative" : ""}`, "aria-pressed": String(chosen), onclick: () => this.chooseUnit({ layer, unit }),
      }, el("span", {}, `block ${layer + 1}, unit ${unit}`), el("span", { class: "bars", "aria-hidden": "true" }, el("span", { class: "bar after", "--w": Math.abs(value) / top })), el("b", {}, fixed(value))));
    });
    return el("section", {}, el("h3", { class: "label" }, "Units that react most when the model reads it"),
      el("ol", { class: "units" }, rows), el("p", { class: "muted small" }, "Choose a unit to shade the text by its activation."));
  }

  chooseUnit(unit) {
    this.unit = unit;
    this.showInside();
    $("panel-inside").querySelector("[aria-pressed=true]")?.focus();
    this.setShading("unit");
  }

  // Compute the activation of the chosen unit for the whole text, and shade it as far as it is known.
  async shadeUnit() {
    const { sheet } = this, unit = this.unit ?? this.strongest, turn = this.turn;
    if (!sheet || !unit) return;
    const known = this.unitValues.get(sheet) ?? {};
    if (known.layer !== unit.layer || known.unit !== unit.unit || known.text !== sheet.string()) {
      const values = [], slices = new Slices(), cache = sheet.model.gpt.makeCache(), context = sheet.model.config.block_size;
      this.unitValues.set(sheet, { ...unit, text: sheet.string(), values });
      for (let i = 0; i < sheet.length; i++) {
        if (i % context === 0) cache.clear();
        const probe = {};
        sheet.model.gpt.forward(sheet.ids[i], cache, probe);
        values.push(probe.units[unit.layer][unit.unit]);
        if (!slices.due) continue;
        this.shadeAll();
        await slices.pause();
        if (this.unitValues.get(sheet).values !== values || sheet.length < values.length) return;
      }
    }
    if (turn === this.turn) this.shadeAll();
  }

  // -------------------------------------------------------------------------------------------------------- shading

  setShading(kind) {
    this.desk.shading = kind;
    for (const radio of document.getElementsByName("shade")) radio.checked = radio.value === kind;
    const needs = kind === "attention" || kind === "unit";
    if (needs && this.index < 0 && this.desk.sheets[0].length) return this.desk.sheets[0].select(this.desk.sheets[0].length - 1);
    if (needs && this.index >= 0 && !this.probes) return this.refresh();
    return kind === "unit" ? this.shadeUnit() : this.shadeAll();
  }

  shadeAll() {
    const kind = this.desk.shading;
    let note = "";
    for (const sheet of this.desk.sheets) {
      let value = null;
      if (kind === "surprise") value = (i) => sheet.bits[i] / 8;
      else if (sheet === this.sheet && this.index >= 0) {
        const shown = kind === "attention" ? this.attention() : kind === "unit" ? this.unitShade(sheet) : null;
        const highest = shown ? shown.weights.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1 : 1;
        if (shown) value = (i) => shown.weights[i - shown.first] / highest;
        if (shown) note = kind === "attention" ? percent(highest) : fixed(highest);
      }
      sheet.shade(kind, value);
    }
    this.showLegend(kind, note);
  }

  unitShade(sheet) {
    const known = this.unitValues.get(sheet);
    return known?.values.length ? { first: 0, weights: known.values } : null;
  }

  showLegend(kind, highest) {
    const head = this.head ? `block ${this.head.layer + 1}, head ${this.head.head + 1}` : "mean of all heads", unit = this.unit ?? this.strongest;
    const words = {
      surprise: ["0", "8 bits"], plain: null,
      attention: highest ? ["0", `${highest}, ${head}`] : null,
      unit: highest && unit ? ["0", `${highest}, block ${unit.layer + 1}, unit ${unit.unit}`] : null,
    }[kind];
    $("legend").dataset.shade = kind;
    $("legend").replaceChildren(...(words ? [words[0], el("span", { class: "ramp", "aria-hidden": "true" }), words[1]] : []));
  }

  // --------------------------------------------------------------------------------------------------------- copied

  async textChanged() {
    this.refreshCopied();
    await this.refresh();
  }

  // Score the characters that no writer has predicted: those of the prompt.
  async scoreRest(isCurrent) {
    for (const sheet of this.desk.sheets) {
      for (let i = 1; i < sheet.length && !this.desk.running; i++) {
        if (sheet.bits[i] !== null) continue;
        const start = sheet.starts[i] ?? this.startOf(sheet, i);
        const read = i > start && (await this.readers.get(sheet.model).read(sheet.ids, i - 1, start, isCurrent));
        if (!isCurrent()) return;
        if (read) this.learn(sheet, i, read.logits);
      }
    }
  }

  async refreshCopied() {
    const { corpus } = this.desk.facts, turn = (this.copiedTurn = (this.copiedTurn ?? 0) + 1), slices = new Slices();
    if (!corpus) return;
    for (const sheet of this.desk.sheets) {
      const first = sheet.given, text = sheet.string(first), offsets = [];
      for (let i = first; i < sheet.length; i++) for (const _ of sheet.character(i).split("")) offsets.push(i);
      const runs = [];
      for (const run of copiedRuns(text, corpus)) {
        if (slices.due) await slices.pause();
        if (turn !== this.copiedTurn) return;
        if (run) runs.push({ start: offsets[run.start], length: offsets[run.start + run.length - 1] - offsets[run.start] + 1, source: run.source, text: text.substr(run.start, run.length) });
      }
      sheet.underline(runs);
    }
    this.showCopied();
  }

  showCopied() {
    const { corpus } = this.desk.facts;
    const parts = this.desk.sheets.filter((sheet) => sheet.length).map((sheet) => {
      const covered = new Set(sheet.runs.flatMap(({ start, length }) => Array.from({ length }, (_, i) => start + i))).size;
      const written = sheet.length - sheet.given, longest = Math.max(0, ...sheet.runs.map((run) => run.text.length));
      const summary = sheet.runs.length
        ? `${percent(covered / written)} of the written text are runs of 12 and more characters that occur in the training text. The longest has ${longest}.`
        : "No run of 12 or more characters occurs in the training text.";
      const rows = [...sheet.runs].sort((a, b) => b.length - a.length).slice(0, 40).map((run) => {
        const line = corpus.slice(0, run.source).split("\n").length, end = run.source + run.text.length;
        const show = (text) => text.replaceAll("\n", " ↵ ");
        return el("li", {}, el("button", { type: "button", class: "run", onclick: () => sheet.select(run.start) },
          el("span", { class: "quote prose", dir: "auto" }, `…${show(corpus.slice(Math.max(0, run.source - 30), run.source))}`, el("mark", {}, show(run.text)), `${show(corpus.slice(end, end + 30))}…`),
          el("span", { class: "muted small" }, `${run.text.length} characters, line ${whole(line)} of the training text`)));
      });
      return [el("p", { class: "small" }, this.desk.sheets.length > 1 ? `${sheet.model.name}: ` : "", summary), el("ol", { class: "runs" }, rows)];
    });
    $("panel-copied").replaceChildren(...parts.flat());
  }
}
