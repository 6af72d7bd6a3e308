// The server's API, the same that programs use: requests, streams of events, and faults in plain sentences.

const KEY = "dllm.key";
let askForKey = async () => null;
let asking = null;

/** What asks for the API key when the server wants one: () -> Promise of the key, or null. */
export const onMissingKey = (ask) => (askForKey = ask);

/** Something that went wrong: one plain sentence with the next step, its kind, and seconds to wait if the server said so. */
export class Fault extends Error {
  /** kind: full, stopped, key, broken, too long, refused, unreached or cut */
  constructor(kind, message, wait = 0) {
    super(message);
    Object.assign(this, { kind, wait });
  }
}

const UNREACHED = "The server cannot be reached. Check that it is running and that this computer is connected, then try again.";
const CUT = "The connection was lost before the answer was complete. What arrived is kept; try again to ask anew.";

/** The fault that a refusing response tells. */
async function refusal(response) {
  let said = "";
  let code = null;
  try {
    ({ message: said, code } = (await response.json()).error);
  } catch {
    // not the shape of this API: a proxy answered
  }
  const wait = Number(response.headers.get("retry-after")) || 0;
  const sentence = said && (/[.!?]$/.test(said) ? said : `${said}.`);
  if (response.status === 429) return new Fault("full", "The server is full. Your message is kept; try again in a moment.", wait || 5);
  if (response.status === 503) return new Fault("stopped", "The server is starting or stopping and takes no requests. Try again in a moment.", wait);
  if (response.status === 401) return new Fault("key", "The server wants an API key that it knows. Try again and enter another one.");
  if (response.status >= 500) return new Fault("broken", `The server failed${said ? `: ${sentence}` : "."} Try again; if it fails again, look at the server's log.`);
  const kind = code === "context_length_exceeded" ? "too long" : "refused";
  return new Fault(kind, `The server refused this: ${sentence || `status ${response.status}.`} Change the message or the settings, then try again.`);
}

/** Asks for another key. Returns whether there is one now. */
async function newKey() {
  sessionStorage.removeItem(KEY);
  const given = await askForKey();
  if (given) sessionStorage.setItem(KEY, given);
  return Boolean(given);
}

/** A response of the server with status 2xx. Throws a Fault, or AbortError when `signal` says so. */
async function request(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("unreached", UNREACHED);
  }
  if (response.ok) return response;
  if (response.status === 401) {
    asking ??= newKey().finally(() => (asking = null)); // two requests ask once
    if (await asking) return request(path, body, signal);
  }
  throw await refusal(response);
}

/** The models of the server: [{id, mask, ends, defaults}]: its mask token, the tokens that end an answer, its settings. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.map(({ id, dllm = {} }) => {
    const { mask_token: mask = "[MASK]", end_token: end, end_of_turn: turn, defaults = {} } = dllm;
    return { id, mask, ends: [end, turn].filter(Boolean), defaults };
  });
}

/** The data of each event of a stream; an event ends with an empty line, lines with : are only there to keep it open. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n\r?\n/);
    rest = lines.pop();
    for (const block of lines) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/**
 * Asks for a text and tells what arrives: told.canvas(canvas) for each pass, told.text(piece) for what is certain to stay.
 * Returns {finish, passes, seconds, seed} of the last chunk. Throws a Fault, or AbortError when `signal` says so.
 */
export async function stream(path, body, told, signal) {
  const response = await request(path, { ...body, stream: true, canvas: true }, signal);
  let finish = null;
  let last = {};
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return { finish, ...last };
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Fault("broken", `The server failed: ${chunk.error.message} Try again.`);
      if (chunk.canvas?.pieces) told.canvas(chunk.canvas);
      for (const choice of chunk.choices ?? []) {
        const piece = choice.delta?.content ?? choice.text;
        if (piece) told.text(piece);
        finish = choice.finish_reason ?? finish;
      }
      if (chunk.dllm) last = chunk.dllm;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Fault) throw error;
    throw new Fault("cut", CUT);
  }
  throw new Fault("cut", CUT);
}
