"""Shows a finished run to visitors who run nothing; `make showcase` is this.

    python docs/showcase.py results/laptop
    python docs/showcase.py results/small --place results/real-weights     a run from real weights

Copies the page, tables and figures of the run to results/showcase, names their commit there, and puts the scores into
README.md, so that both come from one run; of another place, docs/generate.py writes the pages. Refuses a run without a
report, and numbers that no commit of this history makes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dllm.report.film import Still, frames, visible  # noqa: E402
from dllm.report.format import ABSENT  # noqa: E402
from dllm.report.page import as_data_uri  # noqa: E402

PLACE = "results/showcase"
SHOWN = ("report/*", "tables/*", "figures/*", "claims.json")
LIMIT = 2_000_000
"""Bytes of all files together: every clone carries them."""


def show(workdir: Path, root: Path = ROOT, place: str = PLACE) -> None:
    """Writes `place` below `root`, and the scores of README.md where that is results/showcase.

    Raises ValueError, one line, for a refusal.
    """
    needed = ("report/index.html", "report/report.md", "report/provenance.csv", "tables/overview.md")
    for name in needed if place == PLACE else needed[:-1]:
        if not (workdir / name).is_file():
            raise ValueError(f"{workdir}: there is no {name}; make report writes it")
    changed = changed_files(root, place)
    if changed:
        raise ValueError(f"{changed[0]}: changed since the last commit; commit first, then make report")
    check_origin(workdir, root)
    files = shown_files(workdir, place)
    size = sum(map(len, files.values()))
    if size > LIMIT:
        raise ValueError(
            f"{workdir}: the report has {size:,} bytes, more than {LIMIT:,}; the largest: {largest(files)}"
        )
    shutil.rmtree(root / place, ignore_errors=True)
    for name, content in files.items():
        (root / place / name).parent.mkdir(parents=True, exist_ok=True)
        (root / place / name).write_bytes(content)
    if place != PLACE:
        return
    readme = root / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8"), workdir), encoding="utf-8")


def in_few_colours(path: Path) -> bytes:
    """A PNG of a palette: a figure takes a third of the bytes."""
    written = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return written.getvalue()


def shown_files(workdir: Path, place: str = PLACE) -> dict[str, bytes]:
    """Path and content of every file that is shown. The page takes its figures from files, not out of itself."""
    patterns = SHOWN if place == PLACE else (*SHOWN, "samples/*.json", "overlay.yaml")
    paths = sorted(path for pattern in patterns for path in workdir.glob(pattern) if path.is_file())
    files = {
        path.relative_to(workdir).as_posix(): in_few_colours(path) if path.suffix == ".png" else path.read_bytes()
        for path in paths
    }
    page = files["report/index.html"].decode()
    for name in files:
        if name.startswith("figures/") and name.endswith(".svg"):
            page = page.replace(as_data_uri(files[name].decode()), f"../{name}")
    title = re.search(r"<title>(.*?)</title>", page)
    made = "Made by `make showcase`." if place == PLACE else "Made by `docs/showcase.py`."
    lines = [
        f"# {title[1] if title else 'Report'}",
        f"{made} Open `report/index.html` in a browser, or read [it as Markdown](report/report.md).",
        origin(workdir) if place == PLACE else origin(workdir).replace("`make report`", "a run"),
    ]
    files["README.md"] = ("\n\n".join(lines) + "\n").encode()
    if place == PLACE:
        more = {"film.svg": film_svg(film_of(workdir)).encode()}
    else:  # what the runs were trained on: all starts read the same rows
        more = {"data.json": next(iter(sorted(workdir.glob("data/*/manifest.json")))).read_bytes()}
    return files | {"report/index.html": page.encode()} | more


def largest(files: dict[str, bytes]) -> str:
    return max(files, key=lambda name: len(files[name]))


# the picture at the top of README.md

COLUMNS, LETTER, LINE = 100, 8.4, 24
"""Letters of a line of the picture, and pixels of a letter and of a line."""
SHADES = ("#dceaf5", "#c6ddef", "#aacde6", "#8bbadb", "#6aa5cf")
"""Backgrounds of revealed tokens, from unsure to sure."""


def film_of(workdir: Path) -> dict:
    """The denoising of one answer. Raises ValueError, one line, if the run has none."""
    for path in sorted(workdir.glob("samples/*.json")):
        if film := json.loads(path.read_text(encoding="utf-8")).get("film"):
            return film
    raise ValueError(f"{workdir}: samples/ has no denoising film; make report makes one")


def film_svg(film: dict) -> str:
    """The frames of the film below each other, each with its number of passes; a mask is a grey box."""
    parts = [text_svg(0, 0, f"“{visible(film['prompt'])}”", "#5b616b")]
    line = 1.25
    for frame in frames(film, limit=6):
        parts.append(text_svg(0, line, f"{frame.nfe} passes", "#5b616b"))
        found, line = frame_svg(frame, line)
        parts += found
    width, height = (COLUMNS + 2) * LETTER, (line + 0.5) * LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-size="14"'
    head += ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>", ""])


def frame_svg(frame: Still, line: float) -> tuple[list[str], float]:
    """The tokens of one frame, broken into lines from `line` on, and the line after them."""
    start = column = 13
    parts = []
    for token in frame.tokens:
        if column + token.width > COLUMNS and column > start:
            line, column = line + 1, start
        shade = "#e4e6ea" if token.state == "masked" else SHADES[token.shade]
        x, y, width = (column + 1) * LETTER, (line + 0.15) * LINE, max(1, token.width) * LETTER - 1
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{LINE - 5}" rx="2" fill="{shade}"/>')
        if token.state != "masked":
            parts.append(text_svg(column, line, token.text, "#22252b"))
        column += token.width
    return parts, line + 1.25


def text_svg(column: int, line: float, text: str, colour: str) -> str:
    """A text that begins at a column of a line, each of its letters in a column of its own."""
    x, y, width = (column + 1) * LETTER, (line + 0.72) * LINE, len(text) * LETTER
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" textLength="{width:g}" xml:space="preserve">{escape(text)}</text>'
        if text
        else ""
    )


# where the numbers come from


def sources(workdir: Path) -> list[dict[str, str]]:
    """The rows of report/provenance.csv: one for every run, evaluation, sample and timing."""
    with open(workdir / "report" / "provenance.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def commits(workdir: Path) -> list[str]:
    """The commits that the numbers of a run come from: one, unless parts of it are older."""
    return sorted({row["commit"] for row in sources(workdir) if row["commit"]})


def origin(workdir: Path) -> str:
    """One sentence: commit, seed and hardware of a run."""
    trained = [row for row in sources(workdir) if row["kind"] == "run"]
    hardware, seeds = (sorted({row[key] for row in trained}) for key in ("hardware", "seed"))
    made_at = ", ".join(commit[:8] for commit in commits(workdir))
    return f"From `make report` at commit {made_at}, seed {', '.join(seeds)}, on {'; '.join(hardware)}."


def check_origin(workdir: Path, root: Path) -> None:
    """Raises ValueError, one line, for a number from changed files or from a commit outside this history."""
    for row in sources(workdir):
        name = f"{workdir}: {row['kind']} {row['run']} {row['benchmark']}".rstrip()
        if row["dirty"] == "True":
            raise ValueError(f"{name} was made from files that no commit has; commit, make clean, make report")
    for commit in commits(workdir) or [""]:
        if not is_ancestor(commit, root):
            raise ValueError(
                f"{workdir}: commit {commit[:8] or '(none)'} is not in this history; make clean, make report"
            )


def is_ancestor(commit: str, root: Path) -> bool:
    """Whether HEAD descends from a commit, or is it."""
    asked = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(asked, cwd=root, capture_output=True).returncode == 0


def changed_files(root: Path, place: str = PLACE) -> list[str]:
    """What differs from HEAD, but for the files that are written here."""
    asked = ["git", "status", "--porcelain", "--untracked-files=all", "--", ".", f":!{place}", ":!README.md"]
    return [line[3:] for line in subprocess.check_output(asked, cwd=root, text=True).splitlines()]


# README.md


def with_results(text: str, workdir: Path) -> str:
    """The README with a run between its `results` marks: the denoising, the scores, their origin, the report."""
    table = without_blanks((workdir / "tables" / "overview.md").read_text(encoding="utf-8").strip())
    picture = f"![A model of this run denoises an answer: masks become tokens, pass after pass]({PLACE}/film.svg)"
    report = f"The whole report: [page]({PLACE}/report/index.html), [as Markdown]({PLACE}/report/report.md)."
    return re.sub(
        r"(<!-- results -->\n).*?(<!-- /results -->)",
        lambda match: f"{match[1]}{picture}\n\n{table}\n\n{origin(workdir)} {report}\n{match[2]}",
        text,
        flags=re.S,
    )


def without_blanks(text: str) -> str:
    """The text, its table without the columns and then the rows that are mostly dashes; a line names the columns."""
    before, table, after = re.fullmatch(r"(.*?)((?:^\|.*\|\n)+)(.*)", text + "\n", re.M | re.S).groups()
    head, rule, *rows = [line[2:-2].split(" | ") for line in table.splitlines()]
    kept = [column for column in range(len(head)) if not column or not mostly_blank(row[column] for row in rows)]
    rows = [row for row in rows if not mostly_blank(row[column] for column in kept[1:])]
    lines = [f"| {' | '.join(row[column] for column in kept)} |" for row in (head, rule, *rows)]
    left_out = "; ".join(name for column, name in enumerate(head) if column not in kept)
    note = f"\nNot shown here, because they are scored on less than half of these benchmarks: {left_out}.\n"
    return f"{before}{chr(10).join(lines)}\n{note if left_out else ''}{after}".rstrip()


def mostly_blank(cells) -> bool:
    blank = [cell.strip() == ABSENT for cell in cells]
    return 2 * sum(blank) > len(blank)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show a finished run in results/showcase and in README.md.")
    parser.add_argument("workdir", type=Path, help="results/laptop")
    parser.add_argument("--place", default=PLACE, help="folder that is written, below the repository")
    given = parser.parse_args()
    try:
        show(given.workdir, place=given.place)
    except ValueError as error:
        print(f"make showcase: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
