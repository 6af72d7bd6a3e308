"""The site: every page and every module has its place on it, and links lead there. `make docs` builds all of it."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@cache
def site():
    """The module docs/site/build.py."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(page: Path) -> list[str]:
    """The entries of all lists of contents of a page."""
    text = page.read_text()
    lists = re.findall(r"```\{toctree\}\n(.*?)```", text, re.S) + re.findall(
        r"\.\. toctree::\n((?: {3}.*\n|\n)+)", text
    )
    return [line.strip() for block in lists for line in block.splitlines() if line.strip() and ":" not in line]


def test_every_page_is_in_the_contents_once(tmp_path):
    site().copy_pages(tmp_path)
    pages = [path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.md")]
    entries = listed(tmp_path / "index.md")
    decisions = [page for page in pages if page.startswith("docs/decisions/0")]
    assert sorted([*entries, "index", *decisions]) == sorted([*pages, "api/dllm"])
    assert listed(tmp_path / "docs/decisions/index.md") == ["*"]


def test_every_module_is_in_the_reference_below_its_package(tmp_path):
    site().write_api(tmp_path / "api")
    for path in sorted((ROOT / "dllm").rglob("*.py")):
        *package, name = path.relative_to(ROOT).with_suffix("").parts
        if name.startswith("_") or not (path.parent / "__init__.py").exists():
            continue
        assert (
            f"automodule:: {'.'.join([*package, name])}\n"
            in (tmp_path / f"api/{'.'.join([*package, name])}.rst").read_text()
        )
        assert ".".join([*package, name]) in listed(tmp_path / f"api/{'.'.join(package)}.rst")
        for depth in range(1, len(package)):
            assert ".".join(package[: depth + 1]) in listed(tmp_path / f"api/{'.'.join(package[:depth])}.rst")


@pytest.mark.parametrize(
    "link, expected",
    [
        ("[a](tutorial.md#2-chat)", "[a](tutorial.md#2-chat)"),
        ("[a](../README.md#as-a-package)", "[a](../index.md#as-a-package)"),
        ("[a](decisions/)", "[a](decisions/index.md)"),
        ("[`a`](../bench/results/index.html)", '<a href="../bench/results/index.html">a</a>'),
        ("[a](https://example.org/)", "[a](https://example.org/)"),
        ("```\n[a](nowhere.md)\n```", "```\n[a](nowhere.md)\n```"),
    ],
)
def test_a_link_of_a_page_is_turned_into_one_of_the_site(link, expected, tmp_path, monkeypatch):
    assert site().on_the_site(page_with(link, monkeypatch)) == expected


@pytest.mark.parametrize("target", ["nowhere.md", "../bench/nowhere.html", "../config/paper.yaml"])
def test_a_link_that_the_site_cannot_follow_is_refused_with_its_page(target, monkeypatch):
    with pytest.raises(ValueError, match=rf"docs/algorithms.md: {re.escape(target)} "):
        site().on_the_site(page_with(f"[a]({target})", monkeypatch))


def page_with(text: str, monkeypatch) -> Path:
    """A page of docs/ that reads as if it held this text."""
    monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
    return ROOT / "docs" / "algorithms.md"


def test_a_docstring_is_shown_as_markdown():
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "site" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    lines = ["Logits [B, L, V] of `x_t`, *not* <b>x_0</b>.", "", "    a  b"]
    conf.docstring_is_markdown(None, "function", "f", None, None, lines)
    html = "\n".join(lines)
    assert html.startswith(".. raw:: html\n\n   <p>")
    assert '[B, L, V] of <code class="literal">x_t</code>, <em>not</em> &lt;b&gt;x_0&lt;/b&gt;' in html
    assert '<div class="highlight"><pre><code>a  b' in html
