"""What a row is: a text, or a conversation in one of the ways that people write them down.

messages     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
sharegpt     {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
alpaca       {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
pairs        {"prompt": "Hi", "response": "Hello!"}
preference   {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}; each may be turns as of `messages`, and `chosen`
             and `rejected` whole conversations, as in UltraFeedback
text         {"text": "Once upon a time"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dllm.algorithms import resolved
from dllm.choices import ROW_KINDS
from dllm.models.tokenizers import check_messages

Columns = tuple[str, ...]
Row = Mapping[str, Any]

INSTRUCTION, EXTRAS, OUTPUTS = "instruction", ("input", "context"), ("output", "response", "answer", "completion")
"""Alpaca's columns, and what others call them, such as Dolly."""

MESSAGES = ("messages", "conversation", "conversations")
CONVERSATIONS = ("conversations", "conversation", "messages")
PROMPTS = ("prompt", "question", "query", "instruction", "input", "user")
RESPONSES = ("response", "answer", "completion", "output", "assistant")
PREFERENCE = ("chosen", "rejected")
SYSTEM = ("system", "system_prompt")
"""Names of columns, the first that a row has counts."""

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= dict.fromkeys(("model", "ai", "bing", "bard"), "assistant") | {"developer": "system"}
"""What others call the roles, in small or capital letters."""

SEEN = 100
"""Rows that are looked at to say what a dataset holds."""

LISTED = 5
"""Columns that are not read, of which so many are named."""


@dataclass(frozen=True)
class Kind:
    """One way to write rows: what it is called, the columns of a row that are read, and the conversation in them."""

    called: str
    columns: Callable[[Row], Columns]
    """Empty for a row that is not written in this way."""
    conversation: Callable[[Row, str], list[dict]] | None = None
    """(row, where) -> turns; None for text. Raises ValueError, one line, for a row that cannot be used."""
    rejected: Callable[[Row, str], list[dict]] | None = None
    """The same for a second conversation, whose last answer is worse; None: there is none."""


def kinds() -> dict[str, Kind]:
    """The kinds of `choices.ROW_KINDS`, in its order."""
    return {name: resolved(kind) for name, kind in ROW_KINDS.items()}


def recognised(rows: Iterable[Row], name: str) -> tuple[str, str]:
    """The kind of a dataset's first rows, and the line that says so. Raises ValueError, one line, if it has none."""
    columns: dict[str, None] = {}
    found: dict[str, Columns] = {}
    unread: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
        if kind := kind_of(row):
            read = kinds()[kind].columns(named_plainly(row))
            unread |= dict.fromkeys(_unread(row, read))
            found.setdefault(kind, read)
    if not found:
        raise ValueError(
            f"{name}: rows with the columns {', '.join(columns) or '(none)'} are of no known kind; allowed: "
            f"{ALLOWED}; rename the columns, or set `kind`"
        )
    if "text" in found and len(found) > 1:
        raise ValueError(f"{name}: holds both texts and conversations; make two datasets of them")
    said = "; ".join(f"{kinds()[kind].called}: {_listed(names)}" for kind, names in found.items())
    return next(iter(found)), f"rows look like {said}{_not_read(unread)}"


def kind_of(row: Row) -> str | None:
    """The first kind whose columns a row has, or None."""
    row = named_plainly(row)
    return next((name for name, kind in kinds().items() if kind.columns(row)), None)


def named_plainly(row: Row) -> Row:
    """A row with its columns in small letters, without blanks around them; of two alike, the plain one counts."""
    plain = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
    return row if plain.keys() == row.keys() else {**plain, **row}


def conversation_of(row: Row, kind: str, where: str) -> list[dict]:
    """The turns of a row of some kind (`auto`: that of the row itself), as role and content, checked.

    Raises ValueError, one line, for a row that cannot be used.
    """
    found = kind_of(row) if kind == "auto" else kind
    make = resolved(ROW_KINDS[found]).conversation if found in ROW_KINDS else None
    if make is None:
        raise ValueError(f"{where}: no conversation (columns: {', '.join(row)}); allowed: {ALLOWED}")
    return _checked(make(named_plainly(row), where), where)


