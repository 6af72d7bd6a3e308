// Text as it is: nothing in it is markup, and a character that one cannot see is shown.

// control characters, marks that turn the direction of text, invisible characters, lone surrogates
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;

/** A small sign for an unseen character: ␛ for U+001B, [U+202E] for others. */
function sign(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

/** An element with a class and a text; the text is never parsed. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Replaces what is in `target` by `text`, with signs in place of unseen characters. */
export function write(target, text) {
  const parts = [];
  let from = 0;
  text = text.replaceAll("\r\n", "\n");
  for (const match of text.matchAll(UNSEEN)) {
    parts.push(text.slice(from, match.index), element("span", "unseen", sign(match[0])));
    from = match.index + match[0].length;
  }
  target.replaceChildren(...parts.filter((part) => part !== ""), text.slice(from));
}

/** The text with signs in place of unseen characters, for attributes and announcements. */
export const shown = (text) => text.replaceAll("\r\n", "\n").replace(UNSEEN, sign);

/** "1 pass", "2 passes": a number with its noun. */
export const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** Copies a text; where the browser has no clipboard for pages that came without TLS, by a selection. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", "unread");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
