"use strict";
// The views besides writing: measure a text, look back at the training, and the facts about the model.

const bits = (nats) => nats / Math.LN2;

// ---------------------------------------------------------------------------------------------------------- charts

// Return a chart of lines that is drawn again when its width changes. `describe(width)` returns {label, xName, yName,
// series: [{name, points: [[x, y], ...]}], marker: x or null}.
function lineChart(describe) {
  const box = el("div", { class: "chart" });
  box.draw = () => {
    const width = Math.max(280, box.clientWidth || 640);
    box.replaceChildren(drawLines(describe(), width, Math.round(Math.min(340, 150 + width / 5))));
  };
  new ResizeObserver(() => box.clientWidth && box.draw()).observe(box);
  return box;
}

function drawLines({ label, xName, yName, series, marker = null }, width, height) {
  const left = 44, right = 12, top = 28, bottom = 40, all = series.flatMap(({ points }) => points);
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], yTicks = ticks(Math.min(...ys), Math.max(...ys));
  const y0 = Math.min(yTicks[0], ...ys), y1 = Math.max(yTicks.at(-1), ...ys);
  const atX = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const atY = (y) => height - bottom - ((y - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const text = (x, y, anchor, content) => svg("text", { x, y, "text-anchor": anchor }, content);
  const digits = y1 - y0 < 0.5 ? 2 : 1;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
    yTicks.map((y) => [svg("line", { class: "grid", x1: left, x2: width - right, y1: atY(y), y2: atY(y) }), text(left - 8, atY(y) + 4, "end", fixed(y, digits))]),
    ticks(x0, x1).map((x) => text(atX(x), height - bottom + 20, "middle", whole(x))),
    text(width - right, height - 4, "end", xName), text(0, 12, "start", yName),
    marker === null ? null : svg("line", { class: "marker", x1: atX(marker), x2: atX(marker), y1: top, y2: height - bottom }),
    series.map(({ points }, n) => [
      svg("polyline", { class: `line line${n}`, points: points.map(([x, y]) => `${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join(" ") }),
      points.length < 40 ? points.map(([x, y]) => svg("circle", { class: `dot line${n}${x === marker ? " here" : ""}`, cx: atX(x), cy: atY(y), r: x === marker ? 5 : 2.5 })) : null,
    ]));
}

// Return the names of the lines of a chart with their strokes.
function lineKey(names) {
  return el("p", { class: "key" }, names.map((name, n) => el("span", {}, svg("svg", { class: "stroke", viewBox: "0 0 24 8", "aria-hidden": "true" }, svg("line", { class: `line line${n}`, x1: 0, x2: 24, y1: 4, y2: 4 })), name)));
}

// Return bars to compare bits per character: [name, bits, whether it is the model's].
function barChart(rows) {
  const top = Math.max(...rows.map(([, value]) => value));
  return el("dl", { class: "compare" }, rows.map(([name, value, own]) => el("div", { class: own ? "own" : "" },
    el("dt", {}, name), el("dd", {}, el("span", { class: "bar after", "aria-hidden": "true", "--w": value / top }), el("b", {}, fixed(value))))));
}

// --------------------------------------------------------------------------------------------------------- measure

// Return the bits of each character after the one before, by the bigram model of the facts.
function bigramBits(ids, { pairs, frequencies, backoff, unigram }) {
  const V = unigram.length, seen = new Map(pairs.map((pair, i) => [pair, frequencies[i]]));
  return ids.map((id, i) => (i ? -Math.log2((seen.get(ids[i - 1] * V + id) ?? 0) + backoff[ids[i - 1]] * unigram[id]) : null));
}

class Measure {
  constructor(desk, show) {
    Object.assign(this, { desk, show, model: desk.models[0], turn: 0 });
    this.sheet = new Sheet(this.model, "The measured text, by character", (sheet, index) => this.select(index));
    this.sheet.text.id = "measured-text";
    const text = $("measure-text");
    text.addEventListener("input", () => this.check());
    onPress($("measure"), () => this.measure());
    onPress($("measure-written"), () => {
      text.value = desk.sheets[0].string();
      this.measure();
    });
  }

  check() {
    const unknown = describeUnknown(this.model.normalized($("measure-text").value), this.model.ids);
    $("measure-note").textContent = unknown && `${unknown} They are left out.`;
  }

  // Score the text in windows that do not overlap, as the validation text was scored.
  async measure() {
    const { model, sheet } = this, ids = model.encode($("measure-text").value), turn = ++this.turn;
    this.check();
    if (ids.length < 2) return ($("measure-note").textContent = "Type or paste at least two characters.");
    const cache = model.gpt.makeCache(), slices = new Slices();
    sheet.clear();
    sheet.append(ids[0]);
    for (let i = 0; i + 1 < ids.length; i++) {
      if (i % model.config.block_size === 0) cache.clear();
      const logits = model.gpt.forward(ids[i], cache);
      sheet.append(ids[i + 1], { bits: surprisal(logits, ids[i + 1]), start: i - (i % model.config.block_size), logits });
      if (!slices.due) continue;
      $("measure-note").textContent = `${whole(i)} of ${whole(ids.length)} characters read`;
      await slices.pause();
      if (turn !== this.turn) return;
    }
    this.check();
    this.result();
  }

  result() {
    const { sheet, model, desk } = this, { facts } = desk, average = mean(sheet.bits);
    const rows = [["this text", average, true]];
    if (facts.run?.val_loss) rows.push(["validation text", bits(facts.run.val_loss)]);
    if (facts.bigram) rows.push(["this text, by a bigram", mean(bigramBits(sheet.ids, facts.bigram))]);
    rows.push(["guessing", Math.log2(model.characters.length)]);
    this.note = el("p", { class: "stats muted", role: "status" }, "Select a character to see what the model expected.");
    $("measured").replaceChildren(
      el("h2", { class: "label" }, "The text, shaded by surprise"), el("figure", { class: "sheet" }, sheet.text), this.note,
      el("button", { type: "button", onclick: () => this.inspect() }, "Inspect it in the view Write"));
    $("figures").replaceChildren(
      el("h2", { class: "label" }, "Bits per character"),
      el("p", { class: "headline" }, el("b", {}, fixed(average)), ` bits per character in ${whole(sheet.length)} characters. ${this.verdict(average)}`),
      barChart(rows), this.places(), this.byPosition());
    $("measured").hidden = false;
    sheet.flush();
    sheet.shade("surprise", (i) => sheet.bits[i] / 8);
    sheet.text.scrollTop = 0;
  }

  verdict(average) {
    const validation = this.desk.facts.run?.val_loss;
    if (!validation) return "";
    const ratio = average / bits(validation);
    if (ratio < 0.8) return "Much less surprising than the validation text: the model may know it, or it repeats itself.";
    if (ratio < 1.15) return "As surprising as the validation text: it is written like the training text.";
    return ratio < 1.8 ? "More surprising than the validation text." : "Much more surprising than the validation text: it is another kind of text.";
  }

  // The most surprising places, with what the model expected there.
  places() {
    const { sheet } = this;
    const rows = largest(sheet.bits.map((b) => b ?? 0), Math.min(10, sheet.length - 1)).map((i) => {
      const around = (from, to) => sheet.string(Math.max(0, from), Math.min(sheet.length, to)).replaceAll("\n", "↵");
      return el("li", {}, el("button", { type: "button", class: "run", onclick: () => { sheet.select(i); sheet.text.scrollIntoView({ block: "center" }); } },
        el("span", { class: "quote prose", dir: "auto" }, around(i - 24, i), el("mark", {}, glyph(sheet.character(i))), around(i + 1, i + 12)),
        el("span", { class: "muted small" }, `${fixed(sheet.bits[i], 1)} bits${this.expected(i)}`)));
    });
    return el("section", {}, el("h2", { class: "label" }, "Most surprising places"), el("ol", { class: "runs" }, rows));
  }

  expected(index) {
    const logits = this.sheet.logits[index];
    if (!logits) return "";
    const p = softmax(logits);
    return `; expected ${largest(p, 3).map((id) => `${spoken(this.model.characters[id])} ${percent(p[id])}`).join(", ")}`;
  }

  select(index) {
    if (index < 0 || !this.note) return;
    const b = this.sheet.bits[index];
    this.note.textContent = `${spoken(this.sheet.character(index))}: ${b === null ? "the first character is not predicted" : `${fixed(b)} bits${this.expected(index)}`}.`;
  }

  // Loss by position in the window, next to the validation text's.
  byPosition() {
    const { sheet, model, desk } = this, context = model.config.block_size, width = Math.max(1, Math.ceil(context / 16));
    if (sheet.length < context) return "";
    const average = (pairs) => Array.from({ length: Math.ceil(context / width) }, (_, n) => {
      const values = pairs.filter(([position]) => Math.floor(position / width) === n).map(([, value]) => value);
      return [n * width + width / 2 + 0.5, mean(values)];
    }).filter(([, value]) => value !== null);
    const series = [{ name: "this text", points: average(sheet.bits.slice(1).map((b, i) => [i % context, b])) }];
    if (desk.facts.positions?.length) series.push({ name: "validation text", points: average(desk.facts.positions.map(({ position, loss }) => [position - 1, bits(loss)])) });
    return el("section", {}, el("h2", { class: "label" }, "Loss by position"),
      lineChart(() => ({ series, label: "Bits per character by position in the context", xName: "position in the context", yName: "bits per character" })),
      lineKey(series.map(({ name }) => name)));
  }

  // Put the measured text on the desk.
  async inspect() {
    const target = this.desk.sheets[0];
    await this.desk.stop();
    this.desk.remember();
    target.select(-1);
    target.restore({ ...this.sheet.snapshot(), given: 0, promptLength: this.sheet.length });
    target.writer = null;
    this.show("write");
    this.desk.finish("The measured text is in the view Write.");
  }
}

// -------------------------------------------------------------------------------------------------------- training

// Fill the view of the training; return whether there is anything to show.
function showTraining({ history = [], samples = [] }) {
  const rows = history.filter((row) => row.val_loss !== null);
  if (!rows.length) return false;
  const heading = el("p", { class: "headline" }), sample = el("div", { class: "text prose still", dir: "auto", tabindex: 0, role: "region", "aria-label": "What the model wrote then" });
  const slider = el("input", { type: "range", min: 0, max: rows.length - 1, step: 1, value: rows.length - 1, id: "evaluation" });
  const written = (step) => samples.filter((row) => row.step <= step).at(-1);
  const series = ["train_loss", "val_loss"].map((key) => ({ points: rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, bits(row[key])]) }));
  const chart = lineChart(() => ({
    series, marker: rows[slider.value].step, xName: "step", yName: "bits per character",
    label: `Training and validation loss over ${rows.length} evaluations; the validation loss falls from ${fixed(bits(rows[0].val_loss))} to ${fixed(bits(Math.min(...rows.map((row) => row.val_loss))))} bits`,
  }));
  const move = () => {
    const row = rows[slider.value], found = written(row.step);
    slider.setAttribute("aria-valuetext", `step ${row.step}, validation loss ${fixed(bits(row.val_loss))} bits`);
    heading.replaceChildren(`After step ${whole(row.step)}: `, el("b", {}, fixed(bits(row.val_loss))), " bits per character of the validation text");
    sample.hidden = !found;
    sample.replaceChildren(...(found ? [el("span", { class: "given" }, found.prompt ?? ""), found.text] : []));
    chart.draw();
  };
  slider.addEventListener("input", move);
  const play = el("button", { type: "button", onclick: () => playThrough(play, slider, move) }, "Play");
  $("view-training").replaceChildren(el("div", { class: "pages" },
    el("div", {}, el("h2", { class: "label" }, "How the model learned"), chart, lineKey(["training text", "validation text"]),
      el("div", { class: "slider" }, play, el("label", { for: "evaluation", class: "hidden" }, "Evaluation"), slider)),
    el("div", {}, heading, samples.length ? el("h2", { class: "label" }, "What it wrote then") : "", sample)));
  move();
  return true;
}

// Move the slider from the first evaluation to the last, one a second; the same button stops it.
function playThrough(button, slider, move) {
  if (button.timer) return stopPlaying(button);
  slider.value = 0;
  move();
  button.textContent = "Pause";
  button.timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    move();
    if (slider.value === slider.max) stopPlaying(button);
  }, 1000);
}

function stopPlaying(button) {
  clearInterval(button.timer);
  button.timer = null;
  button.textContent = "Play";
}

// ----------------------------------------------------------------------------------------------------------- about

function showAbout(desk, pristine) {
  const { facts, models } = desk;
  const text = () => desk.sheets.map((sheet) => sheet.string()).join("\n\n");
  const about = models.map((model) => aboutModel(model, model.facts.run ?? facts.run ?? {}, models.length > 1));
  const compared = models.length > 1 ? null : comparison(facts.run ?? {});
  $("view-about").replaceChildren(el("div", { class: "pages" }, about, el("div", {}, compared,
    el("section", {}, el("h2", { class: "label" }, "Take it with you"),
      el("div", { class: "actions" },
        el("button", { type: "button", id: "download-text", onclick: () => download("text.txt", text(), "text/plain") }, "Download the text"),
        el("button", { type: "button", id: "save-page", onclick: () => download("page.html", pristine(), "text/html") }, "Save the page")),
      el("p", { class: "muted small" }, "A page inside a frame may not be allowed to save files. Open the file itself then.")),
    el("section", {}, el("h2", { class: "label" }, "Keys"), keys()))));
}

function aboutModel(model, run, several) {
  const { config, facts } = model, loss = run.val_loss;
  const rows = [
    ["Training text", run.source ?? run.dataset],
    ["Parameters", run.parameters && `${whole(run.parameters)}, stored as ${facts.dtype}`],
    ["Architecture", `${config.n_layer} blocks of ${config.n_head} heads, ${config.n_embd} channels, a context of ${config.block_size} characters, ${config.positions} positions`],
    ["Vocabulary", `${whole(model.characters.length)} characters`],
    ["Validation loss", loss && `${fixed(loss, 4)}${run.standard_error ? ` ± ${fixed(run.standard_error, 4)}` : ""} nats per character, ${fixed(bits(loss))} bits`],
    ["Best n-gram model", run.best_ngram && `${fixed(run.best_ngram.loss, 4)} nats per character, ${run.best_ngram.name}`],
    ["Training", run.steps && `${whole(run.steps)} steps${run.train_seconds ? ` in ${whole(run.train_seconds)} seconds` : ""}${run.best_step ? `; the weights are those of step ${whole(run.best_step)}` : ""}`],
    ["Run", run.name], ["Commit", run.commit], ["Date", run.date],
  ];
  return el("section", {}, el("h2", { class: "label" }, several ? model.name : "The model"),
    el("dl", { class: "facts" }, rows.filter(([, value]) => value).map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])));
}

// Bars to compare the loss with those of models that count.
function comparison({ baselines, val_loss: loss }) {
  if (!baselines || !loss) return null;
  const rows = Object.entries(baselines).map(([name, value]) => [name, bits(value)]).sort((a, b) => b[1] - a[1]);
  return el("section", {}, el("h2", { class: "label" }, "Bits per character of the validation text"), barChart([...rows, ["this model", bits(loss), true]]));
}

function keys() {
  const rows = [
    ["Ctrl Enter", "write"], ["Tab", "move to the text, then to the panels"], ["← →", "previous or next character"], ["↑ ↓", "the line above or below"],
    ["Home End", "start or end of the line; with Ctrl, of the text"], ["Esc", "select nothing"],
  ];
  return el("dl", { class: "facts" }, rows.map(([key, meaning]) => [el("dt", {}, key.split(" ").map((part) => el("kbd", {}, part))), el("dd", {}, meaning)]));
}

function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type: `${type};charset=utf-8` }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
