// A turn on the page: the question, which can be edited, and its answers side by side.

import { stop } from "./asking.js";
import { Replay, button, figures } from "./replay.js";
import { copy, element, write } from "./text.js";

/** A fault in one sentence, with a button to try again; seconds to wait are counted down. */
export function faultNote({ message, wait, kind }, again) {
  const note = element("div", "fault");
  const sentence = element("p", "", message);
  sentence.setAttribute("role", "alert");
  const retry = button("Try again", again);
  note.append(sentence, retry);
  let left = kind === "full" ? wait : 0;
  const tell = () => {
    retry.textContent = left > 0 ? `Try again (free in about ${left} s)` : "Try again";
    retry.classList.toggle("ready", left <= 0);
  };
  tell();
  const ticking = setInterval(() => {
    left -= 1;
    tell();
    if (left <= 0 || !note.isConnected) clearInterval(ticking);
  }, 1000);
  return note;
}

/** One answer; acts: {again(answer), rewrite(answer, marked text)}. */
export class AnswerView {
  constructor(answer, acts) {
    Object.assign(this, { answer, acts });
    this.replay = new Replay(answer);
    this.place = element("section", "answer");
    this.place.setAttribute("aria-label", `Answer of ${answer.name}`);
    this.name = element("h3", "name");
    write(this.name, answer.name);
    this.figures = element("p", "figures");
    this.foot = element("div", "foot");
    this.stop = button("Stop", () => stop(answer));
    this.copy = button("Copy", () => this.#copy());
    this.rewrite = button("Rewrite a part", () => acts.rewrite(answer, this.#marked()));
    this.rewrite.addEventListener("mousedown", (event) => event.preventDefault()); // what is marked stays marked
    this.foot.append(this.figures, this.stop, ...this.replay.tools, this.copy, this.rewrite);
    this.place.append(this.name, this.replay.body, this.replay.panel, this.foot);
    this.show();
  }

  arrived() {
    this.replay.arrived();
    this.figures.textContent = figures(this.answer);
  }

  show() {
    const { answer } = this;
    const running = answer.state === "running";
    this.place.setAttribute("aria-busy", running);
    this.place.dataset.state = answer.state;
    this.figures.textContent = figures(answer);
    this.stop.hidden = !running;
    const nothing = answer.state === "failed" && !answer.text && !answer.trace.steps.length;
    this.replay.body.hidden = this.foot.hidden = nothing;
    this.copy.hidden = this.rewrite.hidden = running || !answer.text;
    this.fault?.remove();
    if (!running && answer.state !== "done") {
      const stopped = { message: "Stopped. What arrived is kept.", kind: "", wait: 0 };
      this.fault = faultNote(answer.fault ?? stopped, () => this.acts.again(answer));
      if (!answer.fault) this.fault.classList.add("calm");
      this.place.append(this.fault);
    }
    this.replay.show();
  }

  async #copy() {
    await copy(this.answer.text);
    this.copy.textContent = "Copied";
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }

  /** The text that the reader marked inside this answer. */
  #marked() {
    const chosen = getSelection();
    const inside = chosen.rangeCount && this.replay.body.contains(chosen.anchorNode) && this.replay.body.contains(chosen.focusNode);
    return inside ? chosen.toString() : "";
  }
}

/** A turn; acts: those of AnswerView, and edited(turn, new question). */
export class TurnView {
  constructor(turn, acts) {
    Object.assign(this, { turn, acts });
    this.place = element("li", "turn");
    this.asked = element("div", "question");
    this.answers = element("div", "answers");
    this.place.append(this.asked, this.answers);
    this.#showQuestion();
    this.showAnswers();
  }

  showAnswers() {
    this.views = this.turn.answers.map((answer) => new AnswerView(answer, this.acts));
    this.answers.replaceChildren(...this.views.map((view) => view.place));
    this.answers.classList.toggle("two", this.views.length > 1);
  }

  #showQuestion(focus = false) {
    const text = element("p", "asked");
    text.dir = "auto";
    write(text, this.turn.question);
    const edit = button("Edit", () => this.#edit());
    edit.setAttribute("aria-label", "Edit this message and send it again");
    this.asked.classList.remove("editing");
    this.asked.replaceChildren(element("h2", "unread", "You"), text, edit);
    if (focus) edit.focus();
  }

  #edit() {
    const area = element("textarea");
    area.value = this.turn.question;
    area.dir = "auto";
    area.setAttribute("aria-label", "Your message");
    const leave = () => this.#showQuestion(true);
    const send = () => (area.value.trim() ? this.acts.edited(this.turn, area.value.trim()) : leave());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const row = element("div", "row");
    row.append(button("Send again", send, "main"), button("Cancel", leave));
    this.asked.classList.add("editing");
    this.asked.replaceChildren(area, row);
    area.focus();
  }
}
