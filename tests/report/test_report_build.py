"""The report as a whole: complete, the same twice, and clear about what is missing."""

import filecmp
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from fake_workdir import brief_dict, build_all, plan_dict, read_by, write_workdir

from dllm.report.figures import build_figures
from dllm.report.load import read_metrics, scores
from dllm.report.plan import ReportPlan
from dllm.report.tables import build_tables, make_tables

TIMINGS = ("wall_seconds", "tokens_per_second", "seconds")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_report_rebuilt_from_the_files_that_its_plan_names_is_byte_identical(built, plan, tmp_path, unsaved):
    again = write_workdir(tmp_path / "again")
    unnamed = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()} - set(read_by(plan))
    for name in unnamed:
        (again / name).unlink()
    unsaved.add("speed")  # the next test saves the others again, and compares their bytes
    shutil.copytree(built / "figures", again / "figures", ignore=shutil.ignore_patterns("*.csv", "speed.*"))
    build_all(again, plan)
    assert digests(again) == {name: digest for name, digest in digests(built).items() if name not in unnamed}


def test_wall_times_and_provenance_change_no_table_and_no_figure_but_speed(built, plan, tmp_path):
    other = write_workdir(tmp_path / "other")
    for path in other.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line | {name: 1.5 for name in TIMINGS if name in line} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (*other.rglob("provenance.json"), *other.glob("evals/*/*.json")):
        record = json.loads(path.read_text())
        changed = {"commit": "f" * 40, "written": "2030-01-01", "wall_seconds": 1.0, "hardware": "abacus"}
        path.write_text(json.dumps(record | changed | {"provenance": changed}))
    path = other / "speed/chat-large.json"
    record = json.loads(path.read_text())
    record["points"] = [point | {"seconds": 1.0} for point in record["points"]]
    path.write_text(json.dumps(record))
    build_tables(other, plan, other / "tables")
    build_figures(other, plan, other / "figures")
    for folder in ("tables", "figures"):
        names = [path.name for path in (other / folder).iterdir() if path.stem != "speed"]
        assert filecmp.cmpfiles(other / folder, built / folder, names, shallow=False)[1:] == ([], [])
    assert not filecmp.cmp(other / "figures/speed.csv", built / "figures/speed.csv", shallow=False)


def test_every_figure_has_its_csv_and_every_table_its_three_forms(built, plan):
    figures = {path.name for path in (built / "figures").iterdir()}
    assert figures == {f"{name}.{suffix}" for name in plan.figure_names() for suffix in ("svg", "png", "csv")}
    tables = {path.name for path in (built / "tables").iterdir()}
    files = {f"{name}.{suffix}" for name in plan.table_names() for suffix in ("csv", "md", "tex")}
    assert tables == files | {"metrics.json"}


def test_the_metrics_are_the_numbers_of_the_tables(built, plan):
    metrics = json.loads((built / "tables/metrics.json").read_text())
    table = pd.read_csv(built / "tables/results.csv")
    assert metrics["scores"] == {
        run: dict(zip(rows["benchmark"], rows["value"], strict=True)) for run, rows in table.groupby("run")
    }
    assert set(metrics["loss"]) == set(plan.trained_runs())


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("runs/chat-large/metrics.jsonl", "train"),
        ("runs/chat-large/provenance.json", "train"),
        ("evals/qwen-ar/mmlu.json", "evaluate"),
        ("samples/chat-large.json", "sample"),
        ("speed/chat-large.json", "speed"),
    ],
)
def test_a_missing_file_is_named_with_the_rule_that_makes_it(workdir, brief, unsaved, path, rule):
    (workdir / path).unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(path)} is missing .*rule '{rule}' makes it") as error:
        build_all(workdir, brief)
    assert "\n" not in str(error.value)


def test_a_damaged_line_is_named_with_its_number(workdir):
    path = workdir / "runs/chat-base/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "spl')
    count = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=rf"runs/chat-base/metrics.jsonl:{count} is not JSON"):
        read_metrics(workdir, "chat-base")


