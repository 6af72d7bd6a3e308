"""The page in a real browser: against a server that says what a script tells it, and against one with a model."""

from __future__ import annotations

import json
import re

import pytest

from dllm.config import GenerateSettings
from dllm.serving.page import HEADERS, STATIC, form_fields, page_html
from tests.browser import NoBrowser, browser, watched
from tests.serving.scripted import Script, application, served
from tests.serving.serial import SerialEngine
from tests.serving.servers import ask as ask_api
from tests.serving.servers import running
from tests.serving.servers import served as with_engine

QUESTION, NEXT = "Where does the tarnix live?", "And what does it eat?"
ANSWERS = {QUESTION: "The tarnix lives in the meadow.", NEXT: "It eats roots and small berries."}
LONG_WORD = "x" * 400


@pytest.fixture(scope="module")
def chromium():
    try:
        with browser() as started:
            yield started
    except NoBrowser as error:
        pytest.skip(str(error))


@pytest.fixture
def script():
    return Script(answer=lambda question: ANSWERS.get(question, f"You said: {question}"))


@pytest.fixture
def address(script):
    with served(application(script)) as address:
        yield address


@pytest.fixture
def page(chromium, address):
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page, wrong = watched(context, address)
    page.goto(address)
    page.wait_for_selector("#a-model option", state="attached")
    yield page
    context.close()
    assert not wrong


def opened(chromium, address):
    """A new page of a server, and what it does wrong."""
    page, wrong = watched(chromium.new_context(), address)
    page.goto(address)
    page.wait_for_selector("#a-model option", state="attached")
    return page, wrong


def ask(page, question, state="done"):
    """Sends a message and waits until its answers are in a state."""
    page.fill("#message", question)
    page.press("#message", "Enter")
    page.wait_for_function(
        """([question, state]) => {
          const turn = document.querySelector("#turns > :last-child");
          const answers = [...(turn?.querySelectorAll(".answer") ?? [])];
          const asked = turn?.querySelector(".asked")?.textContent;
          return asked === question && answers.every(answer => answer.dataset.state === state);
        }""",
        arg=[question, state],
    )


def texts(page, selector):
    return [found.strip() for found in page.locator(selector).all_text_contents()]


def press(page, name, which=0):
    """Clicks the first button of a name, or another one."""
    page.get_by_role("button", name=name, exact=True).nth(which).click()


def choose(page, **values):
    """Fills fields of the settings, by id."""
    page.click("header [data-opens-settings]")
    for name, value in values.items():
        field = page.locator(f"#{name.replace('__', '-')}")
        if value is True:
            field.check()
        elif field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(str(value))
    page.click("#settings-close")


