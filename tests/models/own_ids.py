"""Tiny random checkpoints whose special tokens have the ids of the published ones of their family."""

from __future__ import annotations

from pathlib import Path

import torch

SPECIAL = {
    "bert": {"pad": ("[PAD]", 0), "unk": ("[UNK]", 100), "cls": ("[CLS]", 101), "sep": ("[SEP]", 102),
             "mask": ("[MASK]", 103)},
    "distilbert": {"pad": ("[PAD]", 0), "unk": ("[UNK]", 100), "cls": ("[CLS]", 101), "sep": ("[SEP]", 102),
                   "mask": ("[MASK]", 103)},
    "roberta": {"bos": ("<s>", 0), "cls": ("<s>", 0), "pad": ("<pad>", 1), "eos": ("</s>", 2), "sep": ("</s>", 2),
                "unk": ("<unk>", 3), "mask": ("<mask>", 50264)},
    "modernbert": {"unk": ("[UNK]", 50280), "cls": ("[CLS]", 50281), "sep": ("[SEP]", 50282), "pad": ("[PAD]", 50283),
                   "mask": ("[MASK]", 50284)},
    "deberta-v2": {"pad": ("[PAD]", 0), "cls": ("[CLS]", 1), "sep": ("[SEP]", 2), "unk": ("[UNK]", 3),
                   "mask": ("[MASK]", 128000)},
}  # fmt: skip
"""Model type -> name -> (token, id), of bert-base-uncased, distilbert-base-uncased, roberta-base, ModernBERT-base and
deberta-v3-base."""
VOCABULARY = {"bert": 30522, "distilbert": 30522, "roberta": 50265, "modernbert": 50368, "deberta-v2": 128100}
POSITIONS = {"roberta": 66}
"""RoBERTa counts from pad_token_id + 1."""


def save_with_own_ids(directory: Path, kind: str) -> Path:
    """Write a model of 2 layers x 16 and its tokenizer; returns the directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

    special = {number: token for token, number in SPECIAL[kind].values()}
    words = {special.get(number, f"w{number}"): number for number in range(VOCABULARY[kind])}
    tokenizer = Tokenizer(models.WordLevel(words, SPECIAL[kind]["unk"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": token for name, (token, _) in SPECIAL[kind].items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)
    sizes = {"vocab_size": VOCABULARY[kind], "max_position_embeddings": POSITIONS.get(kind, 64)}
    if kind == "distilbert":
        sizes |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {f"{name}_token_id": SPECIAL[kind][name][1] for name in ("pad", "bos", "eos") if name in SPECIAL[kind]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, initializer_range=0.3, **sizes, **ids)
        AutoModelForMaskedLM.from_config(config).save_pretrained(directory)
    return directory
