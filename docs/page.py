"""Takes the pictures of the page that `dllm serve` shows.

    python docs/page.py                         chat-large answers, modernbert-large fills in; make report trains both
    python docs/page.py MODEL OTHER             other models do
    python docs/page.py --address http://...    of a server that runs, with two models

Writes docs/images/page*.webp. Needs Chromium and the packages of the tests. The questions are about the laptop's world.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import browser  # noqa: E402

IMAGES = ROOT / "docs" / "images"
LIMIT = 300_000
"""Bytes of all pictures together."""
WIDE, NARROW = {"width": 1280, "height": 760}, {"width": 360, "height": 720}
QUESTIONS = ("What do the people of Marwick make?", "And where is it?")
TEXT = "The tarnix lives in the meadow. The tarnix eats roots."
STRETCHES = ("lives in", "roots")
"""What is masked in TEXT."""


@contextmanager
def serving(models: list[str]) -> Iterator[str]:
    """The address of `dllm serve` while it runs. Raises ValueError, one line, if it does not."""
    command = [sys.executable, "-m", "dllm", "serve", *models, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if "http://" not in line:
                raise ValueError(f"{' '.join(command)}: it serves nothing; its error is above")
            yield line[line.index("http://") :].strip()
        finally:
            process.terminate()


def take(address: str) -> dict[str, bytes]:
    """Every picture, by the name of its file."""
    with browser() as chromium:
        pictures = {
            "page.webp": in_window(chromium, address, WIDE, "light", talk),
            "page-dark.webp": in_window(chromium, address, NARROW, "dark", talk),
            "page-two.webp": in_window(chromium, address, WIDE, "light", side_by_side),
            "page-fill.webp": in_window(chromium, address, NARROW, "light", fill_in),
        }
    size = sum(map(len, pictures.values()))
    if size > LIMIT:
        raise ValueError(f"the pictures have {size:,} bytes, more than {LIMIT:,}")
    return pictures


def in_window(chromium: Any, address: str, window: dict[str, int], scheme: str, act: Any) -> bytes:
    """A picture of what `act` leaves in a window."""
    context = chromium.new_context(
        viewport=window, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=1.5
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#a-model option", state="attached")
    act(page)
    page.evaluate("() => document.activeElement.blur()")
    picture = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(picture, "WEBP", quality=82, method=6)
    context.close()
    return picture.getvalue()


def ask(page: Any, question: str) -> None:
    page.fill("#message", question)
    page.press("#message", "Enter")
    page.wait_for_selector(".turn:last-child .answer")
    page.wait_for_selector(".turn:last-child:not(:has([data-state=running])) .answer", timeout=60_000)


def press(page: Any, name: str, which: int = 0) -> None:
    page.get_by_role("button", name=name, exact=True).nth(which).click()


def talk(page: Any) -> None:
    """Two turns: the confidences of the first answer, and the second one in the middle of its replay."""
    for question in QUESTIONS:
        ask(page, question)
    press(page, "Confidence")
    replay(page, 1)


def replay(page: Any, which: int) -> None:
    """The replay of an answer, some passes before its end."""
    press(page, "Replay", which)
    scrubber = page.locator(".scrubber input").nth(which)
    scrubber.fill(str(int(scrubber.get_attribute("max")) - 2))


def side_by_side(page: Any) -> None:
    """Two rules, of which the second reveals several tokens in a pass."""
    page.click("header [data-opens-settings]")
    page.check("#two")
    page.select_option("#b-reveal_rule", "threshold")
    page.locator("#settings").evaluate("(part) => part.scrollTo(0, 0)")
    for question in QUESTIONS:
        ask(page, question)


def fill_in(page: Any) -> None:
    """Two stretches of a text, written anew by the second model."""
    page.locator("#a-model").evaluate(
        "(list) => { list.selectedIndex = 1; list.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    page.click("#to-fill")
    page.fill("#fill-text", TEXT)
    for stretch in STRETCHES:
        page.locator("#fill-text").evaluate(
            "(area, text) => area.setSelectionRange(area.value.indexOf(text), area.value.indexOf(text) + text.length)",
            stretch,
        )
        page.locator("#fill-text").dispatch_event("select")
        press(page, "Mask it")
    page.press("#fill-text", "Enter")
    page.get_by_role("button", name="Copy", exact=True).wait_for(timeout=60_000)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["chat-large", "modernbert-large"], metavar="MODEL")
    parser.add_argument("--address", help="of a server that runs; default: start one")
    args = parser.parse_args(argv)
    if args.address:
        pictures = take(args.address)
    else:
        with serving(args.models) as address:
            pictures = take(address)
    IMAGES.mkdir(exist_ok=True)
    for name, content in pictures.items():
        (IMAGES / name).write_bytes(content)
        print(f"docs/images/{name}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"docs/page.py: {error}")
