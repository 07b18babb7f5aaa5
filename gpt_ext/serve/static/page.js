// The page: writing, and choosing a place in what is written to look at.

import { NeedsToken, complete, get, keepToken, look } from "/static/api.js";
import { show } from "/static/look.js";
import { curve } from "/static/losses.js";
import { append, count, draw, mark, placeOf, shade, unshade } from "/static/text.js";

const at = (id) => document.getElementById(id);
// `cut`: the text is in the model's tokens; until it is, no place in it can be looked at.
const state = { byCharacter: true, text: "", prompt: "", cut: true, selected: null, writing: null, looking: null };

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
  state.text = state.prompt = asked.prompt;
  state.cut = state.byCharacter;
  state.writing = new AbortController();
  draw([...state.text], state.prompt.length);
  at("go").textContent = "Stop";
  tell("Writing…");
  try {
    for await (const text of complete(asked, state.writing.signal)) {
      state.text += text;
      append([...text]);
    }
    tell("Done.");
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    fail(error);
  }
  state.writing = null;
  at("go").textContent = "Write";
  if (!state.cut) cut().catch(fail);
}

/** Cuts the text as the model's tokens do. */
async function cut() {
  const text = state.text;
  const { pieces } = await look(text, 1);
  if (text !== state.text) return; // another is being written
  draw(pieces, state.prompt.length);
  state.cut = true;
}

// Looking

async function select(position) {
  if (!state.cut) return;
  if (position === 0) return tell("Nothing comes before the first place.");
  state.looking?.abort();
  state.looking = new AbortController();
  state.selected = position;
  mark(position);
  try {
    const answer = await look(state.text, position, state.looking.signal);
    at("look").hidden = false;
    at("back").disabled = position === 1;
    at("on").disabled = position === answer.pieces.length - 1;
    show(answer, (weights) => shade(weights, answer.start));
  } catch (error) {
    fail(error);
  }
}

/** To the place a step further, within the text; from none, from beyond its ends. */
function move(step) {
  const last = count() - 1;
  const next = (state.selected ?? (step > 0 ? 0 : last + 1)) + step;
  if (last > 0) select(Math.min(last, Math.max(1, next)));
}

function close() {
  state.looking?.abort();
  state.selected = null;
  at("look").hidden = true;
  mark(null);
  unshade();
}

// Events

for (const slider of document.querySelectorAll("input[type=range]")) {
  const label = () => {
    const zero = slider.value === "0" && slider.dataset.zero;
    slider.parentElement.querySelector("output").textContent = zero || slider.value;
  };
  slider.addEventListener("input", label);
  label();
}
at("write").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.writing) state.writing.abort();
  else write();
});
at("close").addEventListener("click", () => { close(); at("text").focus(); });
at("back").addEventListener("click", () => move(-1));
at("on").addEventListener("click", () => move(1));
at("text").addEventListener("click", ({ target }) => {
  const position = placeOf(target);
  if (position !== undefined) select(position);
});
at("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  if (!step) return;
  event.preventDefault();
  move(step);
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
    state.byCharacter = model.unit === "character";
    const unit = state.byCharacter ? "characters" : "tokens";
    at("sizes").textContent =
      `${model.layers} layers × ${model.heads} heads, sees ${model.context} ${unit} of ${model.vocabulary} kinds`;
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
