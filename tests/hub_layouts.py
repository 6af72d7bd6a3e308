"""Hub repositories in the layout of the real ones: all that paper.yaml and small.yaml name, with tiny content.

Files, folders, card, configurations, splits, columns, special tokens and their ids are those of the repository at the
commit that config/*.yaml pins; a model's config.json is the real one but for depth and width. The content is made up
here. Sources: the cards and file lists of the repositories, as public records of that commit or of the repository
state them; where a record differs from the rest, the comment beside the layout says so. Tokenizers of
encoders have the real special tokens, ids and sizes, those of decoders are smaller; their words are learned from the
content, and the ids between are filled.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

Row = dict[str, object]

WORDS = (
    "the old keeper of the small lighthouse wrote every evening how many ships he had seen and which way they went "
    "before the wind turned and the lamp was lit again for another long night by the quiet sea"
).split()


def prose(seed: int, words: int) -> str:
    """Made-up text, the same for the same seed."""
    return " ".join(WORDS[(seed * 7 + i * (1 + seed % 5)) % len(WORDS)] for i in range(words)) + "."


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def chat(i: int) -> list[Row]:
    """A conversation: short, with a system's turn, with more turns, and with an empty turn, which real sets have."""
    first = [turn("user", f"Who wrote in the evening, number {i}?"), turn("assistant", prose(i, 8))]
    if i == 3:
        return [turn("user", ""), turn("assistant", prose(i, 5))]
    system = [turn("system", "Answer in one sentence.")] if i % 3 == 0 else []
    return [*system, *first, *([turn("user", "And then?"), turn("assistant", prose(i + 1, 6))] if i % 2 else [])]


# --------------------------------------------------------------------------------------------------------------------
# Datasets


@dataclass(frozen=True)
class Files:
    """A configuration: how many parquet files each split has, named `<folder><split>-0000i-of-0000n`, and its rows."""

    splits: dict[str, tuple[int, int]]
    """split -> (files, rows in all)."""
    row: Callable[[int], Row]
    folder: str = ""
    schema: pyarrow.Schema | None = None
    endings: dict[str, str] = field(default_factory=dict)
    """split -> what stands between number and suffix of its files, in repositories that the hub itself once wrote."""


@dataclass(frozen=True)
class Dataset:
    """A dataset repository: its configurations, licence, and files that are no data or not parquet."""

    licence: str | None
    configs: dict[str, Files]
    more: Callable[[Path], None] | None = None


