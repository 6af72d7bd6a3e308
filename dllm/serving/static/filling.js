// Filling in: a text with masks where the reader marked a stretch, and what the model puts there.

import { busy, fill } from "./asking.js";
import { Replay, announcement, button, figures } from "./replay.js";
import { copy, element } from "./text.js";
import { Trace } from "./trace.js";
import { faultNote } from "./turn.js";

const LETTERS_PER_TOKEN = 4;
const PLACE = "dllm.fill";

export class Filling {
  /** facts: {mask(): the model's mask token, lane(): {model, settings}, say(text), changed()} */
  constructor(facts) {
    this.facts = facts;
    const found = (id) => document.getElementById(id);
    [this.area, this.masks, this.results, this.put] = ["fill-text", "fill-masks", "fill-results", "fill-put"].map(found);
    this.area.value = sessionStorage.getItem(PLACE) ?? "";
    this.area.addEventListener("input", () => this.#edited());
    for (const event of ["select", "keyup", "mouseup"]) this.area.addEventListener(event, () => this.#guess());
    found("fill-mask").addEventListener("click", () => this.mask());
    found("fill-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.run();
    });
    this.#edited();
  }

  /** Takes up a text, with a part of it marked. `back` takes the result, where it came from. */
  open(text, marked, back) {
    this.area.value = text;
    this.back = back;
    this.#edited();
    const at = marked ? text.indexOf(marked) : -1;
    this.area.focus();
    this.area.setSelectionRange(at < 0 ? 0 : at, at < 0 ? 0 : at + marked.length);
    this.#guess();
  }

  #edited() {
    sessionStorage.setItem(PLACE, this.area.value);
    document.getElementById("fill-run").disabled = busy();
  }

  /** As many masks as the marked stretch has tokens, about. */
  #guess() {
    const { selectionStart, selectionEnd } = this.area;
    if (selectionEnd > selectionStart) {
      const words = this.area.value.slice(selectionStart, selectionEnd).split(/\s+/).filter(Boolean);
      this.masks.value = words.reduce((sum, word) => sum + Math.max(1, Math.round(word.length / LETTERS_PER_TOKEN)), 0) || 1;
    }
  }

  /** Puts masks in place of the marked stretch and the space before it, or where the cursor is. */
  mask() {
    const { value, selectionStart, selectionEnd } = this.area;
    // the space before a word is part of its token in many vocabularies, and of no importance in the others
    const from = value.slice(0, selectionStart).trimEnd().length;
    const to = Math.max(from, value.slice(0, selectionEnd).trimEnd().length);
    const count = Math.min(Number(this.masks.max), Math.max(1, Number(this.masks.value) || 1));
    const masks = this.facts.mask().repeat(count);
    this.area.setRangeText(masks, from, to, "end");
    this.area.focus();
    this.#edited();
  }

  async run() {
    if (busy()) return;
    const text = this.area.value;
    if (!text.includes(this.facts.mask())) {
      this.facts.say("There is nothing to fill in yet. Mark a stretch of the text and choose “Mask it”.", true);
      return;
    }
    const { model, settings } = this.facts.lane();
    const { max_tokens: _, ...asked } = settings; // the text says how long it is
    const record = { text: "", state: "running", trace: new Trace(), fault: null };
    const replay = new Replay(record);
    const place = element("section", "answer");
    place.setAttribute("aria-label", "Filled text");
    const told = element("p", "figures");
    const foot = element("div", "foot");
    place.append(replay.body, replay.panel, foot);
    this.results.prepend(place);
    foot.append(told);
    const going = fill(record, "v1/infill", { model, text, ...asked }, () => {
      replay.arrived();
      told.textContent = figures(record);
    });
    this.facts.changed();
    await going;
    replay.mode = record.state === "done" ? "sureness" : ""; // what the model wrote stands out
    replay.show();
    told.textContent = figures(record);
    this.#finish(record, place, foot, replay);
    this.facts.changed();
  }

  #finish(record, place, foot, replay) {
    if (record.state === "failed") place.append(faultNote(record.fault, () => (place.remove(), this.run())));
    foot.append(...replay.tools);
    if (!record.text) return;
    const { back } = this;
    foot.append(button("Copy", () => copy(record.text)));
    foot.append(button("Go on from this", () => this.open(record.text, "", back)));
    if (back) foot.append(button("Put into the conversation", () => back(record)));
    if (record.state === "done") this.facts.say(announcement(record));
  }
}
