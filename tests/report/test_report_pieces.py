"""The film, the labels at line ends, the plan."""

import re
from dataclasses import replace

import matplotlib
import pandas as pd
import pytest
from fake_workdir import build_all, write_workdir
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pydantic import ValidationError

from dllm.algorithms import resolved
from dllm.report import claims, curves, figures, tables
from dllm.report.film import frames, visible
from dllm.report.load import final_losses, read_metrics, read_samples, scores
from dllm.report.markup import fenced
from dllm.report.page import split_interval
from dllm.report.plan import ReportPlan
from dllm.report.shown import FIGURES, TABLES, FigureRow, TableRow
from dllm.report.style import RC, family_looks, spread


def test_the_film_keeps_its_first_and_last_frame_and_every_token_its_place(workdir):
    film = read_samples(workdir, "chat-large")["film"]
    shown = frames(film, limit=5)
    assert (len(shown), shown[0].step, shown[-1].step) == (5, 0, film["frames"][-1]["step"])
    assert {tuple(token.width for token in frame.tokens) for frame in shown} == {
        tuple(len(visible(token["text"])) for token in film["frames"][-1]["tokens"])
    }


def test_new_in_the_film_means_masked_in_the_frame_shown_before(workdir):
    shown = frames(read_samples(workdir, "chat-large")["film"], limit=4)
    for before, now in zip(shown, shown[1:], strict=False):
        for old, token in zip(before.tokens, now.tokens, strict=True):
            assert (token.state == "new") == (old.state == "masked" and token.state != "masked")


def test_a_film_without_frames_is_an_error():
    with pytest.raises(ValueError, match="has no frames"):
        frames({"frames": []})


def test_control_characters_of_a_token_are_shown_or_dropped():
    assert visible("a\nb\tc\r\x00\x1b[31m") == "a⏎b⇥c[31m"