def stock_configs(folder: str) -> list[str]:
    """The configurations that lm-eval's task files below a folder read."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks" / folder
    found = re.findall(
        r"^\"?dataset_name\"?: *\"?([\w-]+)", "\n".join(p.read_text() for p in sorted(root.glob("*.yaml"))), re.M
    )
    return sorted(set(found))


def gsm8k(i: int) -> Row:
    return {
        "question": f"A boat has {i} lamps and buys two more. How many?",
        "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}",
    }


def mmlu(subject: str) -> Callable[[int], Row]:
    choices = ["a lamp", "a ship", "the wind", "the sea"]
    return lambda i: {"question": f"What is lit, {i}?", "subject": subject, "choices": choices, "answer": i % 4}


MMLU_SCHEMA = pyarrow.schema(
    [("question", pyarrow.string()), ("subject", pyarrow.string()), ("choices", pyarrow.list_(pyarrow.string())),
     ("answer", pyarrow.int64())]
)  # fmt: skip


def ceval(i: int) -> Row:
    return {
        "id": i, "question": f"第{i}题：____看见船？", "A": "灯", "B": "风", "C": "0.80", "D": "海",
        "answer": "ABCD"[i % 4], "explanation": "",
    }  # fmt: skip


def math(i: int) -> Row:
    return {
        "problem": f"What is ${i}+1$?", "level": "Level 1", "type": "Algebra",
        "solution": f"We add: $\\boxed{{{i + 1}}}$.",
    }  # fmt: skip


def bbh(i: int) -> Row:
    return {"input": f"not ( True ) and ( {bool(i % 2)} ) is", "target": "False"}


def winogrande(i: int) -> Row:
    return {
        "sentence": f"The keeper wrote to the sailor because _ was alone {i}.", "option1": "keeper",
        "option2": "sailor", "answer": "12"[i % 2],
    }  # fmt: skip


def hellaswag(i: int) -> Row:
    return {
        "ind": i, "activity_label": "Lighting a lamp", "ctx_a": "A keeper walks up.", "ctx_b": "he",
        "ctx": "A keeper walks up. he", "endings": ["lights it.", "[title] sleeps.", "sails.", "sings."],
        "source_id": f"activitynet~v_{i}", "split": "val", "split_type": "indomain", "label": str(i % 4),
    }  # fmt: skip


def mbpp(i: int) -> Row:
    return {
        "task_id": i, "text": "Write a function that adds one.", "code": "def f(x):\r\n  return x + 1",
        "test_list": ["assert f(1) == 2"] * 3, "test_setup_code": "", "challenge_test_list": [],
    }  # fmt: skip


def mbpp_sanitized(i: int) -> Row:
    found = mbpp(i)
    return {
        "source_file": "one.ipynb", "task_id": i, "prompt": found["text"], "code": found["code"], "test_imports": [],
        "test_list": found["test_list"],
    }  # fmt: skip


def wikitext(i: int) -> Row:
    kinds = ("", f" = The lighthouse {i} = \n", "", f" {prose(i, 90)} <unk> \n")
    return {"text": kinds[i % 4]}


def cmmlu_archive(directory: Path) -> None:
    """cmmlu.py, never run, beside cmmlu_v1_0_1.zip with {dev,test}/<subject>.csv, of 67 subjects.

    Answers of one subject are decimals in `dev` and other texts in `test`: types that are guessed differ.
    """
    (directory / "cmmlu.py").write_text("raise SystemExit('never run')")
    with zipfile.ZipFile(directory / "cmmlu_v1_0_1.zip", "w") as archive:
        for subject in stock_configs("cmmlu"):
            for split, rows in (("dev", 5), ("test", 3)):
                numbers = subject == "college_actuarial_science"
                options = "0.80,0.81,0.82,0.83" if numbers and split == "dev" else "(1) (2),(2) (3),风,海"
                lines = [f"{i},第{i}题：谁看见船？,{options},{'ABCD'[i % 4]}" for i in range(rows)]
                archive.writestr(f"{split}/{subject}.csv", "\n".join([",Question,A,B,C,D,Answer", *lines]) + "\n")


def lambada_texts(directory: Path) -> None:
    """data/lambada_test.jsonl and the same in languages, beside the loading script and its dataset_infos.json."""
    (directory / "data").mkdir()
    (directory / "lambada_openai.py").write_text("raise SystemExit('never run')")
    (directory / "dataset_infos.json").write_text("{}")
    for ending in ("", "_de", "_en", "_es", "_fr", "_it"):
        rows = [{"text": f"{prose(i, 40)[:-1]} lighthouse"} for i in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"data/lambada_test{ending}.jsonl").write_text(text)


DATASETS: dict[str, Dataset] = {
    # card and file list at b08601e0: four configurations, the raw ones first, train of 103 in two files
    "Salesforce/wikitext": Dataset("cc-by-sa-3.0", {
        f"wikitext-{size}-v1": Files(
            {"test": (1, 40), "train": (2 if size.startswith("103") else 1, 400), "validation": (1, 40)},
            wikitext, f"wikitext-{size}-v1/",
        )
        for size in ("103-raw", "103", "2-raw", "2")
    }),
    # 79d93d78: 80 files below plain_text/, 100,173 rows each in reality
    "Skylion007/openwebtext": Dataset("cc0-1.0", {
        "plain_text": Files({"train": (80, 800)}, lambda i: {"text": prose(i, 150)}, "plain_text/"),
    }),
    # dce01c9b: one file, whose name ends with a hash
    "tatsu-lab/alpaca": Dataset("cc-by-nc-4.0", {
        "default": Files({"train": (1, 120)}, lambda i: {
            "instruction": f"Describe the lamp {i}.", "input": "" if i % 2 else "It is old.",
            "output": "" if i == 7 else prose(i, 9), "text": "Below is an instruction ...",
        }, "data/", endings={"train": "-a09b74b3ef9c3b56"}),
    }),
    # b14afda6: six files
    "allenai/tulu-3-sft-mixture": Dataset("odc-by", {
        "default": Files({"train": (6, 120)}, lambda i: {
            "id": f"ai2-adapt-dev/one_{i}", "messages": chat(i), "source": "ai2-adapt-dev/one",
        }, "data/"),
    }),
    # 5feaf2fd: `all` in nine files and a test file; its parts have configurations of their own, two of them here
    "HuggingFaceTB/smoltalk": Dataset("apache-2.0", {
        "all": Files({"train": (9, 120), "test": (1, 40)}, lambda i: {
            "messages": chat(i), "source": "smol-magpie-ultra",
        }, "data/all/"),
        **{
            name: Files({"train": (1, 20), "test": (1, 5)}, lambda i: {"messages": chat(i)}, f"data/{name}/")
            for name in ("everyday-conversations", "smol-rewrite")
        },
    }),
    # 900124bf: jsonl files by language; its card names `default` and the languages as configurations
    "EleutherAI/lambada_openai": Dataset("mit", {}, lambada_texts),
    # e53f0488
    "openai/gsm8k": Dataset("mit", {
        name: Files({"train": (1, 12), "test": (1, 4)}, gsm8k, f"{name}/") for name in ("main", "socratic")
    }),
    # 617524a0: read by `datasets` without a script, so as parquet by subject, as its card's commits convert them
    "ceval/ceval-exam": Dataset("cc-by-nc-sa-4.0", {
        name: Files({"test": (1, 4), "val": (1, 3), "dev": (1, 5)}, ceval, f"{name}/")
        for name in stock_configs("ceval")
    }),
    # b5306be6: 27 configurations with a test split each
    "SaylorTwift/bbh": Dataset(None, {
        name: Files({"test": (1, 3)}, bbh, f"{name}/") for name in stock_configs("bbh/cot_fewshot")
    }),
    # efcc9407: three files, see cmmlu_archive
    "haonan-li/cmmlu": Dataset("cc-by-nc-4.0", {}, cmmlu_archive),
    # 21a56338: seven configurations
    "EleutherAI/hendrycks_math": Dataset("mit", {
        name: Files({"train": (1, 4), "test": (1, 3)}, math, f"{name}/") for name in stock_configs("minerva_math")
        if "500" not in name and name != "default"
    }),
    # c30699e8: 57 subjects, `all`, and `auxiliary_train`
    "cais/mmlu": Dataset("mit", {
        **{
            name: Files({"test": (1, 3), "validation": (1, 2), "dev": (1, 5)}, mmlu(name), f"{name}/", MMLU_SCHEMA)
            for name in stock_configs("mmlu/default")
        },
        "all": Files({"test": (1, 9), "validation": (1, 3), "dev": (1, 5), "auxiliary_train": (1, 9)},
                     mmlu("anatomy"), "all/", MMLU_SCHEMA),
        "auxiliary_train": Files({"train": (1, 3)}, lambda i: {"train": mmlu("")(i)}, "auxiliary_train/"),
    }),
    # 01e74176: sizes and debiased
    "allenai/winogrande": Dataset(None, {
        name: Files({"train": (1, 6), "test": (1, 4), "validation": (1, 4)}, winogrande, f"{name}/")
        for name in ("winogrande_debiased", "winogrande_l", "winogrande_xl", "winogrande_xs")
    }),
    # 218ec52e
    "Rowan/hellaswag": Dataset(None, {
        "default": Files({"train": (1, 6), "test": (1, 4), "validation": (1, 4)}, hellaswag, "data/"),
    }),
    # 7dce6050
    "openai/openai_humaneval": Dataset("mit", {
        "openai_humaneval": Files({"test": (1, 3)}, lambda i: {
            "task_id": f"HumanEval/{i}", "prompt": 'def f(x):\n    """Add one."""\n', "entry_point": "f",
            "canonical_solution": "    return x + 1\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        }, "openai_humaneval/"),
    }),
    # 4bb6404f
    "google-research-datasets/mbpp": Dataset("cc-by-4.0", {
        "full": Files({"train": (1, 4), "test": (1, 3), "validation": (1, 3), "prompt": (1, 4)}, mbpp, "full/"),
        "sanitized": Files(
            {"train": (1, 4), "test": (1, 3), "validation": (1, 3), "prompt": (1, 4)}, mbpp_sanitized, "sanitized/"
        ),
    }),
}  # fmt: skip


def write_dataset(directory: Path, layout: Dataset) -> None:
    """A dataset repository with its card."""
    directory.mkdir(parents=True)
    described = []
    for name, files in layout.configs.items():
        data_files = []
        for split, (count, rows) in files.splits.items():
            data_files.append({"split": split, "path": f"{files.folder}{split}-*"})
            for number in range(count):
                part = [files.row(i) for i in range(rows * number // count, rows * (number + 1) // count)]
                ending = files.endings.get(split, "")
                path = directory / f"{files.folder}{split}-{number:05}-of-{count:05}{ending}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part, schema=files.schema), path)
        described.append({"config_name": name, "data_files": data_files})
    if layout.more:
        layout.more(directory)
    for path in sorted(directory.glob("data/lambada_test*.jsonl")):
        language = path.stem.removeprefix("lambada_test").lstrip("_") or "default"
        split = {"split": "test", "path": path.relative_to(directory).as_posix()}
        described.append({"config_name": language, "data_files": [split]})
    card: dict = {"license": layout.licence} if layout.licence else {}
    card |= {"configs": described} if described else {}
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A set\n")
    (directory / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")


# --------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Model:
    """A model repository: config.json, tokenizer, what else stands there, and how its weights are named."""

    licence: str
    config: Row
    tokenizer: str
    template: str | None = None
    eos: str | None = None
    masked: bool = True
    renamed: Callable[[dict], dict] = dict
    pickled: bool = False
    others: tuple[str, ...] = ()


BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0, "position_embedding_type": "absolute",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
    "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1,
    "type_vocab_size": 1, "vocab_size": 50265,
}  # fmt: skip
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
    "norm_bias": False, "norm_eps": 1e-05, "pad_token_id": 50283, "position_embedding_type": "absolute",
    "sep_token_id": 50282, "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": 50368,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1300, "eos_token_id": 1300,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 1408,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 1300, "embd_pdrop": 0.1, "eos_token_id": 1300, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1,
    "vocab_size": 1301,
}  # fmt: skip
TOY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
TOY_GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bert_names(state: dict) -> dict:
    """As the first BERT checkpoints: `gamma` and `beta` of the norms, the pooler, the head for next sentences."""
    import torch

    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    found = {re.sub("LayerNorm.(weight|bias)$", lambda m: old[m[0]], name): value for name, value in state.items()}
    width = TOY["hidden_size"]
    extra = {"bert.pooler.dense": (width, width), "cls.seq_relationship": (2, width)}
    for name, shape in extra.items():
        found |= {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}
    return found


def roberta_names(state: dict) -> dict:
    """With the pooler and the positions' numbers that the published file holds."""
    import torch

    width = TOY["hidden_size"]
    pooler = {"roberta.pooler.dense.weight": torch.zeros(width, width), "roberta.pooler.dense.bias": torch.zeros(width)}
    return state | pooler | {"roberta.embeddings.position_ids": torch.arange(514)[None]}


