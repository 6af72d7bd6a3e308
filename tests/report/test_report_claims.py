"""Each claim in a case where it holds, one where it does not, and one that is undecided."""

import pandas as pd
import pytest
from fake_workdir import plan_dict

from dllm.report import claims
from dllm.report.load import scores
from dllm.report.plan import ReportPlan


def losses(*rows: tuple, standard_error: float = 0.002, first: float = 3.0, first_step: int = 0) -> pd.DataFrame:
    """Final losses of runs given as (label, recipe, run, loss)."""
    return pd.DataFrame(
        {
            "label": label,
            "recipe": recipe,
            "run": run,
            "steps": 1000,
            "train_loss": loss,
            "train_standard_error": standard_error,
            "eval_loss": loss,
            "eval_standard_error": standard_error,
            "first_eval_step": first_step,
            "first_eval_loss": first,
            "first_eval_standard_error": standard_error,
        }
        for label, recipe, run, loss in rows
    )


def encoders(modern: float, bert: float, **settings) -> pd.DataFrame:
    rows = ("ModernBERT-base", "corrected", "m", modern), ("BERT-base", "corrected", "b", bert)
    return losses(*rows, **settings)


ENCODER_PLAN = ReportPlan.model_validate(
    {"pretraining": [{"run": "m", "label": "ModernBERT-base"}, {"run": "b", "label": "BERT-base"}]}
)


@pytest.mark.parametrize(
    ("modern", "bert", "verdict"),
    [(2.0, 2.5, "holds"), (2.5, 2.0, "does not hold"), (2.000, 2.001, "undecided")],
)
def test_modernbert_leads_only_by_two_standard_errors(modern, bert, verdict):
    assert claims.encoder_claim(encoders(modern, bert), ENCODER_PLAN).verdict == verdict


def test_without_another_encoder_the_first_claim_is_undecided():
    plan = ReportPlan.model_validate({"pretraining": [{"run": "m", "label": "ModernBERT-base"}]})
    frame = losses(("ModernBERT-base", "corrected", "m", 2.0))
    assert claims.encoder_claim(frame, plan).verdict == "undecided"


@pytest.mark.parametrize(
    ("last", "verdict"), [(2.95, "holds"), (3.1, "holds"), (2.5, "does not hold"), (2.851, "undecided")]
)
def test_the_loss_hardly_falls_below_the_margin(last, verdict):
    assert claims.openwebtext_claim(losses(("large", "corrected", "r", last)), ReportPlan()).verdict == verdict


def test_a_late_first_evaluation_leaves_the_second_claim_undecided():
    frame = losses(("large", "corrected", "r", 2.95), first_step=100)
    assert claims.openwebtext_claim(frame, ReportPlan()).verdict == "undecided"


def starts(*values: float, recipe: str = "corrected", **settings) -> pd.DataFrame:
    return losses(*((f"start {i}", recipe, f"{recipe}{i}", value) for i, value in enumerate(values)), **settings)


@pytest.mark.parametrize(
    ("values", "standard_error", "verdict"),
    [
        ((2.00, 2.01, 2.02), 0.002, "holds"),
        ((2.00, 2.01, 2.30), 0.002, "does not hold"),
        ((2.00, 2.01, 2.02), 0.100, "undecided"),
    ],
)
def test_starts_are_the_same_only_where_noise_cannot_hide_a_difference(values, standard_error, verdict):
    frame = starts(*values, standard_error=standard_error)
    assert claims.ablation_claim(frame, ReportPlan()).verdict == verdict


def test_the_corrected_recipe_decides_where_both_were_run():
    published = starts(2.0, 2.0, 2.0, recipe="published")
    corrected = starts(2.0, 2.0, 2.5, recipe="corrected")
    claim = claims.ablation_claim(pd.concat([published, corrected], ignore_index=True), ReportPlan())
    assert claim.verdict == "does not hold"
    assert {finding.recipe: finding.verdict for finding in claim.findings} == {
        "published": "holds",
        "corrected": "does not hold",
    }


def chat_verdict(values: list[float], *, half: float = 1.0, chance: float = 25.0, toy: bool = False):
    names = [f"b{i}" for i in range(len(values))]
    plan = ReportPlan.model_validate(
        {
            "toy": toy,
            "results": [{"run": "large", "label": "large", "close_to": "rival"}],
            "benchmarks": [{"name": name, "label": name} for name in names],
            "reported": [{"label": "rival", "source": "s", "scores": dict.fromkeys(names, 40.0)}],
        }
    )
    frame = pd.DataFrame(
        {
            "run": "large",
            "benchmark": name,
            "benchmark_label": name,
            "value": value,
            "low": value - half,
            "high": value + half,
            "chance": chance,
            "against_chance": "above" if value - half > chance else "near",
        }
        for name, value in zip(names, values, strict=True)
    )
    return claims.chat_claim(frame, plan).verdict


