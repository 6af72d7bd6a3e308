"""The leaderboard: ranks, open cells, and its page as a browser shows it."""

import json
import re

import pandas as pd
import pytest
from fake_workdir import brief_dict, build_all, write_workdir
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.cli.main import main
from dllm.report import leaderboard
from dllm.report.leaderboard import board_frame, build_leaderboard, rank_text
from dllm.report.plan import ReportPlan
from tests.browser import NoBrowser
from tests.browser import browser as chromium_browser

OPEN = ("chat-large", "mmlu")
MISSING = {"LLaDA9 <script>": "its weights are not there"}


def board_plan(**changes) -> ReportPlan:
    """The plan of the fake work directory with every row on the board, one of them a base model."""
    plan = brief_dict(toy=True) | {"missing": MISSING}
    plan["leaderboard"] = [
        {
            "row": row["run"],
            "label": row["label"],
            "kind": "autoregressive" if row.get("kind") == "ar" else "diffusion",
            "algorithm": "mdlm" if number == 1 else "",
            "chat": number != 2,
            "parameters": None if number == 5 else 100_000_000 * (number + 1),
            "published_as": row.get("published_as", ""),
        }
        for number, row in enumerate(plan["results"])
    ]
    return ReportPlan.model_validate(plan | changes)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A work directory whose board has one open cell, which is planned."""
    workdir = write_workdir(tmp_path_factory.mktemp("board") / "work")
    (workdir / "evals" / OPEN[0] / f"{OPEN[1]}.json").unlink()
    (workdir / "configs").mkdir()
    cost = {"hours": 12.0, "device": "GPU", "gib": 20.0}
    (workdir / leaderboard.PLANNED).write_text(json.dumps({"/".join(OPEN): cost}))
    build_leaderboard(workdir, board_plan(), workdir / "report")
    return workdir


@pytest.fixture(scope="module")
def html(board):
    return (board / "report/leaderboard.html").read_text()


def test_a_cell_that_was_not_measured_is_a_line_without_a_score_or_a_rank(board):
    frame = board_frame(board, board_plan()).set_index(["row", "benchmark"])
    assert pd.isna(frame.loc[OPEN, "value"]) and pd.isna(frame.loc[OPEN, "rank_low"])
    assert frame.loc[OPEN, "published"] == 33.5 and pd.isna(frame.loc[OPEN, "difference"])
    assert frame["value"].notna().sum() == len(frame) - 1
    others = frame.xs("mmlu", level="benchmark").drop(index=OPEN[0])
    assert others["rank_high"].max() == len(others)


def test_a_difference_is_ours_less_the_published_number_with_our_interval(board):
    line = board_frame(board, board_plan()).set_index(["row", "benchmark"]).loc["chat-base", "mmlu"]
    assert line.difference == pytest.approx(line.value - 26.1)
    assert line.difference_high - line.difference_low == pytest.approx(line.high - line.low)
    assert line.source == "report" and line.shots == 5 and line.seed == 42


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20)), min_size=1, max_size=8))
def test_ranks_hold_every_order_that_the_intervals_allow(scores):
    part = pd.DataFrame([{"value": v, "low": v - w, "high": v + w} for v, w in scores])
    ranks = {index: (low, high) for index, low, high in leaderboard._ranks(part)}
    order = part["value"].rank(ascending=False, method="first")
    assert all(low <= order[index] <= high for index, (low, high) in ranks.items())
    for i, (low, high) in ranks.items():
        alone = all(part.high[j] < part.low[i] or part.low[j] > part.high[i] for j in ranks if j != i)
        assert alone == (low == high), "a single rank where no interval overlaps, and there only"


def test_ranks_are_written_as_ranges():
    assert [rank_text(1, 1), rank_text(2, 4), rank_text(float("nan"), 3)] == ["1", "2–4", "–"]


def test_the_page_is_whole_without_a_script_and_names_no_other_host(html):
    assert not re.findall(r"(?:https?:)?//[a-z]", html) and "default-src 'none'" in html
    body = html.split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr ") == 6 and body.count('class="score"') + 1 == len(board_plan().benchmarks) * 5 + 3
    assert "planned: 12 h<" in body and body.count('class="score none"') == 6 and 'id="controls" hidden' in html
    assert "LLaDA9 &lt;script&gt;" in html and "LLaDA9 <script>" not in html


def test_every_score_links_to_its_record_and_its_samples(board, html):
    links = re.findall(r'href="([^"]+evals[^"]+)"', html)
    records = [link for link in links if not link.endswith(".samples.jsonl")]
    assert len(links) == 2 * len(records) == 2 * board_frame(board, board_plan())["value"].notna().sum()
    assert all((board / "report" / record).is_file() for record in records)
    assert all(record.replace(".json", ".samples.jsonl") in links for record in records)


def test_the_whole_report_leads_to_the_board_and_has_it_as_a_table(tmp_path, unsaved):
    workdir = write_workdir(tmp_path)
    systems = [{"row": "chat-large", "label": "x", "algorithm": "mdlm", "stages": ["chat-large"]}]
    written = build_all(workdir, board_plan(systems=systems, samples="", speed=""))
    assert workdir / "report/leaderboard.html" in written
    assert 'href="leaderboard.html"' in (workdir / "report/index.html").read_text()
    table = pd.read_csv(workdir / "tables/leaderboard.csv")
    assert len(table) == 48 and "tokens_per_second" not in table and table["rank_low"].min() == 1


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("evals/chat-base/mmlu.json", "{", "evals/chat-base/mmlu.json:1 is not JSON"),
        ("evals/chat-base/mmlu.json", '{"n": 3}', "has no metric, metrics, scorer, provenance; rule 'evaluate'"),
        (leaderboard.PLANNED, "{", "configs/planned.json:1 is not JSON .*remove it"),
    ],
)
def test_a_damaged_record_is_one_line_with_what_makes_it_again(tmp_path, file, text, line):
    workdir = write_workdir(tmp_path / "work")
    (workdir / "configs").mkdir()
    (workdir / file).write_text(text)
    with pytest.raises(ValueError, match=line):
        build_leaderboard(workdir, board_plan(), workdir / "report")


def test_a_benchmark_that_nobody_was_scored_on_is_a_column_of_open_cells(tmp_path):
    workdir = write_workdir(tmp_path / "work")
    for record in workdir.glob("evals/*/mmlu.json"):
        record.unlink()
    build_leaderboard(workdir, board_plan(), workdir / "report")
    frame = board_frame(workdir, board_plan())
    part = frame[frame["benchmark"] == "mmlu"]
    assert len(part) and part["value"].isna().all() and frame["value"].notna().any()


def test_a_report_without_a_board_says_what_to_name(tmp_path, capsys):
    (tmp_path / "report.yaml").write_text("title: x\n")
    assert main(["report", "leaderboard", str(tmp_path / "report.yaml"), "--workdir", str(tmp_path)]) == 2
    assert "name its rows in report.leaderboard" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips the test where there is none and none can be installed."""
    try:
        with chromium_browser() as started:
            yield started
    except NoBrowser as reason:
        pytest.skip(str(reason))


