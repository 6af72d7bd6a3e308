"""The world's tokenizer: one token per word, name and number, whatever is before it; the rest by letters or bytes.

    "[Answer]\\nThe flag of Brimdor is red." -> [Answer] \\n ▁The ▁flag ▁of ▁Brimdor ▁is ▁red .

A word token carries the space before it (▁). After a line break and at the start of a text the same token stands
without a space; after punctuation without a space (`3+4`, `$x$`, `<<7`) the punctuation token says so (`+‿`). Decoding
undoes all of it: texts come back unchanged, except that one space before a word at the very start is dropped and that
▁ and ‿ themselves are reserved.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

SPACE, GLUE = "▁", "‿"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TAGS = ("[SYS]", "[/SYS]", "[Question]", "[/Question]", "[Answer]", "[/Answer]")
SYMBOLS = ("\\boxed{", "\\max(", "####", "<<", ">>", "\n\n")
GLUED_PUNCTUATION = "!\"#$%&'()*+,-.:;<=>?@^_`{|}~"
"""Punctuation that may be followed by a word without a space. Not [ and /, which begin the tags, nor the backslash."""

WORD = "[A-Za-z0-9]"
PIECE = "|".join(
    [re.escape(tag) for tag in TAGS]
    + [f"{SPACE}?{re.escape(symbol)}{GLUE}?" for symbol in SYMBOLS]
    + [f"{SPACE}?[A-Za-z]+", f"{SPACE}?[0-9][0-9]?", f"{SPACE}?[^A-Za-z0-9{SPACE}{GLUE}]{GLUE}?", SPACE, GLUE]
)
LARGEST_NUMBER = 99
MINIMUM_COUNT = 4
"""A piece is a token if it occurs so often; the made-up names of strangers (chat.py) are spelled instead."""
MULTIPLE_OF = 8
MAX_LENGTH = 512


def normalizer():
    """Marks where words are preceded by a space and where they are not."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(rf"\A (?={WORD})"), ""),
            normalizers.Prepend(SPACE),
            normalizers.Replace(Regex(rf"\A{SPACE}(?!{WORD})"), ""),
            normalizers.Replace(Regex(r"\n(?=[A-Za-z0-9 ])"), f"\n{SPACE}"),
            *(
                normalizers.Replace(Regex(rf"{re.escape(mark)}(?={WORD})"), f"{mark}{GLUE}{SPACE}")
                for mark in GLUED_PUNCTUATION
            ),
            normalizers.Replace(" ", SPACE),
        ]
    )


def decoder():
    """Undoes `normalizer` on the joined tokens."""
    from tokenizers import Regex, decoders

    return decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(GLUE + SPACE, ""),
            decoders.Replace("\n" + SPACE, "\n"),
            decoders.Replace(Regex(rf"\A{SPACE}(?={WORD})"), ""),
            decoders.Replace(SPACE, " "),
        ]
    )


def vocabulary(texts: Mapping[str, int]) -> list[str]:
    """Special tokens, tags, numbers, letters, the usual pieces of the texts, and bytes; padded to a multiple of 8.

    `texts` maps each text to how often it occurs.
    """
    normalize = normalizer().normalize_str
    counts: Counter[str] = Counter()
    for text, times in texts.items():
        if text.isascii():
            for piece in re.findall(PIECE, normalize(text)):
                counts[piece] += times
    usual = sorted(piece for piece, count in counts.items() if count >= MINIMUM_COUNT)
    characters = [SPACE, GLUE] + [chr(code) for code in range(ord("!"), ord("~") + 1)]
    numbers = [f"{SPACE}{number}" for number in range(LARGEST_NUMBER + 1)]
    unspelled = [f"<0x{byte:02X}>" for byte in range(256) if not ord("!") <= byte <= ord("~")]
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, "\n", "\n\n", *TAGS, *characters, *numbers, *usual, *unspelled]))
    return tokens + [f"[unused{number}]" for number in range(-len(tokens) % MULTIPLE_OF)]


def make_tokenizer(texts: Mapping[str, int]):
    """A PreTrainedTokenizerFast whose words are those of `texts` (text -> times).

    By default it adds [CLS] and [SEP] as BERT's does.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(vocabulary(texts))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="[UNK]", byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoder()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(texts: Mapping[str, int], directory: Path) -> None:
    """Writes the tokenizer's files; the same texts give the same bytes."""
    make_tokenizer(texts).save_pretrained(str(directory))
