"""Text is text: what a user, a benchmark or a dataset writes never becomes a control token, whatever it spells.

A text that spells a control token (`[MASK]`, `<|eot_id|>`) is *marked*: two characters that no text has stand around
it. A chat template carries the marks along, and `encode_marked` encodes what they enclose as plain text, everything
else as the tokenizer does. A text that spells none of them has no marks, and its tokens are the tokenizer's own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

BEGIN, END = "\U0010fffe", "\U0010ffff"
"""Unicode keeps these two out of every text, so that a program may use them as marks."""

_UNUSUAL = re.compile(r"[^\x20-\x7e\s]")
_LONE = re.compile(f"[{BEGIN}{END}]")
_DUMMY = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})


@dataclass(frozen=True)
class _Controls:
    """Control tokens of a tokenizer: their ids, where a text spells one, and where a marked text has one of its own."""

    ids: dict[str, int]
    unknown: int | None
    spelt: re.Pattern
    own: re.Pattern


_known: WeakKeyDictionary = WeakKeyDictionary()


def _controls(tokenizer) -> _Controls:
    """Its special tokens, and what its chat template writes that is one token; made anew when one of them changes."""
    names = (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token)
    state = (names, len(tokenizer), tokenizer.chat_template)
    if tokenizer in _known and _known[tokenizer][0] == state:
        return _known[tokenizer][1]
    added = {str(token.content): (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    turns = _dummy_chat(tokenizer)
    ids = {token: number for token, (number, special) in added.items() if token and (special or token in turns)}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    words = "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)"
    own = re.compile(f"{BEGIN}(?:{words}){END}|({words})")
    controls = _Controls(ids, tokenizer.unk_token_id, re.compile(words), own)
    _known[tokenizer] = state, controls
    return controls


def _dummy_chat(tokenizer) -> str:
    """What the chat template writes around messages; empty if there is none, or if it refuses."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.apply_chat_template(list(_DUMMY[:1]), tokenize=False, add_generation_prompt=True) + (
            tokenizer.apply_chat_template(list(_DUMMY), tokenize=False, add_generation_prompt=False)
        )
    except (TemplateError, ValueError, TypeError):
        return ""


@lru_cache(maxsize=16)
def _turn_marks(template: str) -> re.Pattern:
    """Where a text spells a turn's mark that a template writes as plain text, such as `[Answer]` and `[/Answer]`.

    Case and blanks do not count, since there are tokenizers that drop them.
    """
    names = {name for name in re.findall(r"\[/(\w+)\]", template) if f"[{name}]" in template}
    words = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    return re.compile(rf"\[(\s*/?\s*(?:{words})\s*)\]", re.IGNORECASE)


def _without_turn_marks(template: str, text: str) -> str:
    """A text with round brackets where it spells a turn's mark, also if only a tokenizer would read it as one."""
    if "[" not in text and text.isascii():
        return text
    turn = _turn_marks(template)
    text = turn.sub(r"(\1)", text)
    if not _UNUSUAL.search(text):
        return text
    folded, places = _folded(text)
    characters = list(text)
    for at in turn.finditer(folded):
        characters[places[at.start()]], characters[places[at.end() - 1]] = "(", ")"
    return "".join(characters)


def _folded(text: str) -> tuple[str, list[int]]:
    """A text without accents, invisible characters and wide forms, and where each of its characters comes from."""
    letters = [
        (part, place)
        for place, character in enumerate(text)
        for part in unicodedata.normalize("NFKD", character)
        if part.isspace() or (part != "\ufffd" and unicodedata.category(part) not in ("Mn", "Cf", "Cc", "Co", "Cn"))
    ]
    return "".join(part for part, _ in letters), [place for _, place in letters]


