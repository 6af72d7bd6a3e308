// The canvases of one answer, pass after pass: what a replay shows. Kept as changes, since most of a canvas stays.

/** A canvas: `pieces` (null: a mask), `confidence` (null: given, not written by the model), `revealed` positions. */
export class Trace {
  /** steps: [{step, length, changes: [[position, piece, confidence]], revealed: [position]}] */
  constructor(steps = []) {
    this.steps = steps;
    this.seen = { pieces: [], confidence: [] };
    for (const step of steps) apply(this.seen, step);
  }

  get passes() {
    return this.steps.length ? this.steps.at(-1).step : 0;
  }

  /** Adds a canvas as the server sends it. Before the first one comes the canvas with what it revealed still masked. */
  add({ step, pieces, confidence, revealed }) {
    if (!this.steps.length) {
      const fresh = new Set(revealed);
      const masked = pieces.map((piece, at) => (fresh.has(at) ? null : piece));
      this.given = masked.map((piece) => piece !== null);
      this.#push({ step: Math.max(0, step - 1), pieces: masked, confidence, revealed: [] });
    }
    this.#push({ step, pieces, confidence, revealed });
  }

  #push({ step, pieces, confidence, revealed }) {
    const given = this.given?.length === pieces.length ? this.given : [];
    const changes = [];
    pieces.forEach((piece, at) => {
      const sure = piece === null ? 0 : given[at] ? null : confidence[at];
      if (piece !== this.seen.pieces[at] || sure !== this.seen.confidence[at]) changes.push([at, piece, sure]);
    });
    const taken = { step, length: pieces.length, changes, revealed };
    this.steps.push(taken);
    apply(this.seen, taken);
  }

  toJSON() {
    return this.steps;
  }

  /** The last canvas. */
  get last() {
    return { ...this.seen, revealed: this.steps.at(-1)?.revealed ?? [] };
  }

  /** The canvas after the changes of steps 0 to `index`. */
  at(index) {
    const canvas = { pieces: [], confidence: [] };
    for (const step of this.steps.slice(0, index + 1)) apply(canvas, step);
    return { ...canvas, revealed: this.steps[index]?.revealed ?? [] };
  }
}

function apply(canvas, { length, changes }) {
  canvas.pieces.length = canvas.confidence.length = length;
  for (const [at, piece, sure] of changes) {
    canvas.pieces[at] = piece;
    canvas.confidence[at] = sure;
  }
}

/**
 * How many pieces of an answer are its text: behind them are the end of the turn and padding. `ends`: tokens that end an
 * answer; `text`: what was kept of it, once it is finished.
 */
export function lengthOfText(pieces, ends, text = null) {
  const first = pieces.findIndex((piece) => piece !== null && ends.includes(piece.trim()));
  let end = Math.min(first < 0 ? pieces.length : first, text === null ? Infinity : textPieces(pieces, text));
  while (end < pieces.length && end > 0 && pieces[end - 1] !== null && !pieces[end - 1].trim()) end -= 1;
  return end;
}

function textPieces(pieces, text) {
  const wanted = text.trim().length;
  let length = 0;
  for (const [count, piece] of pieces.entries()) {
    if (length >= wanted) return count;
    length += (length ? (piece ?? "") : (piece ?? "").trimStart()).length;
  }
  return pieces.length;
}
