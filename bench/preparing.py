"""Preparing conversations: `dllm prepare` against `datasets.map` with the same tokenizer, template and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.measure import Result, compare, require
from bench.options import Options
from dllm.config import DataPart, DatasetEntry, ModelEntry, PrepareConfig, read_config, write_when_changed
from dllm.provenance import cores, write_record

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILE = "downloads/chats/files/chats.parquet"
WAYS = {"ours": "dllm", "theirs": "bench.preparing"}
MADE = {"ours": ("data", ".work"), "theirs": ("cache", "theirs")}


def prepare(options: Options) -> Result:
    """Seconds and peak memory of both, each from a fresh process, in turn."""
    rows, processes = (400 if options.quick else 40_000), cores()
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory)
        _make(workdir, rows, vocabulary=600 if options.quick else 30_000)
        ours = ["prepare", "chats.yaml", "--processes", str(processes)]
        seconds, memory = {way: list[float]() for way in WAYS}, {way: list[float]() for way in WAYS}
        for _ in range(options.repeats(3)):
            for way, module in WAYS.items():
                for made in MADE[way]:  # `map` would find what it has done already
                    shutil.rmtree(workdir / made, ignore_errors=True)
                taken, peak = _measured([module, *(ours if way == "ours" else [str(processes)])], workdir)
                seconds[way].append(taken)
                memory[way].append(peak)
        correct = require(_same(workdir), "every row has the same tokens and the same prompt on both sides")
    name = f"preparing {rows:,} conversations, {processes} processes"
    against = f"datasets.map of the same tokenizer and template, batched, num_proc {processes}, saved to disk"
    facts = {"against": against, "correct": correct, "held_equal": "file, tokenizer, template, length, processes"}
    compared = [
        compare(seconds["ours"], seconds["theirs"], name=name, **facts),
        compare(memory["ours"], memory["theirs"], name=f"memory of {name}", unit="MiB", **facts),
    ]
    per_core = rows / min(seconds["ours"]) / processes
    setup = {"rows": rows, "seconds": seconds, "MiB": memory, "rows per second and core, with the start": per_core}
    return Result(compared, setup=setup)


def _measured(words: list[str], workdir: Path) -> tuple[float, float]:
    """Seconds of a command, and the most MiB that it and its processes have held, what they share counted once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, peak = time.perf_counter(), 0.0
    with open(workdir / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=workdir, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        while child.poll() is None:
            peak = max(peak, sum(_held(psutil.Process(child.pid))))
            time.sleep(0.5)
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {(workdir / 'log').read_text(encoding='utf-8')[-400:]}")
    return time.perf_counter() - start, peak


def _held(process: psutil.Process) -> Iterator[float]:
    for each in (process, *process.children(recursive=True)):
        try:
            held = each.memory_full_info()
            yield getattr(held, "pss", held.uss) / 2**20  # only Linux knows the share of what is shared
        except psutil.Error:  # it has ended
            continue


def _make(workdir: Path, rows: int, vocabulary: int) -> None:
    """Conversations of made-up words, as frequent as words are, in one row group; a BPE tokenizer trained on them."""
    random = numpy.random.default_rng(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    made = ["".join(random.choice(syllables, size)) for size in random.integers(1, 5, 60_000)]
    shares = numpy.cumsum(1 / numpy.arange(10, len(made) + 10))

    def text(words: int) -> str:
        return " ".join(made[i] for i in numpy.searchsorted(shares, random.random(words) * shares[-1])) + "."

    def turns() -> list[dict]:
        lengths = [n for _ in range(random.integers(1, 4)) for n in random.integers((8, 30), (40, 160))]
        return [{"role": ("user", "assistant")[i % 2], "content": text(n)} for i, n in enumerate(lengths)]

    chats = [turns() for _ in range(rows)]
    path = workdir / FILE
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), path, row_group_size=rows)
    write_record(path.parent.parent, kind="dataset", name="chats", config_digest="", inputs={})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((turn["content"] for chat in chats[:4000] for turn in chat), trainer)
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(workdir / "downloads" / "model")
    part = DataPart(name="chats", path="downloads/chats", entry=DatasetEntry(files=["chats.parquet"]))
    model = ModelEntry(path="downloads/model")
    config = PrepareConfig(
        name="chats", parts=[part], model_path="downloads/model", model=model, length=1024, split="disjoint"
    )
    write_when_changed(workdir / "chats.yaml", config)


def _map(processes: int) -> None:
    """Their side, in the work directory: the whole of `datasets`, with its cache below."""
    from datasets import load_dataset

    from dllm.models.tokenizers import load_tokenizer

    config = read_config("chats.yaml", PrepareConfig)
    tokenizer = load_tokenizer(config.model_path, config.model)

    def tokens(batch: dict) -> dict:
        template = tokenizer.apply_chat_template
        prompts = [template(chat[:-1], tokenize=False, add_generation_prompt=True) for chat in batch["messages"]]
        whole = [template(chat, tokenize=False) for chat in batch["messages"]]
        answers = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
        first, second = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (prompts, answers)
        )
        rows = [[*a, *b][: config.length] for a, b in zip(first, second, strict=True)]
        return {"tokens": rows, "prompt": [len(ids) for ids in first]}

    chats = load_dataset("parquet", data_files=FILE, split="train", cache_dir="cache")
    chats = chats.map(tokens, batched=True, num_proc=processes, remove_columns=chats.column_names)
    chats.save_to_disk("theirs", num_proc=processes)


def _same(workdir: Path) -> bool:
    """Whether the rows of both sides are equal, where a prompt leaves room for its answer."""
    from datasets import load_from_disk

    from dllm.data.convert import split_rows
    from dllm.data.tokens import open_rows

    config = read_config(workdir / "chats.yaml", PrepareConfig)
    train, test, _, _ = split_rows(config.parts[0].model_copy(update={"path": str(workdir / config.parts[0].path)}))
    theirs = load_from_disk(str(workdir / "theirs"))
    for split, numbers in (("train", numpy.sort(train)), ("test", test)):
        ours = open_rows(workdir / "data" / "chats", split)
        kept = [row for row in theirs.select(numbers) if row["prompt"] < config.length]
        pairs = ((ours.row(i).tolist(), row["tokens"]) for i, row in enumerate(kept))
        if len(ours) != len(kept) or ours.prompts.tolist() != [row["prompt"] for row in kept]:
            return False
        if any(mine != other for mine, other in pairs):
            return False
    return True


if __name__ == "__main__":
    _map(int(sys.argv[1]))
