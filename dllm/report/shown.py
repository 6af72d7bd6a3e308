"""What a report may show: one row for each table and figure says where its functions are. Imports none of them.

A new table or figure is one function and one row; `templates/` says where on the page it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Fills = Callable[[Any], Any]
"""Whether there is something to show: a function of the `plan.ReportPlan`, true or false."""


@dataclass(frozen=True)
class TableRow:
    """A table. make: (work directory, plan, name of the row) -> `tables.Table`, or None where nothing was measured."""

    make: str | Callable[..., Any]
    fills: Fills
    timed: bool = False
    """It holds wall times: the page shows it, and no folder that is compared byte by byte has it."""


@dataclass(frozen=True)
class FigureRow:
    """A figure. frame: (work directory, plan, name of the row) -> its data; draw: (data, plan) -> the figure."""

    frame: str | Callable[..., Any]
    draw: str | Callable[..., Any]
    fills: Fills
    caption: str


def _scores(plan: Any) -> Any:
    return plan.results and plan.benchmarks


TABLES: dict[str, TableRow] = {
    "overview": TableRow("dllm.report.tables:overview_table", _scores),
    "results": TableRow("dllm.report.tables:results_table", _scores),
    "pretraining": TableRow("dllm.report.tables:loss_table", lambda plan: plan.pretraining),
    "openwebtext": TableRow("dllm.report.tables:loss_table", lambda plan: plan.openwebtext),
    "ablation": TableRow("dllm.report.tables:loss_table", lambda plan: plan.ablation),
    "chat": TableRow("dllm.report.tables:loss_table", lambda plan: plan.chat),
    "reported": TableRow("dllm.report.tables:reported_table", lambda plan: plan.reported and plan.benchmarks),
    "systems": TableRow("dllm.report.tables:systems_table", lambda plan: plan.systems),
    "answers": TableRow("dllm.report.tables:answers_table", lambda plan: any(s.samples for s in plan.systems)),
    "leaderboard": TableRow("dllm.report.leaderboard:leaderboard_table", lambda plan: plan.leaderboard),
    "policies": TableRow("dllm.report.policies:policies_table", lambda plan: plan.policies),
    "policy-answers": TableRow("dllm.report.policies:policy_answers_table", lambda plan: plan.policies),
    "preferences": TableRow("dllm.report.preferences:preferences_table", lambda plan: plan.preferences),
    "claims": TableRow("dllm.report.tables:claims_table", lambda plan: plan.judges),
    "estimators": TableRow("dllm.report.timed:estimators_table", lambda plan: len(plan.estimators) > 1, timed=True),
    "systems-seconds": TableRow("dllm.report.timed:seconds_table", lambda plan: plan.systems, timed=True),
    "decoding": TableRow("dllm.report.decoding:decoding_table", lambda plan: plan.speed, timed=True),
}

FINAL = (
    "Evaluations on the way may read a part of the held-out rows; the title is about the final one, which reads them "
    "all, as the table does."
)
"""What a caption says of curves."""

FIGURES: dict[str, FigureRow] = {
    "pretraining": FigureRow(
        "dllm.report.curves:curves",
        "dllm.report.curves:draw_pretraining",
        lambda plan: plan.pretraining,
        "Masked diffusion training of the encoders on Wikitext-103. Above: training loss, running mean over a "
        "twentieth of the run. Below: evaluation loss with 95 % intervals. Hollow markers are the first size of a "
        f"family, filled ones the second. {FINAL}",
    ),
    "openwebtext": FigureRow(
        "dllm.report.curves:curves",
        "dllm.report.curves:draw_openwebtext",
        lambda plan: plan.openwebtext,
        "Further training on OpenWebText. The faint line is every logged training loss, the band the 95 % interval of "
        f"the evaluation. {FINAL}",
    ),
    "ablation": FigureRow(
        "dllm.report.curves:curves",
        "dllm.report.curves:draw_ablation",
        lambda plan: plan.ablation,
        "Alpaca tuning from three starts. Published recipe dashed, corrected recipe solid; each row has one scale. "
        f"Bands are 95 % intervals. {FINAL}",
    ),
    "ablation-final": FigureRow(
        "dllm.report.curves:ablation_final_frame",
        "dllm.report.curves:draw_ablation_final",
        lambda plan: plan.ablation,
        "Final losses of the same runs with 95 % intervals: hollow and dashed is the published recipe, filled and "
        "solid the corrected one.",
    ),
    "chat": FigureRow(
        "dllm.report.curves:curves",
        "dllm.report.curves:draw_chat",
        lambda plan: plan.chat,
        "Training of the chat models on tulu-3 and smoltalk. Left: training loss, running mean over a twentieth of the "
        f"run. Right: evaluation loss with 95 % intervals. {FINAL}",
    ),
    "starts": FigureRow(
        "dllm.report.curves:curves",
        "dllm.report.curves:draw_chat",
        lambda plan: plan.starts,
        "The same training on the same chat data from each start. Left: training loss, running mean over a twentieth "
        "of the run. Right: loss on held-out answers with 95 % intervals. A token is one of an answer, or an end that "
        f"fills its block, which is easy. {FINAL}",
    ),
    "sizes": FigureRow(
        "dllm.report.starts:starts_frame",
        "dllm.report.curves:draw_sizes",
        lambda plan: plan.starts,
        "The bound on -log p of a held-out answer against the number of parameters (lower is better), with 95 % "
        "intervals. Filled: from pretrained weights; hollow: from random ones.",
    ),
    "systems": FigureRow(
        "dllm.report.systems:systems_frame",
        "dllm.report.figures:draw_systems",
        lambda plan: plan.systems and (plan.system_benchmarks() or not plan.starts),
        "The systems side by side. Left: the bound on -log p of a test answer (lower is better), exact for the "
        "autoregressive model. Then each score with its 95 % Wilson interval; the upright line is chance.",
    ),
    "policies": FigureRow(
        "dllm.report.policies:policies_frame",
        "dllm.report.policies:draw_policies",
        lambda plan: plan.policies,
        "Learning from rewards, by the log-likelihood of an answer that the gradient is of. Left: reward of held-out "
        "prompts. Right: the bound on held-out chat, which is not rewarded (lower is better). Bands are 95 % "
        "intervals; a thick line is the mean of the runs that differ in the seed alone.",
    ),
    "scores": FigureRow(
        "dllm.report.figures:scores_frame",
        "dllm.report.figures:draw_scores",
        lambda plan: _scores(plan) and not plan.systems,
        "Every score with its 95 % Wilson interval. The upright line is chance, where it is known; a hollow marker "
        "does not lie above it; a cross is the published number of the same model. With this many intervals, about "
        "one in twenty misses its true value.",
    ),
    "speed": FigureRow(
        "dllm.report.figures:speed_frame",
        "dllm.report.figures:draw_speed",
        lambda plan: plan.speed,
        "Generation with fewer denoising steps. Left: seconds for all answers, and the time in proportion to the steps "
        "(dotted). Right: quality at the same steps, with 95 % intervals. These are wall times of one machine.",
    ),
    "decoding": FigureRow(
        "dllm.report.decoding:decoding_frame",
        "dllm.report.decoding:draw_decoding",
        lambda plan: plan.speed,
        "Ways to decode, the exact one first: one token per pass, by confidence. The shaded stretch is its 95 % Wilson "
        "interval; an interval beside it is drawn in the second colour.",
    ),
}
