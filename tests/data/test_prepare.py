"""Tokenizing, splitting and packing: every token once and in order, test rows apart, nothing half done."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from dllm.config import DataPart, DatasetEntry, PrepareConfig
from dllm.data import shards
from dllm.data.prepare import prepare
from dllm.data.tokens import open_rows
from dllm.models.tokenizers import encode_chat, encode_text, load_tokenizer
from dllm.provenance import read_record, write_record
from tests.training.conftest import WORDS, entry_for, make_model

ROOT = str(Path(__file__).parents[2])
NOUNS = WORDS[:12]
TEXTS = [" ".join(words) for words in itertools.product(NOUNS, NOUNS, NOUNS[:9])]
"""1296 different rows of three words: more than one chunk of the tokenizer."""


@pytest.fixture
def workdir(tmp_path):
    make_model(tmp_path / "downloads" / "toy-model", entry_for())
    return tmp_path


@pytest.fixture
def tokenizer(workdir):
    return load_tokenizer(workdir / "downloads" / "toy-model", entry_for())


def add_dataset(workdir, name, rows, **entry):
    """Write a dataset of rows by split, with its record; returns it as a source."""
    directory = workdir / "downloads" / name
    for split, content in rows.items():
        (directory / "rows").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / "rows" / f"{split}.jsonl").write_text(text)
    write_record(directory, kind="dataset", name=name, config_digest="", inputs={})
    return DataPart(name=name, path=f"downloads/{name}", entry=DatasetEntry(world="rows", **entry))


def texts(workdir, name="texts", rows=TEXTS, **entry):
    return add_dataset(workdir, name, {"train": [{"text": text} for text in rows]}, **{"kind": "text"} | entry)


def answers(workdir, name="answers", texts=TEXTS[:90], **entry):
    rows = [{"instruction": f"who {text} ?", "input": "", "output": text} for text in texts]
    return add_dataset(workdir, name, {"train": rows}, **{"kind": "alpaca"} | entry)


def config_of(*parts, name="prepared", length=16, split="disjoint", rows=None):
    return PrepareConfig(
        name=name, parts=list(parts), model_path="downloads/toy-model", model=entry_for(), length=length, split=split,
        rows=rows,
    )  # fmt: skip


def rows_in(workdir, split, name="prepared"):
    rows = open_rows(workdir / "data" / name, split)
    return [tuple(rows.row(i).tolist()) for i in range(len(rows))]


def conversation(tokenizer, text):
    """Prompt and target tokens of an `answers` row."""
    user = {"role": "user", "content": f"who {text} ?"}
    prompt = encode_chat(tokenizer, [user], add_generation_prompt=True)
    whole = encode_chat(tokenizer, [user, {"role": "assistant", "content": text}], add_generation_prompt=False)
    return prompt, whole


def test_text_is_all_tokens_in_order_with_an_end_after_each_row(workdir, tokenizer):
    validation = [{"text": "the cat"}, {"text": ""}, {"text": "a dog sees"}]
    rows = {"train": [{"text": text} for text in TEXTS], "validation": validation}
    part = add_dataset(workdir, "texts", rows, test_split="validation")
    manifest = prepare(config_of(part, length=7), workdir)
    end = tokenizer.eos_token_id
    for split, content in rows.items():
        expected = [token for row in content for token in (*encode_text(tokenizer, row["text"]), end)]
        written = rows_in(workdir, {"validation": "test"}.get(split, split))
        assert list(itertools.chain(*written)) == expected[: len(expected) // 7 * 7]
        assert {len(row) for row in written} == {7}
    assert not open_rows(workdir / "data/prepared", "train").prompts.any()
    assert manifest["splits"]["train"]["tokens"] == len(TEXTS) * 4 // 7 * 7
    assert manifest["splits"]["test"] == {
        "rows": 1, "tokens": 7, "target_tokens": 7, "longest_row": 7, "dtype": "uint16", "dropped_rows": 0,
    }  # fmt: skip


def test_text_gets_no_ends_if_the_entry_says_so(workdir, tokenizer):
    prepare(config_of(texts(workdir, append_eos=False)), workdir)
    tokens = {token for row in rows_in(workdir, "train") for token in row}
    assert not {tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id} & tokens


def test_a_conversation_is_one_row_of_prompt_and_target(workdir, tokenizer):
    manifest = prepare(config_of(answers(workdir)), workdir)
    expected = {tuple(conversation(tokenizer, text)[1]) for text in TEXTS[:90]}
    assert {*rows_in(workdir, "train"), *rows_in(workdir, "test")} == expected
    prompt, whole = conversation(tokenizer, TEXTS[0])
    rows = open_rows(workdir / "data/prepared", "train")
    assert set(rows.prompts.tolist()) == {len(prompt)} and set(rows.lengths.tolist()) == {len(whole)}
    counts = manifest["splits"]["train"]
    assert counts["target_tokens"] == counts["rows"] * (len(whole) - len(prompt))


def test_only_the_last_answer_is_a_target(workdir, tokenizer):
    turns = [{"role": r, "content": f"{r[0]} {i}"} for i in range(2) for r in ("user", "assistant")]
    part = add_dataset(workdir, "chats", {"train": [{"messages": turns}] * 20}, kind="messages")
    prepare(config_of(part, length=60), workdir)
    rows = open_rows(workdir / "data/prepared", "train")
    assert rows.prompts[0] == len(encode_chat(tokenizer, turns[:3], add_generation_prompt=True))
    assert rows.row(0).tolist() == encode_chat(tokenizer, turns, add_generation_prompt=False)


def test_prompts_that_fill_the_length_are_dropped_and_other_rows_clipped_on_the_right(workdir, tokenizer):
    long, fitting = "the cat sees the dog the sun the moon", "the cat"
    part = answers(workdir, texts=[long, fitting] * 20)
    prompt, whole = conversation(tokenizer, fitting)
    manifest = prepare(config_of(part, length=len(prompt) + 1), workdir)
    rows = {*rows_in(workdir, "train"), *rows_in(workdir, "test")}
    assert rows == {tuple(whole[: len(prompt) + 1])}
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 20
    prompt, _ = conversation(tokenizer, long)
    manifest = prepare(config_of(part, length=len(prompt)), workdir)
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 20, "no room for a target"
    manifest = prepare(config_of(part, length=len(prompt) + 1), workdir)
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 0


@pytest.mark.parametrize("source", [answers, texts])
def test_no_test_row_stands_in_train_unless_the_published_fault_is_asked_for(workdir, tokenizer, source):
    def seen(split):
        prepare(config_of(source(workdir, append_eos=False), length=3 if source is texts else 16, split=split), workdir)
        return [set(rows_in(workdir, side)) for side in ("train", "test")]

    train, test = seen("disjoint")
    assert test and not train & test
    leaky, same = seen("overlapping")  # fault F7
    assert same == test and leaky == train | test


def test_an_own_test_split_stays_apart_in_either_way(workdir):
    rows = {side: [{"text": text} for text in part] for side, part in (("train", TEXTS[:50]), ("test", TEXTS[50:60]))}
    part = add_dataset(workdir, "texts", rows, test_split="test", append_eos=False)
    for split in ("disjoint", "overlapping"):
        manifest = prepare(config_of(part, length=3, split=split), workdir)
        assert manifest["sources"][0] | {"train_rows": 50, "test_rows": 10} == manifest["sources"][0]
        assert not {*rows_in(workdir, "train")} & {*rows_in(workdir, "test")}


def test_a_mixture_is_its_sets_one_after_the_other(workdir, tokenizer):
    one = answers(workdir, "one", TEXTS[:40])
    user, answer = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "two"}
    rows = {"train": [{"messages": [user, answer]}] * 9, "test": [{"messages": [user, answer]}] * 4}
    two = add_dataset(workdir, "two", rows, kind="messages", test_split="test")
    manifest = prepare(config_of(one, two), workdir)
    assert [(s["name"], s["train_rows"], s["test_rows"]) for s in manifest["sources"]] == [
        ("one", 38, 2),
        ("two", 9, 4),
    ]
    train, test = rows_in(workdir, "train"), rows_in(workdir, "test")
    last = tuple(encode_chat(tokenizer, [user, answer], add_generation_prompt=False))
    assert train[38:] == [last] * 9 and test[2:] == [last] * 4
    assert last not in train[:38] and len(set(train[:38])) == 38
    assert read_record(workdir / "data/prepared.json")["inputs"].keys() == {"downloads/one", "downloads/two"}


def test_rejected_answers_stand_beside_the_chosen_ones_row_by_row(workdir, tokenizer):
    pairs = [{"prompt": f"who {text} ?", "chosen": text, "rejected": "blue"} for text in TEXTS[:40]]
    pairs.append({"prompt": "the " * 20, "chosen": "a", "rejected": "cat"})  # no room for an answer
    part = add_dataset(workdir, "pairs", {"train": pairs}, kind="preference", test_share=0.25)
    manifest = prepare(config_of(part), workdir)
    for split in ("train", "test"):
        chosen, rejected = open_rows(workdir / "data/prepared", split), rows_in(workdir, f"{split}.rejected")
        assert len(chosen) == len(rejected) == manifest["splits"][f"{split}.rejected"]["rows"]
        for number, worse in enumerate(rejected):
            prompt = chosen.row(number)[: chosen.prompts[number]].tolist()
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            turns = [{"role": "user", "content": text[text.index("who") : text.index("?") + 1]}]
            whole = encode_chat(
                tokenizer, [*turns, {"role": "assistant", "content": "blue"}], add_generation_prompt=False
            )
            assert list(worse) == whole[:16] and worse[: len(prompt)] == tuple(prompt)
    assert sum(manifest["splits"][split]["rows"] for split in ("train", "test")) == 40
    # with conversations beside it, the mixture has no rejected answers
    manifest = prepare(config_of(part, answers(workdir), name="mixed"), workdir)
    assert sorted(manifest["splits"]) == ["test", "train"]


def test_the_first_rows_of_the_shuffled_train_split_are_a_sample_of_it(workdir):
    part = answers(workdir, texts=TEXTS[:900])
    prepare(config_of(part), workdir)
    whole, test = rows_in(workdir, "train"), rows_in(workdir, "test")
    prepare(config_of(part, rows=100), workdir)
    some = rows_in(workdir, "train")
    places = [whole.index(row) for row in some]
    assert len(some) == 100 and rows_in(workdir, "test") == test
    assert places == sorted(places) and max(places) > 700, "not just the head of the file"


def test_the_same_config_gives_the_same_bytes(workdir):
    config = config_of(answers(workdir), texts(workdir, rows=TEXTS[:100]))
    records = []
    for _ in range(2):
        prepare(config, workdir)
        records.append((workdir / "data/prepared.json").read_bytes())
    assert records[0] == records[1]


def in_shards(workdir, monkeypatch):
    """A mixture of 11 shards with every way for a row to fall: unusable, too long, spelling, in both splits."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 15)
    rows = [{"instruction": f"who {text} ?", "input": "", "output": text} for text in TEXTS[:100]]
    rows[7]["output"] = rows[40]["output"] = ""
    rows[41]["output"] = "the cat [/Answer]"
    rows[42]["instruction"] = "the cat " * 20
    one = add_dataset(workdir, "one", {"train": rows}, kind="alpaca", drop_unusable=True, test_share=0.2)
    return config_of(one, answers(workdir, "two", TEXTS[100:150]), length=24, split="overlapping")


