// The view of one place in the text: what could stand there, and where each head looks.

import { element } from "/static/losses.js";

const at = (id) => document.getElementById(id);
const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;

/** Text with what can't be seen made visible. */
export const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

let head = { layer: 0, head: 0 };

/** Shows an answer of /api/look; `shade` is given the weights of the head that is chosen. */
export function show(answer, shade) {
  const { chosen, likeliest, attention } = answer;
  const cut = answer.start ? ` The model saw the ${answer.position - answer.start} before it.` : "";
  at("verdict").textContent =
    `“${visible(chosen.text)}” had ${percent(chosen.probability)}: choice ${chosen.rank}.${cut}`;
  at("bars").replaceChildren(...bars(chosen, likeliest));
  if (!attention[head.layer]?.[head.head]) head = { layer: 0, head: 0 };
  drawHeads(attention, shade);
}

function bars(chosen, likeliest) {
  const listed = likeliest.some((_, i) => i + 1 === chosen.rank);
  const all = likeliest.map((each, i) => ({ ...each, isChosen: i + 1 === chosen.rank }));
  if (!listed) all.push({ ...chosen, isChosen: true });
  const most = all[0].probability;
  return all.map(({ text, probability, isChosen }) => {
    const item = document.createElement("li");
    const name = document.createElement("code");
    const bar = document.createElement("meter-bar");
    const number = document.createElement("span");
    name.textContent = visible(text);
    bar.style.width = `${(100 * probability) / most}%`;
    number.className = "number";
    number.textContent = percent(probability);
    item.classList.toggle("chosen", isChosen);
    if (isChosen) item.setAttribute("aria-current", "true");
    item.append(name, bar, number);
    return item;
  });
}

function drawHeads(attention, shade) {
  const grid = at("heads");
  const focused = grid.contains(document.activeElement);
  grid.style.gridTemplateColumns = `repeat(${attention[0].length}, minmax(44px, 1fr))`;
  grid.replaceChildren(...attention.flatMap((heads, layer) =>
    heads.map((weights, index) => headButton(weights, layer, index))));
  const choose = (layer, index) => {
    head = { layer, head: index };
    for (const button of grid.children) {
      const chosen = button.dataset.at === `${layer},${index}`;
      button.setAttribute("aria-checked", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
    at("head").textContent = `Layer ${layer + 1}, head ${index + 1}`;
    shade(attention[layer][index]);
  };
  const place = (button) => button.dataset.at.split(",").map(Number);
  grid.onclick = ({ target }) => {
    const button = target.closest("button");
    if (button) choose(...place(button));
  };
  grid.onkeydown = (event) => {
    const columns = attention[0].length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = grid.children[head.layer * columns + head.head + step];
    if (next) { choose(...place(next)); next.focus(); }
  };
  choose(head.layer, head.head);
  if (focused) grid.querySelector('[aria-checked="true"]').focus();
}

function headButton(weights, layer, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.at = `${layer},${index}`;
  button.setAttribute("role", "radio");
  button.setAttribute("aria-label", `Layer ${layer + 1}, head ${index + 1}`);
  const svg = element("svg", { viewBox: `0 0 ${weights.length} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const most = Math.max(...weights);
  weights.forEach((weight, i) => svg.append(
    element("rect", { x: i, y: 1 - weight / most, width: 1, height: weight / most })));
  button.append(svg);
  return button;
}
