"""Tokenizers as diffusion models need them: a mask token, one token for end, padding and start, a chat template."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.config import ModelEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def load_tokenizer(path: str | Path, model: ModelEntry | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, set up for diffusion as `model` says (nothing is changed without it).

    Raises ValueError, one line, if there is no tokenizer or if it lacks a token that the model entry names.
    """
    from transformers import AutoTokenizer

    if not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        # transformers would make one up from config.json, without any words
        raise ValueError(f"{path}: no tokenizer there ({TOKENIZER_FILES[0]}); fetch or train the checkpoint again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, LookupError, TypeError) as fault:
        first = str(fault).splitlines()[0]
        raise ValueError(f"{path}: no usable tokenizer ({first}); fetch or train the checkpoint again") from None
    if model is None:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    for key, token in (("mask_token", model.mask_token), ("end_token", model.end_token)):
        if token not in vocabulary:
            raise ValueError(
                f"{path}: the tokenizer has no token {token!r} ({key}); set {key} of the model's entry to one of "
                f"its special tokens: {', '.join(sorted(set(tokenizer.all_special_tokens)))}"
            )
    tokenizer.mask_token = model.mask_token
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = model.end_token
    if model.chat_template == "bert":
        tokenizer.chat_template = chat_template("bert")
    return tokenizer


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
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}[{index}].role = {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        if message["role"] == "system" and index:
            raise ValueError(f"{where}[{index}].role = 'system'; only the first turn may be the system's")


def chat_text(tokenizer, messages: list[dict], *, add_generation_prompt: bool) -> str:
    """A conversation in the tokenizer's chat template: what training tokenizes and what a prompt is made of."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def encode_chat(tokenizer, messages: list[dict], *, add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation in the chat template, without CLS or SEP: what training sees and chat sends."""
    return encode_text(tokenizer, chat_text(tokenizer, messages, add_generation_prompt=add_generation_prompt))


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text without CLS or SEP."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
