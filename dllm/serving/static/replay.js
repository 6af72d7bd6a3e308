// A text that is denoised: drawn while it comes, then plain, with its confidences or as a replay. Answers and fills use it.

import { Drawing, passWords } from "./drawing.js";
import { counted, element, shown, write } from "./text.js";
import { lengthOfText } from "./trace.js";

const PLAY_MILLISECONDS = 350;
let count = 0;

/** A button that only has a text. */
export function button(text, act, className = "") {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** made: {text, trace, state, ends}; without `ends`, all of it is text. `body` shows it, `panel` is the scrubber, `tools` are its buttons. */
export class Replay {
  constructor(made) {
    this.made = made;
    this.body = element("div", "body");
    this.body.dir = "auto";
    this.panel = element("div", "scrubber");
    this.panel.hidden = true;
    this.sureness = button("Confidence", () => this.#toggle("sureness"));
    this.scrub = button("Replay", () => this.#toggle("scrub"));
    this.tools = [this.sureness, this.scrub];
    this.#makePanel();
    this.show();
  }

  /** Draws the newest canvas before the browser's next frame. */
  arrived() {
    this.waiting ||= requestAnimationFrame(() => {
      this.waiting = 0;
      if (this.made.state === "running") this.#drawLive();
    });
  }

  #drawLive() {
    if (this.made.trace.steps.length) this.#canvas().draw(this.made.trace.last, { end: this.end });
    else this.#plain(this.made.text);
  }

  /** Shows the text as its state asks: a finished one plain, another one as far as its canvas came. */
  show() {
    const { trace, state, text } = this.made;
    const running = state === "running";
    const replayable = !running && trace.steps.length > 1; // a server that does not show its canvases sends text alone
    if (!replayable) this.mode = "";
    this.body.setAttribute("aria-hidden", running); // a reader is told once, when it is finished
    for (const tool of this.tools) tool.hidden = !replayable;
    for (const mode of ["sureness", "scrub"]) this[mode].setAttribute("aria-pressed", this.mode === mode);
    this.panel.hidden = this.mode !== "scrub";
    if (running) this.#drawLive();
    else if (this.mode === "scrub") this.#drawPass();
    else if (this.mode === "sureness") this.#drawSureness();
    else if (state === "done" && !text.trim()) this.#plain("The model ended its answer at once.", "none");
    else if (state === "done" || !trace.steps.length) this.#plain(text);
    else this.#canvas().draw({ ...trace.last, revealed: [] }, { end: this.end });
  }

  #drawSureness() {
    const { pieces, confidence } = this.made.trace.last;
    this.#canvas().draw({ pieces: pieces.slice(0, this.end), confidence, revealed: [] });
  }

  get end() {
    const { trace, state, text, ends } = this.made;
    return ends ? lengthOfText(trace.last.pieces, ends, state === "done" ? text : null) : Infinity;
  }

  #plain(text, look = "") {
    this.drawing = null;
    this.body.className = `body ${look}`;
    write(this.body, text);
  }

  #canvas() {
    if (!this.drawing) {
      this.body.replaceChildren();
      this.body.className = "body canvas";
      this.drawing = new Drawing(this.body);
    }
    return this.drawing;
  }

  #toggle(mode) {
    this.mode = this.mode === mode ? "" : mode;
    this.#pause();
    if (this.mode === "scrub") {
      this.range.max = this.made.trace.steps.length - 1;
      this.range.value = this.range.max;
    }
    this.show();
    if (this.mode === "scrub") this.range.focus();
    if (this.mode) this.panel.scrollIntoView({ block: "nearest" });
  }

  #makePanel() {
    const id = `scrubber-${++count}`;
    this.play = button("Play", () => (this.playing ? this.#pause() : this.#start()), "play");
    this.range = element("input");
    Object.assign(this.range, { type: "range", min: 0, max: 1, step: 1, id });
    this.range.addEventListener("input", () => {
      this.#pause();
      this.#drawPass();
    });
    const label = element("label", "unread", "Pass of the replay");
    label.htmlFor = id;
    this.said = element("p", "said");
    this.panel.append(this.play, label, this.range, this.said, legend());
  }

  #drawPass() {
    const { trace, state } = this.made;
    const index = Number(this.range.value);
    const { end } = this;
    const canvas = trace.at(index);
    if (state === "done") canvas.pieces = canvas.pieces.slice(0, Math.max(end, trace.reach));
    this.#canvas().draw(canvas, { later: trace.last.pieces, end });
    const words = passWords(canvas, trace.at(index - 1).pieces, end);
    const said = `Pass ${trace.steps[index].step} of ${trace.passes}: ${words}`;
    this.said.textContent = said;
    this.range.setAttribute("aria-valuetext", said);
  }

  #start() {
    if (this.range.value === this.range.max) this.range.value = 0;
    this.play.textContent = "Pause";
    this.#drawPass();
    this.playing = setInterval(() => {
      if (!this.panel.isConnected) return this.#pause(); // another text may stand in its place
      this.range.value = Number(this.range.value) + 1;
      this.#drawPass();
      if (this.range.value === this.range.max) this.#pause();
    }, PLAY_MILLISECONDS);
  }

  #pause() {
    clearInterval(this.playing);
    this.playing = 0;
    this.play.textContent = "Play";
  }
}

/** What the lines under the tokens mean. */
export function legend() {
  const list = element("p", "legend");
  const masked = element("span", "item");
  masked.append(element("span", "mask"), " masked");
  list.append(masked);
  for (const [look, text] of [["unsure", "below 30 %"], ["doubtful", "30–60 %"], ["likely", "60–90 %"], ["sure", "surer"]]) {
    const item = element("span", "item");
    item.append(element("span", look, "word"), ` ${text}`);
    list.append(item);
  }
  const item = element("span", "item");
  item.append(element("span", "sure fresh", "word"), " new");
  list.append(item);
  return list;
}

/** "12 passes · 0.8 s · seed 3", or how far it came. */
export function figures({ state, passes, seconds, seed, finish, leftOut, ends, trace }) {
  const said = [counted(passes ?? trace.passes, "pass", "passes")];
  if (seconds !== undefined) said.push(`${seconds.toFixed(seconds < 1 ? 2 : 1)} s`);
  if (seed !== undefined && state === "done") said.push(`seed ${seed}`);
  if (state === "stopped") said.unshift("stopped");
  if (leftOut) said.push(`without ${leftOut === 1 ? "the oldest turn" : `the ${leftOut} oldest turns`}, for want of room`);
  if (finish === "length" && ends) said.push("as long as allowed");
  return said.join(" · ");
}

/** What a reader of the screen is told of a finished text. */
export function announcement(made) {
  return `${shown(made.name ?? "Filled in")}: ${shown(made.text) || "no text"} (${figures(made).replaceAll(" · ", ", ")})`;
}
