// The view of one place in the text: what could stand there, and where each head looks.

import { element } from "/static/losses.js";

const at = (id) => document.getElementById(id);
const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;

/** Text with what can't be seen made visible. */
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

let chosenHead = { layer: 0, head: 0 };

/** Shows an answer of /api/look; `shade` is given the weights of the head that is chosen. */
export function show(answer, shade) {
  const { chosen, likeliest, attention, start, position } = answer;
  const cut = start ? ` The model saw the ${position - start} before it.` : "";
  at("verdict").textContent =
    `“${visible(chosen.text)}” stands here: ${percent(chosen.probability)}, rank ${chosen.rank}.${cut}`;
  at("bars").replaceChildren(...bars(chosen, likeliest));
  if (!attention[chosenHead.layer]?.[chosenHead.head]) chosenHead = { layer: 0, head: 0 };
  drawHeads(answer, shade);
}

function bars(chosen, likeliest) {
  const all = likeliest.map((each, i) => ({ ...each, isChosen: i + 1 === chosen.rank }));
  if (chosen.rank > likeliest.length) all.push({ ...chosen, isChosen: true });
  const most = all[0].probability;
  return all.map(({ text, probability, isChosen }) => {
    const item = document.createElement("li");
    const name = part("code", "", visible(text));
    const bar = part("span", "bar", "");
    bar.style.width = `${(100 * probability) / most}%`;
    item.classList.toggle("chosen", isChosen);
    if (isChosen) item.setAttribute("aria-current", "true");
    item.append(name, bar, part("span", "number", percent(probability)));
    return item;
  });
}

function part(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function drawHeads({ attention, pieces, start }, shade) {
  const grid = at("heads"), columns = attention[0].length;
  const hadFocus = grid.contains(document.activeElement);
  grid.style.gridTemplateColumns = `auto repeat(${columns}, minmax(44px, 1fr))`;
  const top = ["", ...attention[0].map((_, head) => head + 1)].map((text) => label(text));
  grid.replaceChildren(...top, ...attention.flatMap((heads, layer) =>
    [label(layer + 1), ...heads.map((weights, head) => headButton(weights, layer, head))]));
  const buttons = [...grid.querySelectorAll("button")];

  const choose = (index) => {
    const layer = Math.floor(index / columns), head = index % columns;
    chosenHead = { layer, head };
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === index);
      button.tabIndex = i === index ? 0 : -1;
    });
    const weights = attention[layer][head], most = Math.max(...weights);
    const where = visible(pieces[start + weights.indexOf(most)]);
    at("head").textContent = `Layer ${layer + 1}, head ${head + 1}: most to “${where}”, ${percent(most)}`;
    shade(weights);
  };
  grid.onclick = ({ target }) => {
    const index = buttons.indexOf(target.closest("button"));
    if (index >= 0) choose(index);
  };
  grid.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = buttons.indexOf(document.activeElement) + step;
    if (buttons[next]) { choose(next); buttons[next].focus(); }
  };
  const index = chosenHead.layer * columns + chosenHead.head;
  choose(index);
  if (hadFocus) buttons[index].focus();
}

function label(text) {
  const made = part("span", "quiet", text);
  made.setAttribute("aria-hidden", "true"); // each button has its own name
  return made;
}

function headButton(weights, layer, head) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "radio");
  button.setAttribute("aria-label", `Layer ${layer + 1}, head ${head + 1}`);
  const row = element("svg", {
    viewBox: `0 0 ${weights.length} 1`, preserveAspectRatio: "none", "aria-hidden": "true",
  });
  const most = Math.max(...weights);
  weights.forEach((weight, i) => row.append(
    element("rect", { x: i, width: 1, height: 1, "fill-opacity": weight / most })));
  button.append(row);
  return button;
}