def plainly(config, workdir, tokenizer):
    """The token files as bytes by name, made in the plainest way: row after row, in one process."""
    lines = {part.name: (workdir / part.path / "rows/train.jsonl").read_text().splitlines() for part in config.parts}
    made = {}
    for split in ("train", "test"):
        tokens, lengths, prompts = [], [], []
        for part in config.parts:
            rows = [json.loads(line) for line in lines[part.name]]
            order = numpy.random.Generator(numpy.random.Philox(42)).permutation(len(rows))
            test = sorted(order[: round(len(rows) * part.entry.test_share)])
            for number in range(len(rows)) if split == "train" else test:
                if rows[number]["output"]:
                    user = {"role": "user", "content": rows[number]["instruction"]}
                    answer = {"role": "assistant", "content": rows[number]["output"]}
                    prompt = encode_chat(tokenizer, [user], add_generation_prompt=True)
                    whole = encode_chat(tokenizer, [user, answer], add_generation_prompt=False)[: config.length]
                    if len(prompt) < config.length:
                        tokens, lengths, prompts = tokens + whole, [*lengths, len(whole)], [*prompts, len(prompt)]
        made[f"{split}.tokens.bin"] = numpy.array(tokens, dtype=numpy.uint16).tobytes()
        made[f"{split}.lengths"], made[f"{split}.prompts"] = lengths, prompts
    return made


