"""The published claims as verdicts computed from the data, each with its rule; those on starts are in `starts`."""

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pandas as pd

from dllm.numbers import duration
from dllm.report.format import fixed, in_words, interval, joined, signed_interval
from dllm.report.load import final_losses, read_provenance, read_speed, scores
from dllm.report.plan import RECIPES, ReportPlan, ResultRow
from dllm.report.starts import STARTS_CLAIMS
from dllm.report.statistics import Estimate, Verdict, all_of, decide_below, decide_within
from dllm.report.verdicts import Claim, ClaimRow, Finding, claim_of, unless_truncated, without_verdict

MODERNBERT = "modernbert"


def build_claims(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes `out` (claims.json): the question, its short answer and the claims. Returns the path written."""
    claims = judge(workdir, plan)
    question = "What does pretraining give a chatbot?" if plan.starts else "Can BERTs chat?"
    record = {"toy": plan.toy, "question": question, "answer": short_answer(workdir, plan, claims)}
    record |= {"claims": [asdict(claim) for claim in claims]}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return (out,)


def judge(workdir: Path, plan: ReportPlan) -> tuple[Claim, ...]:
    """The claims of a plan, in their order."""
    claims = (make(*read(workdir, plan), plan) for make, read in claims_of(plan))
    return tuple(replace(claim, number=number) for number, claim in enumerate(claims, 1))


def claims_of(plan: ReportPlan) -> tuple[ClaimRow, ...]:
    """The published claims; those on starts where runs differ in what they start from."""
    return STARTS_CLAIMS if plan.starts else CLAIMS


def encoder_claim(losses: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Claim 1, from the final losses of the encoders: does a ModernBERT end lowest?

    A recipe under which only one side was run has no finding.
    """
    findings = []
    families = {entry.run: entry.encoder_family for entry in plan.pretraining}
    for recipe, runs in _by_recipe(losses):
        modern = runs["run"].map(families) == MODERNBERT
        if modern.all() or not modern.any():
            continue
        for split, name in (("train", "training"), ("eval", "evaluation")):
            part = f"{name} loss"
            best, rival = (runs[group].nsmallest(1, f"{split}_loss").iloc[0] for group in (modern, ~modern))
            lead = _estimate(best, split) - _estimate(rival, split)
            because = (
                f"{best['label']} ends at {fixed(best[f'{split}_loss'], 3)} and the best other encoder, "
                f"{rival['label']}, at {fixed(rival[f'{split}_loss'], 3)} nats per token: a difference of "
                f"{signed_interval(lead.value, lead.low, lead.high, 3)}."
            )
            finding = Finding(part, recipe, decide_below(lead, 0.0), because)
            findings.append(unless_truncated(finding, runs))
    return claim_of(
        "Of six encoders trained on Wikitext-103 with the masked diffusion objective, ModernBERT has the lowest loss.",
        "Holds if the lowest ModernBERT loss is at least 2 combined standard errors below the lowest loss of any other "
        "encoder, fails if it is as far above, and is undecided between. The training loss, of which the claim speaks, "
        "decides; the evaluation loss is shown beside it.",
        findings,
        "Encoders with different tokenizers split a text into different numbers of tokens, "
        "so that nats per token favour the finer vocabulary.",
        deciding=[finding for finding in findings if finding.part == "training loss"],
    )


def openwebtext_claim(losses: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Claim 2, from the first and last evaluation on OpenWebText: does the loss hardly fall?"""
    findings = []
    for recipe, runs in _by_recipe(losses):
        for _, run in runs.iterrows():
            first = Estimate(run["first_eval_loss"], run["first_eval_standard_error"])
            fall = (first - _estimate(run, "eval")) / first.value
            verdict = decide_below(fall, plan.rules.hardly_lower)
            because = (
                f"From step {run['first_eval_step']} to step {run['steps']} the evaluation loss of {run['label']} goes "
                f"from {fixed(first.value, 3)} to {fixed(run['eval_loss'], 3)} nats per token, a fall of "
                f"{_percent_interval(fall)} %."
            )
            if run["first_eval_step"] > 0.05 * run["steps"]:
                verdict = "undecided"
                because += " The first evaluation comes too late to see the start of the run."
            findings.append(unless_truncated(Finding("evaluation loss", recipe, verdict, because), run.to_frame().T))
    margin = fixed(100 * plan.rules.hardly_lower, 0)
    return claim_of(
        "Further training of ModernBERT-large on OpenWebText hardly lowers the loss.",
        f"Holds if the relative fall of the evaluation loss is below {margin} % by 2 combined standard errors, fails "
        "if it is above by as much, and is undecided between, or if the first evaluation comes after 5 % of the run.",
        findings,
    )


def ablation_claim(losses: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Claim 3, from the final losses of the ablation: do all starts end at nearly the same loss?"""
    findings = []
    for recipe, runs in _by_recipe(losses):
        for split, name in (("train", "training"), ("eval", "evaluation")):
            pairs = [
                (decide_within(gap, plan.rules.same_loss), gap, one["label"], other["label"])
                for one, other in combinations([row for _, row in runs.iterrows()], 2)
                for gap in [_relative_gap(_estimate(one, split), _estimate(other, split))]
            ]
            if not pairs:
                findings.append(Finding(f"{name} loss", recipe, "undecided", "One start alone has no difference."))
                continue
            _, widest, one, other = max(pairs, key=lambda pair: abs(pair[1].value))
            within = sum(verdict == "holds" for verdict, *_ in pairs)
            because = (
                f"The widest of {len(pairs)} differences is {one} against {other}: "
                f"{_percent_interval(widest, signed=True)} %; {within} of {len(pairs)} lie surely within the margin."
            )
            finding = Finding(f"{name} loss", recipe, all_of([pair[0] for pair in pairs]), because)
            findings.append(unless_truncated(finding, runs))
    margin = fixed(100 * plan.rules.same_loss, 0)
    return claim_of(
        "Alpaca tuning from three starts (untuned, after Wikitext, after OpenWebText) ends at nearly the same training "
        "and evaluation loss.",
        f"A pair of starts counts as the same if its relative difference, widened by 2 combined standard errors, stays "
        f"within ±{margin} %, and as different if it lies wholly outside. Holds if every pair is the same, fails if "
        "one is different, and is undecided otherwise: a noisy loss shows nothing.",
        findings,
        "All runs meet the same evaluation noise, so their errors are partly shared and the combined one is cautious. "
        "One seed each: how much another seed would move a loss is not in these intervals.",
    )


def chat_claim(score_frame: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Claim 4, from the scores: are the chat models above chance, and is the large one close to Qwen1.5-0.5B?"""
    findings = []
    for row in (row for row in plan.results if row.kind == "ours"):
        own = score_frame[(score_frame["run"] == row.run) & score_frame["chance"].notna()]
        if own.empty:
            continue
        above, below = ((own["against_chance"] == side).sum() for side in ("above", "below"))
        verdict = _majority(int(above), int(len(own) - above), len(own))
        because = f"{row.label}: {above} of {len(own)} scores are above chance"
        because += f" and {below} below it." if below else "."
        of_row = [Finding("above chance", row.recipe, verdict, because)]
        if row.close_to:
            of_row.append(_closeness(own, row, plan))
        findings += [without_verdict(finding, [row.label]) if row.truncated else finding for finding in of_row]
    points = fixed(plan.rules.close_points, 0)
    return claim_of(
        "Instruction tuning alone turns ModernBERT into a chat model, and the large one comes close to Qwen1.5-0.5B.",
        "Above chance: holds if the 95 % interval lies above chance on more than half of the benchmarks, fails "
        f"otherwise. Close: a score is close if its interval lies above the published one less {points} points, and "
        "not close if it lies below; holds or fails by more than half of the shared benchmarks, undecided otherwise.",
        findings,
        "The published numbers come without intervals and are taken as exact. Where chance is 0, as for free answers, "
        "a few right ones lie above it.",
    )


def cost_claim(provenance: dict | None, speed: pd.DataFrame | None, plan: ReportPlan) -> Claim:
    """Claim 5, from the wall time of the large chat run and from the timed generation."""
    rules = plan.rules
    low, high = rules.halving
    return claim_of(
        "The large chat model costs about 50 GPU hours (A100), and half the diffusion steps take about half the time.",
        f"Cost: wall time × devices, within a factor {fixed(rules.gpu_hours_factor)} of {fixed(rules.gpu_hours, 0)} "
        "hours; undecided on other hardware. Steps: holds if every halving of the steps divides the time by "
        f"{fixed(low)} to {fixed(high)}, fails if the median ratio lies outside, undecided otherwise.",
        [_training_cost(provenance, plan), _halving(speed, plan)],
        "Wall times belong to one machine and one day.",
    )


def short_answer(workdir: Path, plan: ReportPlan, claims: tuple[Claim, ...]) -> list[str]:
    """Can BERTs chat? Two to four sentences, computed from the scores and the verdicts."""
    sentences = []
    if plan.starts:
        decided = [claim.findings[0].because for claim in claims if claim.verdict != "undecided"]
        return [*decided, f"Of the {in_words(len(claims))} claims, {_counted(claims)}."]
    if plan.toy:
        sentences.append("This toy run cannot say: it shows that the pipeline works from data to report.")
    frame = scores(workdir, plan)
    ours = frame[frame["kind"] == "ours"] if len(frame) else frame
    if len(ours) and (ours["recipe"] == "corrected").any():
        ours = ours[ours["recipe"] == "corrected"]
    for label, rows in ours.groupby("label", sort=False) if len(ours) else ():
        known = rows[rows["chance"].notna()]
        above = known[known["against_chance"] == "above"]
        if known.empty:
            continue
        text = f"{label} scores above chance on {len(above)} of {len(known)} benchmarks"
        names = above["benchmark_label"].tolist()
        sentences.append(f"{text} ({joined(names)})." if names else f"{text}.")
    if not plan.toy and len(ours):
        verdict = claims[3].verdict
        opening = {"holds": "Yes, within limits.", "does not hold": "Not convincingly.", "undecided": "In part."}
        sentences.insert(0, opening[verdict])
    judged = ", judged on toy data" if plan.toy else ""
    sentences.append(f"Of the {in_words(len(claims))} published claims{judged}, {_counted(claims)}.")
    return sentences


def _counted(claims: tuple[Claim, ...]) -> str:
    """`1 and 3 hold and 2 is undecided`."""
    counts = [(verdict, [str(c.number) for c in claims if c.verdict == verdict]) for verdict in _ORDER]
    return joined([f"{joined(numbers)} {_VERB[verdict][len(numbers) > 1]}" for verdict, numbers in counts if numbers])


_ORDER: tuple[Verdict, ...] = ("holds", "does not hold", "undecided")
_VERB = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
}


def _by_recipe(losses: pd.DataFrame):
    """Recipe and its rows, published first; nothing for an empty frame."""
    for recipe in RECIPES:
        if len(losses) and (losses["recipe"] == recipe).any():
            yield recipe, losses[losses["recipe"] == recipe]


def _estimate(row: pd.Series, split: str) -> Estimate:
    error = row[f"{split}_standard_error"]
    return Estimate(row[f"{split}_loss"], 0.0 if pd.isna(error) else error)


def _relative_gap(one: Estimate, other: Estimate) -> Estimate:
    return (one - other) / ((one.value + other.value) / 2)


def _percent_interval(share: Estimate, *, signed: bool = False) -> str:
    show = signed_interval if signed else interval
    return show(100 * share.value, 100 * share.low, 100 * share.high)


def _majority(holding: int, failing: int, total: int) -> Verdict:
    if 2 * holding > total:
        return "holds"
    return "does not hold" if 2 * failing >= total else "undecided"


def _closeness(own: pd.DataFrame, row: ResultRow, plan: ReportPlan) -> Finding:
    rival = plan.reported_row(row.close_to)
    assert rival is not None  # the plan is checked: `close_to` names a published row
    shared = own[own["benchmark"].isin(rival.scores)]
    gap_low, gap_high = (shared[end] - shared["benchmark"].map(rival.scores) for end in ("low", "high"))
    close = shared[gap_low > -plan.rules.close_points]
    apart = shared[gap_high < -plan.rules.close_points]
    because = (
        f"{row.label} is close to {row.close_to}, or better, on {len(close)} of {len(shared)} benchmarks, and not "
        f"close on {len(apart)}"
    )
    because += f" ({joined(apart['benchmark_label'].tolist())})." if len(apart) else "."
    verdict: Verdict = "undecided"
    if 2 * len(close) > len(shared):
        verdict = "holds"
    elif 2 * len(apart) > len(shared):
        verdict = "does not hold"
    if plan.toy:
        verdict, because = "undecided", "A toy model's scores are not comparable with published ones."
    return Finding(f"close to {row.close_to}", row.recipe, verdict, because)


def _chat_provenance(workdir: Path, plan: ReportPlan) -> dict | None:
    """Provenance of the large chat model: the trained run that claim 4 compares, else the last corrected chat run."""
    compared = [row.run for row in plan.results if row.close_to and row.run in plan.trained_runs()]
    last = [entry.run for entry in plan.chat if entry.recipe == "corrected"][-1:]
    runs = [*compared, *last]
    return read_provenance(workdir, runs[0]) if runs else None


def _speed(workdir: Path, plan: ReportPlan) -> pd.DataFrame | None:
    return read_speed(workdir, plan.speed) if plan.speed else None


def _training_cost(provenance: dict | None, plan: ReportPlan) -> Finding:
    part, rules = "training cost", plan.rules
    if provenance is None:
        return Finding(part, "", "undecided", "The plan has no chat run.", timed=True)
    truncated = {entry.run for entry in plan.chat if entry.truncated} | {r.run for r in plan.results if r.truncated}
    if provenance["run"] in truncated:
        return without_verdict(Finding(part, "", "undecided", "", timed=True), [provenance["run"]])
    hours = provenance["wall_seconds"] * int(provenance.get("processes") or 1) / 3600
    machine = ", ".join(str(provenance[key]) for key in ("hardware", "device") if provenance.get(key))
    because = f"{provenance['run']} took {fixed(hours)} device hours ({machine})."
    if plan.toy:
        took = duration(provenance["wall_seconds"])
        return Finding(part, "", "undecided", f"A toy model trains in {took}; its cost says nothing.", timed=True)
    if "A100" not in machine:
        return Finding(part, "", "undecided", f"{because} The claim is about A100 hours.", timed=True)
    inside = rules.gpu_hours / rules.gpu_hours_factor <= hours <= rules.gpu_hours * rules.gpu_hours_factor
    return Finding(part, "", "holds" if inside else "does not hold", because, timed=True)


def _halving(speed: pd.DataFrame | None, plan: ReportPlan) -> Finding:
    part, (low, high) = "half the steps", plan.rules.halving
    ratios = halving_ratios(speed) if speed is not None else pd.Series(dtype=float)
    if ratios.empty:
        return Finding(part, "", "undecided", "No two timed points differ by a factor of 2 in steps.", timed=True)
    because = (
        f"{len(ratios)} halvings divide the time by {fixed(ratios.min(), 2)} to {fixed(ratios.max(), 2)} "
        f"(median {fixed(ratios.median(), 2)})."
    )
    if ratios.between(low, high).all():
        return Finding(part, "", "holds", because, timed=True)
    inside = low <= ratios.median() <= high
    return Finding(part, "", "undecided" if inside else "does not hold", because, timed=True)


def halving_ratios(speed: pd.DataFrame) -> pd.Series:
    """Time with S steps over time with S / 2 steps, for every S measured at both; indexed by S."""
    seconds = speed.set_index("steps")["seconds"]
    pairs = {steps: steps // 2 for steps in seconds.index if steps % 2 == 0 and steps // 2 in seconds.index}
    return pd.Series({steps: seconds[steps] / seconds[half] for steps, half in pairs.items()}, dtype=float)


CLAIMS: tuple[ClaimRow, ...] = (
    (encoder_claim, lambda workdir, plan: (final_losses(workdir, plan.pretraining),)),
    (openwebtext_claim, lambda workdir, plan: (final_losses(workdir, plan.openwebtext),)),
    (ablation_claim, lambda workdir, plan: (final_losses(workdir, plan.ablation),)),
    (chat_claim, lambda workdir, plan: (scores(workdir, plan),)),
    (cost_claim, lambda workdir, plan: (_chat_provenance(workdir, plan), _speed(workdir, plan))),
)
"""The published claims in their order."""
