"""Debian's Chromium, driven by Playwright: its browser, and pages that notice what a page must not do."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class NoBrowser(Exception):
    """Why there is no browser here, in one line."""


PACKAGES = ("chromium-headless-shell", "chromium")
"""Of Debian, and their programs. The first is the same browser without windows, in two thirds of the time."""


def chromium() -> str:
    """Where Chromium is. Raises NoBrowser where there is none and none can be installed."""
    if found := installed():
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoBrowser("no chromium, and it can be installed only by root with apt-get")
    said = ""
    for package in PACKAGES:
        # what it recommends is half a desktop, with other versions of systemd and perl
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package, "fonts-liberation"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (found := installed()):
            return found
        said = f"apt-get install {package}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
    raise NoBrowser(said)


def installed() -> str | None:
    """The first of these browsers that is there."""
    return next((path for name in (*PACKAGES, "chromium-browser") if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium. Raises NoBrowser."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield started
        finally:
            started.close()


def watched(context: Any, address: str) -> tuple[Any, list[str]]:
    """A new page, and a list of what it does wrong: errors, broken policies, dialogs, requests to other hosts."""
    page, wrong = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    # that a request failed is said there, too; it is not wrong of the page
    page.on("console", lambda line: "Failed to load resource" in line.text or wrong.append(f"console: {line.text}"))
    page.on("request", lambda asked: asked.url.startswith((address, f"blob:{address}")) or wrong.append(asked.url))
    return page, wrong