def check_text(text: str, where: str) -> None:
    """Raise ValueError, one line, for a string that is not text: half a character, or bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} (U+{ord(text[error.start]):04X}) is no text; it comes from bytes that "
            "are not UTF-8, or from half of an escaped pair"
        ) from None


def count_spelling_control(tokenizer, texts: Sequence[str]) -> int:
    """How many of some texts spell a control token."""
    spelt = _controls(tokenizer).spelt
    return sum(spelt.search(text) is not None for text in texts)


def marked(tokenizer, text: str, *, but: Sequence[str] = ()) -> str:
    """A text whose control tokens are to be encoded as text; `but`: those that keep their meaning."""
    return _marked(_controls(tokenizer), text, but)


def all_marked(tokenizer, texts: Sequence[str]) -> list[str]:
    """`marked` of each."""
    controls = _controls(tokenizer)
    return [_marked(controls, text) for text in texts]


def _marked(controls: _Controls, text: str, but: Sequence[str] = ()) -> str:
    text = text if text.isascii() else _LONE.sub("", text)
    return controls.spelt.sub(lambda at: at[0] if at[0] in but else f"{BEGIN}{at[0]}{END}", text)


def unmarked(text: str) -> str:
    """A marked text as it was written."""
    return _LONE.sub("", text)


def literal_messages(tokenizer, messages: list[dict]) -> list[dict]:
    """The turns of a conversation, none of which can open or end another turn; the same list if none would.

    Control tokens are marked. Where the template's own marks are plain text, a message that spells one gets round
    brackets: `[/Answer]` becomes `(/Answer)`.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    controls, turns = _controls(tokenizer), []
    for message in messages:
        content = message["content"]
        literal = _marked(controls, _without_turn_marks(template, content))
        turns.append(message if literal == content else message | {"content": literal})
    return messages if all(one is other for one, other in zip(turns, messages, strict=True)) else turns


def encode_marked(tokenizer, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """Token ids of marked texts; with CLS and SEP around them where `special_tokens`.

    Raises ValueError, one line, for a string that is not text.
    """
    plain = [text for text in texts if BEGIN not in text and END not in text]
    encoded = iter(_call(tokenizer, plain, special_tokens=special_tokens) if plain else [])
    return [
        _encode_pieces(tokenizer, text, special_tokens) if BEGIN in text or END in text else list(next(encoded))
        for text in texts
    ]


def _call(tokenizer, texts: Sequence[str], *, special_tokens: bool = False, as_text: bool = False) -> list[list[int]]:
    options = {"split_special_tokens": True} if as_text else {}
    try:
        return tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False, **options)["input_ids"]
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            check_text(text, repr(text[:40]))
        raise


def _encode_pieces(tokenizer, text: str, special_tokens: bool) -> list[int]:
    """A text with marks: its own control tokens are themselves, and what is between them is text."""
    controls, ids, low = _controls(tokenizer), [], 0
    for at in controls.own.finditer(text):
        if at[1]:
            ids += [*_encode_literal(tokenizer, text[low : at.start()]), controls.ids[at[1]]]
            low = at.end()
    ids += _encode_literal(tokenizer, text[low:])
    if not special_tokens:
        return ids
    inner, outer = _call(tokenizer, ["a"])[0], _call(tokenizer, ["a"], special_tokens=True)[0]
    before = next(n for n in range(len(outer)) if list(outer[n : n + len(inner)]) == list(inner))
    return [*outer[:before], *ids, *outer[before + len(inner) :]]


def _encode_literal(tokenizer, text: str) -> list[int]:
    """Token ids of a text, none of them a control token's: a word of which a tokenizer makes one is cut in two."""
    if not text:
        return []
    controls = _controls(tokenizer)
    forbidden = set(controls.ids.values()) - {controls.unknown}
    ids = list(_call(tokenizer, [unmarked(text)], as_text=True)[0])
    if forbidden.isdisjoint(ids):
        return ids
    pieces = [piece for part in _LONE.split(text) for piece in _halves(part, controls.spelt)]
    encoded = _call(tokenizer, [piece for piece in pieces if piece], as_text=True)
    return [token for part in encoded for token in part if token not in forbidden]


def _halves(text: str, spelt: re.Pattern) -> list[str]:
    return [text[:1], text[1:]] if spelt.fullmatch(text) else [text]
