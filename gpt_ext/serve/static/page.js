// The page: writing, and choosing a place in what is written to look at.

import { NeedsToken, complete, get, keepToken, look } from "/static/api.js";
import { show } from "/static/look.js";
import { curve } from "/static/losses.js";

const at = (id) => document.getElementById(id);
const state = { text: "", prompt: 0, pieces: [], selected: null, writing: null, looking: null };

// Light and dark: the system's, until the button says otherwise.
const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = () => {
  const theme = localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
};
dark.addEventListener("change", setTheme);
at("theme").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme === "dark";
  localStorage.setItem("theme", isDark ? "light" : "dark");
  setTheme();
});
setTheme();

for (const slider of document.querySelectorAll("input[type=range]")) {
  const tell = () => {
    const zero = slider.value === "0" && slider.dataset.zero;
    slider.parentElement.querySelector("output").textContent = zero || slider.value;
  };
  slider.addEventListener("input", tell);
  tell();
}

const tell = (message) => { at("status").textContent = message; };

function fail(error) {
  if (error.name === "AbortError") return;
  if (error instanceof NeedsToken) {
    at("unlock").hidden = false;
    at("token").focus();
  }
  tell(error.message);
}

// Writing

function request() {
  const number = (id) => Number(at(id).value);
  const asked = { prompt: at("prompt").value, max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p") };
  if (number("top_k")) asked.top_k = number("top_k");
  if (at("seed").value) asked.seed = number("seed");
  return asked;
}

async function write() {
  const asked = request();
  close();
  state.text = asked.prompt;
  state.pieces = [...asked.prompt];
  state.prompt = state.pieces.length;
  draw();
  state.writing = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  tell("Writing…");
  try {
    for await (const text of complete(asked, state.writing.signal)) append(text);
    tell("Done.");
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    fail(error);
  }
  state.writing = null;
  at("go").disabled = false;
  at("stop").disabled = true;
}

function append(text) {
  state.text += text;
  const start = state.pieces.length;
  state.pieces.push(...text);
  at("text").append(...state.pieces.slice(start).map((piece, i) => span(piece, start + i)));
  at("text").scrollTop = at("text").scrollHeight;
}

function span(piece, index) {
  const made = document.createElement("span");
  made.id = `piece-${index}`;
  made.textContent = piece;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  made.classList.toggle("prompt", index < state.prompt);
  return made;
}

function draw() {
  at("text").replaceChildren(...state.pieces.map(span));
}

// Looking

async function select(position) {
  state.looking?.abort();
  state.looking = new AbortController();
  mark(position);
  try {
    const answer = await look(state.text, position, state.looking.signal);
    if (answer.pieces.length !== at("text").children.length) repartition(answer.pieces);
    at("look").hidden = false;
    show(answer, (weights) => shade(weights, answer.start));
  } catch (error) {
    fail(error);
  }
}

/** Tokens need not be characters: from the first look on, the text is cut as the server cuts it. */
function repartition(pieces) {
  const prompt = state.pieces.slice(0, state.prompt).join("").length;
  state.pieces = pieces;
  state.prompt = 0;
  for (let length = 0; length < prompt; state.prompt++) length += pieces[state.prompt].length;
  draw();
  mark(state.selected);
}

function mark(position) {
  at("text").querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
  state.selected = position;
  const piece = at(`piece-${position}`);
  piece?.setAttribute("aria-selected", "true");
  piece?.scrollIntoView({ block: "nearest" });
  if (piece) at("text").setAttribute("aria-activedescendant", piece.id);
  else at("text").removeAttribute("aria-activedescendant");
}

function shade(weights, start) {
  const style = getComputedStyle(document.documentElement);
  const strongest = style.getPropertyValue("--heat-most"), most = Math.max(...weights);
  [...at("text").children].forEach((piece, i) => {
    const weight = weights[i - start];
    if (weight > 0.01) piece.style.background = `rgb(var(--heat) / ${(strongest * weight) / most})`;
    else piece.removeAttribute("style");
  });
}

function close() {
  state.looking?.abort();
  at("look").hidden = true;
  mark(null);
  for (const piece of at("text").children) piece.removeAttribute("style");
}

// Events

at("write").addEventListener("submit", (event) => { event.preventDefault(); write(); });
at("stop").addEventListener("click", () => state.writing?.abort());
at("close").addEventListener("click", () => { close(); at("text").focus(); });
at("text").addEventListener("click", ({ target }) => {
  if (target.role === "option") select(Number(target.id.slice("piece-".length)));
});
at("text").addEventListener("keydown", (event) => {
  const last = state.pieces.length - 1, now = state.selected;
  const next = { ArrowRight: (now ?? 0) + 1, ArrowLeft: (now ?? last + 1) - 1, Home: 1, End: last }[event.key];
  if (next === undefined || last < 1) return;
  event.preventDefault();
  select(Math.min(last, Math.max(1, next)));
});
document.addEventListener("keydown", ({ key }) => {
  if (key !== "Escape") return;
  if (state.writing) state.writing.abort();
  else close();
});
at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value);
  at("unlock").hidden = true;
  tell("");
  start();
});

async function start() {
  try {
    const model = await get("/api/model");
    document.title = at("name").textContent = model.name;
    const unit = model.unit === "character" ? "characters" : "tokens";
    at("sizes").textContent =
      `${model.layers} layers × ${model.heads} heads, sees ${model.context} ${unit}, knows ${model.vocabulary}`;
    const losses = await get("/api/losses");
    if (losses.train.length + losses.validation.length) {
      at("losses").hidden = false;
      at("curve").replaceChildren(curve(losses, at("curve").clientWidth));
    }
  } catch (error) {
    fail(error);
  }
}
start();
