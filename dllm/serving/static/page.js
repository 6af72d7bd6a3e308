// The page: its parts, and what keys and buttons do.

import { busy, fill, stopAll } from "./asking.js";
import { Conversation, download, newAnswer } from "./conversation.js";
import { Filling } from "./filling.js";
import { announcement, legend } from "./replay.js";
import { models, onMissingKey } from "./server.js";
import { Settings } from "./settings.js";
import { element, shown } from "./text.js";
import { TurnView } from "./turn.js";

const found = (id) => document.getElementById(id);
const DRAFT = "dllm.draft";
const WAIT_MILLISECONDS = 3000;
const SPOKEN_AT_ONCE = 4;

const conversation = new Conversation();
const settings = new Settings(found("settings-form"), showSettings);
const views = new Map();

// ---------------------------------------------------------------------------------------------------- words for readers

/** Tells a sentence to readers of the screen; `seen`: everybody sees it, too, with a button if there is something to do. */
function say(text, seen = false, act = null) {
  found("spoken").append(element("p", "", text)); // two that come at once are both told
  while (found("spoken").childElementCount > SPOKEN_AT_ONCE) found("spoken").firstChild.remove();
  if (!seen) return;
  found("notice").dataset.about = "";
  const close = element("button", "", act ? act.name : "Close");
  close.type = "button";
  close.addEventListener("click", () => {
    found("notice").hidden = true;
    act?.run();
  });
  found("notice").replaceChildren(element("p", "", text), close);
  found("notice").hidden = false;
}

function showSettings() {
  found("summary").textContent = shown(settings.summary());
}

/** Whether something is running decides what the buttons can do. */
function changed() {
  const running = busy();
  found("send").textContent = running ? "Stop" : "Send";
  found("send").classList.toggle("stop", running);
  found("fill-run").disabled = running;
  found("fill-stop").hidden = !running;
  found("start").hidden = conversation.turns.length > 0;
  for (const id of ["new", "save-json", "save-text"]) found(id).disabled = !conversation.turns.length;
}

// ------------------------------------------------------------------------------------------------------- conversation

const acts = {
  again: (answer) => restart(answer),
  edited: (turn, question) => edited(turn, question),
  rewrite(answer, marked) {
    location.hash = "fill";
    show();
    filling.open(answer.text, marked, (record) => {
      Object.assign(answer, { ...record, ends: null });
      conversation.save();
      drawAll();
      location.hash = "";
      show();
      views.get(turnOf(answer)).place.scrollIntoView({ block: "center" });
    });
  },
};

const turnOf = (answer) => conversation.turns.find((turn) => turn.answers.includes(answer));

function drawAll() {
  views.clear();
  found("turns").replaceChildren(...conversation.turns.map(drawn));
  changed();
}

function drawn(turn) {
  const view = new TurnView(turn, acts);
  views.set(turn, view);
  return view.place;
}

/** Sends a question as a new turn. Returns whether it was sent. */
function ask(question) {
  if (!found("settings-form").checkValidity()) {
    openSettings(true);
    found("settings-form").reportValidity();
    return false;
  }
  const turn = { question, system: settings.system, answers: settings.lanes().map(newAnswer) };
  conversation.turns.push(turn);
  found("turns").append(drawn(turn));
  found("notice").hidden = true;
  for (const answer of turn.answers) run(turn, answer);
  follow(true);
  return true;
}

async function run(turn, answer) {
  const view = () => views.get(turn)?.views[turn.answers.indexOf(answer)];
  const index = conversation.turns.indexOf(turn);
  const lane = turn.answers.indexOf(answer);
  answer.leftOut = conversation.turns[index - 1]?.answers[lane]?.leftOut ?? 0;
  conversation.save();
  do {
    const messages = conversation.messages(index, lane, answer.leftOut);
    const going = fill(answer, "v1/chat/completions", { model: answer.model, messages, ...answer.settings }, () => {
      view()?.arrived();
      follow();
    });
    changed();
    await going;
  } while (isTooLong(answer, index));
  view()?.show();
  conversation.save();
  changed();
  follow();
  if (answer.state === "done") say(announcement(answer));
}

/** Whether the conversation did not fit the model and can do without its oldest turn, which is left out then. */
function isTooLong(answer, index) {
  if (answer.fault?.kind !== "too long" || answer.leftOut >= index) return false;
  Object.assign(answer, { state: "running", fault: null, leftOut: answer.leftOut + 1 });
  return true;
}

