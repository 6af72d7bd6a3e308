"""Writes the pages, parts of pages and the schema that follow from the code; `--check` says whether they are stale.

    python docs/generate.py           write docs/configuration.md, config/schema.json and the marked parts of pages
    python docs/generate.py --check   exit 1, with one line, if one of them is not what the code says
    python docs/generate.py --benchmark   put the ratios of the benchmark into the README

A marked part is between `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))

from pydantic import WithJsonSchema  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from dllm import config  # noqa: E402
from dllm.config import Project, Settings  # noqa: E402

JOBS = {
    "dllm download": config.DownloadConfig,
    "dllm prepare": config.PrepareConfig,
    "dllm train": config.RunConfig,
    "dllm evaluate": config.EvaluationConfig,
    "dllm sample": config.SampleConfig,
    "dllm speed": config.SpeedConfig,
}
"""What each command reads: the configs that the workflow writes below `configs/` of a work directory."""

# --------------------------------------------------------------------------------------------------------------------
# docs/configuration.md

INTRODUCTION = """# Configuration

Written by `docs/generate.py` from `dllm/config/`; change the help of a field there, not here.

A person writes *entries*, in `config/models.yaml`, `config/datasets.yaml`, `config/experiments.yaml`,
`config/benchmarks.yaml`, `config/reported.yaml` and in an overlay.
A job reads a *config*: entries merged and checked, with every name replaced by a path.
The workflow writes the configs below `configs/` of the work directory when the Snakefile is read.

Unknown keys, wrong types and keys written twice are errors.
An error is one line: file, key, value, what is allowed, and often the nearest known name.
`config/schema.json` is the JSON schema of the merged configuration (an overlay alone is incomplete under it)."""

OVERLAYS = """## How overlays work

`snakemake --configfile A.yaml B.yaml` lays `A.yaml`, then `B.yaml`, over the five files of `config/`.
Without `--configfile` the overlay is `config/laptop.yaml`.

- Mappings are merged key by key. Numbers, texts and lists replace what was there, a list as a whole.
- `null` removes a key: an entry disappears, a setting goes back to its default or to what `like` gives.
- `replaces: [runs, evaluations]` at the top of an overlay: of these sections it keeps nothing that was there before.
  `replaces: all` stands for all of what is made and shown: runs, evaluations, samples, speed, report, reported.
- `new` of a model is replaced as a whole: two architectures are never mixed.
- `like: other`, in `runs` and `recipes`, takes every setting that the entry itself lacks from another entry.
  It is resolved after the overlays are merged, so changing an entry changes those that are like it.
- A run has `epochs` or `steps`. Naming one in an entry drops the other inherited through `like`;
  in an overlay over an entry that has the other, set that other to `null`.
- `init` names a model or another run, and so draws the edge of the graph; a circle is an error.
- `1e-4` is a number; names are lower-case letters, digits, `.` and `-`, because they become file names.
- A hub revision is a commit of 40 digits; a branch name is refused."""


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION, OVERLAYS, "## What a person writes", section("the merged configuration", Project)]
    seen = {Project}
    for name, model in settings_below(Project, seen):
        parts.append(section(name, model))
    parts.append("## What a job reads")
    for name, model in JOBS.items():
        parts.append(section(f"`{name}`", model))
        parts += [section(inner, found) for inner, found in settings_below(model, seen)]
    return "\n\n".join(parts) + "\n"


def settings_below(model: type[Settings], seen: set[type]) -> Iterator[tuple[str, type[Settings]]]:
    """(where it is, class) of every settings class inside a class, in the order of its fields, each once."""
    for name, field in model.model_fields.items():
        for inner in settings_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                yield f"`{name}`", inner
                yield from settings_below(inner, seen)


def settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes in a type such as `dict[str, RunEntry]`."""
    if inspect.isclass(annotation) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from settings_in(argument)


