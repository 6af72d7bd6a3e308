"""Sample conversations and the filmstrip: what the report reads."""

from dllm.chat.samples import samples
from dllm.config import GenerateSettings, SampleConfig


def config(**changes) -> SampleConfig:
    facts = {
        "run": "toy",
        "checkpoint": "model",
        "conversations": [["What is the capital of France?", "And Italy?"], ["Who are you?"]],
        "film_prompt": "Hello!",
        "generation": GenerateSettings(max_new_tokens=16, block_size=8),
    }
    return SampleConfig(**facts | changes)


def test_every_conversation_goes_on_with_its_own_answers(taught):
    first, second = samples(taught, config())["conversations"]
    assert [turn["content"] for turn in first] == ["What is the capital of France?", "Paris.", "And Italy?", "Rome."]
    assert [turn["role"] for turn in first] == ["user", "assistant"] * 2
    assert second[1] == {"role": "assistant", "content": "I am a toy."}


def test_the_film_goes_from_all_masks_to_the_answer(taught):
    film = samples(taught, config())["film"]
    first, *_, last = film["frames"]
    assert film["prompt"] == "Hello!" and film["answer"] == "Hello! I am a toy."
    assert first["nfe"] == 0 and {token["state"] for token in first["tokens"]} == {"masked"}
    assert "".join(token["text"] for token in last["tokens"]).strip() == film["answer"]
    assert len({len(frame["tokens"]) for frame in film["frames"]}) == 1
    assert all(0 <= token["confidence"] <= 1 for frame in film["frames"] for token in frame["tokens"])


def test_every_frame_reveals_something_and_says_what_is_new(taught):
    frames = samples(taught, config())["film"]["frames"]
    for before, after in zip(frames, frames[1:], strict=False):
        for old, new in zip(before["tokens"], after["tokens"], strict=True):
            assert (new["state"] == "new") == (old["state"] == "masked" and new["state"] != "masked")
        assert any(token["state"] == "new" for token in after["tokens"])


def test_the_same_settings_give_the_same_file(taught):
    assert samples(taught, config()) == samples(taught, config())