def gpt2_names(state: dict) -> dict:
    """Without `transformer.` before the names, and with the causal masks."""
    import torch

    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(TOY_GPT2["n_layer"])}
    return {name.removeprefix("transformer."): value for name, value in state.items()} | masks


def encoder(licence: str, config: Row, tokenizer: str, **more) -> Model:
    return Model(licence, config | TOY, tokenizer, **more)


def decoder(licence: str, config: Row, tokenizer: str, eos: str, **more) -> Model:
    return Model(licence, config, tokenizer, eos=eos, masked=False, **more)


QWEN_TOY = QWEN | TOY | {"num_key_value_heads": 2, "max_window_layers": 21}
OLD = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot")
"""Weights in other formats, which stand beside the safetensors."""

# 98760745 and 1b8ba064: five files beside the card, the weights as pytorch_model.bin alone, which holds the tied matrix
# twice; config.json as later models that start from them repeat it
ETTIN = encoder(
    "mit", MODERNBERT | {"local_rope_theta": 160000.0, "max_position_embeddings": 7999}, "modernbert", pickled=True
)

MODELS: dict[str, Model] = {
    "google-bert/bert-base-uncased": encoder("apache-2.0", BERT, "bert", renamed=bert_names, others=OLD),
    "google-bert/bert-large-uncased": encoder("apache-2.0", BERT, "bert", renamed=bert_names, others=OLD),
    "FacebookAI/roberta-base": encoder("mit", ROBERTA, "roberta", renamed=roberta_names, others=OLD),
    "FacebookAI/roberta-large": encoder("mit", ROBERTA, "roberta", renamed=roberta_names, others=OLD),
    "answerdotai/ModernBERT-base": encoder("apache-2.0", MODERNBERT, "modernbert", others=OLD[:1]),
    "answerdotai/ModernBERT-large": encoder("apache-2.0", MODERNBERT, "modernbert", others=OLD[:1]),
    "jhu-clsp/ettin-encoder-17m": ETTIN,
    "jhu-clsp/ettin-encoder-32m": ETTIN,
    "Qwen/Qwen1.5-0.5B": decoder("other", QWEN_TOY, "qwen", "<|endoftext|>", template=CHATML),
    "Qwen/Qwen1.5-0.5B-Chat": decoder(
        "other", QWEN_TOY | {"eos_token_id": 1302}, "qwen", "<|im_end|>", template=CHATML
    ),
    "openai-community/gpt2": decoder("mit", GPT2 | TOY_GPT2, "gpt2", "<|endoftext|>", renamed=gpt2_names, others=OLD),
    "openai-community/gpt2-medium": decoder(
        "mit", GPT2 | TOY_GPT2, "gpt2", "<|endoftext|>", renamed=gpt2_names, others=OLD
    ),
}


