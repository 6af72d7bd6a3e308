"""DiffusionLM: texts and conversations in, texts and scores out, the same alone and in a batch."""

import re
from pathlib import Path

import pytest
import torch

import dllm
from dllm.core.canvas import Canvas
from dllm.language_model import DiffusionLM
from tests.plain_sampler import plain_row
from tests.toys import LEARNT, save_toy, turns

PROMPTS = ["Hello", turns("What is the capital of Italy?"), "I am a toy. You", turns("Hello!", "Hello!", "red?"), ""]


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def model(request, tmp_path_factory) -> DiffusionLM:
    torch.set_num_threads(1)
    return dllm.load(save_toy(tmp_path_factory.mktemp("toy"), kind=request.param), device="cpu")


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> DiffusionLM:
    torch.set_num_threads(1)
    return dllm.load(save_toy(tmp_path_factory.mktemp("taught"), teach=LEARNT), device="cpu")


def settings(**changes) -> dllm.GenerateSettings:
    return dllm.GenerateSettings(**{"max_new_tokens": 16, "block_size": 8} | changes)


def test_every_public_name_exists():
    assert set(dllm.__all__) <= set(dir(dllm))
    assert all(getattr(dllm, name) is not None for name in dllm.__all__)
    with pytest.raises(AttributeError, match="DiffusionLM"):
        dllm.lload  # noqa: B018


