// A canvas on the page: quiet blocks where it is masked, and under each token a line that says how sure the model was.

import { element, shown, write } from "./text.js";

// below this confidence -> class; the colours of `dllm chat`, and a line that thins as confidence grows
const RAMP = [
  [0.3, "unsure"],
  [0.6, "doubtful"],
  [0.9, "likely"],
];

/** Share as per cent; nothing for text that the model was given. */
export const percent = (sure) => (sure === null ? "" : `${Math.round(100 * sure)} %`);

const level = (sure) => (sure === null ? "given" : (RAMP.find(([limit]) => sure < limit)?.[1] ?? "sure"));

/** Draws canvases into one element, touching only the positions that changed. */
export class Drawing {
  constructor(place) {
    this.place = place;
    this.drawn = [];
  }

  /** `later`: the pieces of the last canvas, so that a mask is as wide as what comes; `end`: where the answer ends. */
  draw({ pieces, confidence, revealed }, { later = [], end = Infinity } = {}) {
    const fresh = new Set(revealed);
    while (this.place.childNodes.length > pieces.length) this.place.lastChild.remove();
    this.drawn.length = pieces.length;
    pieces.forEach((piece, at) => {
      const behind = at >= end;
      const state = piece === null ? (behind ? "mask behind" : "mask") : behind ? "end" : level(confidence[at]);
      // the last canvas knows the space before a token, also while what is left of it is masked
      const known = piece === null || later[at]?.trim() === piece.trim() ? later[at] : piece;
      const text = behind ? "" : (known ?? piece ?? "");
      const look = `${state}${fresh.has(at) ? " fresh" : ""}`;
      const drawn = `${look}\n${text}\n${confidence[at]}`;
      if (this.drawn[at] === drawn) return;
      this.drawn[at] = drawn;
      const token = makeToken(text, look, behind ? "behind the end" : piece === null ? "" : percent(confidence[at]));
      if (this.place.childNodes[at]) this.place.childNodes[at].replaceWith(token);
      else this.place.append(token);
    });
  }
}

/** A token: the space before it, then its letters in the look of its state. */
function makeToken(text, look, title) {
  const token = element("span", "token");
  const space = /^\s*/.exec(text)[0];
  const letters = element("span", look);
  write(letters, text.slice(space.length));
  if (title) letters.title = title;
  token.append(space, letters);
  return token;
}

const named = (piece) => (piece.trim() ? `“${shown(piece.trim())}”` : piece.includes("\n") ? "a line break" : "a space");

/** What a pass revealed, in words: “lives” 98 %, “in” 76 %. */
export function revealedWords({ pieces, confidence, revealed }, end = Infinity) {
  return revealed
    .filter((at) => pieces[at] !== null && pieces[at] !== undefined)
    .map((at) => (at >= end ? "the end" : `${named(pieces[at])} ${percent(confidence[at])}`.trim()))
    .filter((word, at, all) => word !== "the end" || all.indexOf(word) === at)
    .join(", ");
}