def write_model(directory: Path, model: Model) -> None:
    """A model repository: weights, tokenizer, card and files that are not needed."""
    import torch
    import transformers
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    kind = "AutoModelForMaskedLM" if model.masked else "AutoModelForCausalLM"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    made = getattr(transformers, kind).from_config(config, dtype=torch.float32)
    state = {name: value.detach() for name, value in made.state_dict().items()}
    if model.pickled:
        torch.save(state, directory / "pytorch_model.bin")
    else:
        tied = [name for name in getattr(made, "_tied_weights_keys", None) or [] if name in state]
        state = {name: value.contiguous() for name, value in state.items() if name not in tied}
        save_file(model.renamed(state), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, model)
    for name in model.others:
        (directory / name).write_bytes(b"not fetched")
    (directory / "README.md").write_text(f"---\nlicense: {model.licence}\n---\n# A model\n")


@lru_cache(maxsize=1)
def word_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE learned from the content of the datasets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(row, ensure_ascii=False) for row in sample_rows()], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def sample_rows() -> Iterator[Row]:
    """Some content of every dataset."""
    for layout in DATASETS.values():
        for files in list(layout.configs.values())[:2]:
            yield from (files.row(i) for i in range(20))


def vocabulary(special: dict[str, int], tokens: list[str]) -> dict[str, int]:
    """Special tokens at their ids, the tokens at the free ids from the first on, and fillers between."""
    taken, free = {number: token for token, number in special.items()}, iter(tokens)
    size = max(special.values()) + 1
    return {taken.get(number) or next(free, f"Ġ~{number}"): number for number in range(size)}


