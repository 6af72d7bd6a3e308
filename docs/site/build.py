"""Builds the site: the pages, and an API reference from the docstrings. `make docs` is this.

    python docs/site/build.py           the site, below build/docs/html
    python docs/site/build.py OUT       the same below OUT

Copies the pages to OUT/source, writes a page for every package and module of dllm there, and gives both to Sphinx
(`conf.py` beside this file). A link or an anchor that leads nowhere, and a module that cannot be imported, end the
build with status 1. No network is needed.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md", "docs/**/*.md")
IMAGES = (
    "docs/images/*",
    "bench/results/revising.svg",
    "results/showcase/film.svg",
    "results/real-weights/figures/*.png",
)
"""What is copied, with its place kept: links between pages stay as they are."""
SHOWN = ("LICENSE", "bench/results", "results/showcase", "results/real-weights")
"""What pages link to without being pages: served as it is."""
PROJECT = ("CONTRIBUTING", "CHANGELOG", "docs/lab-log", "docs/decisions/index", "results/README")
"""Pages about the project. The other pages are the guide, in the order of the table of README.md."""
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)")


def build(out: Path) -> int:
    """Writes the site to out/html. Returns the exit status."""
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(out / "html", ignore_errors=True)
    copy_pages(source)
    write_api(source / "api")
    copy_shown(out / "html")
    shutil.rmtree(out / "state", ignore_errors=True)
    places = ["-c", Path(__file__).parent, "-d", out / "state", source, out / "html"]
    return sphinx(["--builder", "html", "--jobs", "auto", "--quiet", "--fail-on-warning", *map(str, places)])


def copy_pages(source: Path) -> None:
    """Every page, its links turned into those of the site; README.md becomes index.md and bears the contents."""
    for path in (path for pattern in (*PAGES, *IMAGES) for path in sorted(ROOT.glob(pattern))):
        place = source / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(on_the_site(path), encoding="utf-8")
        else:
            shutil.copyfile(path, place)
    shutil.move(source / "README.md", source / "index.md")
    with open(source / "index.md", "a", encoding="utf-8") as index:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        named = re.findall(r"^\| \[docs/[\w-]+\.md\]\((docs/[\w-]+)\.md", readme, re.M)
        guide = dict.fromkeys([*named, *(f"docs/{path.stem}" for path in sorted(ROOT.glob("docs/*.md")))])
        index.write(contents([page for page in guide if page not in PROJECT], caption="Guide"))
        index.write(contents(PROJECT, caption="Project"))
        index.write(contents(["api/dllm"], caption="API"))
    decisions = "# Decisions\n\nWhy things are as they are.\n" + contents(["*"], shown=True)
    (source / "docs/decisions/index.md").write_text(decisions, encoding="utf-8")


def contents(pages: Sequence[str], *, caption: str = "", shown: bool = False) -> str:
    """A list of contents; where it is not shown on its page, it is at the left of every page all the same."""
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * (not shown) + [":glob:", ":maxdepth: 1"]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def on_the_site(page: Path) -> str:
    """The text of a page. Links to folders of pages lead to their contents, links to other files to their copies.

    Raises ValueError for a link to a file that is not there or is not served.
    """

    def link(match: re.Match) -> str:
        text, target = match.groups()
        if target.startswith(("http://", "https://", "#")):
            return match[0]
        name, hash_sign, anchor = target.partition("#")
        name = os.path.relpath((page.parent / name).resolve(), ROOT)
        here = page.relative_to(ROOT).parent
        if not (ROOT / name).exists():
            raise ValueError(f"{page.relative_to(ROOT)}: {target} leads nowhere")
        if (ROOT / name).is_dir() and any((ROOT / name).glob("*.md")):
            name = f"{name}/README.md" if (ROOT / name / "README.md").exists() else f"{name}/index.md"
        if name.endswith(".md") and not name.startswith(SHOWN):
            name = "index.md" if name == "README.md" else name
            return f"[{text}]({os.path.relpath(name, here)}{hash_sign}{anchor})"
        if not name.startswith(SHOWN):
            raise ValueError(f"{page.relative_to(ROOT)}: {target} is not a page; name it in SHOWN of {__file__}")
        return f'<a href="{os.path.relpath(name, here)}">{text.replace("`", "")}</a>'

    parts = re.split(r"(^```.*?^```$)", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def write_api(folder: Path) -> None:
    """A page for every package, with its modules below it, and one for every module: whatever is there now."""
    folder.mkdir(parents=True)
    packages = {path.parent for path in (ROOT / "dllm").rglob("__init__.py")}
    for package in packages:
        inner = {path.parent for path in package.glob("*/__init__.py")}
        modules = {path.with_suffix("") for path in package.glob("*.py") if not path.name.startswith("_")}
        for module in modules:
            write_module(folder, module, [])
        write_module(folder, package, sorted(map(module_name, inner | modules)))


def write_module(folder: Path, path: Path, below: list[str]) -> None:
    """The page of one module or package: what its docstrings say, and links to what is below it."""
    name = module_name(path)
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :members:", "   :show-inheritance:"]
    lines += ["   :no-index:" if name == "dllm" else "   :ignore-module-all:"]
    lines += ["", ".. toctree::", "   :maxdepth: 1", "", *(f"   {module}" for module in below)] * bool(below)
    (folder / f"{name}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts)


def copy_shown(html: Path) -> None:
    for name in SHOWN:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, html / name)
        elif (ROOT / name).exists():
            html.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, html / name)


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs")
    try:
        status = build(place.resolve())
    except ValueError as error:
        sys.exit(f"docs/site/build.py: {error}")
    print(f"The site: {place / 'html' / 'index.html'}" if not status else "docs: the lines above are errors")
    sys.exit(status)