def width_beyond_the_window(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


# ---------------------------------------------------------------------------------------------------------------------
# A conversation


def test_a_second_question_is_asked_with_what_was_said_before_and_a_reload_loses_nothing(page, script):
    ask(page, QUESTION)
    ask(page, NEXT)
    assert script.bodies[1]["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWERS[QUESTION]},
        {"role": "user", "content": NEXT},
    ]
    assert script.bodies[1]["stream"] and script.bodies[1]["canvas"] and script.bodies[1]["model"] == "toy"
    assert texts(page, ".answer .body") == [ANSWERS[QUESTION], ANSWERS[NEXT]]
    assert re.fullmatch(r"5 passes · 0\.50 s · seed 0", texts(page, ".answer .figures")[0])
    page.fill("#message", "not yet sent")
    page.reload()
    assert texts(page, ".asked") == [QUESTION, NEXT] and texts(page, ".answer .body") == list(ANSWERS.values())
    assert page.input_value("#message") == "not yet sent"


def test_while_an_answer_is_denoised_its_masks_are_seen_and_a_screen_reader_is_told_only_at_the_end(page, script):
    script.hold_after = 2
    ask(page, QUESTION, state="running")
    page.wait_for_function("() => document.querySelectorAll('.body .mask').length === 5")
    assert page.get_attribute(".answer .body", "aria-hidden") == "true"
    assert page.text_content("#spoken") == ""
    assert page.text_content("#send") == "Stop"
    page.keyboard.press("Escape")
    script.hold_after = None
    page.click(".fault button")
    page.wait_for_selector(".answer[data-state=done]")
    assert page.get_attribute(".answer .body", "aria-hidden") == "false"
    assert texts(page, "#spoken p") == [f"toy: {ANSWERS[QUESTION]} (5 passes, 0.50 s, seed 0)"]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request_and_keeps_what_arrived(page, script, how):
    script.hold_after = 2
    ask(page, QUESTION, state="running")
    page.wait_for_function("() => document.querySelectorAll('.body .mask').length === 5")
    page.fill("#message", "the next thing")
    if how == "button":
        page.click("#send")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector(".answer[data-state=stopped]")
    assert script.gone.wait(10)
    assert page.locator(".body .mask").count() == 5
    assert texts(page, ".figures") == ["stopped · 2 passes"]
    assert page.input_value("#message") == "the next thing"
    # a turn without an answer is no part of what the model sees next
    script.hold_after = None
    ask(page, NEXT)
    assert [message["content"] for message in script.bodies[-1]["messages"]] == [NEXT]


def test_the_scrubber_shows_what_each_pass_revealed(page):
    ask(page, QUESTION)
    press(page, "Replay")
    scrubber = page.locator(".scrubber input")
    last = int(scrubber.get_attribute("max"))
    assert last == 5
    revealed = []
    for index in range(last + 1):
        scrubber.fill(str(index))
        said = page.text_content(".scrubber .said")
        assert said == scrubber.get_attribute("aria-valuetext") and said.startswith(f"Pass {index} of 5: ")
        revealed += re.findall("“([^”]+)” [0-9]+ %", said)
        assert page.locator(".answer .body .mask").count() == max(0, 9 - 2 * index)
    assert sorted(revealed) == sorted(ANSWERS[QUESTION].split())
    assert page.text_content(".answer .body").startswith(ANSWERS[QUESTION])
    page.click(".play")
    page.wait_for_function("() => document.querySelector('.scrubber input').value === '1'")
    press(page, "Replay")
    assert texts(page, ".answer .body") == [ANSWERS[QUESTION]]
    assert page.is_hidden(".scrubber")


def test_a_replay_says_what_a_pass_masks_again_or_changes(page):
    said = page.evaluate(
        """async () => {
          const [{ Trace }, { passWords }] = [await import("/static/trace.js"), await import("/static/drawing.js")];
          const trace = new Trace();
          trace.add({ step: 1, pieces: ["on", null, " it"], confidence: [0.4, 0, 0.9], revealed: [0, 2] });
          trace.add({ step: 2, pieces: [null, "sat", " it"], confidence: [0, 0.8, 0.9], revealed: [1] });
          trace.add({ step: 3, pieces: ["cats", " sit", " it"], confidence: [0.7, 0.8, 0.9], revealed: [0] });
          const copy = new Trace(JSON.parse(JSON.stringify(trace)));
          const all = [0, 1, 2, 3];
          return all.map((at) => passWords(copy.at(at), copy.at(at - 1).pieces, 3));
        }"""
    )
    assert said == [
        "nothing revealed",
        "revealed “on” 40 %, “it” 90 %",
        "revealed “sat” 80 %; masked “on” again",
        "revealed “cats” 70 %; changed “sat” to “sit”",
    ]


def test_what_is_behind_the_end_of_an_answer_is_seen_to_be_so_while_it_comes(page, script):
    script.answer, script.per_pass, script.hold_after = (lambda question: "one"), 3, 1  # all but the last end
    ask(page, QUESTION, state="running")
    page.wait_for_selector(".body .end")
    assert page.locator(".body .end").count() == 2 and page.locator(".body .behind").count() == 1
    assert "[SEP]" not in page.text_content(".body")
    page.keyboard.press("Escape")


def test_confidences_are_shown_when_they_are_asked_for(page):
    ask(page, QUESTION)
    assert page.locator(".answer .body span").count() == 0
    press(page, "Confidence")
    assert page.locator(".answer .body [title$='%']").count() == 6, "and not of the three that end it"
    press(page, "Confidence")
    assert texts(page, ".answer .body") == [ANSWERS[QUESTION]]


def test_an_earlier_message_is_edited_and_what_it_replaces_can_be_brought_back(page, script):
    ask(page, QUESTION)
    ask(page, NEXT)
    page.click(".turn:first-child .question button")
    page.fill(".question textarea", "Where does the sorrok live?")
    page.press(".question textarea", "Enter")
    page.wait_for_selector(".turn:only-child .answer[data-state=done]")
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Where does the sorrok live?"]
    press(page, "Bring it back")
    assert texts(page, ".asked") == [QUESTION, NEXT]


def test_of_a_conversation_that_does_not_fit_the_oldest_turns_are_left_out_and_that_is_said(page, script):
    script.most_messages = 3
    choose(page, system="Be brief.")
    ask(page, QUESTION)
    ask(page, NEXT)
    ask(page, "And then?")
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Be brief.", "And then?"]
    assert "without the 2 oldest turns, for want of room" in texts(page, ".figures")[-1]
    script.most_messages = 1
    ask(page, "And?", state="failed")
    assert texts(page, ".fault [role=alert]")[0].startswith("The server refused this: the conversation is too long.")


def test_what_is_downloaded_is_what_was_said_and_how(page, script):
    choose(page, system="Be brief.", a__seed=3)
    ask(page, QUESTION)
    ask(page, NEXT)
    with page.expect_download() as getting:
        page.click("#save-json")
    kept = json.loads(getting.value.path().read_text())
    assert kept["messages"] == [*script.bodies[1]["messages"], {"role": "assistant", "content": ANSWERS[NEXT]}]
    assert kept["messages"][0] == {"role": "system", "content": "Be brief."}
    answer = kept["turns"][0]["answers"][0]
    assert (answer["passes"], answer["seed"], answer["settings"]) == (5, 3, {"seed": 3})
    assert len(answer["trace"]) == 6
    with page.expect_download() as getting:
        page.click("#save-text")
    text = getting.value.path().read_text()
    assert text.startswith(
        f"System: Be brief.\n\nYou: {QUESTION}\n\ntoy (5 passes, 0.5 s, seed 3): {ANSWERS[QUESTION]}"
    )


def test_an_answer_is_copied_as_it_is(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, QUESTION)
    press(page, "Copy")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == ANSWERS[QUESTION]


# ---------------------------------------------------------------------------------------------------------------------
# Settings, and two answers


def test_settings_are_sent_under_their_names_and_what_is_empty_is_left_out(page, script):
    choose(page, a__max_tokens=48, a__steps=4, a__reveal_rule="threshold", a__threshold=0.5, a__temperature=0.7)
    ask(page, QUESTION)
    sent = {name: value for name, value in script.bodies[0].items() if name in GenerateSettings.model_fields}
    assert sent == {"steps": 4, "reveal_rule": "threshold", "threshold": 0.5, "temperature": 0.7}
    assert script.bodies[0]["max_tokens"] == 48
    choose(page, a__reveal_rule="")
    ask(page, NEXT)
    assert not {"reveal_rule", "threshold"} & script.bodies[1].keys(), "a threshold is the rule's own"
    assert page.get_attribute("#a-max_tokens", "placeholder") == "64", "what the server has"


def test_a_setting_that_cannot_be_is_said_at_its_field_and_the_message_stays(page, script):
    choose(page, a__steps=-1)
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")
    assert page.evaluate("document.activeElement.id") == "a-steps"
    assert page.input_value("#message") == QUESTION and not script.bodies


def test_two_settings_answer_side_by_side_and_each_goes_on_from_its_own_answer(page, script):
    script.models = ("toy", "other")
    page.reload()
    page.wait_for_selector("#b-model option[value=other]", state="attached")
    choose(page, two=True, b__model="other", b__steps=3, a__seed=7)
    script.answer = lambda question: f"{len(script.bodies)}"
    ask(page, QUESTION)
    ask(page, NEXT)
    first, second = script.bodies[2:] if script.bodies[2]["model"] == "toy" else script.bodies[:1:-1]
    assert (first["model"], first.get("steps"), first["seed"]) == ("toy", None, 7)
    assert (second["model"], second["steps"], second["seed"]) == ("other", 3, 7)
    assert {first["messages"][1]["content"], second["messages"][1]["content"]} == {"1", "2"}
    assert texts(page, ".turn:last-child .name") == ["A · toy · steps none", "B · other · steps 3"]
    assert all(re.search(r"\d+ passes · [\d.]+ s", text) for text in texts(page, ".figures"))
    left, right = (page.locator(".turn:last-child .answer").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]


# ---------------------------------------------------------------------------------------------------------------------
# Filling in


def test_a_stretch_of_an_answer_is_marked_and_written_anew(page, script):
    ask(page, QUESTION)
    page.locator(".answer .body").evaluate(
        """body => getSelection().setBaseAndExtent(body.firstChild, 11, body.firstChild, 16)"""
    )
    press(page, "Rewrite a part")
    chosen = page.locator("#fill-text").evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)")
    assert chosen == "lives"
    page.fill("#fill-masks", "2")
    page.click("#fill-mask")
    page.click("#fill-run")
    page.wait_for_selector("text=Put into the conversation")
    assert script.bodies[-1]["text"] == "The tarnix[MASK][MASK] in the meadow."
    assert page.locator("#fill-results .given").count() == 5, "what was given has no confidence"
    assert "The tarnix filled filled in the meadow." in page.text_content("#fill-results")
    press(page, "Put into the conversation")
    assert texts(page, ".turn .body") == ["The tarnix filled filled in the meadow."]
    ask(page, NEXT)
    assert script.bodies[-1]["messages"][1]["content"] == "The tarnix filled filled in the meadow."


