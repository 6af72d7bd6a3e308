// What was said, as plain data: turns of a question and one answer, or two side by side. Kept until the tab is closed.

import { Trace } from "./trace.js";

const PLACE = "dllm.conversation";

/** An answer before its first pass. state: running, done, stopped or failed; trace: what each pass did. */
export const newAnswer = (lane) => ({ ...lane, text: "", state: "running", fault: null, trace: new Trace() });

export class Conversation {
  /** turns: [{question, system, answers}] */
  turns = [];

  /**
   * The messages that lane number `lane` sends to have turn `index` answered. Turns without an answer are left out, and
   * those before turn `from`.
   */
  messages(index, lane, from = 0) {
    const { question, system } = this.turns[index];
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const turn of this.turns.slice(from, index)) {
      const text = (turn.answers[lane] ?? turn.answers[0])?.text;
      if (text?.trim()) messages.push({ role: "user", content: turn.question }, { role: "assistant", content: text });
    }
    return [...messages, { role: "user", content: question }];
  }

  /** Remembers the conversation in this tab; if there is no room for the replays, the words alone. */
  save() {
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(this.turns));
    } catch {
      try {
        sessionStorage.setItem(PLACE, JSON.stringify(this.turns, (name, value) => (name === "trace" ? [] : value)));
      } catch {
        // no room at all: the conversation lasts as long as the page
      }
    }
  }

  /** Takes up what this tab remembers; an answer that was on its way then is a stopped one. */
  restore() {
    try {
      this.turns = JSON.parse(sessionStorage.getItem(PLACE)) ?? [];
    } catch {
      this.turns = [];
    }
    for (const answer of this.turns.flatMap((turn) => turn.answers)) {
      answer.trace = new Trace(answer.trace);
      if (answer.state === "running") answer.state = "stopped";
    }
  }

  /** Everything, with replays; `messages` is what the API takes. */
  asJSON() {
    const { turns } = this;
    const last = turns.length - 1;
    const said = last < 0 ? [] : this.messages(last, 0);
    const text = turns[last]?.answers[0]?.text;
    const messages = text ? [...said, { role: "assistant", content: text }] : said;
    return JSON.stringify({ made: new Date().toISOString(), messages, turns }, null, 1);
  }

  /** What was said, to read. */
  asText() {
    const paragraphs = [];
    let before = "";
    for (const { question, system, answers } of this.turns) {
      if (system && system !== before) paragraphs.push(`System: ${system}`);
      before = system;
      paragraphs.push(`You: ${question}`);
      for (const answer of answers) {
        const note = answer.state === "done" ? `${answer.passes} passes, ${answer.seconds} s, seed ${answer.seed}` : answer.state;
        paragraphs.push(`${answer.name} (${note}): ${answer.text}`);
      }
    }
    return `${paragraphs.join("\n\n")}\n`;
  }
}

/** Hands a file to the reader. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
