"use strict";
// The view that measures any text: bits per character, and the places where the model is most surprised.

// Return the bits of each character after the one before, by the bigram model of the facts.
function bigramBits(ids, { pairs, frequencies, backoff, unigram }) {
  const V = unigram.length, frequency = new Map(pairs.map((pair, i) => [pair, frequencies[i]]));
  return ids.map((id, i) => {
    if (!i) return null;
    const before = ids[i - 1];
    return -Math.log2((frequency.get(before * V + id) ?? 0) + backoff[before] * unigram[id]);
  });
}

class Measure {
  // `show(name)` shows another view.
  constructor(desk, show) {
    Object.assign(this, { desk, show, model: desk.models[0], turn: 0 });
    this.sheet = new Sheet(this.model, "The measured text, by character", (sheet, index) => this.select(index));
    this.sheet.text.id = "measured-text";
    $("measure-text").addEventListener("input", () => this.check());
    onPress($("measure"), () => this.measure());
    onSubmitKey("view-measure", () => this.measure());
    if (desk.models.length > 1) $("measure-label").textContent = `Any text, measured by ${this.model.name}`;
    onPress($("measure-written"), () => {
      $("measure-text").value = desk.sheets[0].string();
      this.measure();
    });
  }

  check() {
    const unknown = describeUnknown(this.model.normalized($("measure-text").value), this.model.ids);
    this.say(unknown && `${unknown} Left out.`);
  }

  // Show a note. A screen reader reads it again whenever it is set.
  say(note) {
    if ($("measure-note").textContent !== note) $("measure-note").textContent = note;
  }

  // Score the text in windows that do not overlap, as the validation text was scored.
  async measure() {
    const { model, sheet } = this, ids = model.encode($("measure-text").value), turn = ++this.turn;
    this.check();
    $("measured").hidden = true;
    $("figures").replaceChildren();
    if (ids.length < 2) {
      return this.say("Type or paste at least two characters.");
    }
    let told = performance.now();
    const cache = model.gpt.makeCache(), slices = new Slices(), context = model.config.block_size;
    sheet.clear();
    sheet.append(ids[0]);
    for (let i = 0; i + 1 < ids.length; i++) {
      if (i % context === 0) cache.clear();
      const logits = model.gpt.forward(ids[i], cache);
      sheet.append(ids[i + 1], { bits: surprisal(logits, ids[i + 1]), start: i - (i % context), logits });
      if (!slices.due) continue;
      if (performance.now() - told > 1000) {
        this.say(`${whole(i)} of ${whole(ids.length)} characters read`);
        told = performance.now();
      }
      await slices.pause();
      if (turn !== this.turn) return;
    }
    this.check();
    this.showResult();
  }

  showResult() {
    const { sheet, model } = this, { run } = model.facts, { bigram } = this.desk.facts, average = mean(sheet.bits);
    const rows = [["this text", average, true]];
    if (run.val_loss) rows.push(["validation text", bits(run.val_loss)]);
    if (bigram) rows.push(["this text, by a bigram", mean(bigramBits(sheet.ids, bigram))]);
    rows.push(["guessing", Math.log2(model.characters.length)]);
    this.note = el("p", { class: "stats muted", role: "status" }, "Select a character to see what the model expected.");
    $("measured").replaceChildren(
      el("h2", { class: "label" }, "The text, shaded by surprise"),
      el("figure", { class: "sheet" }, sheet.text), this.note,
      el("button", { type: "button", id: "inspect", onclick: () => this.inspect() }, "Inspect it in the view Write"));
    $("figures").replaceChildren(
      el("h2", { class: "label" }, "Bits per character"),
      el("p", { class: "headline" }, el("b", {}, fixed(average)),
        ` bits per character in ${whole(sheet.length)} characters. ${this.verdict(average)}`),
      barChart(rows), this.places(), this.byPosition());
    $("measured").hidden = false;
    $("announcer").textContent = `${fixed(average)} bits per character.`;
    sheet.flush();
    sheet.shade("surprise", (i) => sheet.bits[i] / 8);
    sheet.text.scrollTop = 0;
  }

  verdict(average) {
    const validation = this.model.facts.run.val_loss, than = "surprising than the validation text";
    if (!validation) return "";
    const ratio = average / bits(validation);
    if (ratio < 0.8) return `Much less ${than}: the model may know it, or it repeats itself.`;
    if (ratio < 1.15) return "About as surprising as the validation text.";
    return ratio < 1.8 ? `More ${than}.` : `Much more ${than}: it is another kind of text.`;
  }

  // Return the list of the most surprising places.
  places() {
    const { sheet } = this, around = (from, to) => visible(sheet.string(Math.max(0, from), Math.min(sheet.length, to)));
    const show = (index) => {
      sheet.select(index);
      sheet.text.scrollIntoView({ block: "nearest" });
    };
    const places = largest(sheet.bits.map((b) => b ?? 0), Math.min(10, sheet.length - 1));
    const rows = places.map((i) => el("li", {}, el("button", { type: "button", class: "run", onclick: () => show(i) },
      el("span", { class: "quote prose", dir: "auto" },
        around(i - 24, i), el("mark", {}, glyph(sheet.character(i))), around(i + 1, i + 12)),
      el("span", { class: "muted small" }, `${fixed(sheet.bits[i], 1)} bits${this.expected(i)}`))));
    return el("section", {}, el("h2", { class: "label" }, "Most surprising places"), el("ol", { class: "runs" }, rows));
  }

  expected(index) {
    const logits = this.sheet.logits[index];
    if (!logits) return "";
    const p = softmax(logits), { characters } = this.model;
    const names = largest(p, 3).map((id) => `${spoken(characters[id])} ${percent(p[id])}`);
    return `; expected ${names.join(", ")}`;
  }

  select(index) {
    if (index < 0 || !this.note) return;
    const b = this.sheet.bits[index], c = spoken(this.sheet.character(index));
    const why = b === null ? "the first character is not predicted" : `${fixed(b)} bits${this.expected(index)}`;
    this.note.textContent = `${c}: ${why}.`;
  }

  // Return a chart of the loss by position in the window, with that of the validation text.
  byPosition() {
    const { sheet, model } = this, context = model.config.block_size, step = Math.max(1, Math.ceil(context / 16));
    if (sheet.length < context) return "";
    const average = (pairs) => Array.from({ length: Math.ceil(context / step) }, (_, n) => {
      const values = pairs.filter(([position]) => Math.floor(position / step) === n).map(([, value]) => value);
      return [n * step + step / 2 + 0.5, mean(values)];
    }).filter(([, value]) => value !== null);
    const series = [{ name: "this text", points: average(sheet.bits.slice(1).map((b, i) => [i % context, b])) }];
    const validation = this.desk.facts.positions?.map((loss, position) => [position, bits(loss)]);
    if (validation?.length) series.push({ name: "validation text", points: average(validation) });
    const label = "Bits per character by position in the context";
    return el("section", {}, el("h2", { class: "label" }, "Loss by position"),
      lineChart(() => ({ series, label, xName: "position in the context", yName: "bits per character" })),
      lineKey(series.map(({ name }) => name)));
  }

  // Put the measured text on the desk.
  async inspect() {
    const [target] = this.desk.sheets;
    if (!(await this.desk.stop())) return;
    this.desk.remember();
    target.select(-1);
    target.restore({ ...this.sheet.snapshot(), logits: this.sheet.logits, given: 0, promptLength: this.sheet.length });
    target.writer = null;
    this.show("write");
    target.text.focus();
    this.desk.finish("The measured text is in the view Write.");
  }
}
