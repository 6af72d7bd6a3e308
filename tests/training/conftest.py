"""A tiny trained-from-scratch setting: a word-level tokenizer, a small stock encoder, prepared text and answers."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm.config import DataPart, DatasetEntry, ModelEntry, OptimizerSettings, PrepareConfig, Recipe, RunConfig
from dllm.data.prepare import prepare
from dllm.models.load import new_model
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import write_record
from dllm.training import trainer

WORDS = "the a cat dog sun moon sees likes red blue one two [Question] [/Question] [Answer] [/Answer] who ?".split()
SIZES = {
    "bert": {"model_type": "bert", "intermediate_size": 64, "max_position_embeddings": 64},
    "roberta": {"model_type": "roberta", "intermediate_size": 64, "max_position_embeddings": 64},
    "modernbert": {"model_type": "modernbert", "intermediate_size": 48, "max_position_embeddings": 64},
    "llama": {"model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 64},
}


def entry_for(kind: str = "bert") -> ModelEntry:
    """A two-layer stock model of a family."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.08}
    new = SIZES[kind] | sizes | ({"num_key_value_heads": 2} if kind == "llama" else {})
    if kind in ("bert", "roberta"):
        new |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ModelEntry(new=new, tokenizer="toy", family="decoder" if kind == "llama" else "encoder")


def make_model(directory: Path, entry: ModelEntry) -> None:
    """Write a new model with its tokenizer and record."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    fast.save_pretrained(directory)
    loaded = load_tokenizer(directory, entry)
    new_model(entry, loaded).save_pretrained(directory)
    loaded.save_pretrained(directory)
    write_record(directory, kind="model", name=directory.name, config_digest="", inputs={})


def prepare_toys(directory: Path) -> None:
    """Write a toy model and rows of text and answers, raw and prepared."""
    make_model(directory / "downloads" / "toy-model", entry_for())
    raw = directory / "downloads" / "toy"
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(WORDS[i] for i in torch.randint(12, (n,), generator=generator).tolist())

    for name, rows in {
        "text": [{"text": words(9)} for _ in range(120)],
        "alpaca": [
            {"instruction": f"who {words(i % 4 + 1)} ?", "input": "", "output": words(i % 5 + 1)} for i in range(90)
        ],
    }.items():
        (raw / name).mkdir(parents=True)
        (raw / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_record(raw, kind="dataset", name="toy", config_digest="", inputs={})
    for kind in ("text", "alpaca"):
        dataset = DatasetEntry(world=kind, kind=kind, test_share=0.2)
        prepare(
            PrepareConfig(
                name=kind,
                parts=[DataPart(name=kind, path="downloads/toy", entry=dataset)],
                model_path="downloads/toy-model",
                model=entry_for(),
                length=24,
                split="disjoint",
            ),
            directory,
        )


@pytest.fixture
def workdir(tmp_path, tmp_path_factory) -> Path:
    """A work directory of the test's own with a toy model and its data; copied, for they are made once."""
    torch.set_num_threads(1)
    toys = tmp_path_factory.getbasetemp() / "toys"
    if not (toys / "data").exists():
        prepare_toys(toys)
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_config(name: str = "run", **changes) -> RunConfig:
    """A short run of six steps on the toy setting; `recipe` takes a dict of recipe switches."""
    recipe = Recipe(**{"autocast": "none", "block_size": 4} | changes.pop("recipe", {}))
    settings = {
        "name": name, "algorithm": "mdlm", "init": "toy-model", "init_path": "downloads/toy-model",
        "model": entry_for(), "data": "alpaca", "data_path": "data/alpaca", "recipe_name": "corrected",
        "length": 24, "epochs": None, "steps": 6, "stop_after": None, "global_batch_size": 8, "micro_batch_size": 8,
        "optimizer": OptimizerSettings(learning_rate=3e-3), "seed": 1, "mlm_share": 0.3, "evaluations": 3,
        "eval_rows": None, "eval_draws": 1,
    }  # fmt: skip
    return RunConfig(**settings | changes, recipe=recipe)


TIMED = ("wall_seconds", "tokens_per_second", "generated_per_second")


def metrics_of(workdir: Path, run: str) -> list[dict]:
    """The deterministic part of a run's metrics."""
    rows = [json.loads(line) for line in (workdir / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def train_once(config: RunConfig, workdir: Path) -> None:
    """Train a run on the toys, or copy it: of all tests of a process that need it, the first one trains it."""
    key, run = config.model_dump_json(), f"runs/{config.name}"
    if key in KEPT:
        shutil.copytree(KEPT[key] / "run", workdir / run)
        shutil.copy2(KEPT[key] / "run.json", workdir / f"{run}.json")
        return
    trainer.train(config, workdir, quiet=True)
    kept = Path(tempfile.mkdtemp(dir=workdir.parent))
    shutil.copytree(workdir / run, kept / "run")
    shutil.copy2(workdir / f"{run}.json", kept / "run.json")
    KEPT[key] = kept


KEPT: dict[str, Path] = {}
"""Copies of runs that `train_once` has trained, by their configurations."""


def train_until(config: RunConfig, workdir: Path, *, step: int) -> None:
    """Train a run that is killed before a step, the first being 0."""
    unhindered = trainer._Run._step

    def killed(self, number):
        if number == step:
            raise KeyboardInterrupt
        return unhindered(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config, workdir, quiet=True)