def test_a_replay_ends_when_another_text_takes_its_place(page, script):
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    ask(page, QUESTION)
    press(page, "Replay")
    page.click(".play")
    press(page, "Rewrite a part")
    page.fill("#fill-text", "One[MASK]")
    page.click("#fill-run")
    press(page, "Put into the conversation")
    page.wait_for_timeout(1500)
    assert wrong == []


def test_no_more_masks_are_put_than_the_field_allows(page):
    page.click("#to-fill")
    page.fill("#fill-masks", "999999999")
    page.click("#fill-mask")
    assert page.input_value("#fill-text") == "[MASK]" * 999


def test_a_text_of_ones_own_is_filled_in_by_keys_alone(page, script):
    choose(page, a__max_tokens=9, a__steps=1)
    page.focus("#to-fill")
    page.keyboard.press("Enter")
    page.focus("#fill-text")
    page.keyboard.type("A cat sat here")
    for _ in range(len(" here")):
        page.keyboard.press("ArrowLeft")
    for _ in range(len("sat")):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Go on from this").wait_for()
    assert script.bodies[-1]["text"] == "A cat[MASK] here"
    assert script.bodies[-1]["steps"] == 1 and "max_tokens" not in script.bodies[-1]


def test_a_text_without_masks_is_not_sent(page, script):
    page.click("#to-fill")
    page.fill("#fill-text", "nothing to fill")
    page.click("#fill-run")
    assert "nothing to fill in yet" in page.text_content("#notice")
    assert not script.bodies and page.input_value("#fill-text") == "nothing to fill"


