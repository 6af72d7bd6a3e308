"""What can go wrong with a streamed set, without a hub: each is one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from pyarrow.lib import ArrowInvalid

from dllm.config import ConfigError, DatasetEntry, DownloadConfig, load_project
from dllm.data import download
from dllm.data.convert import stream_facts
from dllm.data.stream import Corpus, Place, StreamedRows, open_corpus

CONFIG = Path(__file__).parent.parent.parent / "config"
CORPUS = Corpus("web/text", "0" * 40, ("a.parquet", "b.parquet"), 4, False, 16, 100)


class Documents:
    """What `datasets` gives for a stream: rows, and how far they were read."""

    def __init__(self, rows, fault=None):
        self.rows, self.fault, self.at = rows, fault, 0

    def __iter__(self):
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]
        if self.fault:
            raise self.fault

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Tokenizer:
    """A word is its number."""

    eos_token_id = 0
    mask_token = eos_token = pad_token = bos_token = unk_token_id = chat_template = None
    added_tokens_decoder, all_special_tokens, all_special_ids = {}, [], []

    def __len__(self):
        return 100

    def __call__(self, texts, **options):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def stream(monkeypatch, rows, fault=None, batch_size=2):
    monkeypatch.setattr(StreamedRows, "_documents", lambda self, epoch: Documents(rows, fault))
    return StreamedRows(CORPUS, Tokenizer(), seed=3, batch_size=batch_size)


def numbered(rows):
    return [{"text": " ".join(["1"] * 4)} for _ in range(rows)]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (ConnectionError("Server Disconnected"), "web/text@00000000: the download broke off (Server Disconnected)"),
        (ArrowInvalid("Parquet magic bytes not found\nat all"), "a shard cannot be read (Parquet magic bytes not"),
    ],
)
def test_a_stream_that_breaks_ends_the_run_with_one_line(monkeypatch, fault, line):
    batches = stream(monkeypatch, numbered(20), fault).batches(0)
    with pytest.raises(ValueError) as caught:
        list(batches)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_without_text_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="web/text@00000000: no text"):
        next(stream(monkeypatch, [{"text": None}]).batches(0))


def test_a_set_smaller_than_a_global_batch_is_one_line_and_no_endless_loop(monkeypatch):
    with pytest.raises(ValueError, match=r"fewer rows than one global batch \(8\)"):
        next(stream(monkeypatch, numbered(7), batch_size=8).batches(0))


def test_the_rows_left_over_sit_the_epoch_out(monkeypatch):
    batches = stream(monkeypatch, numbered(7)).batches(0)
    seen = [next(batches) for _ in range(7)]
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1, 2]
    first = {int(i) for _, rows in seen[:3] for i in rows.ids}
    assert len(first) == 6 and first < set(range(7))


def test_a_state_is_small_and_survives_json(monkeypatch):
    one = stream(monkeypatch, numbered(5000))
    batches = one.batches(0)
    for _ in range(1000):
        next(batches)
    text = json.dumps(one.state(1000))
    assert len(text) < 1000 and Place(**json.loads(text)).step <= 1000


def test_a_stream_says_that_it_needs_the_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="web/text: is streamed, but HF_HUB_OFFLINE is set; unset it, or set stream"):
        next(StreamedRows(CORPUS, Tokenizer(), seed=3, batch_size=2).batches(0))


def test_what_was_not_fetched_to_be_streamed_is_not_taken_for_it(tmp_path):
    (tmp_path / "manifest.json").write_text('{"hub": "a/b"}')
    with pytest.raises(ValueError, match="was not fetched to be streamed; run the download again"):
        stream_facts(tmp_path)
    assert open_corpus(tmp_path) is None


def test_one_shard_is_too_few(monkeypatch):
    entry = DatasetEntry(hub="web/text", revision="0" * 40, stream=True)
    files = {"train": [f"hf://datasets/web/text@{'0' * 40}/a.parquet"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: builder)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="a.parquet", size=3)])
    with pytest.raises(ValueError, match=r"1 parquet shard\(s\), too few to stream .*stream: false"):
        download._shards(DownloadConfig(name="w", what="dataset", dataset=entry), info)


def test_a_full_disk_is_noticed_before_anything_is_fetched(tmp_path):
    config = DownloadConfig(name="w", what="dataset", dataset=DatasetEntry(hub="a/b", revision="0" * 40))
    files = [SimpleNamespace(rfilename="here", size=10**18), SimpleNamespace(rfilename="there", size=10**18)]
    pin = {"repo_id": "a/b", "revision": "0" * 40, "repo_type": "dataset", "cache_dir": tmp_path / "store"}
    with pytest.raises(ValueError, match="w: 2000000000.0 GB to download, .* GB free below .*make room"):
        download._check_room(config, tmp_path / "scratch", files, pin)
    snapshot = tmp_path / "store/datasets--a--b/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "here").write_text("complete")
    with pytest.raises(ValueError, match="w: 1000000000.0 GB to download"):
        download._check_room(config, tmp_path / "scratch", files, pin)


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ({"datasets": {"alpaca": {"stream": True}}}, "stream = true is for text from the hub"),
        ({"datasets": {"wikitext": {"stream": True}}}, "stream = true is for text from the hub"),
        ({"datasets": {"openwebtext": {"rows": 3}}}, "stream = true is for text from the hub"),
        (
            {"datasets": {"corpus": {"mix": ["wikitext", "openwebtext"]}}},
            "datasets.corpus.mix = 'openwebtext' is streamed, which a part of a mixture cannot be",
        ),
        (
            {"runs": {"modernbert-large-openwebtext": {"steps": None, "epochs": 2}}},
            "runs.modernbert-large-openwebtext.epochs = 2, but 'openwebtext' is streamed",
        ),
    ],
)
def test_a_setting_that_a_stream_cannot_have_is_one_line(overlay, line):
    with pytest.raises(ConfigError) as caught:
        load_project(CONFIG, CONFIG / "paper.yaml", overlay)
    assert line in str(caught.value) and "\n" not in str(caught.value)