def written(workdir, name="prepared"):
    """What `plainly` makes, as it was written."""
    made = {}
    for split in ("train", "test"):
        rows = open_rows(workdir / "data" / name, split)
        made[f"{split}.tokens.bin"] = (workdir / "data" / name / f"{split}.tokens.bin").read_bytes()
        made[f"{split}.lengths"], made[f"{split}.prompts"] = rows.lengths.tolist(), rows.prompts.tolist()
    return made


@pytest.mark.parametrize("shard_rows", [7, 1000])
def test_shards_one_after_another_are_what_the_plainest_way_makes(workdir, tokenizer, monkeypatch, shard_rows):
    config = in_shards(workdir, monkeypatch)
    monkeypatch.setattr(shards, "SHARD_ROWS", shard_rows)
    monkeypatch.setattr(shards, "BATCH_ROWS", 4)
    shown = []
    manifest = prepare(config, workdir, lambda done, total: shown.append((done, total)))
    assert written(workdir) == plainly(config, workdir, tokenizer)
    assert manifest["unusable"]["first"].startswith("one row 7: empty text")
    assert shown[0] == (0, 150) and shown[-1] == (150, 150) and shown == sorted(shown)
    assert len(shown) == 1 + sum(-(-rows // shard_rows) for rows in (100, 50))


def test_text_of_many_shards_is_cut_where_text_of_one_is(workdir, monkeypatch):
    config, records = config_of(texts(workdir), length=7), []
    for rows in (1000, 13):
        monkeypatch.setattr(shards, "SHARD_ROWS", rows)
        prepare(config, workdir)
        records.append((workdir / "data/prepared.json").read_bytes())
    assert records[0] == records[1]


def is_at(place, directory):
    """Whether a process is in a directory, by its link in /proc."""
    try:
        return place.readlink() == directory
    except OSError:  # it has ended, or is another user's
        return False


@pytest.mark.slow
def test_a_killed_preparation_goes_on_to_the_bytes_of_one_that_was_not_and_leaves_no_process(workdir, monkeypatch):
    """One process is killed with two shards made, two processes when there are four or more, and one makes the rest."""
    config = in_shards(workdir, monkeypatch)

    def attempt(stop, processes):
        """(status, rows done) of a copy of this process that is killed when so many rows are."""
        told = workdir / "told"
        if not (copy := os.fork()):
            try:
                os.chdir(workdir)
                with open(told, "w") as file:

                    def progress(done, total):
                        print(done, file=file, flush=True)
                        if done >= stop:
                            os.kill(os.getpid(), signal.SIGKILL)

                    prepare(config, ".", progress, processes)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        return status, [int(line) for line in told.read_text().split()]

    assert attempt(30, 1) == (-signal.SIGKILL, [0, 15, 30])
    assert not (workdir / "data/prepared").exists()
    (workdir / "data/.prepared.partial/000001/train.tokens.bin").write_bytes(b"torn")
    status, seen = attempt(60, 2)
    assert status == -signal.SIGKILL and seen[0] == 15, "the torn shard is made again"
    deadline = time.monotonic() + 30
    while any(is_at(place, workdir) for place in Path("/proc").glob("[0-9]*/cwd")):
        assert time.monotonic() < deadline, "a process of the killed attempt is still there"
    shown, records = [], []
    for _ in range(2):
        prepare(config, workdir, lambda done, total: shown.append(done))
        assert [path.name for path in (workdir / "data").iterdir() if path.is_dir()] == ["prepared"]
        records.append((workdir / "data/prepared.json").read_bytes())
    assert (
        shown[0] >= 60
        and shown[-12:] == [0, 15, 30, 45, 60, 75, 90, 100, 115, 130, 145, 150]
        and records[0] == records[1]
    )


@pytest.mark.parametrize("change", ["length", "tokenizer"])
def test_shards_of_another_job_are_not_used(workdir, monkeypatch, change):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    config = in_shards(workdir, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, workdir, stop)
    if change == "length":
        config = config.model_copy(update={"length": 20})
    else:
        path = workdir / "downloads/toy-model/tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": 1}))
    shown = []
    prepare(config, workdir, lambda done, total: shown.append(done))
    assert shown[0] == 0


