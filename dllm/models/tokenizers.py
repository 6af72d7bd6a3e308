"""Tokenizers as diffusion models need them: a mask token, one token for end, padding and start, a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.config import ModelEntry
from dllm.models.literal_text import all_marked, check_text, encode_marked, literal_messages
from dllm.models.published import SIDECAR, family_of
from dllm.provenance import how_to_make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def load_tokenizer(path: str | Path, model: ModelEntry | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, set up for diffusion as `model` says (nothing is changed without it).

    A decoder's tokenizer that has no mask token is given the one that `model` names.
    Raises ValueError, one line, if there is no tokenizer or if it lacks a token that the model entry names.
    """
    tokenizer = read_tokenizer(path)
    if model is not None:
        set_up_tokenizer(tokenizer, model, path)
    return tokenizer


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, as it was saved or published; code beside it is never run.

    Raises ValueError, one line, if there is none.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        # transformers would make one up from config.json, without any words
        step = how_to_make(path, "fetch or train the checkpoint again")
        raise ValueError(f"{path}: no tokenizer there ({TOKENIZER_FILES[0]}), {step}")
    family = family_of(path)
    # AutoTokenizer goes by the model's type, and would read the plain tokenizer of a Qwen2 as if it were Qwen2's own
    kind = "PreTrainedTokenizerFast" if _is_plain(Path(path)) else family.tokenizer if family else "AutoTokenizer"
    options = {"trust_remote_code": False} if kind == "AutoTokenizer" else {}
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(str(path), **options)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        first = first_sentence(error)
        raise ValueError(f"{path}: no usable tokenizer ({first}); fetch or train the checkpoint again") from None
    tokenizer.init_kwargs.pop("local_files_only", None)  # of this call, not of the tokenizer: it would be saved with it
    if family and family.template:
        tokenizer.chat_template = chat_template(family.template)
    return tokenizer


def first_sentence(error: Exception) -> str:
    """What a library says is wrong: its first line, and the next one where that only announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _is_plain(path: Path) -> bool:
    """Whether a tokenizer was saved here as one of transformers' plain class, which reads tokenizer.json as it is.

    Here: by training, which leaves a sidecar, or as a stand-in of a published family. What others have saved under that
    name is left to AutoTokenizer, which knows the checkpoints that say so in error.
    """
    try:
        stated = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return False
    plain = stated in ("PreTrainedTokenizerFast", "TokenizersBackend") and (path / "tokenizer.json").exists()
    return plain and ((path / SIDECAR).exists() or family_of(path) is not None)


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: ModelEntry, path: str | Path, *, mask: bool = True
) -> None:
    """Give a tokenizer the mask token, the end token and the chat template that a model entry names.

    mask: whether a mask token is needed. Raises ValueError, one line, for a token that the tokenizer lacks,
    and for one that is to be both.
    """
    if model.mask_token == model.end_token:
        raise ValueError(
            f"{path}: mask_token and end_token are both {model.mask_token!r}, and an end that is a mask is never "
            "written; set end_token of the model's entry to another special token"
        )
    named = {"mask_token": model.mask_token, "end_token": model.end_token}
    vocabulary = tokenizer.get_vocab()
    if model.mask_token not in vocabulary and model.family == "decoder" and tokenizer.mask_token is None:
        del named["mask_token"]  # an autoregressive model has none: it gets one
        if mask:
            tokenizer.add_special_tokens({"mask_token": model.mask_token})
    for key, token in named.items():
        if token not in vocabulary:
            raise ValueError(
                f"{path}: the tokenizer has no token {token!r} ({key}); set {key} of the model's entry to one of "
                f"its special tokens: {', '.join(sorted(set(tokenizer.all_special_tokens)))}"
            )
    if "mask_token" in named:
        tokenizer.mask_token = model.mask_token
    tokenizer.eos_token = tokenizer.pad_token = model.end_token
    if model.chat_template == "bert" or tokenizer.bos_token is None:
        tokenizer.bos_token = model.end_token  # a template of its own may begin with its own start token
    if model.chat_template == "bert":
        tokenizer.chat_template = chat_template("bert")


def check_same_tokenizer(path: str | Path, other: str | Path, model: ModelEntry) -> None:
    """Raise ValueError, one line, unless the tokenizers in two directories make the same tokens of every text.

    Compared is what they do once set up as `model` says, not their files, which may hold the same in other words.
    """
    facts = [_facts(load_tokenizer(directory, model)) for directory in (path, other)]
    if different := sorted(key for key in {*facts[0], *facts[1]} if facts[0].get(key) != facts[1].get(key)):
        raise ValueError(
            f"its tokenizer is not that of {Path(other).name!r}: they differ in {', '.join(different)}; leave "
            "`tokenizer` out of its entry (in an overlay: null)"
        )


def _facts(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What decides the tokens that a tokenizer makes of a text, or of a conversation in its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend else {"class": type(tokenizer).__name__}
    set_by_each_call = {"truncation", "padding"}
    facts = {key: value for key, value in facts.items() if key not in set_by_each_call}
    return facts | {"chat_template": tokenizer.chat_template, "vocabulary": tokenizer.get_vocab()}


def chat_template(name: str) -> str:
    """The jinja source of one of our chat templates."""
    return resources.files("dllm.models").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def check_messages(messages: list[dict], where: str = "messages") -> None:
    """Raise ValueError, one line, unless these are turns of a conversation that a template can write."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where} is empty; it needs at least one turn such as {{'role': 'user', 'content': 'Hello!'}}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}[{index}] = {message!r} has no text; a turn needs 'role' and 'content'")
        check_text(message["content"], f"{where}[{index}]")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}[{index}].role = {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        if message["role"] == "system" and index:
            raise ValueError(f"{where}[{index}].role = 'system'; only the first turn may be the system's")


def chat_text(tokenizer, messages: list[dict], **options) -> str:
    """A conversation in the tokenizer's chat template, with marks where a message spells a control token.

    What training tokenizes and what a prompt is made of, by `encode_marked`. options: `add_generation_prompt`, and
    others of transformers. Raises ValueError, one line, for a conversation that the template refuses.
    """
    return rendered(tokenizer, literal_messages(tokenizer, messages), **options)


def rendered(tokenizer, messages: list[dict], **options) -> str:
    """`chat_text` of messages that are literal already."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles, reason = ", ".join(message["role"] for message in messages), " ".join(str(error).split())
        raise ValueError(f"the model's chat template refuses turns of {roles}: {reason}") from None


def encode_chat(tokenizer, messages: list[dict], *, add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation in the chat template, without CLS or SEP: what training sees and chat sends."""
    return encode_marked(tokenizer, [chat_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)])[0]


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text without CLS or SEP; what spells a control token is text, too."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of each."""
    return encode_marked(tokenizer, all_marked(tokenizer, texts))


def check_ids(name: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Raise ValueError, one line, for a token id that the model does not have."""
    for position, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name} has the token id {token} at position {position}; the model's vocabulary has {vocabulary} "
                f"tokens: give ids from 0 to {vocabulary - 1}"
            )


def rewritten(tokenizer) -> tuple[str, ...]:
    """Strings that the tokenizer's decoder replaces in a joined text, wherever its tokens end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    steps = (decoder or {}).get("decoders", [decoder or {}])
    return tuple(step["pattern"]["String"] for step in steps if "String" in step.get("pattern", ()))


def overlap(text: str, mark: str) -> int:
    """How many of the last characters of a text may be the first ones of a mark that is not in it."""
    return max((size for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
