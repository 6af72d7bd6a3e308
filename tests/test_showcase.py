"""The showcase: the report of one run, whole, small, from a commit of this history, with the scores of the README."""

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageChops

from dllm.report.plan import ReportPlan
from dllm.report.style import RC
from tests.report.fake_workdir import brief_dict, build_all, write_workdir

ROOT = Path(__file__).parent.parent
README = "# A\n\n<!-- results -->\nold\n<!-- /results -->\n\nB\n"


@cache
def showcase():
    """The module docs/showcase.py."""
    spec = importlib.util.spec_from_file_location("showcase", ROOT / "docs" / "showcase.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.check_output(["git", *identity, *words], cwd=root, text=True).strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A finished run with invented numbers, its images of few pixels: each is shown a dozen times."""
    workdir = write_workdir(tmp_path_factory.mktemp("built") / "laptop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RC, "savefig.dpi", 20)
        build_all(workdir, ReportPlan.model_validate(brief_dict(toy=True)))
    return workdir


@pytest.fixture(scope="module")
def files(built) -> list[str]:
    """What is shown of it, by path."""
    return list(showcase().shown_files(built))


@pytest.fixture
def repository(tmp_path, built, files) -> tuple[Path, Path]:
    """A repository with a README, and a run whose numbers come from its only commit."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "README.md").write_text(README)
    (root / ".gitignore").write_text("/results/laptop/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    workdir = root / "results" / "laptop"
    for path in files:
        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
        if (built / path).exists():
            (workdir / path).write_bytes((built / path).read_bytes())
    shutil.copytree(built / "samples", workdir / "samples")
    change(workdir / "report/provenance.csv", showcase().commits(built)[0], git(root, "rev-parse", "HEAD"))
    return root, workdir


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def check(place: Path, readme: str, root: Path) -> None:
    """What must be true of every showcase, and of the README beside it."""
    assert all(showcase().is_ancestor(commit, root) for commit in showcase().commits(place))
    assert showcase().origin(place) in (place / "README.md").read_text()
    assert showcase().with_results(readme, place) == readme, "README.md has other scores: make showcase"
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) <= showcase().LIMIT
    page, text = ((place / "report" / name).read_text() for name in ("index.html", "report.md"))
    links = {*re.findall(r'(?:href|src)="([^"#]+)"', page), *re.findall(r"\]\(([^)#]+)\)", text)}
    missing = [link for link in links if not link.startswith("http") and not (place / "report" / link).exists()]
    assert not missing, missing
    assert len(links) > 20
    assert all((root / link).exists() for link in re.findall(rf"\]\(({showcase().PLACE}[^)]*)\)", readme))
    ElementTree.parse(place / "film.svg")


def test_the_committed_showcase_is_whole_and_has_the_scores_of_the_readme():
    place = ROOT / showcase().PLACE
    if not place.exists():
        pytest.skip("nothing is shown yet: make report, then make showcase")
    if not (ROOT / ".git").exists() or git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("needs the history of the repository")
    check(place, (ROOT / "README.md").read_text(), ROOT)


def test_a_run_is_shown_whole_with_its_commit_and_the_same_again(repository):
    root, workdir = repository
    showcase().show(workdir, root)
    place = root / showcase().PLACE
    check(place, (root / "README.md").read_text(), root)
    assert git(root, "rev-parse", "HEAD")[:8] in (root / "README.md").read_text()
    page = (place / "report/index.html").read_text()
    assert "data:image" not in page and 'src="../figures/scores.svg"' in page
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    showcase().show(workdir, root)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_other_scores_in_the_readme_are_noticed(repository):
    root, workdir = repository
    showcase().show(workdir, root)
    change(root / "README.md", "14.9", "15.9")
    with pytest.raises(AssertionError, match="make showcase"):
        check(root / showcase().PLACE, (root / "README.md").read_text(), root)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root, run: (run / "report/index.html").unlink(), r"there is no report/index\.html; make report"),
        (lambda root, run: (root / "new.py").write_text("x"), r"new\.py: changed since the last commit"),
        (lambda root, run: change(run / "report/provenance.csv", ",False,", ",True,"), "files that no commit has"),
        (
            lambda root, run: change(run / "report/provenance.csv", git(root, "rev-parse", "HEAD"), 40 * "a"),
            "commit aaaaaaaa is not in this history",
        ),
        (lambda root, run: (run / "figures/x.svg").write_text("x" * 2_000_000), r"the largest: figures/x\.svg"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(spoil, message, repository):
    root, workdir = repository
    spoil(root, workdir)
    with pytest.raises(ValueError, match=message) as refused:
        showcase().show(workdir, root)
    assert "\n" not in str(refused.value)
    assert not (root / showcase().PLACE).exists() and (root / "README.md").read_text() == README


def test_images_are_shown_with_the_same_pixels_in_fewer_bytes(repository):
    root, workdir = repository
    drawn = Image.new("RGB", (640, 480), "white")
    for shade in range(200):
        drawn.paste((shade, 20, 255 - shade), (shade, shade, shade + 200, shade + 200))
    drawn.convert("RGBA").save(workdir / "figures/x.png")
    showcase().show(workdir, root)
    shown = root / showcase().PLACE / "figures/x.png"
    assert shown.stat().st_size < (workdir / "figures/x.png").stat().st_size
    with Image.open(shown) as image:
        assert image.mode == "P" and ImageChops.difference(image.convert("RGB"), drawn).getbbox() is None


def test_columns_and_rows_that_are_mostly_dashes_are_left_out_and_the_columns_named():
    table = "\n".join(
        [
            "**Scores.**\n",
            "| Benchmark | Chance | A | B |",
            "| :--- | ---: | ---: | ---: |",
            "| one | 25.0 | 1.0 \\[0, 2\\] | – |",
            "| two | – | 2.0 | – |",
            "| three | – | – | 3.0 |",
            "\nA note.",
        ]
    )
    assert showcase().without_blanks(table).splitlines() == [
        "**Scores.**",
        "",
        "| Benchmark | A |",
        "| :--- | ---: |",
        "| one | 1.0 \\[0, 2\\] |",
        "| two | 2.0 |",
        "",
        "Not shown here, because they are scored on less than half of these benchmarks: Chance; B.",
        "",
        "A note.",
    ]