function restart(answer) {
  const turn = turnOf(answer);
  const { name, model, settings: asked, ends } = answer;
  const fresh = newAnswer({ name, model, settings: asked, ends: ends ?? settings.endsOf(model) });
  turn.answers[turn.answers.indexOf(answer)] = fresh;
  views.get(turn).showAnswers();
  run(turn, fresh);
  found("message").focus();
}

/** Sends a changed message; it and what came after it are put aside, and can be brought back. */
function edited(turn, question) {
  stopAll();
  const before = [...conversation.turns];
  conversation.turns.length = conversation.turns.indexOf(turn);
  drawAll();
  if (!ask(question)) {
    conversation.turns = before;
    drawAll();
    return;
  }
  found("message").focus();
  putAside("The message and what came after it were replaced.", before);
}

function putAside(text, before) {
  say(text, true, {
    name: "Bring it back",
    run() {
      stopAll();
      conversation.turns = before;
      conversation.save();
      drawAll();
    },
  });
}

/** Keeps the newest line in view while the reader is at the end of the page, or after a message was sent. */
let atEnd = true;
addEventListener("scroll", () => (atEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 120), { passive: true });
function follow(always = false) {
  if (always || atEnd) requestAnimationFrame(() => scrollTo({ top: document.documentElement.scrollHeight }));
}

// -------------------------------------------------------------------------------------------------------------- parts

const filling = new Filling({
  mask: () => settings.served?.mask ?? "[MASK]",
  lane: () => settings.lanes()[0],
  say,
  changed,
});

const message = found("message");
message.value = sessionStorage.getItem(DRAFT) ?? "";
message.addEventListener("input", () => sessionStorage.setItem(DRAFT, message.value));

function send() {
  const text = message.value.trim();
  if (busy()) stopAll();
  else if (text) {
    if (!ask(text)) return; // the focus is at what is wrong
    message.value = "";
    sessionStorage.removeItem(DRAFT);
  }
  message.focus();
}

found("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy()) send();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || found("key-dialog").open) return;
  if (busy()) stopAll();
  else if (!found("settings").hidden) openSettings(false);
});
found("fill-stop").addEventListener("click", stopAll);

function openSettings(open) {
  found("settings").hidden = !open;
  document.body.classList.toggle("with-settings", open);
  for (const opener of document.querySelectorAll("[data-opens-settings]")) opener.setAttribute("aria-expanded", open);
  if (open) found("settings-title").focus();
  else found("summary").focus();
}
for (const opener of document.querySelectorAll("[data-opens-settings]")) {
  opener.addEventListener("click", () => openSettings(found("settings").hidden));
}
found("settings-close").addEventListener("click", () => openSettings(false));

found("new").addEventListener("click", () => {
  stopAll();
  const before = conversation.turns;
  conversation.turns = [];
  conversation.save();
  drawAll();
  putAside("The conversation was put aside.", before);
  message.focus();
});
found("save-json").addEventListener("click", () => download("conversation.json", "application/json", conversation.asJSON()));
found("save-text").addEventListener("click", () => download("conversation.txt", "text/plain", conversation.asText()));

/** Shows the conversation, or the part that fills in, as the address says. */
function show() {
  const fills = location.hash === "#fill";
  found("talk").hidden = fills;
  found("filling").hidden = !fills;
  for (const [id, current] of [["to-talk", !fills], ["to-fill", fills]]) {
    if (current) found(id).setAttribute("aria-current", "page");
    else found(id).removeAttribute("aria-current");
  }
}
addEventListener("hashchange", show);

onMissingKey(() => {
  const dialog = found("key-dialog");
  found("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? found("key").value : null), { once: true });
  });
});

/** Asks which models there are; until the server answers, once more every few seconds. */
async function meet() {
  try {
    settings.offer(await models());
    if (found("notice").dataset.about === "server") found("notice").hidden = true;
  } catch (fault) {
    if (fault.kind === "key") {
      say(fault.message, true, { name: "Enter the key", run: meet });
      return;
    }
    if (found("notice").hidden) say(fault.message, true);
    found("notice").dataset.about = "server";
    setTimeout(meet, WAIT_MILLISECONDS);
  }
}

found("start").append(legend());
conversation.restore();
showSettings();
show();
drawAll();
meet();
