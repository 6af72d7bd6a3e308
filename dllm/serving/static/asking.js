// One request on its way to the page: it fills a record, can be stopped, and ends as done, stopped or failed.

import { Fault, stream } from "./server.js";

const running = new Map();

/** Whether anything is on its way. */
export const busy = () => running.size > 0;

/** Stops every request; what arrived is kept. */
export function stopAll() {
  for (const stop of running.values()) stop.abort();
}

/** Stops the request that fills `record`, if there is one. */
export const stop = (record) => running.get(record)?.abort();

/**
 * Sends `body` to `path` and fills record {text, trace, state, fault, passes, seconds, seed, finish}.
 * arrived() is called for every pass and piece of text.
 */
export async function fill(record, path, body, arrived) {
  const abort = new AbortController();
  running.set(record, abort);
  const told = {
    canvas(canvas) {
      record.trace.add(canvas);
      arrived();
    },
    text(piece) {
      record.text += piece;
      arrived();
    },
  };
  try {
    Object.assign(record, await stream(path, body, told, abort.signal), { state: "done" });
  } catch (error) {
    record.state = error.name === "AbortError" ? "stopped" : "failed";
    if (record.state === "failed") {
      const { kind, message, wait } = error instanceof Fault ? error : new Fault("broken", `The page failed: ${error.message}`);
      record.fault = { kind, message, wait };
    }
  } finally {
    running.delete(record);
  }
}