def test_a_section_without_runs_is_left_out(workdir, unsaved):
    everything = plan_dict()
    for section in ("openwebtext", "ablation", "samples", "speed", "reported"):
        everything.pop(section)
    for row in everything["results"]:
        row.pop("published_as", None), row.pop("close_to", None)
    build_all(workdir, ReportPlan.model_validate(everything))
    page = (workdir / "report/index.html").read_text()
    assert 'id="pretraining"' in page
    for anchor in ("openwebtext", "ablation", "film", "conversations", "speed", "reported"):
        assert f'id="{anchor}"' not in page


def test_a_report_without_systems_has_nothing_of_them(built, plan):
    assert "systems" not in plan.table_names() and not (built / "figures/systems.svg").exists()
    assert 'id="systems"' not in (built / "report/index.html").read_text()


def test_an_empty_plan_still_makes_a_page(tmp_path):
    build_all(tmp_path, ReportPlan())
    assert "The plan has no runs that could decide it." in (tmp_path / "report/index.html").read_text()


def test_the_difference_is_ours_less_the_published_number_with_our_interval(workdir, plan):
    frame = scores(workdir, plan).set_index(["run", "benchmark"])
    row = frame.loc[("chat-large", "gsm8k")]
    ours = json.loads((workdir / "evals/chat-large/gsm8k.json").read_text())["metrics"]["acc"]
    assert row["value"] == pytest.approx(100 * ours["value"])
    assert row["difference"] == pytest.approx(100 * ours["value"] - 17.1)
    assert row["difference_low"] == pytest.approx(100 * ours["low"] - 17.1)
    assert row["difference_high"] == pytest.approx(100 * ours["high"] - 17.1)
    assert frame.loc[("untuned", "gsm8k")][["reported", "difference"]].isna().all()


def test_an_evaluation_without_an_interval_gets_the_wilson_interval(workdir, plan):
    path = workdir / "evals/chat-large/mmlu.json"
    record = json.loads(path.read_text())
    before = scores(workdir, plan)
    record["metrics"]["acc"].update(low=None, high=None)
    path.write_text(json.dumps(record))
    pd.testing.assert_frame_equal(scores(workdir, plan), before)


def test_a_metric_that_was_not_measured_is_an_error(workdir, plan):
    path = workdir / "evals/chat-base/lambada.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metric": "acc_norm"}))
    with pytest.raises(ValueError, match=r"lambada.json has no metric 'acc_norm'; it has acc\.$"):
        scores(workdir, plan)


def test_prompts_that_were_cut_are_counted_below_the_table(workdir, plan, tmp_path):
    other = write_workdir(tmp_path / "other")
    path = other / "evals/qwen-ar/gsm8k.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncated": 1_300}))
    said = "Documents whose prompt did not fit and was cut from the left: Qwen1.5-0.5B on GSM8K, 1300 of 1319."
    for folder, shown in ((other, True), (workdir, False)):
        table = make_tables(folder, plan)["overview"]
        assert (said in table.note) == shown and ("cut from the left" in table.note) == shown


def test_scores_above_chance_are_marked_with_a_sign_and_not_by_colour_alone(built):
    text = (built / "tables/overview.md").read_text()
    mmlu = next(line for line in text.splitlines() if line.startswith("| MMLU"))
    assert mmlu.count("▲") == 5 and mmlu.count("**") == 10


def test_a_published_number_far_below_chance_is_flagged(workdir, plan):
    table = make_tables(workdir, plan)["reported"]
    flagged = [row[0].text for row in table.rows if any(cell.mark for cell in row)]
    assert flagged == ["gpt2-medium"] and table.note.startswith("† ")


def test_a_published_number_is_held_against_the_chance_of_the_benchmark_it_was_published_for(workdir, plan):
    everything = plan.model_dump()
    for benchmark in everything["benchmarks"]:
        benchmark |= {"chance": 0.9, "reported_chance": 0.0}  # miniatures that are easily guessed
    table = make_tables(workdir, ReportPlan.model_validate(everything))["reported"]
    assert not any(cell.mark for row in table.rows for cell in row)