def rejected_conversation_of(row: Row, kind: str, where: str) -> list[dict]:
    """The turns of the conversation of a row whose last answer is the worse one; otherwise as `conversation_of`."""
    make = resolved(ROW_KINDS[kind]).rejected
    assert make is not None  # such a kind has one
    return _checked(make(named_plainly(row), where), where)


def _checked(turns: list[dict], where: str) -> list[dict]:
    check_messages(turns, f"{where}: messages")
    return turns


def has_rejected(kind: str) -> bool:
    """Whether the rows of a kind have a rejected answer beside the chosen one."""
    return kind in ROW_KINDS and resolved(ROW_KINDS[kind]).rejected is not None


def _unread(row: Row, read: Columns) -> list[str]:
    """The columns of a row that hold something and are not read."""
    return [
        name
        for name, value in row.items()
        if isinstance(name, str) and name.strip().lower() not in (*read, *SYSTEM) and value not in (None, "", [], {})
    ]


def _not_read(unread: Iterable[str]) -> str:
    """What a line says of columns that are not read, so that nobody takes them for learnt."""
    names = [*unread]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"; not read: {', '.join(names[:LISTED])}{more}" if names else ""


def _listed(names: Columns) -> str:
    return f"column{'s' if len(names) > 1 else ''} {', '.join(names)}"


# --------------------------------------------------------------------------------------------------------------------
# One kind after another


def _turns(value: Any, where: str, column: str) -> list[dict]:
    """A list of turns, or its JSON as a text; a turn has role and content, or from and value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{where}: column {column!r} is a text that is not JSON") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: no messages ({value!r:.80}); a row needs a list of role and content")
    return [_turn(turn, where) if isinstance(turn, Mapping) else turn for turn in value]


def _turn(turn: Mapping, where: str) -> dict:
    named = "role" if turn.get("role") is not None else "from"
    role = turn.get(named)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    return {
        "role": ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role,
        "content": _content(content, where),
    }


def _content(content: Any, where: str) -> Any:
    """The text of OpenAI-style parts, one after another; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}: holds a part of type {kind!r}; allowed: text; drop the row")
        texts.append(text)
    return "".join(texts)


def _first(row: Row, names: Columns) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _with_system(row: Row, turns: list[dict]) -> list[dict]:
    """The turns behind the system prompt of a column of its own, if there is one."""
    name = _first(row, SYSTEM)
    if name is None or not isinstance(row[name], str) or not row[name].strip() or turns[0].get("role") == "system":
        return turns
    return [{"role": "system", "content": row[name]}, *turns]


def _chat_columns(names: Columns, key: str) -> Callable[[Row], Columns]:
    """Recognises a column with a list of turns that have a certain key."""

    def columns(row: Row) -> Columns:
        for name in names:
            value = row.get(name)
            if isinstance(value, str) and f'"{key}"' in value and value.lstrip().startswith("["):
                return (name,)
            if isinstance(value, list) and (not value and name == names[0] or _has(value, key)):
                return (name,)
        return ()

    return columns


def _has(turns: list, key: str) -> bool:
    return bool(turns) and isinstance(turns[0], Mapping) and turns[0].get(key) is not None


def _chat(names: Columns) -> Callable[[Row, str], list[dict]]:
    def conversation(row: Row, where: str) -> list[dict]:
        column = _first(row, names) or names[0]
        turns = _turns(row.get(column), where, column)
        return _with_system(row, turns) if isinstance(turns[0], dict) else turns

    return conversation


def _alpaca_columns(row: Row) -> Columns:
    """Those of Alpaca; with an input or a context beside the instruction, the answer may have another name."""
    extra, output = _first(row, EXTRAS), _first(row, OUTPUTS)
    here = tuple(name for name in (INSTRUCTION, extra, output) if name and isinstance(row.get(name), str))
    return here if {INSTRUCTION, output} <= {*here} and (output == OUTPUTS[0] or extra in here) else ()