def section(where: str, model: type[Settings]) -> str:
    """One class: a heading, what it is, a table of its settings."""
    lines = [f"### {model.__name__}: {where}", "", inspect.getdoc(model).splitlines()[0], ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (
            f"`{name}`",
            (choices_text(field.metadata) or type_text(field.annotation)) + limits_text(field),
            default_text(field),
            field.description,
        )
        lines.append(f"| {' | '.join((cell or '').replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def choices_text(metadata: Iterable[Any]) -> str:
    """The names that a table allows, where a setting is one of them."""
    found = [name for part in metadata if isinstance(part, WithJsonSchema) for name in part.json_schema["enum"]]
    return ", ".join(f"`{name}`" for name in found)


def type_text(annotation: Any) -> str:
    """A type in words, with links to the settings classes in it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return choices_text(arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_text(part) for part in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"name: {type_text(arguments[1])}" if arguments[1] is not Any else "mapping"
    if issubclass(annotation, Settings):
        return f"[{annotation.__name__}](#{anchor(annotation)})"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[annotation]


def anchor(model: type[Settings]) -> str:
    """The anchor of a class's section."""
    return ANCHORS[model]


def limits_text(field: FieldInfo) -> str:
    """What pydantic's limits allow, such as `, > 0`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least", "max_length": "at most"}
    found = [(sign, getattr(part, key)) for part in field.metadata for key, sign in signs.items() if hasattr(part, key)]
    numbers = [f"{sign} {value}" for sign, value in found if not sign.startswith("at")]
    sizes = [f"{sign} {value} of them" for sign, value in found if sign.startswith("at")]
    return "".join(f", {text}" for text in (*numbers, *sizes))


def default_text(field: FieldInfo) -> str:
    """The default as it would be written in YAML."""
    if field.is_required():
        return "needed"
    if isinstance(field.default, Settings):
        return "its defaults"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def _anchors() -> dict[type, str]:
    """The anchor that GitHub gives each section's heading."""
    seen: set[type] = {Project}
    places = [("the merged configuration", Project), *settings_below(Project, seen)]
    for name, model in JOBS.items():
        places += [(f"`{name}`", model), *settings_below(model, seen)]
    found: dict[type, str] = {}
    for where, model in places:
        found.setdefault(model, re.sub(r"[^a-z0-9_ -]", "", f"{model.__name__}: {where}".lower()).replace(" ", "-"))
    return found


ANCHORS = _anchors()

# --------------------------------------------------------------------------------------------------------------------
# Parts of other pages


def paper_runs() -> str:
    """The runs that config/paper.yaml plans."""
    project = _paper()
    lines = ["| run | starts from | data | length | global batch | budget | recipe | launch |", "|" + "---|" * 8]
    for name, run in project.runs.items():
        budget = f"{run.epochs:g} epochs" if run.epochs else f"{run.steps:,} steps"
        if run.stop_after:
            budget = f"{run.stop_after:,} of {budget}"
        devices = run.resources.nodes * run.resources.gpus_per_node
        cells = (f"`{name}`", run.init, run.data, run.length, run.global_batch_size, budget, run.recipe)
        lines.append(f"| {' | '.join(map(str, cells))} | {run.launch}, {devices} GPUs |")
    return "\n".join(lines)


def paper_downloads() -> str:
    """What config/paper.yaml fetches, with the licences that the entries state."""
    lines = ["| name | hub repository | commit | licence |", "|---|---|---|---|"]
    for name, download in config.download_configs(_paper()).items():
        entry = download.model or download.dataset
        licence = entry.licence or "see its card"
        lines.append(f"| {name} | `{entry.hub}` | `{entry.revision[:8]}` | {licence} |")
    return "\n".join(lines)


def paper_jobs() -> str:
    """How many jobs of each kind config/paper.yaml plans."""
    project = _paper()
    scored = sum(len(project.benchmarks_of(row)) for row in project.evaluations.values())
    counts = {
        "downloads": len(config.download_configs(project)),
        "prepared datasets": len(config.prepare_configs(project)),
        "training runs": len(project.runs),
        f"evaluations ({len(project.evaluations)} rows of at most {len(project.benchmarks)} benchmarks)": scored,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items()) + ", then samples, timing and the report."


def paper_plan() -> str:
    """What config/paper.yaml is predicted to cost where nothing is prepared yet."""
    return _plan(_paper())


def one_gpu_plan() -> str:
    """What config/one-gpu.yaml is predicted to cost where nothing is prepared yet."""
    return _plan(_project("one-gpu"))


def small_plan() -> str:
    """What config/small.yaml is predicted to cost where nothing is prepared yet."""
    return _plan(_project("small"))


def scaling_plan() -> str:
    """What config/scaling.yaml is predicted to cost where nothing is prepared yet."""
    return _plan(_project("small", "scaling"))


def leaderboard_plan() -> str:
    """What config/leaderboard.yaml is predicted to cost where nothing is prepared yet."""
    return _plan(_project("leaderboard"))


def leaderboard_rows() -> str:
    """The rows of config/leaderboard.yaml: what is scored, at which commit, how, and what that is planned to take."""
    from dllm.planning.project import plan_project

    project = _project("leaderboard")
    jobs = plan_project(project, ROOT / "nowhere").jobs
    head = "| row | model | scored by | GPU hours |\n|---|---|---|---:|\n"
    lines = []
    for row, entry in project.evaluations.items():
        name = project.root_model(entry.checkpoint)
        model = project.models[name]
        made = f", trained here ({', '.join(project.stages(entry.checkpoint))})" if entry.checkpoint != name else ""
        hours = sum(jobs["evaluate", f"{row}/{name}"].device_hours for name in project.benchmarks_of(entry))
        how = "what it writes" if entry.chat_template else "likelihood"
        how += ", autoregressive" if entry.kind == "hf" else ""
        lines.append(f"| `{row}` | `{model.hub}` at `{model.revision[:8]}`{made} | {how} | {hours:.1f} |\n")
    return head + "".join(lines).rstrip()


def leaderboard_published() -> str:
    """The published numbers that rows of config/leaderboard.yaml are compared with, each with its source."""
    project = _project("leaderboard")
    columns = {name: entry.label for name, entry in project.benchmarks.items()}
    lines = ["| row | published | read in | under which conditions |", "|---|---|---|---|"]
    for row, entry in project.evaluations.items():
        if not entry.compare:
            lines.append(f"| `{row}` | no number was found in a public record | | |")
            continue
        published, own = project.reported[entry.compare], project.benchmarks_of(entry)
        scores = ", ".join(f"{columns[name]} {published.scores[name]}" for name in own if name in published.scores)
        lines.append(f"| `{row}` | {scores} | {published.source} | {published.note} |")
    return "\n".join(lines)


def _real(name: str) -> Any:
    """A file of the run that is shown as the first one from real weights, as JSON or as text."""
    text = (ROOT / "results/real-weights" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text.strip()


def real_summary() -> str:
    """The first result on real weights in a few lines: figure, what was trained on what, and the findings."""
    with open(ROOT / "results/real-weights/tables/systems.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(ROOT / "results/real-weights/report/systems-seconds.csv", encoding="utf-8", newline="") as file:
        minutes = sorted(float(row["training_seconds"]) / 60 for row in csv.DictReader(file))
    took = f"{minutes[0]:.0f} to {minutes[-1]:.0f}"
    sizes = sorted({int(row["parameters"]) for row in rows})
    encoders = " and ".join(f"{size / 1e6:.1f}" for size in sizes)
    trained = sum(split["train_rows"] for split in _real("data.json")["sources"])
    judged = [f"{claim['claim'][:-1]}: {claim['verdict']}." for claim in _real("claims.json")["claims"]]
    bounds = [
        f"| {row['label']} | {int(row['steps']):,} | {float(row['nats']):.1f} "
        f"[{float(row['nats_low']):.1f}, {float(row['nats_high']):.1f}] |"
        for row in rows
    ]
    table = "\n".join(["| training from | steps | bound, nats per answer |", "|---|---:|---:|", *bounds])
    picture = "![Loss on held-out answers against steps, by start](results/real-weights/figures/starts.png)"
    return (
        f"A first result on real weights, in the sizes that were at hand: encoders of {encoders} million parameters, "
        f"{trained:,} rows of real conversations, {took} minutes of one CPU core for each run.\n"
        f"{' '.join(judged)}\n\n{table}\n\n"
        "The bound is that on -log p of a held-out answer, lower is better, with its 95 % interval; one seed each.\n"
        "Models this small learn what an answer looks like, and hardly to answer: what they say, and what the run can "
        f"and cannot show, is in [docs/small.md](docs/small.md).\n\n{picture}"
    )


def real_data() -> str:
    """Source by source, the rows of the run from real weights."""
    lines = ["| source | rows to train on | rows held out |", "|---|---:|---:|"]
    sources = _real("data.json")["sources"]
    return "\n".join([*lines, *(f"| `{s['hub']}` | {s['train_rows']:,} | {s['test_rows']:,} |" for s in sources)])


def real_claims() -> str:
    """The claims of that run with their verdicts, findings and rules."""
    lines = []
    for claim in _real("claims.json")["claims"]:
        lines.append(f"{claim['number']}. **{claim['verdict']}**: {claim['claim']}")
        lines += [f"   - {finding['verdict']}: {finding['because']}" for finding in claim["findings"]]
        lines.append(f"   - Rule: {claim['rule']} {claim['caveat']}")
    return "\n".join(lines)


def real_answers() -> str:
    """Bounds and answers of all starts side by side."""
    return f"{_real('tables/systems.md')}\n\n{_real('tables/answers.md')}"


def _plan(project: Project) -> str:
    from dllm.planning import show
    from dllm.planning.project import plan_project

    plan = plan_project(project, ROOT / "nowhere")
    return f"```text\n{show.assumptions(plan)}\n\n{show.table(plan, {}, verbose=False)}\n\n{show.totals(plan)}\n```"


GPU_HOUR = 2.0
"""Dollars for an hour of one A100 with 80 GB: an assumption, about what such machines are let for."""


def cluster_needs() -> str:
    """Rule by rule, what a cluster gives to config/paper.yaml, as predicted, and what that costs."""
    from dllm.numbers import duration
    from dllm.planning.project import RULES, plan_project

    plan = plan_project(_paper(), ROOT / "nowhere")
    head = ("rule", "jobs", "runs on", "GPUs of a job", "longest job", "memory of a job", "GPU hours", "cost")
    lines = [f"| {' | '.join(head)} |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    total = 0.0
    for rule in RULES:
        jobs = [job for job in plan.jobs.values() if job.rule == rule]
        hours = sum(job.device_hours for job in jobs if job.place.devices)
        total += hours
        place = {"download": "a node with network", "report": "any node"}.get(rule, "GPU nodes" if hours else "CPU")
        cells = [
            rule, len(jobs), place, max(job.place.devices for job in jobs) or "",
            duration(max(job.cost.seconds for job in jobs)), f"{max(job.cost.host_gib for job in jobs):.1f} GiB",
            f"{hours:,.1f}" if hours else "", f"${hours * GPU_HOUR:,.0f}" if hours else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append(f"| total | {len(plan.jobs)} | | | | | {total:,.0f} | ${total * GPU_HOUR:,.0f} |")
    kept = sum(job.cost.kept_gib for job in plan.jobs.values())
    scratch = max(job.cost.scratch_gib for job in plan.jobs.values())
    lines += ["", f"At ${GPU_HOUR:.2f} for an hour of one {plan.hardware.name}. Disk: {kept:.0f} GiB stay, up to "]
    lines[-1] += f"{scratch:.0f} GiB more while a job runs."
    return "\n".join(lines)


def benchmark() -> str:
    """The targets of the benchmark and what its committed results say of them; and Monte Carlo at its fewest draws."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARK.glob("*.json"))]
    every = [row for case in found for row in case["rows"]]
    fewest = [row for row in every if row["against"].startswith("Monte Carlo 32,") and "equal" not in row["name"]]
    rows = [row for row in every if row["target"] is not None or row in fewest]
    lines = ["| work | against | ratio | asked for |", "|---|---|---:|---:|"]
    for row in rows:
        unit = "" if row["unit"] == "s" else f", {row['unit']}"
        asked = "" if row["target"] is None else f"{row['target']:g} ×"
        asked += ", missed" if asked and row["ratio"] < row["target"] else ""
        lines.append(f"| {row['name']}{unit} | {row['against']} | **{row['ratio']:.3g} ×** | {asked} |")
    machines = sorted({f"{row['hardware']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows})
    commits = sorted({row["commit"][:8] for row in rows})
    return "\n".join([*lines, "", f"From `make bench` on {'; '.join(machines)}, commits {', '.join(commits)}."])


def recipes() -> str:
    """Every switch of the recipes and scorers, as `published` and `corrected` set it."""
    project = _paper()
    lines = ["| switch | corrected | published | published-zero2 |", "|---|---|---|---|"]
    names = ("corrected", "published", "published-zero2")
    for key in config.Recipe.model_fields:
        values = [getattr(project.recipes[name], key) for name in names]
        lines.append(f"| recipe `{key}` | {' | '.join(f'`{value}`' for value in values)} |")
    scorers = [project.scorers[name] for name in ("corrected", "published")]
    for key in ("estimator", "mc_draws", "mc_batch", "budget", "rounds"):
        values = [getattr(scorer.likelihood, key) for scorer in scorers]
        lines.append(f"| scorer `likelihood.{key}` | {' | '.join(f'`{value}`' for value in values)} | |")
    for key in ("special_tokens", "bf16_scores", "fewshot_as_multiturn"):
        values = [json.dumps(getattr(scorer, key)).strip('"') for scorer in scorers]
        lines.append(f"| scorer `{key}` | {' | '.join(f'`{value}`' for value in values)} | |")
    return "\n".join(lines)


def policy() -> str:
    """What `auto` takes for targets of several lengths, and how many different inputs it forwards."""
    from dllm.config import LikelihoodSettings
    from dllm.likelihood.designs import likelihood_design
    from dllm.likelihood.policy import estimator_for

    lines = [
        "| target tokens | `auto` takes | passes, budget 64 | budget 16 | `mc`, 128 draws |",
        "|---|---|---|---|---|",
    ]
    for length in (1, 2, 3, 5, 6, 8, 12, 16, 32, 64, 128):
        cells = []
        for settings in (LikelihoodSettings(), LikelihoodSettings(budget=16), LikelihoodSettings(estimator="mc")):
            passes = len(likelihood_design(length, 0, settings).masked.unique(dim=0))
            name = f" ({estimator_for(length, settings)})" if settings.budget == 16 else ""
            cells.append(f"{passes}{name}")
        lines.append(f"| {length} | {estimator_for(length, LikelihoodSettings())} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread() -> str:
    """Standard deviation of each estimator over 100 keys, on the two toy models of the tests."""
    import torch

    from dllm.config import LikelihoodSettings
    from dllm.likelihood.designs import estimate, likelihood_design
    from tests.oracles import markov_backbone, tabular_backbone

    kinds = {
        "`mc`, 128 draws": LikelihoodSettings(estimator="mc"),
        "`lattice`, budget 16": LikelihoodSettings(estimator="lattice", budget=16),
        "`lattice`, budget 64": LikelihoodSettings(estimator="lattice"),
    }
    models = {"random table": tabular_backbone(3), "Markov chain": markov_backbone(3)}
    lines = [f"| model | target tokens | {' | '.join(kinds)} |", "|" + "---|" * (2 + len(kinds))]
    for name, backbone in models.items():
        for length in (3, 6, 9):
            table, cells = _nll_table(backbone, length), []
            for settings in kinds.values():
                values = []
                for key in range(100):
                    design = likelihood_design(length, key, settings)
                    row = (design.masked.long() << torch.arange(length)).sum(-1)
                    values.append(estimate(design, table[row])[0])
                cells.append(f"{torch.tensor(values, dtype=torch.float64).std():.2f}")
            lines.append(f"| {name} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _nll_table(backbone, length: int):
    """nll_i(S) of a toy model for every set S of masked tokens of one target: [2^L, L]."""
    import torch

    target = torch.arange(length) % 3
    masked = (torch.arange(2**length)[:, None] >> torch.arange(length)) & 1 == 1
    logits = backbone.model.logits_of(torch.where(masked, backbone.mask_id, target)).double()
    logits[..., backbone.mask_id] = -torch.inf
    return -logits.log_softmax(-1).gather(-1, target.expand(2**length, -1)[..., None])[..., 0]


def revising() -> str:
    """What `python -m bench revising` has measured, one line for each model, questions, temperature and way."""
    measured = json.loads((BENCHMARK / "revising.json").read_text(encoding="utf-8"))
    rows = measured["setup"]["answers"]
    steps = sorted({row["steps"] for row in rows})
    lines = ["| model | questions | temperature | way | " + " | ".join(f"{count} steps" for count in steps) + " |"]
    lines.append("|---|---|---|---|" + "---:|" * len(steps))
    by_line: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        key = (row["model"], row["questions"], f"{row['temperature']:g}", row["way"])
        by_line.setdefault(key, {})[row["steps"]] = row
    for key, own in by_line.items():
        cells = [
            f"{one['right']} of {one['of']}; {one['bound']:.2f}; {one['repeated']:.1%}"
            if (one := own.get(count))
            else ""
            for count in steps
        ]
        lines.append("| " + " | ".join((*key, *cells)) + " |")
    note = (
        "Right answers; the model's bound of all answers, nats per token; share of tokens that repeat the one before. "
        f"From `python -m bench revising` on {measured['hardware']}, commit {measured['commit'][:8]}."
    )
    return "\n".join([*lines, "", note])


def rewards() -> str:
    """What runs that learn from rewards gave: the table of a report, as it wrote it."""
    with open(ROOT / "docs/images/policies.csv", encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    head = "| run | steps | reward before | after | rise | bound on chat before | after |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for run in runs:
        value = {key: float(text) for key, text in run.items() if key not in ("label", "run")}
        rise = f"{value['rise']:+.2f} ± {value['rise_standard_error']:.2f}"
        both = f"{value['reward_before']:.2f} | {value['reward_after']:.2f} | {rise}"
        bounds = f"{value['bound_before']:.3f} | {value['bound_after']:.3f}"
        lines.append(f"| `{run['run']}` | {run['steps']} | {both} | {bounds} |")
    project = _project("laptop", "systems")
    run = project.runs[runs[0]["run"]]
    least = min(float(row["rise"]) / float(row["rise_standard_error"]) for row in runs)
    note = (
        f"Reward: the mean of {run.policy.num_generations_eval} answers to each of "
        f"{project.datasets[run.data].test_documents} held-out prompts. The rise stands with its standard error over "
        f"prompts; the smallest is {least:.1f} of its standard errors."
    )
    return "\n".join([*lines, "", note])


def gradients() -> str:
    """How noisy the gradients of three likelihoods of an answer are, as `python -m bench policy` measured it."""
    measured = json.loads((BENCHMARK / "policy.json").read_text(encoding="utf-8"))
    result = measured["setup"]
    lines = ["| likelihood | cosine | norm | noise of the masks |", "|---|---:|---:|---:|"]
    means = {}
    for name in dict.fromkeys(row["likelihood"] for row in result["estimates"]):
        rows = [row for row in result["estimates"] if row["likelihood"] == name]
        cosine, norm, noise = (sum(row[k] for row in rows) / len(rows) for k in ("cosine", "norm", "mask_noise"))
        lines.append(f"| `{name}` | {cosine:.2f} | {norm:.2f} | {100 * noise:.0f} % |")
        means[name] = cosine
    best = max(means, key=lambda name: means[name])
    answers, prompts, passes, long = (
        result[key] for key in ("answers_per_estimate", "prompts", "passes", "answers_per_prompt")
    )
    made = (
        f"{answers} answers to {prompts} prompts per estimate, {passes} passes for each, by {measured['hardware']}. "
        f"The long-run gradient is that of the expected reward, from {long} answers to each prompt and their exact "
        f"log-probabilities; the cosine of its two halves is {result['halves_cosine']:.2f}."
    )
    note = (
        "Cosine and norm: of an estimate with the long-run gradient, and relative to its norm. Noise of the masks: the "
        "squared norm of what changes from one draw of them to the next, of that of the mean. Nearest to the long-run "
        f"gradient is `{best}`."
    )
    return "\n".join([made, "", *lines, "", note])


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "revising": ("docs/samplers.md", revising),
    "paper runs": ("docs/reproduce.md", paper_runs),
    "paper downloads": ("docs/reproduce.md", paper_downloads),
    "paper jobs": ("docs/reproduce.md", paper_jobs),
    "paper plan": ("docs/reproduce.md", paper_plan),
    "cluster needs": ("docs/reproduce.md", cluster_needs),
    "needs": ("README.md", cluster_needs),
    "one-gpu plan": ("docs/reproduce.md", one_gpu_plan),
    "small plan": ("docs/small.md", small_plan),
    "scaling plan": ("docs/small.md", scaling_plan),
    "leaderboard plan": ("docs/leaderboard.md", leaderboard_plan),
    "leaderboard rows": ("docs/leaderboard.md", leaderboard_rows),
    "leaderboard published": ("docs/leaderboard.md", leaderboard_published),
    "real data": ("docs/small.md", real_data),
    "real claims": ("docs/small.md", real_claims),
    "real answers": ("docs/small.md", real_answers),
    "real weights": ("README.md", real_summary),
    "rewards": ("docs/rl.md", rewards),
    "gradients": ("docs/rl.md", gradients),
    "recipes": ("docs/recipes.md", recipes),
    "estimator policy": ("docs/algorithms.md", policy),
    "estimator spread": ("docs/algorithms.md", spread),
}
"""Name of a marked part: the page it stands on, and what writes it."""


def _paper() -> Project:
    return _project("paper")


def _project(*names: str) -> Project:
    return config.load_project(ROOT / "config", *(ROOT / "config" / f"{name}.yaml" for name in names))


def with_part(text: str, name: str, content: str) -> str:
    """A page's text with one marked part replaced. Raises ValueError if the page has no such part."""
    pattern = re.compile(rf"(<!-- generated: {re.escape(name)} -->\n).*?(<!-- /generated -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"the part {name!r} is not marked on its page; put <!-- generated: {name} --> there")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


# --------------------------------------------------------------------------------------------------------------------


def generated() -> dict[str, str]:
    """Every generated file: path from the root, and what it should hold."""
    files = {
        "docs/configuration.md": configuration_page(),
        "config/schema.json": json.dumps(config.schema(), indent=2, ensure_ascii=False) + "\n",
    }
    for name, (page, write) in PARTS.items():
        text = files.get(page) or (ROOT / page).read_text(encoding="utf-8")
        files[page] = with_part(text, name, write())
    return files


def stale(files: dict[str, str]) -> list[str]:
    """Paths whose file is missing or holds something else."""
    paths = {path: ROOT / path for path in files}
    return [p for p, file in paths.items() if not file.exists() or file.read_text(encoding="utf-8") != files[p]]


def main(arguments: list[str] | None = None) -> int:
    """Write what is stale, or with `--check` only say so."""
    parser = argparse.ArgumentParser(description="Write docs/configuration.md, config/schema.json and parts of pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--benchmark", action="store_true", help="put the results of `make bench` into the README")
    args = parser.parse_args(arguments)
    if args.benchmark:
        readme = ROOT / "README.md"
        text = with_part(readme.read_text(encoding="utf-8"), "benchmark", benchmark())
        readme.write_text(text, encoding="utf-8")
    files = generated()
    old = stale(files)
    if args.check:
        if old:
            print(f"{', '.join(old)}: not what the code says; run python docs/generate.py", file=sys.stderr)
        return 1 if old else 0
    for path in old:
        (ROOT / path).write_text(files[path], encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