@pytest.fixture
def shown(browser, board):
    """Opens the board: width in pixels, and whether scripts run. Fails on errors and requests elsewhere."""
    wrong, contexts = [], []

    def opened(width: int = 1400, scripts: bool = True):
        context = browser.new_context(viewport={"width": width, "height": 900}, java_script_enabled=scripts)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text))
        page.on("request", lambda asked: asked.url.startswith("file://") or wrong.append(asked.url))
        page.goto((board / "report/leaderboard.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def names(page) -> list[str]:
    return page.locator("#board tbody tr:visible th").evaluate_all("all => all.map(one => one.dataset.value)")


def column(page, head: str) -> list[str]:
    """What a column shows, from top to bottom."""
    at = page.locator("#board thead th").evaluate_all(
        "(all, head) => all.findIndex(one => one.innerText.startsWith(head))", head
    )
    cells = "(all, at) => all.map(one => one.cells[at].dataset.value)"
    return page.locator("#board tbody tr").evaluate_all(cells, at)


def test_a_click_sorts_by_a_score_and_a_second_one_the_other_way_with_open_cells_last(shown):
    page = shown()
    head = page.get_by_role("button", name="MMLU", exact=True)
    head.click()
    found = column(page, "MMLU")
    assert found[-1] == "" and [float(x) for x in found[:-1]] == sorted(map(float, found[:-1]), reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("MMLU")
    head.click()
    found = column(page, "MMLU")
    assert found[-1] == "" and [float(x) for x in found[:-1]] == sorted(map(float, found[:-1]))
    page.get_by_role("button", name="Parameters").click()
    assert column(page, "Parameters")[-1] == "nan" and page.locator("th[aria-sort]").count() == 1


def test_the_keyboard_alone_sorts_and_filters(shown):
    page = shown()
    page.keyboard.press("Tab")  # the link to the report
    page.keyboard.press("Tab")
    page.keyboard.type("qwen")
    assert names(page) == ["Qwen1.5-0.5B"] and page.locator("#count").inner_text() == "1 of 6 models"
    page.keyboard.press("Enter")
    page.locator("#find").fill("")
    page.get_by_role("button", name="Model").focus()
    page.keyboard.press("Enter")
    forth = names(page)
    assert len(forth) == 6 and (forth[0], forth[-1]) == ("ModernBERT-base-chat", "Qwen1.5-0.5B")
    page.keyboard.press("Space")
    assert names(page) == forth[::-1]


def test_filters_go_together(shown):
    page = shown()
    page.select_option("#kind", "autoregressive")
    assert names(page) == ["Qwen1.5-0.5B"]
    page.select_option("#kind", "diffusion")
    page.select_option("#asked", "base")
    assert len(names(page)) == 1
    page.select_option("#asked", "")
    page.fill("#find", "monte carlo")
    heads = page.locator("#board thead th.score:visible .head").all_inner_texts()
    assert heads == ["MMLU", "Winogrande", "HellaSwag"], "columns in which it is not scored are gone"
    page.fill("#find", "")
    assert page.locator("#board thead th.score:visible").count() == 9
    page.fill("#find", "nothing of this name")
    assert names(page) == [] and page.locator("#count").inner_text() == "0 of 6 models"


def test_without_scripts_it_is_a_plain_table(shown):
    page = shown(scripts=False)
    assert len(page.locator("#board tbody tr:visible").all()) == 6
    assert not page.locator("#controls").is_visible() and page.locator("#board button").count() == 0


def test_on_a_phone_the_table_scrolls_and_the_page_does_not(shown):
    page = shown(width=360)
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1] == 360
    table = page.locator(".boarded")
    assert table.evaluate("one => one.scrollWidth > one.clientWidth")
    before = page.locator("#board tbody th").first.bounding_box()["x"]
    table.evaluate("one => { one.scrollLeft = 400 }")
    assert page.locator("#board tbody th").first.bounding_box()["x"] == pytest.approx(before, abs=1), "the name stays"


def test_marks_of_a_cell_lie_where_its_numbers_are(shown):
    """The bar spans the interval on the axis of its column."""
    page = shown()
    cell = page.locator("#board tbody tr").first.locator("td").nth(5)  # MMLU
    axis, span = (cell.locator(name).bounding_box() for name in (".axis", ".range"))
    low, high = (float(x) for x in re.findall(r"[\d.]+", cell.locator(".interval").inner_text()))
    ends = 20, 40  # 24.4 to 39.5 in whole tens
    left, right = ((span["x"] + side - axis["x"]) / axis["width"] for side in (0, span["width"]))
    expected = [(value - ends[0]) / (ends[1] - ends[0]) for value in (low, high)]
    assert [left, right] == pytest.approx(expected, abs=0.01)


def test_a_published_number_leads_to_its_source_and_to_what_is_known_of_it(shown):
    page = shown()
    cited = page.locator("#board tbody tr").first.locator("sup a").first
    assert cited.get_attribute("title") == "report"
    cited.click()
    target = page.locator(":target")
    assert target.inner_text().startswith("report") and target.is_visible()
