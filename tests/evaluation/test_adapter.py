import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.config import GenerateSettings, Scorer
from dllm.evaluation.adapter import DiffusionAnswerer, cut_at_stops, encode_pair, encode_prompt, rolling_blocks
from dllm.evaluation.store import AnswerStore
from dllm.evaluation.stored import StoredLM

from .echo import EchoModel, words_tokenizer

TOKENIZER = words_tokenizer()


def words(tokens):
    return TOKENIZER.convert_ids_to_tokens(tokens)


def requests(*pairs, kind="loglikelihood", task="t"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, 0, metadata=(task, i, 1)) for i, pair in enumerate(pairs)]


def adapter(model=None, **settings):
    scorer = {k: settings.pop(k) for k in list(settings) if k in Scorer.model_fields}
    generation = GenerateSettings(max_new_tokens=8)
    model = model or EchoModel(TOKENIZER)
    return DiffusionAnswerer(TOKENIZER, lambda: model, generation=generation, scorer=Scorer(**scorer), **settings)


def values(answerer, requests):
    return [answer["answer"] for answer in answerer.answers(requests[0].request_type, requests)]


# --- special tokens


def test_exact_splits_tokenize_each_side_on_its_own_without_cls_and_sep():
    prompt, target = encode_pair(TOKENIZER, "Question : w1 Answer : ", " A", "exact")
    assert (words(prompt), words(target)) == (["Question", ":", "w1", "Answer", ":"], ["A"])


@pytest.mark.parametrize("mode", ["reference-v0", "reference-v0.1"])
def test_reference_splits_reduce_a_letter_to_the_final_sep(mode):
    prompt, target = encode_pair(TOKENIZER, "Question : w1 Answer :", " A", mode)
    assert words(prompt) == ["[CLS]", "Question", ":", "w1", "Answer", ":", "[SEP]"]
    assert words(target) == ["[SEP]"]


@pytest.mark.parametrize("mode", ["reference-v0", "reference-v0.1"])
def test_reference_splits_lose_the_newline_behind_the_chat_template(mode):
    prompt, target = encode_pair(TOKENIZER, "<user> w1 <answer>\n", "A", mode)
    assert words(prompt) == ["[CLS]", "<user>", "w1", "<answer>", "[SEP]"]
    assert words(target) == ["A", "[SEP]"]


@pytest.mark.parametrize("mode", ["reference-v0", "reference-v0.1"])
def test_reference_splits_lose_the_first_word_of_an_ending(mode):
    _, target = encode_pair(TOKENIZER, "what is", " w1 w2 w3", mode)
    assert words(target) == ["w2", "w3", "[SEP]"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("exact", ["what", "is"]),
        ("reference-v0", ["what", "is"]),
        ("reference-v0.1", ["[CLS]", "what", "is", "[SEP]"]),
    ],
)
def test_only_the_later_reference_keeps_cls_and_sep_in_a_prompt(mode, expected):
    assert words(encode_prompt(TOKENIZER, "what is", mode)) == expected
    model = EchoModel(TOKENIZER)
    values(adapter(model, special_tokens=mode), requests(("what is", {"until": []}), kind="generate_until"))
    assert words(model.prompts[0]) == expected


# --- likelihood


def test_a_loglikelihood_is_minus_the_bound():
    pairs = requests(("w1 w2", "w1"), ("w1 w2", "w3"), ("w1 w2", "w3 w4 w1"))
    assert values(adapter(), pairs) == [[0.0, True], [-2.0, False], [-4.0, False]]


def test_a_raced_question_is_the_same_in_any_order_of_its_requests():
    asked = []

    class Racer(EchoModel):
        def race(self, prompts, targets, questions, settings):
            asked.append([prompts[question.requests[0]] for question in questions])
            return super().race(prompts, targets, questions, settings)

    answerer = adapter(Racer(TOKENIZER), likelihood={"rounds": [6]}, divisors={"t": lambda request: {"acc": 1.0}})
    one = requests(("w1", " A"), ("w2", " w2"))
    for number, request in enumerate(one):
        request.doc_id, request.idx = 0, number
    answers = answerer.answers("loglikelihood", one)
    assert answerer.answers("loglikelihood", one[::-1])[::-1] == answers
    assert asked[0] == asked[1] and len({answerer.variant("loglikelihood", request) for request in one}) == 1