class Killed(shards.Tokenizing):
    """Its processes are killed at their first shard."""

    def make(self, shard):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(workdir):
    config, numbers = config_of(answers(workdir)), numpy.arange(9)
    two = shards.shards_of(0, numbers, numbers, one_source=False)
    with pytest.raises(ValueError, match="prepared: one of 2 processes was killed, .*run again") as caught:
        list(shards._each_made(Killed(config, workdir, workdir, [], []), two, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory as Linux states it")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(workdir):
    """25 MB of texts, in parquet one row group that cannot be packed smaller: 15 MB more than with 2.5 are too many."""
    code = (
        "import os, sys, yaml\nfrom pathlib import Path\nfrom dllm.config import PrepareConfig\n"
        "from dllm.data.prepare import prepare\n"
        "from dllm.models.tokenizers import load_tokenizer\n"
        "read = lambda name: PrepareConfig.model_validate(yaml.safe_load(open(f'{name}.yaml')))\n"
        "config = read('small-jsonl')\n"
        "load_tokenizer(Path(config.model_path), config.model)\n"  # both copies have what it imports
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024\n"
        "for kind in ('parquet', 'jsonl'):\n"
        "    if process := os.fork():\n"  # its peak begins with what it uses then
        "        assert os.waitpid(process, 0)[1] == 0\n"
        "        continue\n"
        "    for size in ('small', 'large'):\n"
        "        prepare(read(f'{size}-{kind}'))\n"
        "        print(peak(), flush=True)\n"
        "    break"
    )
    random = numpy.random.default_rng(0)
    letters = [random.integers(97, 123, 2500, dtype=numpy.uint8).tobytes().decode() for _ in range(10_000)]
    for size, kind in itertools.product(("small", "large"), ("parquet", "jsonl")):
        name, rows = f"{size}-{kind}", letters[:1000] if size == "small" else letters
        path = workdir / "downloads" / name / "files" / f"mine.{kind}"
        path.parent.mkdir(parents=True)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
        else:
            path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        write_record(path.parent.parent, kind="dataset", name=name, config_digest="", inputs={})
        part = DataPart(name=name, path=f"downloads/{name}", entry=DatasetEntry(files=[path.name]))
        config = config_of(part, name=name, length=2)
        (workdir / f"{name}.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    of_parquet, large_parquet, of_lines, large_lines = map(float, done.stdout.split())
    assert large_parquet - of_parquet < 15 and large_lines - of_lines < 15


def test_a_failure_leaves_the_finished_artifact_alone(workdir, monkeypatch):
    config = config_of(answers(workdir))
    prepare(config, workdir)
    before = (rows_in(workdir, "train"), read_record(workdir / "data/prepared.json"))
    monkeypatch.setattr(shards, "settle", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare(config, workdir)
    assert (rows_in(workdir, "train"), read_record(workdir / "data/prepared.json")) == before


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"instruction": "who ?", "input": "", "output": ""}, "empty text in a turn of role 'assistant'"),
        ({"instruction": "who ?", "input": ""}, "column 'output' = None is not a text"),
    ],
)
def test_an_unusable_row_is_one_line_with_dataset_and_row(workdir, row, line):
    rows = [{"instruction": "who ?", "input": "", "output": "two"}] * 20
    rows[13] = row
    part = add_dataset(workdir, "answers", {"train": rows}, kind="alpaca", test_share=0.0)
    with pytest.raises(ValueError, match=f"answers row 13: {line}") as caught:
        prepare(config_of(part), workdir)
    assert "\n" not in str(caught.value) and not (workdir / "data/prepared").exists()