# ---------------------------------------------------------------------------------------------------------------------
# With a model


def test_a_model_answers_on_the_page_as_to_programs(chromium, url, taught):
    page, wrong = opened(chromium, url)
    ask(page, "What is the capital of France?")
    ask(page, "And Italy?")
    assert texts(page, ".answer .body") == ["Paris.", "Rome."]
    body = {"model": "toy", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    told = ask_api(url, "/v1/chat/completions", body).json
    assert told["choices"][0]["message"]["content"] == "Paris."
    assert texts(page, ".figures")[0].startswith(f"{told['dllm']['passes']} passes · ")
    press(page, "Replay")
    assert page.get_attribute(".scrubber input", "max") == str(told["dllm"]["passes"])
    page.locator(".scrubber input").first.fill("0")
    assert page.locator(".body .mask").count() > 0
    page.click("#to-fill")
    page.fill("#fill-text", f"I am a {taught.backbone.tokenizer.mask_token}")
    page.press("#fill-text", "Enter")
    page.wait_for_selector("#fill-results .figures:has-text('·')")
    filled = ask_api(url, "/v1/infill", {"model": "toy", "text": page.input_value("#fill-text")}).json
    assert texts(page, "#fill-results .body") == [filled["choices"][0]["text"]]
    page.context.close()
    assert not wrong


def test_every_setting_of_the_form_is_one_that_the_server_takes(chromium, url):
    page, wrong = opened(chromium, url)
    for rule in ("threshold", "factor", "entropy_bound"):
        names = {field.name for field in form_fields() if field.rule in ("", rule)} - {"reveal_rule", "remask", rule}
        values = {"max_tokens": 16, "steps": 8, "block_size": 8, "seed": 5} | {rule: 0.5}
        choose(
            page,
            a__reveal_rule=rule,
            a__remask="none",
            **{f"a__{name}": values.get(name, 1) for name in names | {rule}},
        )
        ask(page, "Who are you?")
    assert all("seed 5" in text for text in texts(page, ".figures"))
    page.context.close()
    assert not wrong


def test_an_answer_that_is_stopped_leaves_the_model(chromium, taught):
    engine = SerialEngine(taught, slow=0.2)
    with running([with_engine(taught, engine=engine)]) as server:
        page, wrong = opened(chromium, server.url)
        ask(page, "Who are you?", state="running")
        page.wait_for_selector(".body .mask")
        page.keyboard.press("Escape")
        page.wait_for_selector(".answer[data-state=stopped]")
        page.context.close()
    assert engine.cancelled == 1
    assert not wrong


def test_two_models_answer_side_by_side(chromium, taught):
    with running([with_engine(taught), with_engine(taught, id="again")]) as server:
        page, wrong = opened(chromium, server.url)
        choose(page, two=True, b__model="again")
        ask(page, "Hello!")
        assert texts(page, ".answer .body") == ["Hello! I am a toy."] * 2
        assert texts(page, ".answer .name") == ["A · toy", "B · again"]
        page.context.close()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_a_lost_connection_is_one_sentence_and_the_next_try_works(page, script):
    script.cut_after = 3
    ask(page, QUESTION, state="failed")
    assert texts(page, ".fault [role=alert]") == [
        "The connection was lost before the answer was complete. What arrived is kept; try again to ask anew."
    ]
    assert page.locator(".body .mask").count() == 3
    script.cut_after = None
    press(page, "Try again")
    page.wait_for_selector(".answer[data-state=done]")
    assert texts(page, ".answer .body") == [ANSWERS[QUESTION]] and page.locator(".fault").count() == 0


def test_a_stopped_server_is_one_sentence_and_the_question_is_kept(chromium, script):
    with served(application(script)) as address:
        page, wrong = opened(chromium, address)
    ask(page, QUESTION, state="failed")
    assert texts(page, ".fault [role=alert]")[0].startswith("The server cannot be reached.")
    assert texts(page, ".asked") == [QUESTION]
    page.context.close()
    assert not wrong


def test_a_full_server_is_waited_for(page, script):
    script.refuse = [(429, {"retry-after": "2"}, "too many requests are waiting")]
    ask(page, QUESTION, state="failed")
    assert texts(page, ".fault button") == ["Try again (free in about 2 s)"]
    page.wait_for_selector(".fault button.ready")
    assert texts(page, ".fault button") == ["Try again"]
    page.click(".fault button")
    page.wait_for_selector(".answer[data-state=done]")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "The server refused this: it is too long. Change the message or the settings, then try again."),
        (500, "The server failed: it is too long. Try again; if it fails again, look at the server's log."),
        (503, "The server is starting or stopping and takes no requests. Try again in a moment."),
    ],
)
def test_a_refusal_is_one_plain_sentence_with_the_next_step(page, script, status, said):
    script.refuse = [(status, {}, "it is too long")]
    ask(page, QUESTION, state="failed")
    assert texts(page, ".fault [role=alert]") == [said]


