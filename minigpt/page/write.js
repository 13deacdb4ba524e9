"use strict";
// The desk: the prompt, the settings, and the loop that writes in slices of time.

// A model of the page: its weights and its vocabulary.
class Model {
  constructor(facts) {
    const { name, config, characters, normalize = "none" } = facts;
    Object.assign(this, { facts, name, config, normalize, characters: Array.from(characters) });
    this.ids = new Map(this.characters.map((c, id) => [c, id]));
    this.gpt = GPT.fromFacts(facts, decodeBase64($(facts.weights).textContent.trim()));
  }

  normalized(text) {
    return this.normalize === "NFC" ? text.normalize("NFC") : text;
  }

  // Return the ids of the known characters of a text.
  encode(text) {
    return Array.from(this.normalized(text), (c) => this.ids.get(c)).filter((id) => id !== undefined);
  }
}

// Any number of digits is allowed in a fraction, so its field has no step, and nudge() handles its arrow keys.
const numeric = (min, max, step = "any") => ({ type: "number", min, max, step });

// Change a fraction by 0.05 when an arrow key is pressed.
function nudge(event) {
  const { target: input, key } = event, direction = { ArrowUp: 1, ArrowDown: -1 }[key];
  if (input.step !== "any" || !direction) return;
  event.preventDefault();
  const value = Number((Number(input.value) + 0.05 * direction).toFixed(4));
  input.value = Math.min(input.max, Math.max(input.min, value));
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

// The settings: name in params.yaml, label, hint, attributes of the input.
const FIELDS = [
  ["temperature", "Temperature", "divides the logits; 0: always the likeliest", numeric(0, 5)],
  ["top_k", "Top-k", "keep the k likeliest; 0: all", numeric(0, null, 1)],
  ["top_p", "Top-p", "keep the likeliest up to this sum; 1: all", numeric(0.01, 1)],
  ["min_p", "Min-p", "keep those as likely as this share of the likeliest", numeric(0, 1)],
  ["repetition_penalty", "Repetition penalty", "of characters in the context; 1: off", numeric(0.1, 5)],
  ["seed", "Seed", "the same seed writes the same text", { type: "text", inputmode: "numeric", pattern: "[0-9]+" }],
  ["max_new_tokens", "Length", "characters to write", numeric(1, 100000, 1)],
  ["stop", "Stop text", "ends the text; \\n is a new line, | separates several", { type: "text", spellcheck: "false" }],
];

const OVERFLOWS = { reread: "reread the last half", slide: "slide by one (slow)", roll: "roll (rotary positions)" };

const PRESETS = {
  "As configured": {},
  Likeliest: { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1 },
  Careful: { temperature: 0.5, top_k: 0, top_p: 0.9, min_p: 0, repetition_penalty: 1 },
  Unfiltered: { temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1 },
  Adventurous: { temperature: 1.3, top_k: 0, top_p: 1, min_p: 0.05, repetition_penalty: 1 },
};

// The sampling parameters as the reader set them. `onChange` is called after each change.
class Settings {
  constructor(defaults, canRoll, onChange) {
    Object.assign(this, { onChange, defaults: { stop: [], overflow: "reread", ...defaults } });
    if (!canRoll && this.defaults.overflow === "roll") this.defaults.overflow = "reread";
    this.inputs = {};
    for (const [name, label, description, attributes] of FIELDS) {
      this.inputs[name] = el("input", { id: `set-${name}`, "aria-describedby": `hint-${name}`, ...attributes });
      this.addField(name, label, description);
    }
    const options = Object.entries(OVERFLOWS).filter(([name]) => canRoll || name !== "roll");
    this.inputs.overflow = el("select", { id: "set-overflow", "aria-describedby": "hint-overflow" },
      options.map(([value, label]) => el("option", { value }, label)));
    this.addField("overflow", "Full context", "when the context has no room left");
    $("presets").append(...Object.entries(PRESETS).map(([name, values]) =>
      el("button", { type: "button", class: "chip", onclick: () => this.set(values, name) }, name)));
    $("fields").addEventListener("input", () => this.changed());
    $("fields").addEventListener("keydown", nudge);
    this.set({});
  }

  addField(name, label, description) {
    $("fields").append(el("div", { class: "field" }, el("label", { for: `set-${name}` }, label), this.inputs[name],
      el("span", { class: "hint", id: `hint-${name}` }, description)));
  }

  // Set values; those not given are the defaults. A preset keeps the seed, the length and the like.
  set(values, preset = "") {
    const kept = preset in PRESETS && preset !== "As configured" ? ["seed", "max_new_tokens", "stop", "overflow"] : [];
    for (const [name, input] of Object.entries(this.inputs)) {
      if (kept.includes(name)) continue;
      const value = values[name] ?? this.defaults[name] ?? "";
      input.value = name === "stop" ? value.map(escaped).join("|") : value;
    }
    this.changed();
  }

  changed() {
    for (const [name, , description] of FIELDS) {
      const input = this.inputs[name], wrong = !input.checkValidity();
      const problem = `${input.validationMessage} Used instead: ${this.defaults[name]}.`;
      $(`hint-${name}`).textContent = wrong ? problem : description;
      input.setAttribute("aria-invalid", String(wrong));
    }
    const now = this.values;
    for (const chip of $("presets").children) {
      const preset = { ...this.defaults, ...PRESETS[chip.textContent] };
      const same = Object.keys(PRESETS.Likeliest).every((name) => preset[name] === now[name]);
      chip.setAttribute("aria-pressed", String(same));
    }
    const parts = [
      `temperature ${now.temperature}`, now.top_k && `top-k ${now.top_k}`, now.top_p < 1 && `top-p ${now.top_p}`,
      now.min_p && `min-p ${now.min_p}`, `seed ${now.seed}`, `${whole(now.max_new_tokens)} characters`,
    ];
    $("settings-summary").textContent = parts.filter(Boolean).join(" · ");
    this.onChange();
  }

  // The sampling parameters. An empty or wrong field counts as its default.
  get values() {
    const values = { ...this.defaults };
    for (const [name, input] of Object.entries(this.inputs)) {
      if (!input.value || !input.checkValidity()) continue;
      if (input.type === "number") values[name] = Number(input.value);
      else values[name] = input.value;
    }
    if (Number.isSafeInteger(Number(values.seed))) values.seed = Number(values.seed); // a larger one stays a text
    return { ...values, stop: unescaped(this.inputs.stop.value) };
  }
}

// Stop strings in one line: separated by |, with \n, \r, \| and \\ for characters that it cannot have.
const ESCAPES = { "\n": "n", "\r": "r", "|": "|", "\\": "\\" };
const escaped = (text) => text.replace(/[\n\r|\\]/g, (c) => `\\${ESCAPES[c]}`);
const unescaped = (line) => (line.match(/(?:\\[nr|\\]|[^|])+/g) ?? []).map((text) =>
  text.replace(/\\([nr|\\])/g, (_, letter) => Object.keys(ESCAPES).find((c) => ESCAPES[c] === letter)));

// Whether two settings choose the same characters: the length and the stop texts do not matter.
function samplesAlike(a, b) {
  const chosen = (values) => JSON.stringify({ ...values, max_new_tokens: 0, stop: [] });
  return chosen(a) === chosen(b);
}

// The view that writes: one sheet for each model, and a history for Undo.
class Desk {
  constructor(models, facts) {
    Object.assign(this, { models, facts, undone: [], running: null, turn: 0, shading: "surprise" });
    this.listeners = { select: () => {}, text: () => {}, settings: () => {} };
    this.sheets = models.map((model, n) => {
      const label = models.length > 1 ? `Text of ${model.name}, by character` : "The text, by character";
      const sheet = new Sheet(model, label, (...selected) => this.listeners.select(...selected));
      sheet.text.id = `text${n}`;
      const caption = models.length > 1 ? el("figcaption", { class: "label" }, model.name) : null;
      $("sheets").append(el("figure", { class: "sheet" }, caption, sheet.text, sheet.stats));
      return sheet;
    });
    const canRoll = models.every((model) => model.config.positions === "rotary");
    this.settings = new Settings(facts.sampling, canRoll, () => this.listeners.settings());
    this.connect();
  }

  connect() {
    const prompt = $("prompt");
    // Not a form: a frame that only allows scripts, such as MLflow's, blocks its submission.
    onPress($("write"), () => this.write());
    prompt.addEventListener("input", () => this.checkPrompt());
    let width = 0; // in another width, the prompt has another number of lines
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width && contentRect.width !== width) this.fitPrompt();
      width = contentRect.width;
    }).observe(prompt);
    onSubmitKey("view-write", () => this.write());
    onPress($("stop"), () => this.stop());
    onPress($("continue"), () => this.continue());
    onPress($("undo"), () => this.undo());
    prompt.value = (this.facts.prompt ?? "").replace(/^\n$/, "");
    this.checkPrompt();
  }

  // The prompt. A model needs at least one character to continue: an empty one is a new line, or a space.
  get prompt() {
    const candidates = ["\n", " ", ...this.models[0].characters];
    return $("prompt").value || candidates.find((c) => this.models.every(({ ids }) => ids.has(c))) || "\n";
  }

  // Make the prompt as high as its text.
  fitPrompt() {
    const prompt = $("prompt");
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight + 2}px`;
  }

  // Name the unknown characters of the prompt; return whether all are known.
  checkPrompt() {
    const prompt = $("prompt");
    this.fitPrompt();
    const notes = this.models.map((model) => {
      const note = describeUnknown(model.normalized(this.prompt), model.ids);
      return note && this.models.length > 1 ? `${model.name}: ${note}` : note;
    });
    const note = notes.find(Boolean) ?? "";
    if ($("prompt-note").textContent !== note) $("prompt-note").textContent = note;
    prompt.setAttribute("aria-invalid", String(Boolean(note)));
    enable($("write"), !note);
    return !note;
  }

  // Write a new text after the prompt.
  async write() {
    if (!this.checkPrompt()) return $("prompt").focus();
    if (!(await this.stop())) return;
    this.remember();
    for (const sheet of this.sheets) sheet.clear();
    for (const sheet of this.sheets) {
      sheet.select(-1); // after clear(), because it sets the shading of the new texts
      const ids = sheet.model.encode(this.prompt);
      sheet.promptLength = sheet.given = ids.length;
      for (const id of ids) sheet.append(id);
      sheet.writer = this.startWriter(sheet);
    }
    return this.run(this.settings.values.max_new_tokens);
  }

  startWriter(sheet, drawn = 0) {
    const writer = new Writer(sheet.model.gpt, this.settings.values);
    writer.start(sheet.ids, drawn);
    sheet.drawn = drawn;
    return writer;
  }

  // Write more characters after the text, with the settings as they are now.
  async continue() {
    if (!(await this.stop())) return;
    this.remember();
    const { values } = this.settings;
    for (const sheet of this.sheets) {
      if (sheet.writer?.ids.length === sheet.length && samplesAlike(sheet.writer.sampling, values)) {
        sheet.writer.sampling = values;
        continue;
      }
      sheet.writer = this.startWriter(sheet, sheet.drawn);
      sheet.promptLength = sheet.length;
    }
    return this.run(this.settings.values.max_new_tokens);
  }

  // Put the character `id` in the place of character `index`, and write on from there.
  async branch(sheet, index, id) {
    if (!(await this.stop())) return;
    this.remember();
    const remaining = Math.max(1, sheet.length - index - 1), logits = sheet.logits[index], start = sheet.starts[index];
    sheet.truncate(index);
    sheet.append(id, { bits: logits && surprisal(logits, id), start, logits });
    sheet.promptLength = sheet.length;
    sheet.given = Math.min(sheet.given, index);
    sheet.writer = this.startWriter(sheet);
    sheet.flush();
    sheet.select(index);
    sheet.text.focus({ preventScroll: true });
    return this.run(remaining, [sheet]);
  }

  // Stop writing, and wait for the last slice. Return whether nothing else was asked for meanwhile.
  async stop() {
    const turn = ++this.turn;
    if (this.running) {
      this.running.stopped = true;
      await this.running.over;
    }
    return turn === this.turn;
  }

  remember() {
    if (!this.sheets.some((sheet) => sheet.length)) return;
    this.undone.push(this.sheets.map((sheet) => sheet.snapshot()));
    if (this.undone.length > 20) this.undone.shift();
  }

  async undo() {
    if (!(await this.stop())) return;
    const states = this.undone.pop();
    if (!states) return;
    this.sheets.forEach((sheet, n) => {
      sheet.select(-1);
      sheet.restore(states[n]);
      sheet.writer = null;
    });
    this.finish("Undone.");
  }

  // Write `length` characters on each of the sheets.
  async run(length, sheets = this.sheets) {
    const running = { stopped: false, begin: performance.now() }, slices = new Slices();
    this.running = running;
    running.over = new Promise((resolve) => (running.end = resolve));
    this.refresh();
    const pens = sheets.map((sheet) => ({ sheet, remaining: length, first: sheet.length }));
    try {
      for (let active = pens; active.length && !running.stopped; active = active.filter((pen) => pen.remaining > 0)) {
        for (const pen of active) this.step(pen);
        if (!slices.due) continue;
        for (const { sheet } of active) sheet.flush();
        this.showStats();
        await slices.pause();
      }
    } finally {
      this.running = null;
      running.end();
      const seconds = (performance.now() - running.begin) / 1000;
      for (const { sheet, first } of pens) sheet.speed = (sheet.length - first) / seconds;
      this.finish(`${plural(sum(pens.map(({ sheet, first }) => sheet.length - first)), "character")} written.`);
    }
  }

  // Read one character, or write one.
  step(pen) {
    const { sheet } = pen, { writer } = sheet;
    if (writer.readAhead()) return;
    const { id, logits } = writer.next();
    // A context that rolls has no fixed start; the inspector finds one.
    const start = writer.sampling.overflow === "roll" ? null : writer.first;
    sheet.append(id, { bits: surprisal(logits, id), start, logits });
    sheet.drawn = writer.drawn;
    pen.remaining--;
    const stops = writer.sampling.stop.map((stop) => sheet.model.normalized(stop));
    for (const stop of stops.sort((a, b) => b.length - a.length)) { // of several that end here, the longest counts
      const length = Array.from(stop).length;
      if (sheet.length - pen.first < length || sheet.string(sheet.length - length) !== stop) continue;
      sheet.truncate(sheet.length - length);
      pen.remaining = 0;
      return;
    }
  }

  // Show the text after it has changed.
  finish(message) {
    for (const sheet of this.sheets) sheet.flush();
    this.refresh();
    this.showStats();
    this.listeners.text();
    $("announcer").textContent = message;
  }

  refresh() {
    const some = this.sheets.some((sheet) => sheet.length);
    enable($("stop"), Boolean(this.running));
    enable($("continue"), some && !this.running);
    enable($("undo"), this.undone.length > 0);
    enable($("download-text"), some);
    document.body.classList.toggle("writing", Boolean(this.running));
  }

  // Show the length and the mean surprisal of each text next to the validation loss.
  showStats() {
    for (const sheet of this.sheets) {
      const written = sheet.length - sheet.given, surprise = mean(sheet.bits.slice(Math.max(1, sheet.given)));
      const validation = sheet.model.facts.run.val_loss / Math.LN2;
      const parts = [
        plural(written, "character"), surprise !== null && `${fixed(surprise)} bits per character`,
        validation && `validation text ${fixed(validation)}`,
        !this.running && sheet.speed && `${whole(sheet.speed)} characters/s`,
      ];
      sheet.stats.textContent = sheet.length ? parts.filter(Boolean).join(" · ") : "";
    }
  }
}
