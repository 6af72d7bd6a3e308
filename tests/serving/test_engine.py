"""An engine answers many at once, each as the model alone does."""

import itertools
import random
from concurrent.futures import Future
from dataclasses import replace
from threading import Event

import pytest
import torch

import dllm
from dllm.config import LikelihoodSettings
from dllm.serving.engine import Engine, Turns
from dllm.serving.events import Closed, Edited, Finished, Full, Scored, Snapshot, TooLong
from dllm.synthetic.tokenizer import GLUE, MINIMUM_COUNT, make_tokenizer
from tests.edit_checkpoint import save_edit_toy
from tests.toys import LEARNT, save_toy, turns

SECONDS = 600
"""Far more than any of these takes; a test that waits so long has failed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return dllm.load(save_toy(tmp_path_factory.mktemp("taught"), teach=LEARNT), device="cpu")


@pytest.fixture
def engine(model):
    with opened(model) as engine:
        yield engine


class opened:
    """An engine that is closed in the end."""

    def __init__(self, model, **options):
        self.engine = Engine(
            model, name="toy", **{"batch_size": 6, "batch_tokens": 400, "time_limit": SECONDS} | options
        )

    def __enter__(self):
        return self.engine

    def __exit__(self, *_):
        self.engine.close(finish=False, timeout=SECONDS)


class Answers:
    """What an engine says of a request: its events, and when its `n` answers have ended."""

    def __init__(self, n=1):
        self.events, self.ends = [[] for _ in range(n)], [Future() for _ in range(n)]
        self.begun = Event()

    def __call__(self, index, event):
        self.events[index].append(event)
        self.begun.set()
        if isinstance(event, Finished | Scored | Exception):
            self.ends[index].set_result(event)

    def results(self):
        return [end.result(SECONDS) for end in self.ends]

    @property
    def texts(self):
        return [result.text for result in self.results()]


def settings(**changes):
    return dllm.GenerateSettings(**{"max_new_tokens": 16, "block_size": 8} | changes)


def any_settings(rng):
    changes = rng.choice(
        [
            {},
            {"temperature": 0.8, "top_p": 0.9},
            {"steps": 4, "temperature": 1.2},
            {"reveal_rule": "threshold", "threshold": 0.2},
            {"reveal_rule": "entropy_bound", "entropy_bound": 3.0, "temperature": 0.5},
            {"reveal_rule": "random", "stop": ["a"]},
            {"guidance": 1.0},
            {"reuse": "dual", "refresh": 3},
            {"early_stop": False, "stop": ["am", "Par"]},
            {"remask": "rescale", "remask_share": 0.5, "temperature": 1.0, "block_size": 4},
            {"edit_threshold": 0.6, "temperature": 1.0, "block_size": 4},
        ]
    )
    return settings(**changes, seed=rng.randrange(100), max_new_tokens=rng.choice([4, 9, 16, 24]))


PROMPTS = [*(prompt for prompt, _ in LEARNT), "Hello", "I am a toy. You", "one two"]


def check_streamed(events, text, revises=False):
    """Snapshots end with the text, and what they said before was never taken back."""
    said = ""
    for step, event in enumerate(events[:-1], 1):
        assert isinstance(event, Snapshot) and event.step == step
        assert event.text.startswith(said) and text.startswith(event.text)
        assert all((piece is None) == (c == 0) for piece, c in zip(event.pieces, event.confidence, strict=True))
        assert event.revealed or revises, "a pass that takes nothing back reveals something"
        said = event.text


def test_many_mixed_requests_at_once_give_what_each_gives_alone(model, engine):
    rng = random.Random(1)
    asked = []
    for _ in range(32):
        kind, options = rng.choice(["answer", "answer", "many", "infill", "score"]), any_settings(rng)
        said = Answers(3 if kind == "many" else 1)
        if kind == "score":
            pairs = ["Hello", turns("Who are you?"), "I am"], [" a", "I am a toy.", " red blue"]
            handle = engine.score(*pairs, LikelihoodSettings(budget=8), on_event=said)
        elif kind == "infill":
            text = rng.choice(["I am [MASK] toy", "[MASK] [MASK] you", "What is [MASK] capital [MASK] France"])
            options = options.model_copy(update={"guidance": 0.0, "steps": None})
            handle = engine.infill(text, options, on_event=said, snapshots=rng.random() < 0.5)
        else:
            prompt = rng.choice(PROMPTS)
            n, snapshots = len(said.events), rng.random() < 0.5
            handle = engine.answer(prompt, options, n=n, on_event=said, snapshots=snapshots)
        asked.append((kind, options, said, locals().get("prompt"), locals().get("text"), handle))
    for kind, options, said, prompt, text, _ in asked:
        results = said.results()
        if kind == "score":
            expected = model.nelbo(["Hello", turns("Who are you?"), "I am"], pairs[1], LikelihoodSettings(budget=8))
            assert list(results[0].scores) == expected
        elif kind == "infill":
            assert results[0].text == model.infill([text], options)[0]
        else:
            for index, found in enumerate(results):
                (alone,) = model.answers([prompt], options.model_copy(update={"seed": options.seed + index}))
                assert (found.text, found.passes, found.ids) == (alone.text, alone.passes, alone.ids)
                assert found.tokens == alone.tokens
                if len(said.events[index]) > 1:
                    revises = options.remask != "none" or options.edit_threshold is not None
                    check_streamed(said.events[index], found.text, revises)
    stats = engine.stats()
    assert stats.finished == 32 and stats.queued == stats.running == stats.failed == 0


def test_a_stream_never_shows_a_part_of_an_end(model, engine):
    for prompt, answer in LEARNT:
        for stop in ([], [" toy"], ["toy.!"]):
            said = Answers()
            engine.answer(prompt, settings(stop=stop), on_event=said, snapshots=True)
            (result,) = said.results()
            assert result.text == model.generate([prompt], settings(stop=stop))[0]
            assert result.text == (answer.split(stop[0])[0].rstrip() if stop else answer)
            check_streamed(said.events[0], result.text)
            assert result.reason == "stop"


@pytest.mark.parametrize(
    "changes", [{"remask": "cap", "remask_share": 0.6, "steps": 40}, {"edit_threshold": 0.3, "edit_passes": 5}]
)
def test_a_token_that_may_be_taken_back_is_not_sent(model, engine, changes):
    taken_back = 0
    for seed in range(8):
        options = settings(**changes, block_size=4, temperature=1.5, seed=seed, early_stop=False)
        said = Answers()
        engine.answer("Hello", options, on_event=said, snapshots=True)
        (result,) = said.results()
        assert result.text == model.generate(["Hello"], options)[0]
        check_streamed(said.events[0], result.text, revises=True)
        shown = [event.ids for event in said.events[0][:-1]]
        mask = model.backbone.mask_id
        for before, after in itertools.pairwise(shown):
            taken_back += any(old not in (mask, new) for old, new in zip(before, after, strict=True))
    assert taken_back > 0


def test_a_full_canvas_is_a_length_and_an_end_is_a_stop(engine):
    said = Answers(), Answers()
    engine.answer(turns("Who are you?"), settings(max_new_tokens=3), on_event=said[0])
    engine.answer(turns("Who are you?"), settings(), on_event=said[1])
    assert [one.results()[0].reason for one in said] == ["length", "stop"]


def test_what_is_settled_is_the_beginning_of_every_text_that_goes_on(model):
    rng, size = random.Random(0), model.backbone.vocab_size
    for _ in range(200):
        ids = [rng.choice([token for token in range(size) if token != model.backbone.mask_id]) for _ in range(12)]
        stop = rng.choice([[], ["am a"], [" "], ["you", " you are"]])
        whole = model.decode(ids, stop)
        for known in range(13):
            assert whole.startswith(model.settled(ids[:known], stop))


def test_what_a_decoder_may_still_take_away_is_not_settled(model):
    tokenizer = make_tokenizer({"1+x is so, $x$ and (y) are not a sum.": MINIMUM_COUNT})
    other = dllm.DiffusionLM(replace(model.backbone, tokenizer=tokenizer), model.algorithm)
    rng, ids = random.Random(0), [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    glued = tokenizer.convert_tokens_to_ids("+" + GLUE)
    assert other.settled([glued]) == "+" and other.decode([glued]) == "+" + GLUE
    for _ in range(200):
        response = [rng.choice([glued, *ids]) for _ in range(12)]
        whole = other.decode(response)
        for known in range(13):
            assert whole.startswith(other.settled(response[:known]))


class Gate:
    """A pass of the model begins only when it is open."""

    def __init__(self, model, monkeypatch):
        self.open, self.reached = Event(), Event()
        hidden = type(model.backbone).hidden

        def gated(backbone, *args, **keywords):
            self.reached.set()
            assert self.open.wait(SECONDS)
            return hidden(backbone, *args, **keywords)

        monkeypatch.setattr(type(model.backbone), "hidden", gated)


def test_a_cancelled_request_frees_its_rows_before_the_next_pass(model, monkeypatch):
    gate = Gate(model, monkeypatch)
    with opened(model, batch_size=2) as engine:
        gone, stays = Answers(4), Answers()
        handle = engine.answer("Hello", settings(early_stop=False), n=4, on_event=gone)
        assert gate.reached.wait(SECONDS)
        engine.answer("one", settings(max_new_tokens=2, early_stop=False), on_event=stays)
        handle.cancel()
        handle.cancel()
        gate.open.set()
        stays.results()
        stats = engine.stats()
        assert stats.cancelled == 1 and stats.passes <= 2 * 2 + 2, "one pass of two rows, and the passes of the other"
        assert gone.events == [[], [], [], []]


def test_more_requests_than_the_queue_holds_are_refused_with_a_time(model, monkeypatch):
    gate = Gate(model, monkeypatch)
    with opened(model, batch_size=1, queue=2) as engine:
        said = [Answers() for _ in range(3)]
        engine.answer("Hello", settings(max_new_tokens=2), on_event=said[0])
        assert gate.reached.wait(SECONDS)
        gate.open.set()
        said[0].results()
        gate.open.clear()
        gate.reached.clear()
        engine.answer("Hello", settings(max_new_tokens=2), on_event=(running := Answers()))
        assert gate.reached.wait(SECONDS)
        # the running one may not be known to run before its first pass has ended
        taken = 0
        with pytest.raises(Full) as full:
            for one in [*said[1:], Answers(), Answers()]:
                engine.answer("Hello", settings(max_new_tokens=2), on_event=one)
                taken += 1
        assert taken in (1, 2) and full.value.retry_after >= 1 and engine.stats().refused == 1
        gate.open.set()
        running.results()
        assert said[1].results()[0].text == model.generate(["Hello"], settings(max_new_tokens=2))[0]


def test_an_error_reaches_the_request_that_caused_it_and_no_other(model, engine, monkeypatch):
    hidden = type(model.backbone).hidden
    (bad,) = model.encode_prompt("blue")

    def refuses(backbone, tokens, *args, **keywords):
        if (tokens == bad).any():
            raise RuntimeError("a pass that fails")
        return hidden(backbone, tokens, *args, **keywords)

    expected = model.generate(["Hello", "one two"], settings(early_stop=False))
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backbone), "hidden", refuses)
        said = [Answers() for _ in range(3)]
        for prompt, one in zip(["Hello", "blue", "one two"], said, strict=True):
            engine.answer(prompt, settings(early_stop=False), on_event=one, snapshots=True)
        assert [said[0].texts[0], said[2].texts[0]] == expected
        assert str(said[1].results()[0]) == "a pass that fails"
    later = Answers()
    engine.answer("Hello", settings(early_stop=False), on_event=later)
    assert later.texts == expected[:1] and engine.stats().failed == 1


def test_a_wrong_request_is_one_line_for_who_asked(model, engine):
    said = Answers()
    with pytest.raises(ValueError, match="leaves 80"):
        engine.answer("Hello" + " Hello" * 89, settings(), on_event=said)
    with pytest.raises(ValueError, match="steps = 1 is less than"):
        engine.answer("Hello", settings(steps=1), on_event=said)
    with pytest.raises(ValueError, match="it needs one at least"):
        engine.infill("no hole", settings(), on_event=said)
    with pytest.raises(ValueError, match="edit_flows only"):
        engine.edit("draft", None, settings(), on_event=said)
    with pytest.raises(ValueError, match="1 prompts and 2 targets"):
        engine.score(["a"], ["b", "c"], LikelihoodSettings(), on_event=said)
    with (
        opened(model, batch_tokens=20) as small,
        pytest.raises(ValueError, match="batch_tokens = 20 is less than the 34"),
    ):
        small.answer("Hello", settings(guidance=1.0), on_event=said)
    assert said.events == [[]]


def test_a_listener_that_fails_is_gone_and_harms_nobody(model, engine):
    def broken(index, event):
        raise OSError("the client has gone")

    said = Answers()
    engine.answer("Hello", settings(), on_event=broken, snapshots=True)
    engine.answer("one two", settings(), on_event=said)
    assert said.texts == model.generate(["one two"], settings())


def test_short_requests_that_come_later_are_done_before_a_long_one(model):
    order = []

    class Ordered(Answers):
        def __call__(self, index, event):
            super().__call__(index, event)
            if not isinstance(event, Snapshot):
                order.append(self)

    with opened(model, batch_size=2) as engine:
        long, short = Ordered(), [Ordered() for _ in range(4)]
        engine.answer("Hello", settings(max_new_tokens=80, early_stop=False), on_event=long, snapshots=True)
        assert long.begun.wait(SECONDS)
        for one in short:
            engine.answer("Hello", settings(max_new_tokens=2), on_event=one)
        long.results()
    assert order == [*short, long]


def test_a_long_score_lets_answers_go_on(model, engine):
    score, answer, ended = Answers(), Answers(), []
    for request in (score, answer):
        request.ends[0].add_done_callback(ended.append)
    pairs = ["Hello"] * 40, [" I am a toy. I am a toy. I am a toy"] * 40
    engine.score(*pairs, LikelihoodSettings(budget=64, batch_tokens=64), on_event=score)
    engine.answer("Hello", settings(max_new_tokens=2), on_event=answer)
    assert isinstance(score.results()[0], Scored)
    assert ended == [answer.ends[0], score.ends[0]]


def test_closing_finishes_what_runs_and_refuses_what_is_new(model):
    with opened(model, batch_size=2) as engine:
        said = [Answers() for _ in range(5)]
        for one in said:
            engine.answer("Hello", settings(), on_event=one)
        engine.close(finish=True, timeout=SECONDS)
        assert [one.ends[0].done() for one in said] == [True] * 5
        assert {one.texts[0] for one in said} == set(model.generate(["Hello"], settings()))
        with pytest.raises(Closed):
            engine.answer("Hello", settings(), on_event=Answers())


def test_closing_without_finishing_ends_what_runs_with_an_event(model):
    with opened(model, batch_size=1) as engine:
        said = [Answers() for _ in range(3)]
        for one in said:
            engine.answer("Hello", settings(max_new_tokens=80, early_stop=False), on_event=one, snapshots=True)
        assert said[0].begun.wait(SECONDS)
        engine.close(finish=False, timeout=SECONDS)
        assert all(isinstance(one.results()[0], Closed) for one in said)


def test_a_request_beyond_the_time_limit_ends_with_an_error(model):
    with opened(model, time_limit=0.0) as engine:
        said = Answers()
        engine.answer("Hello", settings(), on_event=said)
        assert isinstance(said.results()[0], TooLong)


def test_two_engines_take_turns_on_one_device(model):
    turns_taken = Turns()
    with opened(model, turns=turns_taken) as one, opened(model, turns=turns_taken) as other:
        said = [Answers() for _ in range(6)]
        for number, each in enumerate(said):
            (one, other)[number % 2].answer("Hello", settings(seed=number, temperature=1.0), on_event=each)
        found = [each.texts[0] for each in said]
    assert found == [model.generate(["Hello"], settings(seed=n, temperature=1.0))[0] for n in range(6)]


def test_a_model_that_edits_edits_drafts_and_answers_as_it_does_alone(tmp_path):
    model = dllm.load(save_edit_toy(tmp_path), device="cpu")
    options = settings(steps=6, temperature=1.0)
    with opened(model) as engine:
        said = [Answers() for _ in range(3)]
        engine.edit("I am a toy", None, options, on_event=said[0], snapshots=True)
        engine.answer(turns("Hello!"), options, on_event=said[1], snapshots=True)
        engine.answer(turns("Who are you?"), options, on_event=said[2])
        with pytest.raises(ValueError, match="n = 2"):
            engine.answer("Hello", options, n=2, on_event=Answers())
        with pytest.raises(ValueError, match="`edits` instead of `infill`"):
            engine.infill("I am [MASK]", options, on_event=Answers())
        *_, last = model.edits("I am a toy", None, options)
        expected = [model.decode(last.responses()[0])]
        expected += [model.generate([turns(text)], options)[0] for text in ("Hello!", "Who are you?")]
        assert [one.texts[0] for one in said] == expected
        assert all(isinstance(event, Edited) for event in [*said[0].events[0][:-1], *said[1].events[0][:-1]])
        assert said[1].events[0][-2].text == expected[1] and len(said[2].events[0]) == 1


def test_a_model_of_hybrid_noise_answers_and_scores_as_it_does_alone(tmp_path):
    model = dllm.load(save_toy(tmp_path, algorithm="hybrid", uniform_share=0.3), device="cpu")
    pairs, scoring = (["a", "b"], ["b", "c a"]), LikelihoodSettings(budget=8, batch_tokens=64)
    score, answer = Answers(), Answers()
    with opened(model) as engine:
        engine.score(*pairs, scoring, on_event=score)
        engine.answer(turns("a b"), settings(steps=4), on_event=answer)
        assert list(score.results()[0].scores) == model.nelbo(*pairs, scoring)
        assert answer.texts == model.generate([turns("a b")], settings(steps=4))


def test_a_model_without_a_loop_of_rows_fills_holes_as_it_does_alone(tmp_path):
    model = dllm.load(save_toy(tmp_path, algorithm="hybrid", uniform_share=0.3), device="cpu")
    text, options = "red [MASK] [MASK] blue", settings(steps=4)
    filled, wrong = Answers(), Answers()
    with opened(model) as engine:
        with pytest.raises(ValueError, match="it needs one at least"):
            engine.infill("red blue", options, on_event=wrong)
        engine.infill(text, options, on_event=filled, snapshots=True)
        (result,) = filled.results()
    assert [result.text] == model.infill([text], options) and (result.passes, result.tokens) == (4, 2)
    assert [event.text for event in filled.events[0] if isinstance(event, Edited)][-1] == result.text
