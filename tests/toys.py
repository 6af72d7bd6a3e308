"""Tiny stock transformers models with a word-level tokenizer, saved as training saves them; and toys of no class."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm.core.packing import Layout
from dllm.models.backbone import Backbone
from dllm.models.tokenizers import chat_template
from tests.plain_forward import hidden_states, logits_at

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TAGS = ("[SYS]", "[/SYS]", "[Question]", "[/Question]", "[Answer]", "[/Answer]")
WORDS = (
    "Hello Who are you I am a toy What is the capital of France And Italy Paris Rome . ? ! red green blue one two"
).split()


TAUGHT: dict[str, dict[str, Tensor]] = {}
"""Weights of toys that were taught: the tests of a process teach the same ones again and again."""


def word_tokenizer(words: tuple[str, ...] | list[str] = WORDS):
    """A PreTrainedTokenizerFast: one token per word (▁ is the space before it), line break, tag or special."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL_TOKENS, *TAGS, "\n", "\n\n", *words, *(f"▁{word}" for word in words)]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    split = r"\[/?[A-Za-z]+\]|\n+|▁?[A-Za-z]+|▁?[^A-Za-z\n]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="[PAD]",
        bos_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        chat_template=chat_template("bert"),
        clean_up_tokenization_spaces=False,
    )


def toy_model(kind: str, vocab_size: int, *, max_length: int = 96, seed: int = 0) -> nn.Module:
    """A random BertForMaskedLM or ModernBertForMaskedLM of 2 layers x 32."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=max_length,
        initializer_range=0.1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        **({"cls_token_id": 2, "sep_token_id": 3} if kind == "modernbert" else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForMaskedLM.from_config(config).eval()


def save_toy(
    directory: Path,
    *,
    kind: str = "bert",
    words: tuple[str, ...] | list[str] = WORDS,
    max_length: int = 96,
    teach: list[tuple[list[dict], str]] | None = None,
    **sidecar,
) -> Path:
    """Save a toy checkpoint with its tokenizer and sidecar, and return its directory.

    teach: conversations and answers that it learns by heart in a moment; random weights without.
    """
    tokenizer = word_tokenizer(words)
    model = toy_model(kind, len(tokenizer), max_length=max_length)
    if teach:
        key = json.dumps([kind, words, max_length, teach])
        if key not in TAUGHT:
            learn_by_heart(model, tokenizer, teach)
            TAUGHT[key] = model.state_dict()
        model.load_state_dict(TAUGHT[key])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts = {
        "algorithm": "mdlm",
        "run": "toy",
        "family": "encoder",
        "prediction": "in_place",
        "response_end": "fill",
        "block_size": 8,
        "length": max_length,
        "special_tokens": {"mask": "[MASK]", "eos": "[PAD]", "end_of_turn": "[/Answer]"},
        "chat_template": "bert",
    }
    (Path(directory) / "dllm.json").write_text(json.dumps(facts | sidecar), encoding="utf-8")
    return Path(directory)


def learn_by_heart(model: nn.Module, tokenizer, pairs: list[tuple[list[dict], str]], *, steps: int = 200) -> None:
    """Fit the answers of a few conversations, for canvases of 16 tokens, at random mask shares."""
    prompts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns, _ in pairs]
    encode = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    answers = [tokenizer(f"{text}\n[/Answer]\n\n", add_special_tokens=False)["input_ids"] for _, text in pairs]
    rows = [p + a + [tokenizer.pad_token_id] * (16 - len(a)) for p, a in zip(encode, answers, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    attention = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    target = attention & (torch.arange(width) >= torch.tensor([len(p) for p in encode])[:, None])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        share = torch.rand(len(rows), 1, generator=generator) * 0.8 + 0.2
        masked = target & (torch.rand(tokens.shape, generator=generator) < share)
        masked[:, width - 16] |= ~masked.any(1)
        masked &= target
        hidden = hidden_states(model, tokens.masked_fill(masked, tokenizer.mask_token_id), attention)
        loss = nn.functional.cross_entropy(logits_at(model, hidden, masked), tokens[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class ToyBackbone(Backbone):
    """A backbone around a module with `logits_of(tokens [B, L], attention [B, L] or None)`: [B, L, V], any numbers.

    Ids: text 0..V-1, then mask, EOS and padding. A row is computed as a whole, as if a cache were always fresh; in rows
    that attend block-causally, each block behind all that it sees.
    """

    def __init__(self, model: nn.Module, mask_id: int, eos_id: int, pad_id: int, vocab_size: int, **changes):
        defaults = {"tokenizer": None, "family": "encoder", "prediction": "in_place", "max_length": 64}
        ids = {"mask_id": mask_id, "eos_id": eos_id, "pad_id": pad_id, "vocab_size": vocab_size, "packable": False}
        super().__init__(model=model, **defaults | ids | changes)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, tokens: Tensor, layout: Layout, *, cache=None, part: Layout | None = None, read=None) -> Tensor:
        part = part or layout
        if layout.blocks is None:
            attention = torch.arange(layout.width) < layout.cu_seqlens.diff()[:, None]
            hidden = part.pack(self.model.logits_of(tokens, attention))
        else:
            hidden = self._block_by_block(tokens, layout, part)
        return hidden if read is None else hidden.index_select(0, read)

    def head_logits(self, rows: Tensor) -> Tensor:
        return rows.float()

    def nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head_logits(rows), targets, reduction="none")

    def _block_by_block(self, tokens: Tensor, layout: Layout, part: Layout) -> Tensor:
        rows, taken, pattern, base = [], [], layout.blocks.pattern, 0
        for row, (first, count) in enumerate(zip(part.begins, part.lengths, strict=True)):
            key_end, span = (x[base : base + layout.lengths[row]] for x in (pattern.key_end, pattern.span))
            base += layout.lengths[row]
            low = first
            while low < first + count:
                high = low + 1
                while high < first + count and key_end[high] == key_end[low] and span[high] == span[low]:
                    high += 1
                seen, behind = tokens[row, : key_end[low]], tokens[row, low:high]
                rows.append(seen if span[low] < 0 else torch.cat([seen, behind]))
                taken.append((low, high) if span[low] < 0 else (int(key_end[low]), len(rows[-1])))
                low = high
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        hidden = self.model.logits_of(padded, torch.arange(padded.shape[1]) < lengths[:, None])
        return torch.cat([states[low:high] for states, (low, high) in zip(hidden, taken, strict=True)])


def turns(*texts: str) -> list[dict]:
    """Texts as alternating turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


LEARNT = [
    (turns("Hello!"), "Hello! I am a toy."),
    (turns("Who are you?"), "I am a toy."),
    (turns("What is the capital of France?"), "Paris."),
    (turns("What is the capital of France?", "Paris.", "And Italy?"), "Rome."),
]
"""Conversations and answers that a taught toy knows by heart."""