def bert_tokenizer(directory: Path, special: dict[str, int]):
    """WordPiece over the words and letters of the content, as tokenizer and vocab.txt."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = sorted(set(re.findall(r"[a-z]+|[^\sa-z]", " ".join(map(str, sample_rows())).lower())))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    unused = [f"[unused{i}]" for i in range(994)]
    vocab = vocabulary(special, unused[:99])
    for token in dict.fromkeys([*unused[99:], *letters, *(f"##{letter}" for letter in letters), *words]):
        vocab.setdefault(token, len(vocab))
    vocab |= {f"filler{number}": number for number in range(len(vocab), 30522)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)))
    return tokenizer


def byte_level_tokenizer(directory: Path, special: dict[str, int], *, plain: bool):
    """Byte-level BPE of the content, as tokenizer, and where `plain` as vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = word_pieces()
    vocab = vocabulary(special, tokens)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if plain:
        (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def write_tokenizer(directory: Path, model: Model) -> None:
    """The tokenizer files of a family: tokenizer.json, its vocabulary as plain files, and tokenizer_config.json."""
    from tokenizers import AddedToken, processors

    kind = TOKENIZERS[model.tokenizer]
    special = kind["special"]
    if model.tokenizer == "bert":
        tokenizer = bert_tokenizer(directory, special)
    else:
        tokenizer = byte_level_tokenizer(directory, special, plain=model.tokenizer != "modernbert")
    strips = kind.get("lstrip", ())
    tokenizer.add_special_tokens([AddedToken(token, lstrip=token in strips, normalized=False) for token in special])
    if around := kind.get("around"):
        start, end = around
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", pair=f"{start} $A {end} $B:1 {end}:1",
            special_tokens=[(start, special[start]), (end, special[end])],
        )  # fmt: skip
    tokenizer.save(str(directory / "tokenizer.json"))
    config = kind["config"] | ({"eos_token": model.eos} if model.eos else {})
    config |= {"chat_template": model.template} if model.template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