def test_a_model_close_to_its_rival_on_most_benchmarks_makes_the_fourth_claim_hold():
    assert chat_verdict([39.0, 41.0, 30.0]) == "holds"


def test_a_model_far_below_its_rival_on_most_benchmarks_fails_the_fourth_claim():
    assert chat_verdict([30.0, 30.0, 41.0]) == "does not hold"


def test_a_model_at_chance_fails_the_fourth_claim():
    assert chat_verdict([25.0, 25.5, 24.5], half=20.0) == "does not hold"


def test_wide_intervals_leave_closeness_undecided():
    assert chat_verdict([35.0, 35.0, 41.0], half=4.0) == "undecided"


def test_a_toy_model_is_never_close_to_a_published_one():
    assert chat_verdict([39.0, 41.0, 40.0], toy=True) == "undecided"


def speed(*seconds: float) -> pd.DataFrame:
    """Times for 64, 32, 16, ... steps."""
    return pd.DataFrame({"steps": 64 // 2**i, "seconds": value} for i, value in enumerate(seconds))


A100 = {"run": "large", "wall_seconds": 7 * 3600.0, "processes": 8, "hardware": "A100"}


@pytest.mark.parametrize(
    ("provenance", "points", "toy", "verdict"),
    [
        (A100, speed(8, 4, 2), False, "holds"),
        (A100 | {"wall_seconds": 90 * 3600.0}, speed(8, 4, 2), False, "does not hold"),
        (A100 | {"hardware": "1 x H200"}, speed(8, 4, 2), False, "undecided"),
        (A100, speed(8, 4, 2), True, "undecided"),
        (A100, speed(8, 7.5, 7), False, "does not hold"),
        (A100, speed(8, 4, 2, 1.6), False, "undecided"),
        (A100, speed(8), False, "undecided"),
        (A100, None, False, "undecided"),
        (None, speed(8, 4, 2), False, "undecided"),
    ],
)
def test_the_fifth_claim_needs_both_the_cost_and_the_halving(provenance, points, toy, verdict):
    assert claims.cost_claim(provenance, points, ReportPlan(toy=toy)).verdict == verdict


def test_steps_without_their_half_have_no_ratio():
    frame = pd.DataFrame({"steps": [96, 64, 32], "seconds": [9.0, 6.0, 3.0]})
    assert claims.halving_ratios(frame).to_dict() == {64: 2.0}


def test_an_empty_plan_leaves_every_claim_undecided(tmp_path):
    found = claims.judge(tmp_path, ReportPlan())
    assert [claim.number for claim in found] == [1, 2, 3, 4, 5]
    assert {claim.verdict for claim in found} == {"undecided"}


def test_the_answer_names_the_verdicts_and_a_toy_run_refuses_to_answer(workdir):
    for toy in (False, True):
        plan = ReportPlan.model_validate(plan_dict(toy))
        answer = " ".join(claims.short_answer(workdir, plan, claims.judge(workdir, plan)))
        assert "above chance on 5 of 7" in answer
        assert ("toy run cannot say" in answer) == toy


def test_a_control_takes_no_part_in_the_fourth_claim(workdir, plan):
    claim = claims.chat_claim(scores(workdir, plan), plan)
    assert not any("untuned" in finding.because or "Qwen1.5-0.5B:" in finding.because for finding in claim.findings)


def test_a_run_that_was_stopped_or_had_hardly_any_steps_decides_nothing():
    frame = encoders(2.0, 2.5).assign(truncated=[True, False])
    claim = claims.encoder_claim(frame, ENCODER_PLAN)
    assert claim.verdict == "undecided" and "ModernBERT-base stopped early" in claim.findings[0].because
    frame = losses(("large", "corrected", "r", 2.95)).assign(truncated=True)
    assert claims.openwebtext_claim(frame, ReportPlan()).verdict == "undecided"
    frame = losses(("a", "corrected", "r", 2.0), ("b", "corrected", "s", 2.0)).assign(truncated=[False, True])
    assert claims.ablation_claim(frame, ReportPlan()).verdict == "undecided"


@pytest.mark.parametrize(
    ("change", "truncated"),
    [({}, False), ({"steps": 2, "epochs": None}, True), ({"stop_after": 2}, True), ({"stop_after": 400}, False)],
)
def test_the_plan_knows_which_runs_are_truncated(change, truncated):
    from pathlib import Path

    from dllm.config import load_project

    config = Path(__file__).parents[2] / "config"
    project = load_project(config, config / "paper.yaml", {"runs": {"chat-large": change}})
    plan = ReportPlan.of(project)
    assert {entry.truncated for entry in plan.chat if entry.run == "chat-large"} == {truncated}
    assert {row.truncated for row in plan.results if row.run == "chat-large"} == {truncated}
