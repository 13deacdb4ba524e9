"use strict";
// The start of the page: facts and weights, the views, the theme.

const template = $("app").innerHTML; // before anything is filled in, for "Save the page"
let desk, inspector, measure, views;

// Return the page as it was opened, as HTML.
function pristine() {
  const copy = document.documentElement.cloneNode(true);
  copy.querySelector("#app").innerHTML = template;
  copy.removeAttribute("data-theme");
  copy.removeAttribute("style");
  copy.querySelector("body").removeAttribute("class");
  return `<!DOCTYPE html>\n${copy.outerHTML}\n`;
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
}

// Buttons for the theme, and for the size of the text on a projector.
function connectDisplay() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = false, scale = 1;
  setTheme(system.matches);
  system.addEventListener("change", () => chosen || setTheme(system.matches));
  $("theme").addEventListener("click", () => {
    chosen = true;
    setTheme(document.documentElement.dataset.theme !== "dark");
  });
  for (const [id, factor] of [["smaller", 1 / 1.15], ["larger", 1.15]]) {
    $(id).addEventListener("click", () => {
      scale = Math.max(0.75, Math.min(2.4, scale * factor));
      document.documentElement.style.setProperty("--scale", scale.toFixed(3));
      desk?.fitPrompt();
    });
  }
}

function describe({ models }) {
  const names = models.map((model) => model.name), { parameters, source } = models[0].run;
  const origin = source ? `, trained on ${source}` : "", size = parameters ? ` of ${whole(parameters)} parameters` : "";
  $("title").textContent = names.join(" and ");
  $("subtitle").textContent = names.length > 1
    ? "Two GPTs that write side by side, in this page, one character after the other."
    : `A GPT${size}${origin}. It writes in this page, one character after the other.`;
}

function start() {
  connectDisplay();
  const facts = JSON.parse($("facts").textContent);
  describe(facts);
  desk = new Desk(facts.models.map((model) => new Model(model)), facts);
  inspector = new Inspector(desk);
  views = new Tabs($("views"));
  measure = new Measure(desk, (name) => views.show($(`tab-${name}`)));
  $("tab-training").hidden = !showTraining(facts);
  $("tab-copied").hidden = $("copied-toggle").hidden = !facts.corpus;
  showAbout(desk, pristine);
  desk.refresh(); // its buttons, one of which is in the view About
  $("underline").addEventListener("change", () => {
    document.body.classList.toggle("no-underline", !$("underline").checked);
  });
}

function fail(error) {
  $("title").textContent = "This page cannot start";
  $("subtitle").textContent = `${error.message}. Build it again with the command minigpt page, or download it again.`;
  document.body.classList.add("failed");
}

try {
  start();
} catch (error) {
  fail(error);
}