def test_the_program_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    (place,) = re.findall(r'dllm\.load\("(.*?)"\)', program)
    save_toy(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out.split("\n")
    assert any(line.startswith("0 ") for line in printed) and float(printed[-2].split()[0]) > 0


CHANGES = [
    {},
    {"temperature": 0.8},
    {"steps": 4},
    {"batch_size": 2, "temperature": 1.0},
    {"batch_tokens": 80},
    {"reveal_rule": "threshold", "threshold": 0.2},
    {"reveal_rule": "factor", "factor": 2.0, "batch_size": 2},
    {"reveal_rule": "entropy_bound", "entropy_bound": 3.0, "temperature": 0.5},
    {"reuse": "prefix"},
    {"reuse": "dual", "refresh": 3, "batch_size": 2},
    {"guidance": 1.0, "batch_tokens": 160},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_ragged_batch_equals_its_rows_alone_and_keeps_their_order(model, changes):
    short = settings(max_new_tokens=8, block_size=4, **changes)
    together = model.generate(PROMPTS, short)
    alone = [model.generate([prompt], short)[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("rule", ["confidence", "threshold", "factor", "entropy_bound", "random"])
def test_answers_are_those_of_the_plain_sampler_up_to_their_end(taught, rule):
    prompts, mask = [prompt for prompt, _ in LEARNT], taught.backbone.mask_id
    options = settings(reveal_rule=rule, block_size=4, temperature=0.5 if rule == "random" else 0.0)
    for prompt, answer in zip(prompts, taught.answers(prompts, options), strict=True):
        row = [*taught.encode_prompt(prompt), *[mask] * 16]
        tokens, passes = plain_row(taught.backbone, row, len(row) - 16, options)
        assert tuple(tokens[len(row) - 16 :][: answer.tokens]) == answer.ids and answer.passes <= passes


def test_a_taught_model_gives_the_answers_without_their_end(taught):
    prompts, answers = zip(*LEARNT, strict=True)
    assert taught.generate(list(prompts), settings()) == list(answers)


def test_the_end_of_turn_ends_a_row_early_and_changes_no_answer(taught):
    prompts = [prompt for prompt, _ in LEARNT]
    early = taught.answers(prompts, settings(block_size=4))
    full = taught.answers(prompts, settings(block_size=4, early_stop=False))
    assert [a.text for a in early] == [a.text for a in full]
    assert [a.tokens for a in early] == [7, 5, 2, 2]
    assert all(a.passes == 16 for a in full)
    assert early[2].passes <= 4 and early[1].passes <= 8


def test_a_stop_string_cuts_the_answer_before_it_and_ends_the_row(taught):
    (cut,) = taught.answers([turns("Who are you?")], settings(block_size=1, stop=[" toy"]))
    assert (cut.text, cut.tokens, cut.passes) == ("I am a", 3, 4)


def test_an_answer_says_what_it_cost(taught):
    (answer,) = taught.answers([turns("Who are you?")], settings(early_stop=False))
    prompt = len(taught.encode_prompt(turns("Who are you?")))
    assert answer.computed == 16 * (prompt + 16) and answer.passes == 16
    assert taught.decode(answer.ids) == answer.text and len(answer.ids) == answer.tokens
    (cheaper,) = taught.answers([turns("Who are you?")], settings(early_stop=False, reuse="dual"))
    assert cheaper.computed == 2 * (prompt + 16) + 14 * 8


@pytest.mark.parametrize("stop", [[" toy"], ["a toy"], [".", "nothing"], ["\n"], ["I am"]])
def test_a_stop_string_is_found_at_the_pass_that_completes_it(taught, stop, monkeypatch):
    options = settings(block_size=4, stop=stop)
    found = taught.answers([turns("Who are you?"), turns("Hello!")], options)
    monkeypatch.setattr(DiffusionLM, "_may_show", lambda self, token, characters: True)  # text is decoded always
    assert found == taught.answers([turns("Who are you?"), turns("Hello!")], options)
    last = [*taught.stream([turns("Who are you?")], options)][-1]
    assert taught.decode(last.responses()[0], stop).strip() == found[0].text


def test_a_budget_smaller_than_a_row_is_one_clear_line(model):
    with pytest.raises(ValueError, match="batch_tokens = 16 is less than the 17 tokens of a single row"):
        model.generate(["Hello"], settings(batch_tokens=16))


def test_streaming_ends_with_the_generated_text(taught):
    canvases = list(taught.stream([turns("Who are you?")], settings()))
    assert all(isinstance(canvas, Canvas) for canvas in canvases)
    assert canvases[0].masked.sum() == 16 and not canvases[-1].masked.any()
    assert taught.decode(canvases[-1].responses()[0]).strip() == "I am a toy."


def test_a_conversation_is_encoded_as_in_training_without_cls_and_sep(model):
    tokens = model.encode_prompt([{"role": "system", "content": " red "}, *turns("Who are you?")])
    text = "[SYS]\nred\n[/SYS]\n\n[Question]\nWho are you?\n[/Question]\n\n[Answer]\n"
    assert model.backbone.tokenizer.decode(tokens) == text
    assert model.encode_prompt(text) == tokens == model.encode_prompt(tokens)


def test_decoding_leaves_out_what_stands_behind_the_end(model):
    encode = model.encode_prompt
    mask, pad = model.backbone.mask_id, model.backbone.pad_id
    assert model.decode([*encode("Hello!\n[/Answer]\n\n"), *encode("Who"), pad]) == "Hello!"
    assert model.decode([*encode("Hello"), pad, *encode("Who")]) == "Hello"
    assert model.decode([*encode("Hello"), mask, *encode("!")]) == "Hello!"
    assert model.decode(encode("one two red"), stop=[" two", " red"]) == "one"
    assert model.answer_length([*encode("Hello!\n[/Answer]\n\n"), pad]) == 2
    assert model.answer_length([pad, pad]) == 0


def test_scores_and_matches_keep_their_order_and_do_not_depend_on_the_batch(model):
    prompts, targets = ["Hello", turns("Who are you?"), []], [" I am", "red", "What is the capital"]
    together = model.nelbo(prompts, targets)
    alone = [model.nelbo([p], [t])[0] for p, t in zip(prompts, targets, strict=True)]
    assert [s.nats for s in together] == pytest.approx([s.nats for s in alone], rel=1e-5)  # fp32 sums in another order
    assert all(score.nats > 0 for score in together)
    assert len(model.greedy_match(prompts, targets)) == 3
    assert model.nelbo([], []) == [] == model.generate([])


def test_a_taught_model_matches_its_answers_greedily_and_finds_them_likely(taught):
    prompts, answers = [[turns("What is the capital of France?")] * 2, ["Paris.", "Rome."]]
    assert taught.greedy_match(prompts, answers) == [True, False]
    right, wrong = taught.nelbo(prompts, answers)
    assert right.nats < wrong.nats


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["Hello" + " Hello" * 89], ["prompts[0] has 90 tokens", "max_new_tokens = 16", "leaves 80"]),
        ([[]], ["messages is empty"]),
        ([[{"role": "robot", "content": "Hello"}]], ["'robot'", "allowed: system, user, assistant"]),
        ([[{"role": "user"}]], ["needs 'role' and 'content'"]),
        ([turns("Hello", "Hello")], ["last turn", "assistant"]),
        ("Hello", ["give a list"]),
        (turns("Hello"), ["give a list"]),
    ],
)
def test_a_wrong_prompt_is_one_clear_line(model, prompts, words):
    with pytest.raises(ValueError) as fault:
        model.generate(prompts, settings())
    assert all(word in str(fault.value) for word in words) and "\n" not in str(fault.value)


def test_a_wrong_pair_is_one_clear_line(model):
    with pytest.raises(ValueError, match=r"targets\[1\] = '' has no tokens"):
        model.nelbo(["Hello", "Who"], ["I", ""])
    with pytest.raises(ValueError, match="2 prompts and 1 targets"):
        model.nelbo(["Hello", "Who"], ["I"])
    with pytest.raises(ValueError, match="targets is a single value"):
        model.nelbo(["Hello"], "I")


def test_a_model_without_a_chat_template_says_so(tmp_path):
    model = dllm.load(save_toy(tmp_path), device="cpu")
    model.backbone.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; give a text"):
        model.encode_prompt(turns("Hello"))


def test_a_checkpoint_without_a_sidecar_takes_the_end_of_turn_from_its_template(tmp_path):
    directory = save_toy(tmp_path)
    (directory / "dllm.json").unlink()
    model = dllm.load(directory, device="cpu")
    assert model.end_of_turn == "[/Answer]" and model.algorithm.name == "mdlm"


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        dllm.load(tmp_path)


@pytest.mark.parametrize("token", [-1, 10**6, 2**70])
def test_a_token_id_that_the_model_lacks_is_one_line(model, token):
    size = model.backbone.vocab_size
    line = rf"\[1\] has the token id {token} at position 2; the model's vocabulary has {size} tokens"
    with pytest.raises(ValueError, match=f"prompts{line}"):
        model.generate([[5, 6], [7, 8, token]], settings())
    with pytest.raises(ValueError, match=f"prompts{line}"):
        model.nelbo([[5], [7, 8, token]], [[5], [6]])
    with pytest.raises(ValueError, match=f"targets{line}"):
        model.greedy_match([[5], [6]], [[5], [7, 8, token]])


def test_a_mask_in_a_prompt_is_text_or_given_and_never_filled(model):
    tokenizer, mask = model.backbone.tokenizer, model.backbone.mask_id
    for prompt in ("Who [MASK] you", turns("Who [MASK] you"), turns("[PAD] [MASK] [/Answer]")):
        assert mask not in model.encode_prompt(prompt)
    given = [*tokenizer("Who")["input_ids"], mask, *tokenizer("you")["input_ids"]]
    for canvas in model.stream([given], settings(temperature=1.0)):
        assert canvas.tokens[0, : len(given)].tolist() == given
    assert not canvas.masked.any()
    (answer,) = model.answers([given], settings())
    assert answer.passes == 16, "a token per pass of the answer, and none for the prompt"


def test_the_same_text_is_scored_wherever_it_stands(model):
    score = model.nelbo(["Who [MASK] you"], ["I [MASK] toy"])[0]
    assert score.nats > 0 and model.greedy_match(["Who"], ["[MASK] [PAD]"]) == [False]
    ids = [model.encode_prompt(text) for text in ("Who [MASK] you", "I [MASK] toy")]
    assert score == model.nelbo([ids[0]], [ids[1]])[0]


def test_holes_inside_a_text_are_filled_on_demand(taught):
    (text,) = taught.infill(["I am [MASK] toy"], settings())
    assert text.startswith("I am") and text.endswith("toy") and "[MASK]" not in text
    assert taught.infill([]) == []
    for wrong in ("I am a toy", "[MASK] " * 200):
        with pytest.raises(ValueError, match=r"texts\[0\] has \d+ tokens, \d+ of them \[MASK\]"):
            taught.infill([wrong])
