"use strict";
// The views about the past: how the model learned, and the facts about it.

// -------------------------------------------------------------------------------------------------------- training

// Fill the view of the training; return whether there is anything to show.
function showTraining({ models, history = [], samples = [] }) {
  const rows = history.filter((row) => Number.isFinite(row.val_loss));
  if (!rows.length) return false;
  const last = rows.length - 1, heading = el("p", { class: "headline" });
  const slider = el("input", { type: "range", min: 0, max: last, step: 1, value: last, id: "evaluation" });
  const sample = el("div", { class: "text prose still", tabindex: 0, role: "region", "aria-label": "Sample" });
  const points = (key) => rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, bits(row[key])]);
  const series = [{ points: points("train_loss") }, { points: points("val_loss") }];
  const chart = lineChart(() => ({
    series, marker: rows[slider.value].step, xName: "step", yName: "bits per character", label: describeHistory(rows),
  }));
  const move = () => {
    const row = rows[slider.value], loss = fixed(bits(row.val_loss));
    const found = samples.filter(({ step }) => step <= row.step).at(-1);
    slider.setAttribute("aria-valuetext", `step ${row.step}, validation loss ${loss} bits`);
    heading.replaceChildren(
      `After step ${whole(row.step)}: `, el("b", {}, loss), " bits per character of the validation text");
    sample.hidden = !found;
    if (found) sample.replaceChildren(el("span", { class: "given" }, found.prompt ?? ""), found.text);
    chart.draw();
  };
  slider.addEventListener("input", move);
  const play = el("button", { type: "button", onclick: () => playThrough(play, slider, move) }, "Play");
  $("view-training").replaceChildren(el("div", { class: "pages" },
    el("div", {},
      el("h2", { class: "label" }, `How ${models.length > 1 ? models[0].name : "the model"} learned`),
      chart, lineKey(["training text", "validation text"]),
      el("div", { class: "slider" }, play, el("label", { for: "evaluation", class: "hidden" }, "Evaluation"), slider)),
    el("div", {}, heading, samples.length ? el("h2", { class: "label" }, "What it wrote then") : "", sample)));
  move();
  return true;
}

function describeHistory(rows) {
  const losses = rows.map((row) => bits(row.val_loss));
  return `Training and validation loss at ${rows.length} evaluations. The validation loss ` +
    `starts at ${fixed(losses[0])}, and its lowest value is ${fixed(Math.min(...losses))} bits per character.`;
}

// Move the slider from the first evaluation to the last, one a second; the same button stops it.
function playThrough(button, slider, move) {
  const stop = () => {
    clearInterval(button.timer);
    button.timer = null;
    button.textContent = "Play";
  };
  if (button.timer) return stop();
  slider.value = 0;
  move();
  button.textContent = "Pause";
  button.timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    move();
    if (slider.value === slider.max) stop();
  }, 1000);
}

// ----------------------------------------------------------------------------------------------------------- about

// Fill the view of the facts. `page()` returns the page as HTML.
function showAbout(desk, page) {
  const { facts, models } = desk, several = models.length > 1;
  const text = () => desk.sheets.map((sheet) => sheet.string()).join("\n\n");
  const save = (id, name, label, content) => {
    const button = el("button", { type: "button", id }, label);
    onPress(button, () => download(name, content()));
    return button;
  };
  $("view-about").replaceChildren(el("div", { class: "pages" },
    models.map((model) => aboutModel(model, model.facts.run, several)),
    el("div", {},
      several ? "" : comparison(models[0].facts.run),
      el("section", {}, el("h2", { class: "label" }, "Take it with you"),
        el("div", { class: "actions" }, save("download-text", "text.txt", "Download the text", text),
          save("save-page", "page.html", "Save the page", page)),
        hint("A page inside a frame may not be allowed to save files. Open the file itself then.")),
      el("section", {}, el("h2", { class: "label" }, "Keys"), keys()))));
}

function aboutModel(model, run, several) {
  const { config: c, facts } = model, { val_loss: loss, standard_error: error } = run;
  const seconds = run.train_seconds ? ` in ${whole(run.train_seconds)} seconds` : "";
  const best = run.best_step ? `; the weights are those of step ${whole(run.best_step)}` : "";
  const nats = (value, error) => `${fixed(value, 4)}${error ? ` ± ${fixed(error, 4)}` : ""} nats per character`;
  const size = `${plural(c.n_layer, "block")} of ${plural(c.n_head, "head")}, ${c.n_embd} channels`;
  const rows = [
    ["Training text", run.source],
    ["Parameters", run.parameters && `${whole(run.parameters)}, stored as ${facts.dtype}`],
    ["Architecture", `${size}, a context of ${c.block_size} characters, ${c.positions} positions`],
    ["Vocabulary", `${whole(model.characters.length)} characters`],
    ["Validation loss", loss && `${nats(loss, error)}, ${fixed(bits(loss))} bits`],
    ["Best n-gram model", run.best_ngram && `${nats(run.best_ngram.loss)}, ${run.best_ngram.name}`],
    ["Training", run.steps && `${whole(run.steps)} steps${seconds}${best}`],
    ["Run", run.name], ["Commit", run.commit?.slice(0, 12)],
    ["Date", run.date?.replace(/^(\S{10})T(\d\d:\d\d).*/, "$1, $2 UTC")],
  ];
  return el("section", {}, el("h2", { class: "label" }, several ? model.name : "The model"), definitions(rows));
}

// Return bars that compare the loss with those of models that count, "" without figures.
function comparison({ baselines, val_loss: loss }) {
  if (!baselines || !loss) return "";
  const rows = Object.entries(baselines).map(([name, value]) => [name, bits(value)]).sort((a, b) => b[1] - a[1]);
  return el("section", {}, el("h2", { class: "label" }, "Bits per character of the validation text"),
    barChart([...rows, ["this model", bits(loss), true]]));
}

function keys() {
  const rows = {
    "Ctrl Enter": "write, or measure", Tab: "move to the text, then to the panels",
    "← →": "previous or next character",
    "↑ ↓": "the line above or below", "Home End": "start or end of the line; with Ctrl, of the text",
    Esc: "select nothing",
  };
  const show = (names) => names.split(" ").map((name) => el("kbd", {}, name));
  return definitions(Object.entries(rows).map(([names, use]) => [show(names), use]));
}

// Return a list of names and values, without the values that are missing.
function definitions(rows) {
  return el("dl", { class: "facts" },
    rows.filter(([, value]) => value).map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

function download(name, content) {
  const type = name.endsWith(".html") ? "text/html" : "text/plain";
  const url = URL.createObjectURL(new Blob([content], { type: `${type};charset=utf-8` }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