def test_a_key_is_asked_for_and_kept_in_this_tab_only(chromium, script):
    script.key = "<b>secret</b>"
    with served(application(script)) as address:
        page, wrong = watched(chromium.new_context(), address)
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", script.key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#a-model option", state="attached")
        ask(page, QUESTION)
        assert page.evaluate("[JSON.stringify({...localStorage}), document.cookie]") == ["{}", ""]
        assert page.evaluate("sessionStorage['dllm.key']") == script.key
        page.context.close()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------------
# What a model says is text


HOSTILE = {
    "markup": "<img src=x onerror=alert(1)> <script>alert(2)</script> <b>bold</b> &lt; </section></main>",
    "a link": "<a href='javascript:alert(3)'>x</a> <iframe srcdoc='<script>alert(4)</script>'></iframe>",
    "a style": "<style>*{display:none}</style> <svg onload=alert(5)>",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_markup_is_shown_as_it_is_written_wherever_it_comes_from(page, script, text):
    script.models = (text,)
    script.answer = lambda question: text
    page.reload()
    page.wait_for_selector("#a-model option", state="attached")
    elements = "document.querySelectorAll('img, script, a, iframe, style, svg, b').length"
    before = page.evaluate(elements)
    ask(page, text)
    assert texts(page, ".answer .body") == [text] == texts(page, ".asked") == texts(page, ".answer .name")
    press(page, "Confidence")
    press(page, "Replay")
    assert page.evaluate(elements) == before
    script.refuse = [(400, {}, text)]
    ask(page, "again", state="failed")
    assert text in page.text_content(".fault")
    assert page.evaluate(elements) == before


def test_characters_that_nobody_sees_are_seen_and_turn_nothing_around(page, script):
    script.answer = lambda question: "one\x1b[31m \u202etwo\u202c \u2066\u0000 three\u200b \U000e0041 \u05d0\u05d1 four"
    ask(page, QUESTION)
    assert texts(page, ".answer .body .unseen") == [
        "␛", "[U+202E]", "[U+202C]", "[U+2066]", "␀", "[U+200B]", "[U+E0041]",
    ]  # fmt: skip
    shown = page.text_content(".answer .body")
    assert not re.search("[\u0000-\u0008\u000b-\u001f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown)
    assert page.evaluate("getComputedStyle(document.querySelector('.answer .body')).unicodeBidi") == "isolate"
    place = "Array.from(document.querySelectorAll('.answer .body > *'), e => e.getBoundingClientRect().left)"
    assert page.evaluate(place) == sorted(page.evaluate(place)), "the signs stand in the order of the text"
    press(page, "Confidence")
    assert page.locator(".answer .body .unseen").count() == 7


def test_no_file_of_the_page_makes_markup_of_text_or_asks_another_host():
    files = [*STATIC.glob("*.js"), *STATIC.glob("*.css"), *STATIC.glob("*.jinja"), *STATIC.glob("*.svg")]
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|javascript:"
        assert not re.search(dangerous, text), file.name
        assert not re.search(r"(https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", "")), file.name
    assert not re.search(r"\son[a-z]+=|\sstyle=|<script>", page_html())


def test_the_policy_allows_what_the_server_itself_sends_and_nothing_else():
    policy = dict(rule.split(" ", 1) for rule in HEADERS["Content-Security-Policy"].split("; "))
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy["default-src"] == "'none'" and set(policy.values()) == {"'none'", "'self'"}
    for part in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[part] == "'none'"


# ---------------------------------------------------------------------------------------------------------------------
# For everybody


def test_everything_is_reached_by_keys(page, script):
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[data-state=done]")
    assert script.bodies[0]["messages"][0]["content"] == "one\ntwo"
    reached, outlines = set(), []
    page.focus(".skip")
    for _ in range(40):
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        outlines.append(page.evaluate(
            """() => { const e = document.activeElement, box = e.closest(".box") ?? e;
                       return [e, box].some(x => getComputedStyle(x).outlineStyle !== "none"); }"""
        ))  # fmt: skip
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
    controls = {"Conversation", "Fill in", "New", "Save text", "Save JSON", "Settings", "Edit", "Confidence", "Replay"}
    assert controls | {"Copy", "Rewrite a part", "message", "Send"} <= reached
    assert all(outlines), "what has the focus is seen to have it"
    page.focus("header [data-opens-settings]")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "settings-title"
    page.keyboard.press("Escape")
    assert page.is_hidden("#settings")
    page.get_by_role("button", name="Replay", exact=True).focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowLeft")
    said = page.text_content(".scrubber .said")
    page.keyboard.press("ArrowLeft")
    assert page.text_content(".scrubber .said") != said


def test_every_control_has_a_name_and_the_page_its_landmarks(page):
    ask(page, QUESTION)
    press(page, "Replay")
    choose(page, two=True, a__reveal_rule="factor")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")]
          .filter(e => !e.closest("[hidden]"))
          .filter(e => !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length))
          .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    roles = {role: page.get_by_role(role).count() for role in ("main", "banner", "navigation", "status")}
    assert roles == {"main": 1, "banner": 1, "navigation": 1, "status": 1}
    assert page.locator("h1").count() == 1 and page.get_attribute("html", "lang") == "en"
    helps = page.evaluate(
        """() => [...document.querySelectorAll("[aria-describedby]")]
          .map(e => document.getElementById(e.getAttribute("aria-describedby"))?.textContent)"""
    )
    assert len(helps) > 10 and all(helps)