def _alpaca(row: Row, where: str) -> list[dict]:
    """Instruction, a blank line and the input where there is one."""
    extra, output = _first(row, EXTRAS), _first(row, OUTPUTS) or OUTPUTS[0]
    for column in filter(None, (INSTRUCTION, extra, output)):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{where}: column {column!r} = {row.get(column)!r} is not a text; columns: {', '.join(row)}"
            )
    user = f"{row[INSTRUCTION]}\n\n{row[extra]}" if extra and row[extra].strip() else row[INSTRUCTION]
    return _with_system(row, [{"role": "user", "content": user}, {"role": "assistant", "content": row[output]}])


def _pair_columns(row: Row) -> Columns:
    prompt, response = _first(row, PROMPTS), _first(row, RESPONSES)
    return (prompt, response) if prompt and response else ()


def _pairs(row: Row, where: str) -> list[dict]:
    """The prompt and the response; each a text, or turns as of `messages`."""
    columns = _pair_columns(row)
    if not columns:
        raise ValueError(
            f"{where}: no prompt with its response (columns: {', '.join(row)}); allowed: one of {', '.join(PROMPTS)} "
            f"and one of {', '.join(RESPONSES)}"
        )
    return _prompt_and_answer(row, columns, where)


def _prompt_and_answer(row: Row, columns: Columns, where: str) -> list[dict]:
    """The turns of a column with a prompt and one with an answer."""
    turns: list[dict] = []
    for column, role in zip(columns, ("user", "assistant"), strict=True):
        value = row[column]
        if isinstance(value, list):
            turns += _turns(value, where, column)
        elif isinstance(value, str):
            turns.append({"role": role, "content": value})
        else:
            raise ValueError(f"{where}: column {column!r} = {value!r:.80} is not a text; columns: {', '.join(row)}")
    return _with_system(row, turns)


def _preference_columns(row: Row) -> Columns:
    here = all(row.get(name) is not None for name in PREFERENCE)
    prompt = _first(row, PROMPTS)
    return ((prompt,) if prompt else ()) + PREFERENCE if here else ()


def _answered(column: str) -> Callable[[Row, str], list[dict]]:
    """Makes the conversation that ends with the answer of a column.

    Turns that begin with the assistant's, and a text, follow the prompt; others are whole, prompt and all.
    """

    def conversation(row: Row, where: str) -> list[dict]:
        for name in PREFERENCE:
            if row.get(name) is None:
                raise ValueError(
                    f"{where}: no column {name!r} (columns: {', '.join(row)}); a preference needs a prompt, `chosen` "
                    "and `rejected`"
                )
        value, prompt = row[column], _first(row, PROMPTS)
        if isinstance(value, list):
            turns = _turns(value, where, column)
            if not isinstance(turns[0], dict) or turns[0].get("role") != "assistant":
                return _with_system(row, turns) if isinstance(turns[0], dict) else turns
        if prompt is None:
            raise ValueError(
                f"{where}: column {column!r} is an answer alone and there is no prompt (columns: {', '.join(row)}); "
                f"allowed: one of {', '.join(PROMPTS)}, or turns that begin with the user's"
            )
        return _prompt_and_answer(row, (prompt, column), where)

    return conversation


def _text_columns(row: Row) -> Columns:
    return ("text",) if isinstance(row.get("text"), str) else ()


CHATS = Kind("conversations", _chat_columns(MESSAGES, "role"), _chat(MESSAGES))
SHAREGPT = Kind("ShareGPT conversations", _chat_columns(CONVERSATIONS, "from"), _chat(CONVERSATIONS))
ALPACA = Kind("instructions and answers (Alpaca)", _alpaca_columns, _alpaca)
PAIRS = Kind("prompts and responses", _pair_columns, _pairs)
PREFERENCES = Kind("chosen and rejected answers", _preference_columns, *map(_answered, PREFERENCE))
TEXT = Kind("plain text", _text_columns)

ALLOWED = (
    "messages (role, content), conversations (from, value), instruction with output, "
    f"{'/'.join(PROMPTS)} with {'/'.join(RESPONSES)}, chosen with rejected, text"
)
"""What an error line says of them."""