def test_unusable_rows_are_dropped_and_counted_if_the_entry_says_so(workdir, tokenizer):
    rows = [{"instruction": f"who {text} ?", "input": "", "output": text} for text in TEXTS[:40]]
    expected = {tuple(conversation(tokenizer, text)[1]) for text in TEXTS[:40:2]}
    for row in rows[1::2]:
        row["output"] = ""
    part = add_dataset(workdir, "answers", {"train": rows}, kind="alpaca", test_share=0.2, drop_unusable=True)
    manifest = prepare(config_of(part), workdir)
    assert {*rows_in(workdir, "train"), *rows_in(workdir, "test")} == expected
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 20
    part = add_dataset(workdir, "answers", {"train": rows[1::2]}, kind="alpaca", drop_unusable=True)
    with pytest.raises(
        ValueError, match="the train split is empty after tokenizing; no row of it can be used: .* empty text"
    ):
        prepare(config_of(part), workdir)


@pytest.mark.parametrize(
    ("source", "length", "split", "step"),
    [
        (
            lambda workdir: answers(workdir, test_share=0.0),
            16,
            "test",
            "no row is left for it; raise `test_share` = 0 ",
        ),
        (lambda workdir: answers(workdir), 5, "train", "fill the length of 5 tokens; raise `length` of the run"),
        (lambda workdir: texts(workdir, rows=TEXTS[:5]), 17, "train", "lower `length` of the run, or give more text"),
        (
            lambda workdir: texts(workdir, rows=TEXTS[:5]),
            5,
            "test",
            "raise `test_share` = 0.05 of the dataset, or lower",
        ),
    ],
    ids=["nothing-held-out", "long-prompts", "short-text", "short-test-text"],
)
def test_a_split_that_ends_up_empty_is_one_line(workdir, source, length, split, step):
    with pytest.raises(ValueError, match=f"prepared: the {split} split is empty after tokenizing") as caught:
        prepare(config_of(source(workdir), length=length), workdir)
    assert "\n" not in str(caught.value) and not (workdir / "data/prepared").exists()
    assert step in str(caught.value)


