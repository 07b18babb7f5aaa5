// The text, in pieces that can be chosen and shaded.

const box = document.getElementById("text");

export const count = () => box.children.length;

/** The text anew, cut in these pieces; those that begin in its first `prompt` code units are the prompt's. */
export function draw(pieces, prompt) {
  let begun = 0;
  box.replaceChildren(...pieces.map((piece, i) => {
    const made = option(piece, i);
    made.classList.toggle("prompt", begun < prompt);
    begun += piece.length;
    return made;
  }));
}

/** Goes on with these pieces, and stays at the end unless the reader has scrolled away from it. */
export function append(pieces) {
  const atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 8;
  const from = count();
  box.append(...pieces.map((piece, i) => option(piece, from + i)));
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function option(piece, index) {
  const made = document.createElement("span");
  made.id = `piece-${index}`;
  made.textContent = piece;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", "false");
  return made;
}

/** The place of the piece that was clicked; undefined beside the pieces. */
export function placeOf(target) {
  if (target.parentElement === box) return [...box.children].indexOf(target);
}

/** Chooses the piece at a place, or none for null. */
export function mark(position) {
  box.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
  const piece = box.children[position];
  piece?.setAttribute("aria-selected", "true");
  piece?.scrollIntoView({ block: "nearest" });
  if (piece) box.setAttribute("aria-activedescendant", piece.id);
  else box.removeAttribute("aria-activedescendant");
}

/** Shades each piece from `start` on by its weight, relative to the largest. */
export function shade(weights, start) {
  const most = Math.max(...weights);
  [...box.children].forEach((piece, i) => {
    const weight = (weights[i - start] ?? 0) / most;
    if (weight > 0.01) piece.style.setProperty("--weight", weight);
    else piece.removeAttribute("style");
  });
}

export function unshade() {
  for (const piece of box.children) piece.removeAttribute("style");
}