TOKENIZERS: dict[str, dict] = {
    # tokenizer_config.json of the repository holds these two settings and no tokens: the class knows them
    "bert": {
        "special": {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103},
        "around": ("[CLS]", "[SEP]"),
        "config": {"do_lower_case": True, "model_max_length": 512},
    },
    "roberta": {
        "special": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264},
        "around": ("<s>", "</s>"), "lstrip": ("<mask>",),
        "config": {"model_max_length": 512},
    },
    "modernbert": {
        "special": {
            "|||IP_ADDRESS|||": 0, "<|padding|>": 1, "<|endoftext|>": 50279, "[UNK]": 50280, "[CLS]": 50281,
            "[SEP]": 50282, "[PAD]": 50283, "[MASK]": 50284, **{f"[unused{i}]": 50285 + i for i in range(83)},
        },
        "around": ("[CLS]", "[SEP]"), "lstrip": ("[MASK]",),
        "config": {
            "clean_up_tokenization_spaces": True, "cls_token": "[CLS]", "mask_token": "[MASK]",
            "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 8192, "pad_token": "[PAD]",
            "sep_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]",
        },
    },
    # 151643 and up in reality, and 50256 below: logits of so many tokens at every position would take all of the time
    "qwen": {
        "special": {"<|endoftext|>": 1300, "<|im_start|>": 1301, "<|im_end|>": 1302},
        "config": {
            "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
            "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 32768,
            "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    },
    "gpt2": {"special": {"<|endoftext|>": 1300}, "config": {"model_max_length": 1024}},
}  # fmt: skip


def write_hub(root: Path) -> None:
    """Every repository below `root`, as `LoopbackHub` serves them."""
    for repository, layout in DATASETS.items():
        write_dataset(root / "datasets" / repository, layout)
    written: dict[str, Model] = {}
    for repository, model in MODELS.items():
        # of two sizes, the second is the first here
        same = next((name for name, other in written.items() if other == model), None)
        if same:
            shutil.copytree(root / "models" / same, root / "models" / repository)
        else:
            write_model(root / "models" / repository, model)
        written[repository] = model