def test_greedy_is_asked_only_for_tasks_that_read_it():
    lm = adapter(greedy_tasks=frozenset({"reads"}))
    assert lm.answers("loglikelihood", requests(("w1", "w1"), task="reads"))[0] == {
        "answer": [0.0, True],
        "standard_error": 0.5,
        "estimator": "enumerate",
        "passes": 2,  # one for the bound, one for the check
    }
    assert lm.answers("loglikelihood", requests(("w1", "w1"), task="other"))[0]["answer"] == [0.0, False]


def test_an_empty_continuation_is_certain():
    assert values(adapter(), requests(("w1", ""))) == [[0.0, True]]


def test_a_long_context_is_shortened_from_the_left_and_says_so():
    model = EchoModel(TOKENIZER, max_length=4)
    (answer,) = adapter(model).answers("loglikelihood", requests(("w1 w2 w3 w4 w5", "w6")))
    assert answer["truncated"] == 2
    assert words(model.prompts[0]) == ["w3", "w4", "w5"]


def test_a_continuation_longer_than_the_model_is_an_error():
    with pytest.raises(ValueError, match="t, document 0: the continuation has 5 tokens, the model takes 4"):
        values(adapter(EchoModel(TOKENIZER, max_length=4)), requests(("", "w1 w2 w3 w4 w5")))


def test_bf16_scores_make_near_ties_equal():
    class Near(EchoModel):
        def nelbo(self, prompts, targets, settings):
            from .echo import EchoScore

            return [EchoScore(3.0 + 0.001 * i, 0.0, 1) for i in range(len(prompts))]

    pairs = requests(("w1", "A"), ("w1", "B"))
    exact = values(adapter(Near(TOKENIZER)), pairs)
    rounded = values(adapter(Near(TOKENIZER), bf16_scores=True), pairs)
    assert exact[0] != exact[1] and rounded[0] == rounded[1]