def test_a_toy_run_says_so_on_the_page_in_its_tables_and_in_its_figures(workdir, built, unsaved):
    unsaved.add("scores")
    build_all(workdir, ReportPlan.model_validate(brief_dict(toy=True)))
    page = (workdir / "report/index.html").read_text()
    assert page.index("Toy numbers.") < page.index("<nav")
    assert "**Toy numbers.**" in (workdir / "report/report.md").read_text()
    assert "Toy data and models." in (workdir / "tables/results.md").read_text()
    assert (workdir / "figures/scores.svg").read_bytes() != (built / "figures/scores.svg").read_bytes()
    assert "Toy" not in (built / "report/index.html").read_text()


class _Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.ids, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.ids += [values["id"]] if "id" in values else []

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_its_links_lead_somewhere(built):
    page = _Page((built / "report/index.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif not link.startswith("data:image/svg+xml;base64,"):
            assert (built / "report" / link).is_file(), link
    targets = re.findall(r"\]\(([^)\s]+)\)", (built / "report/report.md").read_text())
    assert targets and all((built / "report" / target).is_file() for target in targets)


def test_model_output_cannot_become_markup(built):
    text = (built / "report/index.html").read_text()
    assert "<script>" not in text
    assert "<script>alert('no')</script> ```` $5_000 {ok} \\ end" in _Page(text).text
    markdown = (built / "report/report.md").read_text()
    start = markdown.index("What does this print?")
    fence = markdown.rfind("\n`````text\n", 0, start)
    assert fence >= 0 and markdown.index("\n`````\n", start) > markdown.index("averylongword")


def test_labels_with_special_characters_are_escaped_in_every_form(workdir):
    everything = plan_dict()
    everything["pretraining"][0]["label"] = "Modern<BERT> & co | 50%_x"
    tables = build_tables(workdir, ReportPlan.model_validate(everything), workdir / "tables")
    text = {path.suffix: path.read_text() for path in tables if path.stem == "pretraining"}
    assert r"| Modern\<BERT\> \& co \| 50%\_x |" in text[".md"]
    assert r"Modern\textless{}BERT\textgreater{} \& co \textbar{} 50\%\_x &" in text[".tex"]
    assert pd.read_csv(workdir / "tables/pretraining.csv")["label"][0] == "Modern<BERT> & co | 50%_x"


def test_every_number_has_its_run_seed_commit_digests_and_hardware(built, plan):
    frame = pd.read_csv(built / "report/provenance.csv")
    evaluations = frame[frame["kind"] == "evaluation"]
    assert set(frame[frame["kind"] == "run"]["run"]) == set(plan.trained_runs())
    assert len(evaluations) == sum(len(plan.scored(row)) for row in plan.results)
    columns = ["seed", "commit", "config_digest", "data_digest", "hardware", "wall_seconds"]
    assert frame[columns].notna().all().all()


def test_claims_resting_on_wall_times_stay_out_of_the_tables(built):
    frame = pd.read_csv(built / "tables/claims.csv")
    assert set(frame[frame["claim"] == 5]["verdict"]) == {"timed"}
    record = json.loads((built / "claims.json").read_text())
    assert [claim["verdict"] for claim in record["claims"]] == ["holds", "holds", "undecided", "undecided", "holds"]


def test_estimators_stand_side_by_side_with_score_passes_and_seconds(built):
    frame = pd.read_csv(built / "report/estimators.csv")
    assert list(frame["benchmark"].unique()) == ["mmlu", "winogrande", "hellaswag"]
    assert set(zip(frame["estimator"], frame["passes_per_document"], strict=True)) == {("auto", 4.0), ("mc", 512.0)}
    page = (built / "report/index.html").read_text()
    assert "Two estimates of one likelihood" in page and 'href="../report/estimators.csv"' in page


def test_faster_decoding_is_shown_with_its_agreement(built):
    text = (built / "report/report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| threshold 0.9"))
    assert "62.0" in row and "91.0" in row


def test_an_evaluation_without_its_costs_is_named(workdir, brief, unsaved):
    path = workdir / "evals/chat-large/mmlu.json"
    record = json.loads(path.read_text())
    record.pop("passes_per_document")
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"evals/chat-large/mmlu\.json has no costs; rule 'evaluate'"):
        build_all(workdir, brief)