def test_nothing_is_wider_than_a_window_of_360_pixels(page, script):
    page.set_viewport_size({"width": 360, "height": 700})
    script.answer = lambda question: f"{LONG_WORD} and {LONG_WORD}"
    assert width_beyond_the_window(page) == 0
    choose(page, two=True, b__steps=3, system=LONG_WORD)
    ask(page, LONG_WORD)
    press(page, "Replay")
    press(page, "Confidence", -1)
    assert width_beyond_the_window(page) == 0
    script.refuse = [(400, {}, LONG_WORD), (429, {}, "")]
    ask(page, QUESTION, state="failed")
    assert width_beyond_the_window(page) == 0
    page.click(".turn:first-child .question button")
    page.click("header [data-opens-settings]")
    assert width_beyond_the_window(page) == 0
    page.keyboard.press("Escape")
    page.click("#to-fill")
    page.fill("#fill-text", f"{LONG_WORD} [MASK]")
    page.press("#fill-text", "Enter")
    page.get_by_role("button", name="Go on from this").wait_for()
    assert width_beyond_the_window(page) == 0


def test_the_theme_is_that_of_the_system_until_it_is_chosen(page):
    def dark():
        return page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 29)"

    assert not dark()
    page.emulate_media(color_scheme="dark")
    assert dark()
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-label") == "Theme: light" and not dark()
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert dark()
    page.reload()
    assert dark()


