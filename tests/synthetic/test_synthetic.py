"""The synthetic world: the same bytes from the same seed, no benchmark row in training, a tokenizer that fits it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm import synthetic
from dllm.config import load_project
from dllm.synthetic import write
from dllm.synthetic.code import TEST_PROGRAMS
from dllm.synthetic.entities import ANIMALS, MEN, TOWNS, WOMEN, make_synthetic_world
from dllm.synthetic.instructions import bbh_prompt, gsm8k_prompt, minerva_prompt, mmlu_description, mmlu_prompt
from dllm.synthetic.problems import LARGEST, NUMBER_WORDS, SMALLEST, TOYS
from dllm.synthetic.scenes import PEOPLE, ROOMS, THINGS
from dllm.synthetic.tokenizer import GLUE, SPACE

SEED = 7
NUMBERS = range(SMALLEST, LARGEST + 1)
TASKS = (
    "lambada_openai_mini",
    "gsm8k_mini",
    "bbh_mini",
    "minerva_math_mini",
    "mmlu_mini",
    "hellaswag_mini",
    "winogrande_mini",
    "ceval-valid_mini",
    "cmmlu_mini",
)
YAMLS = Path(synthetic.__file__).parents[1] / "evaluation" / "tasks" / "miniature"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world")
    synthetic.build(path, seed=SEED)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory / "tokenizer")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def benchmark(directory: Path, pattern: str) -> list[dict]:
    found = [row for path in sorted((directory / "benchmarks").glob(pattern)) for row in rows(path)]
    assert found
    return found


def messages(directory: Path) -> list[list[dict]]:
    """Every training conversation, alpaca's rows as conversations of one turn."""
    talks = [row["messages"] for name in ("tulu", "smoltalk") for row in rows(directory / name / "train.jsonl")]
    for row in rows(directory / "alpaca" / "train.jsonl"):
        asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        talks.append([{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}])
    return talks


def training_texts(directory: Path) -> list[str]:
    """Every text a model can be trained or tuned on; a conversation is also one text, its turns joined by a space."""
    texts = []
    for name in ("wikitext", "openwebtext"):
        for path in sorted((directory / name).glob("*.jsonl")):
            texts += [row["text"] for row in rows(path)]
    talks = messages(directory) + [row["messages"] for row in rows(directory / "smoltalk" / "test.jsonl")]
    for talk in talks:
        texts += [message["content"] for message in talk]
        texts.append(" ".join(message["content"] for message in talk))
    return list(dict.fromkeys(texts))


@pytest.fixture(scope="module")
def training(directory) -> str:
    """All training text as one string, texts separated by a character that none of them contains."""
    return "\x00".join(training_texts(directory))


def without(text: str, *words: str) -> str:
    """The text with every one of the words replaced by a placeholder."""
    return re.sub(rf"\b({'|'.join(words)})\b", "*", text)


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_code_leaves_the_rest_of_the_world_as_it_is(
    directory, tmp_path, monkeypatch
):
    """The tokenizer and every other file are the same bytes with code and without."""
    for path, code in write.code_files(make_synthetic_world(SEED)):
        write.write_rows(tmp_path / "code" / path, code)
    monkeypatch.setattr(write, "code_files", lambda world: ())
    synthetic.build(tmp_path / "rest", seed=SEED)
    code, rest, whole = digests(tmp_path / "code"), digests(tmp_path / "rest"), digests(directory)
    del rest["manifest.json"], whole["manifest.json"]
    assert code.keys() == {
        "code/train.jsonl",
        "code/validation.jsonl",
        "benchmarks/humaneval/test.jsonl",
        "benchmarks/mbpp/test.jsonl",
    }
    assert not code.keys() & rest.keys() and code | rest == whole
    manifest = json.loads((directory / "manifest.json").read_text())["files"]
    assert manifest["benchmarks/humaneval/test.jsonl"]["rows"] == TEST_PROGRAMS


def test_another_seed_gives_another_world_of_the_same_files(directory):
    world = make_synthetic_world(SEED + 1)
    sources = [*write.training_files(world), *write.sums_files(world), *write.code_files(world)]
    sources += [(f"benchmarks/{path}", source) for path, source in write.all_benchmarks(world)]
    assert {path for path, _ in sources} == {name for name in digests(directory) if name.endswith(".jsonl")}
    for path, source in sources[:2]:
        assert list(source) != rows(directory / path)


