"""Tokenizers and the chat template."""

import pytest

from dllm.models.tokenizers import chat_template, check_messages, encode_chat, encode_text, load_tokenizer
from tests.stock import stock_entry
from tests.toys import word_tokenizer

SYSTEM = {"role": "system", "content": " I am a toy. "}
QUESTION = {"role": "user", "content": "\nWho are you?\n\n"}
ANSWER = {"role": "assistant", "content": "  I am a toy.\n"}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def saved(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def text_of(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_a_conversation_is_written_exactly_as_documented(tokenizer):
    assert text_of(tokenizer, [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER]) == (
        "[SYS]\nI am a toy.\n[/SYS]\n\n"
        "[Question]\nWho are you?\n[/Question]\n\n"
        "[Answer]\nI am a toy.\n[/Answer]\n\n"
        "[Question]\nWho are you?\n[/Question]\n\n"
        "[Answer]\nI am a toy.\n[/Answer]\n\n"
    )
    assert text_of(tokenizer, [QUESTION], prompt=True) == "[Question]\nWho are you?\n[/Question]\n\n[Answer]\n"


def test_the_system_turn_is_written_only_at_the_front(tokenizer):
    assert text_of(tokenizer, [QUESTION, SYSTEM, ANSWER]) == text_of(tokenizer, [QUESTION, ANSWER])


@pytest.mark.parametrize("before", [[QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, QUESTION]])
def test_the_generation_prompt_is_how_the_full_text_begins(tokenizer, before):
    prompt, whole = text_of(tokenizer, before, prompt=True), text_of(tokenizer, [*before, ANSWER])
    assert whole == prompt + "I am a toy.\n[/Answer]\n\n"
    ids, full = (
        encode_chat(tokenizer, messages, add_generation_prompt=flag)
        for messages, flag in ((before, True), ([*before, ANSWER], False))
    )
    assert full[: len(ids)] == ids


def test_a_chat_has_no_cls_and_no_sep(tokenizer):
    ids = encode_chat(tokenizer, [QUESTION, ANSWER], add_generation_prompt=False)
    assert ids == encode_text(tokenizer, text_of(tokenizer, [QUESTION, ANSWER]))
    assert not {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id} & set(ids)
    assert tokenizer.cls_token_id in tokenizer("Hello")["input_ids"], "it would add them if asked"


def test_loading_for_diffusion_makes_end_padding_and_start_one_token(saved):
    entry = stock_entry("bert").model_copy(update={"end_token": "[SEP]"})
    tokenizer = load_tokenizer(saved, entry)
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == "[SEP]"
    assert tokenizer.mask_token == "[MASK]" and tokenizer.chat_template == chat_template("bert")
    assert len(tokenizer) == len(load_tokenizer(saved))


def test_without_an_entry_nothing_is_changed(saved, tokenizer):
    loaded = load_tokenizer(saved)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_saved_does_not_say_whether_the_hub_was_in_reach(saved, tmp_path, offline, monkeypatch):
    monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda: offline)
    load_tokenizer(saved, stock_entry("bert")).save_pretrained(tmp_path / "again")
    assert "local_files_only" not in (tmp_path / "again/tokenizer_config.json").read_text()


def test_a_models_own_chat_template_is_kept_if_the_entry_says_so(tmp_path, tokenizer):
    own = word_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path)
    entry = stock_entry("bert").model_copy(update={"chat_template": "own"})
    assert load_tokenizer(tmp_path, entry).chat_template == own.chat_template


@pytest.mark.parametrize("key", ["mask_token", "end_token"])
def test_a_token_the_tokenizer_lacks_is_an_error_that_lists_its_special_ones(saved, key):
    entry = stock_entry("bert").model_copy(update={key: "<mask>"})
    line = rf"no token '<mask>' \({key}\); set {key} of the model's entry to one of its special tokens: .*\[MASK\]"
    with pytest.raises(ValueError, match=line):
        load_tokenizer(saved, entry)


@pytest.mark.parametrize("content", ["{ nonsense", '{"version": "1.0"}', ""])
def test_a_damaged_tokenizer_is_an_error_of_one_line(saved, content):
    (saved / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no usable tokenizer") as caught:
        load_tokenizer(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tokenizer_is_an_error_although_transformers_would_make_one_up(saved):
    for path in saved.glob("tokenizer*"):
        path.unlink()
    (saved / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"no tokenizer there \(tokenizer.json\)"):
        load_tokenizer(saved, stock_entry("bert"))
    with pytest.raises(ValueError, match="no tokenizer there"):
        load_tokenizer(saved / "nowhere")


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "messages is empty; it needs at least one turn"),
        ("Hello!", "messages is empty"),
        ([QUESTION, "Hello!"], r"messages\[1\] = 'Hello!' has no text; a turn needs 'role' and 'content'"),
        ([{"role": "user"}], r"messages\[0\] = .* has no text"),
        ([{"role": "user", "content": None}], r"messages\[0\] = .* has no text"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role = 'tool'; allowed: system, user, assistant"),
        ([{"content": "x"}], r"messages\[0\].role = None; allowed: system, user, assistant"),
        ([QUESTION, SYSTEM], r"messages\[1\].role = 'system'; only the first turn may be the system's"),
    ],
)
def test_messages_that_no_template_can_write_are_errors_of_one_line(messages, line):
    with pytest.raises(ValueError, match=line) as caught:
        check_messages(messages)
    assert "\n" not in str(caught.value)


def test_a_proper_conversation_passes():
    check_messages([SYSTEM, QUESTION, ANSWER, QUESTION])