def test_letters_stand_out_from_their_ground_in_light_and_dark():
    css = (STATIC / "page.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", css)
    for colours in ({name: light for name, light, _ in pairs}, {name: dark for name, _, dark in pairs}):
        for ground in ("paper", "card", "band"):
            for ink in ("ink", "quiet", "accent"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
            assert contrast(colours["edge"], colours[ground]) >= 2.8, ground  # fields stand on paper and card
        assert contrast(colours["bad"], colours["bad-band"]) >= 4.5
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_colours_of_confidence_are_those_of_the_terminal():
    from dllm.chat.render import RAMP

    css = (STATIC / "page.css").read_text()
    drawn = (STATIC / "drawing.js").read_text()
    names = re.findall(r'\[(0\.\d), "(\w+)"\]', drawn)
    assert [float(limit) for limit, _ in names] == [limit for limit, _, _ in RAMP[:-1]]
    for (_, name), (_, colour, _) in zip(names, RAMP, strict=False):
        assert f"--{name}: {colour};" in css


def test_the_form_takes_help_and_limits_of_the_settings():
    fields = {field.name: field for field in form_fields()}
    assert (fields["steps"].least, fields["steps"].step) == (1, "1")
    assert (fields["threshold"].least, fields["threshold"].most, fields["threshold"].rule) == (0, 1, "threshold")
    assert fields["reveal_rule"].choices[0] == GenerateSettings().reveal_rule
    for name, field in fields.items():
        setting = GenerateSettings.model_fields["max_new_tokens" if name == "max_tokens" else name]
        assert field.help.lower().removesuffix(".") == setting.description.replace("`", "").lower()