@given(st.text(alphabet="`a\n", max_size=40))
def test_no_text_can_close_its_own_fence(text):
    lines = fenced(text).split("\n")
    assert not any(set(line) == {"`"} and len(line) >= len(lines[-1]) for line in lines[1:-1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_keep_their_order_and_their_distance(heights):
    placed = spread(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    gaps = [placed[b] - placed[a] for a, b in zip(order, order[1:], strict=False)]
    assert all(gap >= 0.1 - 1e-9 for gap in gaps)
    assert sum(placed) == pytest.approx(sum(heights), abs=1e-6)


def test_one_family_has_one_colour_and_its_sizes_differ_in_filling():
    found = family_looks([("A-base", "a"), ("A-large", "a"), ("B", "b")])
    assert found["A-base"].color == found["A-large"].color != found["B"].color
    assert (found["A-base"].filled, found["A-large"].filled, found["B"].filled) == (False, True, True)


def test_published_curves_are_dashed_and_corrected_ones_solid(workdir, plan):
    with matplotlib.rc_context(RC):
        figure: Figure = curves.draw_ablation(curves.curves(workdir, plan, "ablation"), plan)
    styles = {}
    for axes in figure.axes:
        lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
        styles.setdefault(axes.get_title(loc="left"), {line.get_linestyle() for line in lines})
    assert styles["Training loss, published"] == styles["Evaluation loss, published"] == {"--"}
    assert styles["Training loss, corrected"] == styles["Evaluation loss, corrected"] == {"-"}


def test_the_title_of_curves_tells_the_final_loss_of_the_table_and_not_their_last_point(workdir, plan):
    frame = curves.curves(workdir, plan, "ablation")
    ends = frame[frame["split"] == "eval"].groupby(["label", "recipe"], as_index=False).last()
    final = ends.assign(split="final", loss=ends["loss"] + 1)
    with matplotlib.rc_context(RC):
        without, with_final = (
            curves.draw_ablation(shown, plan).texts[0].get_text() for shown in (frame, pd.concat([frame, final]))
        )
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", title)] for title in (without, with_final)]
    assert numbers[0] and numbers[1] == pytest.approx([number + 1 for number in numbers[0]])


def test_a_benchmark_takes_as_many_lines_of_the_scores_as_rows_are_scored_on_it(workdir, plan):
    frame = scores(workdir, plan)
    benchmark = frame["benchmark_label"].iloc[0]
    fewer = frame[(frame["benchmark_label"] != benchmark) | (frame["run"] == frame["run"].iloc[0])]
    with matplotlib.rc_context(RC):
        drawn = [figures.draw_scores(shown, plan) for shown in (frame, fewer)]
    missing = len(frame) - len(fewer)
    spans = [-figure.axes[0].get_ylim()[0] for figure in drawn]
    assert missing > 0 and (spans[0] - spans[1]) / missing in (pytest.approx(0.18), pytest.approx(0.145))


def test_brackets_of_an_answer_are_no_interval():
    assert 'class="interval"' in split_interval("−5.0 [−7.1, 3.0] ▲")
    assert 'class="interval"' not in split_interval("a . [ answer ] [1, x]")


def test_no_letter_of_a_figure_is_smaller_than_nine_points(workdir, plan):
    with matplotlib.rc_context(RC):
        for name in plan.figure_names():
            row = FIGURES[name]
            figure = resolved(row.draw)(resolved(row.frame)(workdir, plan, name), plan)
            sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
            assert min(sizes) >= 9
            assert figure.get_figwidth() == 9.0


def test_short_runs_without_optional_columns_can_be_drawn(tmp_path):
    path = tmp_path / "runs/tiny/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "split": "train", "loss": 2.0}\n{"step": 1, "split": "eval", "loss": 2.5}\n')
    plan = ReportPlan.model_validate({"chat": [{"run": "tiny", "label": "tiny"}]})
    row = final_losses(tmp_path, plan.chat).iloc[0]
    assert (row["train_loss"], row["eval_loss"]) == (2.0, 2.5)
    figures.build_figures(tmp_path, plan, tmp_path / "figures")
    assert (tmp_path / "figures/chat.svg").is_file()


def test_metrics_without_an_evaluation_are_an_error(tmp_path):
    path = tmp_path / "runs/tiny/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    with pytest.raises(ValueError, match="runs/tiny/metrics.jsonl has no eval line"):
        read_metrics(tmp_path, "tiny")


def test_a_section_that_no_plan_has_is_an_error():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ReportPlan.model_validate({"chats": []})


def test_the_same_seed_writes_the_same_fake_work_directory(tmp_path):
    one, two = (write_workdir(tmp_path / name) for name in ("one", "two"))
    for path in (path for path in one.rglob("*") if path.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()


def test_a_new_table_figure_or_claim_is_one_function_and_one_row(workdir, brief, monkeypatch, unsaved):
    def best(workdir, plan, name):
        frame = scores(workdir, plan).nlargest(1, "value")[["label", "value"]]
        return tables.table_of(name, "The best score.", ("Model", "Score"), [], frame)

    def draw(frame, plan):
        figure = Figure()
        figure.subplots().plot(frame["value"], "o")
        return figure

    def sixth(frame, plan):
        return replace(claims.chat_claim(frame, plan), claim="A sixth one.")

    monkeypatch.setitem(TABLES, "best", TableRow(best, lambda plan: plan.results))
    monkeypatch.setitem(FIGURES, "best", FigureRow(figures.scores_frame, draw, lambda plan: plan.results, "The best."))
    monkeypatch.setattr(claims, "CLAIMS", (*claims.CLAIMS, (sixth, lambda workdir, plan: (scores(workdir, plan),))))
    build_all(workdir, brief)
    assert "best.csv" in {path.name for path in (workdir / "tables").iterdir()}
    assert "best.svg" in {path.name for path in (workdir / "figures").iterdir()}
    page = (workdir / "report/index.html").read_text()
    assert "A sixth one." in page and "Of the six published claims" in page
    assert "The six claims." in (workdir / "tables/claims.md").read_text()
