"""Learning from rewards: rewards of held-out prompts against steps, what else changes, and what answers become."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dllm.numbers import Z95
from dllm.report.format import fixed, interval, signed_interval
from dllm.report.load import read_metrics, split_of
from dllm.report.plan import ReportPlan
from dllm.report.style import WIDTH, head, looks
from dllm.report.tables import Table, table_of

PANELS = {
    "reward": "Reward of held-out prompts",
    "loss": "Bound on held-out chat, nats per token",
}


def policies_frame(workdir: Path, plan: ReportPlan, name: str = "policies") -> pd.DataFrame:
    """One row per run and evaluation: label, run, step, and reward and bound with their 95 % intervals."""
    frames = []
    for entry in plan.policies:
        rows = split_of(read_metrics(workdir, entry.run), "eval")
        frame = pd.DataFrame({"label": entry.label, "run": entry.run, "step": rows["step"]})
        for column, error in (("reward", "reward_standard_error"), ("loss", "standard_error")):
            half = Z95 * rows[error].astype(float)
            frame[column] = rows[column]
            frame[f"{column}_low"], frame[f"{column}_high"] = rows[column] - half, rows[column] + half
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def draw_policies(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Reward, and the bound on other data, against steps: a thin line per run, a thick one for the mean of a label."""
    looks_of = looks(frame["label"])
    figure = Figure(figsize=(WIDTH, 3.8))
    for axes, (column, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for label, rows in frame.groupby("label", sort=False):
            look = looks_of[label]
            for _, run in rows.groupby("run"):
                axes.fill_between(
                    run["step"], run[f"{column}_low"], run[f"{column}_high"], color=look.color, alpha=0.08
                )
                axes.plot(run["step"], run[column], color=look.color, linewidth=0.8, alpha=0.6)
            mean = rows.groupby("step")[column].mean()
            axes.plot(mean.index, mean, look.marker, color=look.color, linestyle="-", label=label)
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    head(figure, _ending(frame[frame["step"] == frame["step"].max()]), below=0.2)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="upper left",
        ncols=len(looks_of),
        bbox_to_anchor=(0.0, 1 - 0.36 / figure.get_figheight()),
    )
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.15, wspace=0.16)
    return figure


def _ending(last: pd.DataFrame) -> str:
    """Which likelihood ends with the highest reward, and from which others it is not apart."""
    means = last.groupby("label")[["reward", "reward_low", "reward_high"]].mean().sort_values("reward")
    best = means.iloc[-1]
    near = [name for name, one in means.iloc[:-1].iterrows() if one["reward_high"] >= best["reward_low"]]
    apart = f"; its interval overlaps with {' and '.join(map(str, near))}" if near else ""
    return f"{means.index[-1]} ends with the highest reward, {fixed(best['reward'], 2)}{apart}"


def policies_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per run: reward and bound before and after, and how far the rewarded model is from its start."""
    tidy, rows = [], []
    for entry in plan.policies:
        metrics = read_metrics(workdir, entry.run)
        steps, evaluations = split_of(metrics, "train"), split_of(metrics, "eval")
        first, last = evaluations.iloc[0], evaluations.iloc[-1]
        error = (first["reward_standard_error"] ** 2 + last["reward_standard_error"] ** 2) ** 0.5
        row: dict[str, Any] = {
            "label": entry.label,
            "run": entry.run,
            "steps": int(metrics["step"].max()),
            "reward_before": first["reward"],
            "reward_after": last["reward"],
            "rise": last["reward"] - first["reward"],
            "rise_standard_error": error,
            "bound_before": first["loss"],
            "bound_after": last["loss"],
            "kl": steps["kl"].iloc[-1] if "kl" in steps else float("nan"),
            "clipped": steps["clipped"].mean(),
            "distinct": steps["distinct"].iloc[-1],
        }
        tidy.append(row)
        half = Z95 * error
        rows.append(
            (
                entry.label,
                fixed(row["steps"], 0),
                _with_interval(first),
                _with_interval(last),
                signed_interval(row["rise"], row["rise"] - half, row["rise"] + half, 2),
                fixed(row["bound_before"], 3),
                fixed(row["bound_after"], 3),
                fixed(row["kl"], 3),
                fixed(100 * row["clipped"], 1),
            )
        )
    columns = ("Likelihood", "Steps", "Reward before", "after", "Rise", "Bound before", "after", "KL", "Clipped, %")
    note = (
        "Reward: mean of answers to held-out prompts, drawn as in training, with 95 % intervals over prompts. Bound: "
        "nats per token of held-out chat, which is not rewarded. KL: per log-likelihood, from the start, in the last "
        "step. Clipped: share of the ratios, over all steps."
    )
    caption = "Learning from rewards: each run before and after."
    return table_of(name, caption, columns, rows, pd.DataFrame(tidy), note)


def _with_interval(row: pd.Series) -> str:
    half = Z95 * row["reward_standard_error"]
    return interval(row["reward"], row["reward"] - half, row["reward"] + half, 2)


def policy_answers_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """What the first run of each label answers to the first held-out prompts, evaluation by evaluation."""
    firsts = {entry.label: entry.run for entry in reversed(plan.policies)}
    tidy, rows = [], []
    for label in dict.fromkeys(entry.label for entry in plan.policies):
        for row in split_of(read_metrics(workdir, firsts[label]), "eval").itertuples():
            for sample in row.samples:
                tidy.append({"label": label, "step": row.step, **sample})
            answers = [sample["answer"] for sample in row.samples]
            rows.append((label, fixed(row.step, 0), *answers))
    prompts = list(dict.fromkeys(row["prompt"] for row in tidy))
    columns = ("Likelihood", "Step", *prompts)
    caption = "Answers over time, to the first held-out prompts, neither chosen nor edited."
    return table_of(name, caption, columns, rows, pd.DataFrame(tidy), left=len(columns))
