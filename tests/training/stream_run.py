"""Training from a stream, in a process of its own: the hub's address is read when its client is imported.

`python -m tests.training.stream_run WORKDIR REVISION` fetches and prepares the streamed corpus, trains it at one go,
trains it again killed on the way and resumed, and once more in two processes, and prints what a reader of the stream
sees, as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy

from dllm.config import DataPart, DatasetEntry, DownloadConfig, PrepareConfig, write_when_changed
from dllm.data import stream
from dllm.data.download import download
from dllm.data.prepare import prepare
from dllm.data.stream import StreamedRows, open_corpus
from dllm.data.tokens import open_rows
from dllm.models.tokenizers import load_tokenizer
from dllm.objectives.mdlm import MDLM
from dllm.training import trainer
from dllm.training.micro_batches import TrainingSplit, micro_batches
from dllm.training.trainer import train
from tests.training.conftest import entry_for, make_model, run_config
from tests.training.launches import launched

LENGTH, BATCH = 24, 8
SETTINGS = {"data": "web", "data_path": "data/web", "length": LENGTH, "steps": 30, "evaluations": 5}


def fetched(workdir: Path, revision: str) -> dict:
    """The manifest of the prepared streamed set."""
    entry = DatasetEntry(hub="web/text", revision=revision, config="plain_text", test_share=0.05, stream=True,
                         shuffle_rows=20)  # fmt: skip
    download(DownloadConfig(name="web", what="dataset", dataset=entry), workdir)
    make_model(workdir / "downloads/toy-model", entry_for())
    config = PrepareConfig(
        name="web", parts=[DataPart(name="web", path="downloads/web", entry=entry)], length=LENGTH, split="disjoint",
        model_path="downloads/toy-model", model=entry_for(),
    )  # fmt: skip
    return prepare(config, workdir)


def rows_of(workdir: Path, steps: int) -> list[tuple[int, list[int], list[list[int]]]]:
    """(epoch, sample ids, tokens) of the first steps."""
    found = []
    for epoch, rows in reader(workdir).batches(0):
        found.append((epoch, rows.ids.tolist(), rows.tokens.reshape(-1, LENGTH).tolist()))
        if len(found) == steps:
            return found


def reader(workdir: Path) -> StreamedRows:
    tokenizer = load_tokenizer(workdir / "downloads/toy-model", entry_for())
    return StreamedRows(open_corpus(workdir / "data/web"), tokenizer, seed=1, batch_size=BATCH)


def resumed_rows(workdir: Path, steps: int, at: list[int]) -> dict[int, list]:
    """The rows from step `at` on, read by a stream that was given the state of an earlier one at that step."""
    first = reader(workdir)
    batches, found = first.batches(0), {}
    for step in range(steps):
        if step in at:
            state = json.loads(json.dumps(first.state(step)))
            later = reader(workdir)
            later.load_state(state)
            rest = later.batches(step)
            found[step] = [next(rest) for _ in range(steps - step)]
            found[step] = [(e, r.ids.tolist(), r.tokens.reshape(-1, LENGTH).tolist()) for e, r in found[step]]
        next(batches)
    return found


def shares(workdir: Path, ranks: int) -> list[list[tuple]]:
    """(rows of the global batch, its tokens, denominator) of the micro-batches that each of `ranks` processes takes."""
    config = run_config(data="web", data_path="data/web", length=LENGTH, steps=30)
    objective = MDLM(config.recipe)
    found = []
    for rank in range(ranks):
        split = TrainingSplit(open_rows(workdir / "data/web", "test"), objective, None, 0, 4, stream=reader(workdir))
        parts = micro_batches(split, config, first=3, last=8, rank=rank, ranks=ranks)
        found.append([(part.numbers.tolist(), part.tokens, float(part.denominator)) for part in parts])
    return found


def main() -> None:
    time.sleep = lambda seconds: None  # the clients wait between their attempts
    workdir, revision = Path(sys.argv[1]), sys.argv[2]
    told = {"manifest": fetched(workdir, revision)}
    told["rows"] = rows_of(workdir, 60)
    told["resumed"] = resumed_rows(workdir, 45, [0, 1, 2, 3, 17, 30, 44])
    told["again"] = rows_of(workdir, 5)
    stream.DOCUMENTS = 7  # how many documents are tokenized at a time is no part of the result
    told["other chunks"] = rows_of(workdir, 60)
    told["shares"] = {ranks: shares(workdir, ranks) for ranks in (1, 2, 4)}

    train(run_config("whole", **SETTINGS), workdir, quiet=True)
    step = trainer._Run._step

    def killed(self, number):
        if number == 17:
            raise KeyboardInterrupt
        return step(self, number)

    trainer._Run._step = killed
    try:
        train(run_config("cut", **SETTINGS), workdir, quiet=True)
    except KeyboardInterrupt:
        trainer._Run._step = step
    states = sorted(workdir.glob(".work/cut-*/step-*/progress.json"))
    told["states"] = [json.loads(path.read_text())["stream"] for path in states]
    train(run_config("cut", **SETTINGS), workdir, quiet=True)

    pair = write_when_changed(workdir / "pair.yaml", run_config("pair", **SETTINGS))
    done = launched(workdir, "ddp", "-m", "dllm", "train", pair, "--workdir", workdir, "--quiet")
    assert done.returncode == 0, done.stderr[-4000:]
    print(json.dumps(told, default=lambda value: value.tolist() if isinstance(value, numpy.ndarray) else str(value)))


if __name__ == "__main__":
    main()