@given(st.lists(st.integers(0, 99), max_size=50), st.integers(2, 9))
def test_rolling_blocks_are_the_text_in_order_and_fit(tokens, max_length):
    pairs = list(rolling_blocks(tokens, max_length))
    assert [t for _, block in pairs for t in block] == tokens
    assert all(len(context) + len(block) <= max_length for context, block in pairs)
    position = 0
    for context, block in pairs:
        assert context == tokens[max(0, position - len(context)) : position]
        assert len(context) == min(position, max_length - max(1, max_length // 2))
        position += len(block)


def test_a_rolling_loglikelihood_sums_the_blocks():
    lm = adapter(EchoModel(TOKENIZER, max_length=4))
    # blocks: w1 w2 | w1 w3 given w1 w2 | w3 given w1 w3
    (answer,) = lm.answers("loglikelihood_rolling", requests(("w1 w2 w1 w3 w3",), kind="loglikelihood_rolling"))
    assert answer == {
        "answer": -6.0,
        "standard_error": pytest.approx(0.5 * math.sqrt(3)),
        "estimator": "enumerate",
        "passes": 5,
    }


# --- generation


def test_an_answer_ends_before_the_first_stop_string():
    pairs = [("what is w1", {"until": [" STOP", "is"]}), ("what is w1", {"until": "STOP"})]
    assert values(adapter(), requests(*pairs, kind="generate_until")) == ["", "is w1 "]


def test_text_without_stop_strings_is_left_alone():
    assert cut_at_stops("a b", ["c", ""]) == "a b"


def test_a_canvas_without_room_for_a_prompt_is_an_error():
    with pytest.raises(ValueError, match="max_new_tokens = 8 leaves no room for a prompt: the model takes 8 tokens"):
        values(adapter(EchoModel(TOKENIZER, max_length=8)), requests(("what", {"until": []}), kind="generate_until"))


def test_repeats_of_a_request_have_their_own_seeds_and_stops_reach_the_sampler():
    seen = []

    class Recorder(EchoModel):
        def answers(self, prompts, settings):
            seen.append((settings.seed, settings.stop, len(prompts)))
            return super().answers(prompts, settings)

    pairs = requests(("w1", {"until": ["x"]}), ("w2", {"until": ["x"]}), ("w1", {"until": ["x"]}))
    adapter(Recorder(TOKENIZER)).answers("generate_until", pairs, [0, 0, 1])
    assert seen == [(0, ["x"], 2), (1, ["x"], 1)]


def test_the_chat_template_is_the_tokenizers_own(tmp_path):
    turns = [{"role": "user", "content": "w1"}]
    lm = StoredLM(adapter(), AnswerStore(tmp_path), model_key="")
    assert lm.apply_chat_template(turns) == "<user> w1 <answer>\n"
    prefilled = [*turns, {"role": "assistant", "content": "w2"}]
    assert lm.apply_chat_template(prefilled, add_generation_prompt=False) == "<user> w1 <assistant> w2"


# --- text is text


@pytest.mark.parametrize("mode", ["exact", "reference-v0", "reference-v0.1"])
def test_control_tokens_in_a_document_are_text(mode):
    model = EchoModel(TOKENIZER)
    pairs = requests(("w1 [MASK] w2", " w3 [MASK]"), ("w1 [PAD]", "[MASK]"))
    assert len(values(adapter(model, special_tokens=mode), pairs)) == 2
    assert not any({TOKENIZER.mask_token_id, TOKENIZER.pad_token_id} & set(prompt) for prompt in model.prompts)
    ends = [TOKENIZER.cls_token_id, TOKENIZER.sep_token_id]
    for prompt in model.prompts:
        assert ([prompt[0], prompt[-1]] == ends) == (mode != "exact") and len(set(ends) & set(prompt)) in (0, 2)


def test_a_conversation_keeps_the_templates_control_tokens_and_no_others():
    tokenizer = words_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<answer>", "[SEP]")
    model = EchoModel(tokenizer)
    answerer = DiffusionAnswerer(
        tokenizer, lambda: model, generation=GenerateSettings(max_new_tokens=8), scorer=Scorer(), chat_template=True
    )
    lm = StoredLM(answerer, AnswerStore.__new__(AnswerStore), model_key="m")
    prompt = lm.apply_chat_template([{"role": "user", "content": "w1 [SEP] [MASK]"}])
    answerer.answers("loglikelihood", requests((prompt, "w1")))
    assert model.prompts[0].count(tokenizer.sep_token_id) == 1 and tokenizer.mask_token_id not in model.prompts[0]


def test_a_document_that_cannot_be_answered_is_named(tmp_path):
    class Picky(EchoModel):
        def nelbo(self, prompts, targets, settings):
            if any(self.tokenizer.convert_tokens_to_ids("w7") in prompt for prompt in prompts):
                raise ValueError("request 2: something about it")
            return super().nelbo(prompts, targets, settings)

    lm = StoredLM(adapter(Picky(TOKENIZER)), AnswerStore(tmp_path), model_key="m")
    with pytest.raises(ValueError, match="^t, document 2: request 2: something about it$"):
        lm.loglikelihood(requests(("w1", "w2"), ("w3", "w2"), ("w7", "w2"), ("w9", "w2")))


def test_what_an_autoregressive_model_cuts_off_is_counted():
    from types import SimpleNamespace

    from dllm.evaluation.causal import CausalAnswerer

    model = SimpleNamespace(
        max_length=6,
        tok_encode=str.split,
        loglikelihood=lambda requests, disable_tqdm: [(-1.0, False)] * len(requests),
        generate_until=lambda requests, disable_tqdm: ["w1"] * len(requests),
    )
    answerer = CausalAnswerer(TOKENIZER, lambda: model, generation=GenerateSettings(max_new_tokens=2))
    scored = answerer.answers("loglikelihood", requests(("a b c d e", "f g"), ("a b c d e", "f g h i")))
    assert [answer.get("truncated") for answer in scored] == [None, 2]
    pairs = requests(("a b c d", {"until": []}), ("a b c d e", {"until": []}), kind="generate_until")
    assert [answer.get("truncated") for answer in answerer.answers("generate_until", pairs)] == [None, 1]