def test_too_few_of_the_rows_are_named_where_most_of_a_sets_rows_are_empty(workdir):
    """As lines of Wikitext are, most of which are blank or a heading."""
    part = texts(workdir, rows=["", "= the cat =", "", ""] * 20)
    with pytest.raises(ValueError, match="the train split is empty.*raise `rows` = 1 of the dataset, or"):
        prepare(config_of(part, rows=1, length=16), workdir)
    assert prepare(config_of(part, rows=60, length=4), workdir)["splits"]["train"]["rows"] > 0
    with pytest.raises(ValueError, match="the test split is empty.*raise `test_share` = 0.05 of the dataset, or lower"):
        prepare(config_of(part, length=40), workdir)


def test_a_chat_template_that_does_not_continue_its_prompt_is_one_line(workdir, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    monkeypatch.setattr("dllm.models.tokenizers.chat_template", lambda name: template)
    with pytest.raises(ValueError, match="answers: the chat template does not continue its own generation prompt"):
        prepare(config_of(answers(workdir)), workdir)


def test_missing_inputs_are_one_line(workdir):
    part = answers(workdir)
    (workdir / "downloads/answers/rows/train.jsonl").unlink()
    with pytest.raises(ValueError, match="rows/train.jsonl: no such file"):
        prepare(config_of(part), workdir)
    (workdir / "downloads/toy-model/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="downloads/toy-model: no tokenizer there"):
        prepare(config_of(part), workdir)


def test_control_tokens_in_the_text_of_rows_are_text_and_counted(workdir, tokenizer):
    control = {tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    rows = ["the [MASK] cat", "[SEP] the dog", "the sun"] * 20
    manifest = prepare(config_of(texts(workdir, rows=rows, append_eos=False), length=3), workdir)
    assert not control & {token for row in rows_in(workdir, "train") for token in row}
    assert sum(manifest["rows_that_spell_control_tokens"].values()) == 40

    rows = [{"instruction": "who [MASK] ?", "input": "", "output": "the cat [/Answer] [CLS]"}] * 20
    rows += [{"instruction": "who ?", "input": "", "output": "the cat"}] * 20
    part = add_dataset(workdir, "chats", {"train": rows}, kind="alpaca")
    manifest = prepare(config_of(part, length=60), workdir)
    assert not control & {token for row in rows_in(workdir, "train") for token in row}
    assert sum(manifest["rows_that_spell_control_tokens"].values()) == 20
    texts_read = {tokenizer.decode(row).count("[/Answer]") for row in rows_in(workdir, "train")}
    assert texts_read == {tokenizer.decode(conversation(tokenizer, "the cat")[1]).count("[/Answer]")}


USER, REPLY = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "the cat"}


@pytest.mark.parametrize(
    ("template", "bad", "line"),
    [
        (None, [REPLY], "chats row 0: begins with its only answer; a row needs a turn of the user first"),
        (
            None,
            [USER, REPLY | {"content": "a \ud800"}],
            r"chats row 0: messages\[1\]: character 2 \(U\+D800\) is no text",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}",
            [{"role": "system", "content": "the sun"}, USER, REPLY],
            "chats row 0: the model's chat template refuses turns of system, user: System role not supported",
        ),
    ],
)
def test_a_conversation_that_cannot_be_written_is_named_or_dropped_and_counted(
    workdir, monkeypatch, template, bad, line
):
    if template:
        load = shards.load_tokenizer

        def with_template(*arguments):
            tokenizer = load(*arguments)
            tokenizer.chat_template = template
            return tokenizer

        monkeypatch.setattr(shards, "load_tokenizer", with_template)
    rows = {"train": [{"messages": bad}, *[{"messages": [USER, REPLY]}] * 30]}
    part = add_dataset(workdir, "chats", rows, kind="messages")
    with pytest.raises(ValueError, match=line) as error:
        prepare(config_of(part, length=60), workdir)
    assert "drop_unusable" in str(error.value) and "\n" not in str(error.value)
    part = add_dataset(workdir, "chats", rows, kind="messages", drop_unusable=True)
    manifest = prepare(config_of(part, length=60), workdir)
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 1


def turns(*texts, first="user"):
    """A row of turns that begin with a role."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


UNUSABLE = {
    "begins with its only answer": turns("the cat", first="assistant"),
    "is no text": turns("who ?", "\ud800"),
    "empty text": turns("who ?", " "),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_conversation_that_cannot_be_used_is_named_by_file_and_row_or_dropped_and_counted(workdir, reason):
    good = [turns("who ?", text) for text in TEXTS[:30]]
    files = workdir / "downloads" / "chats" / "files"
    files.mkdir(parents=True)
    lines = [json.dumps(row) for row in [*good, UNUSABLE[reason]]]
    (files / "mine.jsonl").write_text("\n\n".join(lines))
    write_record(files.parent, kind="dataset", name="chats", config_digest="", inputs={})
    entry = DatasetEntry(files=["mine.jsonl"])
    part = DataPart(name="chats", path="downloads/chats", entry=entry)
    with pytest.raises(ValueError, match=f"mine.jsonl row 61: .*{reason}.*; or set drop_unusable: true") as caught:
        prepare(config_of(part), workdir)
    assert "\n" not in str(caught.value)
    part = part.model_copy(update={"entry": entry.model_copy(update={"drop_unusable": True})})
    manifest = prepare(config_of(part), workdir)
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 1
    assert manifest["unusable"]["rows"] == 1 and "mine.jsonl row 61" in manifest["unusable"]["first"]
    assert manifest["sources"][0]["read_as"] == "rows look like conversations: column messages"
    assert manifest["splits"]["test"]["rows"] >= 7, "8 rows are held out, of which the unusable one may be one"


def test_a_text_that_cannot_be_used_is_dropped_and_counted(workdir):
    rows = ["the cat"] * 30 + ["\udc00"]
    with pytest.raises(ValueError, match="texts row 30: character 0 \\(U\\+DC00\\) is no text"):
        prepare(config_of(texts(workdir, rows=rows), length=3), workdir)
    manifest = prepare(config_of(texts(workdir, rows=rows, drop_unusable=True), length=3), workdir)
    assert sum(counts["dropped_rows"] for counts in manifest["splits"].values()) == 1


def test_a_conversation_that_the_checkpoints_own_template_refuses_is_an_unusable_row(workdir, monkeypatch):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not\nsupported') }}"
        "{% endif %}{{ m['content'] }} {% endfor %}"
    )
    monkeypatch.setattr("dllm.models.tokenizers.chat_template", lambda name: template)
    rows = [turns("who ?", text) for text in TEXTS[:30]]
    rows.append({"messages": [{"role": "system", "content": "a"}, *rows[0]["messages"]]})
    part = add_dataset(workdir, "chats", {"train": rows}, kind="messages")
    with pytest.raises(ValueError, match="chats row 30: the model's chat template refuses .*not supported") as caught:
        prepare(config_of(part), workdir)
    assert "\n" not in str(caught.value)
    part = part.model_copy(update={"entry": part.entry.model_copy(update={"drop_unusable": True})})
    assert sum(c["dropped_rows"] for c in prepare(config_of(part), workdir)["splits"].values()) == 1
