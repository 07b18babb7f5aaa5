// The run's loss curve, as SVG.

const HEIGHT = 260, LEFT = 44, RIGHT = 12, TOP = 30, BOTTOM = 28;

export function element(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** `train` and `validation` are lists of [step, loss]; at least one is not empty; `width` in pixels. */
export function curve({ train, validation }, width) {
  const points = [...train, ...validation];
  const last = Math.max(1, ...points.map(([step]) => step));
  const losses = points.map(([, loss]) => loss);
  const low = Math.floor(Math.min(...losses)), high = Math.max(low + 1, Math.ceil(Math.max(...losses)));
  const x = (step) => LEFT + (step / last) * (width - LEFT - RIGHT);
  const y = (loss) => TOP + ((high - loss) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const label = `Loss by step, ${low} to ${high} nats a token over ${last} steps`;
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label });

  const stride = Math.ceil((high - low) / 6);
  for (let loss = low; loss <= high; loss += stride) {
    svg.append(element("line", { x1: LEFT, x2: width - RIGHT, y1: y(loss), y2: y(loss) }));
    svg.append(element("text", { x: LEFT - 8, y: y(loss) + 4, "text-anchor": "end" }, loss));
  }
  svg.append(element("text", { x: 0, y: 14 }, "loss, nats a token"));
  for (const part of [0, 0.5, 1]) {
    const anchor = ["start", "middle", "end"][part * 2];
    const step = Math.round(part * last);
    const text = part ? `step ${step.toLocaleString("en")}` : "0";
    svg.append(element("text", { x: x(part * last), y: HEIGHT - 8, "text-anchor": anchor }, text));
  }
  for (const [name, line] of Object.entries({ train, validation })) {
    const path = line.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ");
    svg.append(element("polyline", { points: path, class: name }));
  }
  for (const [step, loss] of validation) svg.append(element("circle", { cx: x(step), cy: y(loss), r: 3.5 }));
  return svg;
}