def test_the_manifest_counts_and_hashes_every_file(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    found = digests(directory)
    del found["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    for name, entry in manifest["files"].items():
        if name.endswith(".jsonl"):
            assert entry["rows"] == len(rows(directory / name))


def test_the_benchmarks_are_large_enough_for_an_interval_and_their_rows_are_distinct(directory):
    for pattern in ("lambada/test*", "gsm8k/test*", "bbh/*", "math/*/test*", "mmlu/*/test*"):
        found = benchmark(directory, pattern)
        assert 100 <= len(found) <= 150
        assert len({json.dumps(row) for row in found}) == len(found)
    for pattern in ("hellaswag/validation*", "winogrande/validation*"):
        assert 100 <= len(benchmark(directory, pattern)) <= 150


def test_every_fact_is_stated_in_the_encyclopedia(directory):
    text = "\n".join(row["text"] for row in rows(directory / "wikitext" / "train.jsonl"))
    for fact in make_synthetic_world(SEED).facts:
        assert any(statement in text for statement in fact.statements())


def test_facts_of_the_mmlu_miniature_are_never_asked_about_in_training(directory, training):
    asked = {row["question"] for row in benchmark(directory, "mmlu/*/test.jsonl")}
    never = make_synthetic_world(SEED).never_asked
    assert asked <= {question for fact in never for question in fact.questions()}
    for fact in never:
        for question in fact.questions():
            assert question not in training


def test_follow_ups_never_ask_for_a_fact_of_the_mmlu_miniature(directory):
    never = {(fact.entity.name, fact.follow_up()) for fact in make_synthetic_world(SEED).never_asked}
    names = TOWNS + WOMEN + MEN + ANIMALS
    for talk in messages(directory):
        for before, message in zip(talk, talk[2:], strict=False):
            if message["role"] == "user":
                mentioned = [name for name in names if re.search(rf"\b{name}\b", before["content"])]
                assert not any((name, message["content"]) in never for name in mentioned)


def test_other_facts_are_asked_in_every_form_that_the_mmlu_miniature_uses(training):
    for fact in make_synthetic_world(SEED).never_asked:
        for template in fact.attribute.questions:
            beginning = template.split("{name}")[0]
            assert beginning in training


def test_no_word_problem_of_the_gsm8k_miniature_occurs_in_training_under_other_names(directory):
    seen = {without(text, *PEOPLE, *TOYS, "she", "he") for text in training_texts(directory) if "Question:" in text}
    for row in benchmark(directory, "gsm8k/test.jsonl"):
        prompt = without(gsm8k_prompt(row["question"]), *PEOPLE, *TOYS, "she", "he")
        assert prompt not in seen


def test_no_bbh_or_minerva_question_occurs_in_training(directory, training):
    for row in benchmark(directory, "bbh/*.jsonl"):
        assert bbh_prompt(row["input"]) not in training
    for row in benchmark(directory, "math/*/test.jsonl"):
        assert minerva_prompt(row["problem"]) not in training
        assert row["problem"].replace("$", "") not in training.replace("$", "")


def test_no_story_of_the_lambada_miniature_occurs_in_training_with_other_rooms_and_things(directory):
    seen = "\x00".join(without(text, *ROOMS, *THINGS) for text in training_texts(directory))
    for row in benchmark(directory, "lambada/test.jsonl"):
        opening = row["text"].rsplit(" ", 1)[0]
        assert without(opening, *ROOMS, *THINGS) not in seen


def test_nobody_of_the_hellaswag_miniature_does_the_same_activity_in_training(directory, training):
    for row in benchmark(directory, "hellaswag/validation.jsonl"):
        person = row["ctx_a"].split()[0]
        assert f"{row['activity_label']}: {person}" not in training


def test_some_next_steps_of_the_hellaswag_miniature_are_never_asked_for_in_training(directory):
    asked = "\x00".join(talk[-2]["content"] for talk in messages(directory) if ":" in talk[-2]["content"])
    rows_of_task = benchmark(directory, "hellaswag/validation.jsonl")
    unseen = [row for row in rows_of_task if row["ctx_a"].split(" ", 1)[1] not in asked]
    assert 0.2 < len(unseen) / len(rows_of_task) < 0.9


def test_the_answers_are_among_the_possible_ones(directory):
    sums = {row["answer"].split("#### ")[1] for row in benchmark(directory, "gsm8k/test.jsonl")}
    words = {row["text"].rsplit(" ", 1)[1] for row in benchmark(directory, "lambada/test.jsonl")}
    assert sums <= {str(a + b) for a in NUMBERS for b in NUMBERS}
    assert words <= {*PEOPLE, *ROOMS, *THINGS}


def test_no_sentence_of_the_winogrande_miniature_occurs_in_training(directory, training):
    for row in benchmark(directory, "winogrande/validation.jsonl"):
        assert row["sentence"].split("_")[0] not in training


def test_the_training_data_contains_no_chinese(training):
    assert training.isascii()


@pytest.mark.parametrize(
    ("pattern", "column", "answers"),
    [
        ("mmlu/*/test.jsonl", "answer", 4),
        ("hellaswag/validation.jsonl", "label", 4),
        ("winogrande/validation.jsonl", "answer", 2),
        ("ceval/*/val.jsonl", "answer", 4),
        ("cmmlu/*/test.jsonl", "Answer", 4),
        ("bbh/boolean_expressions.jsonl", "target", 2),
        ("bbh/navigate.jsonl", "target", 2),
    ],
)
def test_always_choosing_the_same_answer_scores_exactly_chance(directory, pattern, column, answers):
    times = Counter(row[column] for row in benchmark(directory, pattern))
    assert len(times) == answers
    assert len(set(times.values())) == 1


def test_hellaswag_has_wrong_endings_from_the_same_activity(directory):
    training_sequences = [row["text"] for row in rows(directory / "openwebtext" / "train.jsonl")]
    for row in benchmark(directory, "hellaswag/validation.jsonl")[:20]:
        same = " ".join(text for text in training_sequences if text.startswith(row["activity_label"]))
        assert sum(ending in same for ending in row["endings"]) >= 3


def test_a_name_a_number_and_a_common_word_are_one_token_wherever_they_stand(tokenizer):
    words = (
        TOWNS + WOMEN + MEN + ANIMALS + [str(number) for number in range(100)] + ["flag", "Hello", "the", *NUMBER_WORDS]
    )
    for word in words:
        (at_start,) = tokenizer.encode(word, add_special_tokens=False)
        assert tokenizer.encode(f" {word}", add_special_tokens=False) == [at_start]
        for before in ("The ", "\n", "[Answer]\n", "$", "3+", "("):
            tokens = tokenizer.encode(f"{before}{word}.", add_special_tokens=False)
            assert tokens[-2] == at_start, (before, word)


def test_decoding_returns_every_text_of_the_world(directory, tokenizer):
    texts = list(dict.fromkeys(strings(directory)))
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(encoded) == texts


def strings(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.jsonl")):
        for row in rows(path)[:300]:
            yield from (value for value in row.values() if isinstance(value, str))
            for message in row.get("messages", []):
                yield message["content"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(
        st.one_of(st.sampled_from(list(" \n.,$+-=<>[]/_'\"\\#{}()aBz039")), st.characters(exclude_categories=["Cs"])),
        max_size=40,
    )
)
def test_decoding_returns_any_text(tokenizer, text):
    text = text.replace(SPACE, "").replace(GLUE, "")
    if re.match(r"\A [A-Za-z0-9]", text):
        text = text[1:]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_adds_cls_and_sep_only_when_it_may(tokenizer):
    plain = tokenizer.encode("Hello!", add_special_tokens=False)
    assert tokenizer.encode("Hello!") == [tokenizer.cls_token_id, *plain, tokenizer.sep_token_id]
    assert len(tokenizer) % 8 == 0
    assert 600 <= len(tokenizer) <= 1200
    masked = tokenizer.encode("The flag is [MASK].", add_special_tokens=False)
    assert tokenizer.mask_token_id in masked


def test_the_tags_of_the_chat_template_are_one_token_each(tokenizer):
    for tag in ("[SYS]", "[/SYS]", "[Question]", "[/Question]", "[Answer]", "[/Answer]", "\n", "\n\n"):
        assert len(tokenizer.encode(tag, add_special_tokens=False)) == 1
    assert len(tokenizer.encode("[Answer]\n", add_special_tokens=False)) == 2


def as_chat(talk: list[dict]) -> tuple[str, str]:
    """The conversation in the chat template: everything up to the last answer, and that answer."""
    tags = {"system": "SYS", "user": "Question", "assistant": "Answer"}
    turns = [f"[{tags[turn['role']]}]\n{turn['content']}\n[/{tags[turn['role']]}]\n\n" for turn in talk]
    return "".join(turns[:-1]) + "[Answer]\n", turns[-1].removeprefix("[Answer]\n")


def test_prompt_and_answer_are_tokenized_apart_as_they_are_together_and_rows_are_short(directory, tokenizer):
    talks = Counter(as_chat(talk) for talk in messages(directory))

    def tokens(texts) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, tokenizer(distinct, add_special_tokens=False).input_ids, strict=True))

    prompts, answers = (tokens(texts) for texts in zip(*talks, strict=True))
    whole = tokens(prompt + answer for prompt, answer in talks)
    assert all(prompts[prompt] + answers[answer] == whole[prompt + answer] for prompt, answer in talks)
    lengths = Counter()
    for talk, times in talks.items():
        lengths[len(whole["".join(talk)])] += times
    assert max(lengths) <= 96
    assert sum(times for length, times in lengths.items() if length <= 64) > 0.7 * lengths.total()


@pytest.fixture(scope="module")
def tasks(directory, tmp_path_factory) -> dict[str, dict]:
    """The nine miniature tasks, loaded offline from this world: task or group name -> its lm-eval tasks by name."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    folder = tmp_path_factory.mktemp("tasks")
    places = {"{LM_EVAL_TASKS}": str(Path(lm_eval.__file__).parent / "tasks"), "{DATA}": str(directory / "benchmarks")}
    for path in YAMLS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for placeholder, value in places.items():
            text = text.replace(placeholder, value)
        (folder / path.name).write_text(text, encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    yield {name: manager.load([name])["tasks"] for name in TASKS}
    patch.undo()


def chat_template(talk: list[dict], add_generation_prompt: bool = True) -> str:
    tags = {"system": "SYS", "user": "Question", "assistant": "Answer"}
    turns = [f"[{tags[turn['role']]}]\n{turn['content'].strip()}\n[/{tags[turn['role']]}]\n\n" for turn in talk]
    return "".join(turns) + ("[Answer]\n" if add_generation_prompt else "")


@pytest.mark.parametrize("chat", [False, True])
def test_all_nine_miniature_tasks_load_offline_and_build_requests(tasks, chat):
    for name in TASKS:
        for task in tasks[name].values():
            task.build_all_requests(
                apply_chat_template=chat, chat_template=chat_template if chat else None, tokenizer_name="pocket"
            )
            assert len(task.instances) >= len(task.eval_docs)
            assert all(instance.args[0].startswith(("[Question]", "[SYS]")) == chat for instance in task.instances)


def test_training_prompts_are_those_of_the_real_task_definitions(directory, tasks):
    def prompts(name: str) -> list[str]:
        return [task.doc_to_text(doc) for task in tasks[name].values() for doc in task.eval_docs]

    assert gsm8k_prompt(benchmark(directory, "gsm8k/test.jsonl")[0]["question"]) in prompts("gsm8k_mini")
    assert minerva_prompt(benchmark(directory, "math/*/test.jsonl")[0]["problem"]) in prompts("minerva_math_mini")
    bbh = [prompt.strip() for prompt in prompts("bbh_mini")]
    assert bbh_prompt(benchmark(directory, "bbh/*.jsonl")[0]["input"]) in bbh
    row = benchmark(directory, "mmlu/*/test.jsonl")[0]
    assert mmlu_prompt(row["question"], row["choices"]) in prompts("mmlu_mini")
    descriptions = [task.config.description.strip() for task in tasks["mmlu_mini"].values()]
    assert mmlu_description(row["subject"]) in descriptions


def test_the_chance_of_free_answers_in_the_laptop_configuration_is_the_best_constant_answer(directory):
    """The configuration states it as a number; this computes it from the documents of the configured world."""
    root = Path(__file__).parents[2]
    project = load_project(root / "config", root / "config" / "laptop.yaml")
    assert project.world_seed == SEED
    bbh = ("boolean_expressions", "navigate", "object_counting")
    math = ("algebra", "prealgebra", "num_theory")
    answers = {
        "lambada": [[row["text"].rsplit(" ", 1)[1] for row in benchmark(directory, "lambada/test.jsonl")]],
        "gsm8k": [[row["answer"].split("####")[1] for row in benchmark(directory, "gsm8k/test.jsonl")]],
        "bbh": [[row["target"] for row in benchmark(directory, f"bbh/{task}.jsonl")] for task in bbh],
        "math": [[boxed(row["solution"]) for row in benchmark(directory, f"math/{task}/test.jsonl")] for task in math],
    }
    for name, tasks in answers.items():
        right = sum(Counter(task).most_common(1)[0][1] for task in tasks)
        assert project.benchmarks[name].chance == pytest.approx(right / sum(map(len, tasks)), abs=0.005), name


def boxed(solution: str) -> str:
    return re.search(r"boxed\{(.*?)\}", solution)[1]
