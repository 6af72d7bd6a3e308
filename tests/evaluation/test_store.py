from hypothesis import given
from hypothesis import strategies as st

from dllm.evaluation.store import AnswerStore, request_key


def key(*, kind="loglikelihood", arguments=("a", "b"), repeat=0, variant="", model_key="m"):
    return request_key(kind, arguments, repeat=repeat, variant=variant, model_key=model_key)


def test_what_was_written_is_found_by_the_next_process(tmp_path):
    AnswerStore(tmp_path).write({"k": {"answer": [-1.5, True], "passes": 3}})
    assert AnswerStore(tmp_path)["k"] == {"answer": [-1.5, True], "passes": 3}


def test_all_writers_are_read(tmp_path):
    AnswerStore(tmp_path, "shard-0-of-2").write({"k0": {"answer": "x"}})
    AnswerStore(tmp_path, "shard-1-of-2").write({"k1": {"answer": "y"}})
    assert {k: AnswerStore(tmp_path)[k]["answer"] for k in ("k0", "k1")} == {"k0": "x", "k1": "y"}


def test_a_torn_last_line_is_ignored_and_swallows_nothing(tmp_path):
    store = AnswerStore(tmp_path)
    store.write({"k0": {"answer": "x"}})
    store.write({"k1": {"answer": "y"}, "k2": {"answer": "y"}})
    store.path.write_bytes(store.path.read_bytes()[:-4])
    resumed = AnswerStore(tmp_path)
    assert "k0" in resumed and "k1" not in resumed and "k2" not in resumed
    resumed.write({"k1": {"answer": "z"}})
    assert AnswerStore(tmp_path)["k1"] == {"answer": "z"}


def test_lines_that_are_no_answers_are_skipped(tmp_path):
    (tmp_path / "shard-0-of-1.jsonl").write_bytes(b'[1]\n"x"\n3\n\xff\xfe\n\n{"k": {"answer": "x"}}\n')
    assert len(AnswerStore(tmp_path)) == 1


def test_everything_that_decides_an_answer_is_in_its_key():
    keys = [
        key(),
        key(kind="generate_until"),
        key(arguments=("ab", "")),
        key(repeat=1),
        key(variant="greedy"),
        key(model_key="other"),
        key(arguments=("a", {"until": ["b"]})),
    ]
    assert len(set(keys)) == len(keys)


@given(st.text(), st.text())
def test_a_key_is_a_function_of_the_request(context, continuation):
    assert key(arguments=(context, continuation)) == key(arguments=(context, continuation))


def test_a_store_nobody_wrote_to_leaves_no_directory(tmp_path):
    assert len(AnswerStore(tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()
