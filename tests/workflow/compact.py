"""Plans as short texts that a person can read a difference in: nothing said twice, and nothing left out.

A job's config is written without values that are its class's defaults, which `defaults_text` lists once. What all jobs
of a kind share, what all of an evaluation's row or benchmark share, and models and datasets that are downloaded, are
written once. `configs_text` reads its own text back and compares it with the files, so that no value can go missing.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import dllm.config
from dllm.config import DownloadConfig, EvaluationConfig, PrepareConfig, RunConfig, SampleConfig, SpeedConfig
from dllm.report.plan import ReportPlan

KINDS = {
    "downloads": DownloadConfig, "data": PrepareConfig, "runs": RunConfig, "evals": EvaluationConfig,
    "samples": SampleConfig, "speed": SpeedConfig, "report": ReportPlan,
}  # fmt: skip
WIDTH = 118


def defaults_text() -> str:
    """Every setting of every settings class with its default; `...` where a value must be given."""
    lines = []
    classes = {c for c in vars(dllm.config).values() if isinstance(c, type) and issubclass(c, BaseModel)}
    for cls in sorted({*classes, ReportPlan}, key=lambda c: c.__name__):
        if cls.model_fields:
            settings = {name: _default(field) for name, field in cls.model_fields.items()}
            lines += _entry(cls.__name__, settings)
    return "\n".join(lines) + "\n"


def configs_text(workdir: Path) -> str:
    """Every config below `workdir`/configs. Raises AssertionError if the text does not say all that the files say."""
    files = {}
    for path in sorted((workdir / "configs").rglob("*.yaml")):
        kind, _, name = path.relative_to(workdir / "configs").with_suffix("").as_posix().partition("/")
        written = yaml.safe_load(path.read_text())
        given = KINDS[kind].model_validate(written, strict=False)
        assert given.model_dump(mode="json") == written, f"{path}: its class reads another content"
        files.setdefault(kind, {})[name] = given.model_dump(mode="json", exclude_defaults=True)
    known = {}
    for name, config in files["downloads"].items():
        known |= {_key(config[what]): f"downloads/{name}" for what in ("model", "dataset") if what in config}
    recipes = {}
    for run in files["runs"].values():
        recipe = recipes.setdefault(run["recipe_name"], run["recipe"])
        if recipe == run["recipe"]:
            del run["recipe"]
        run["model"] = known.get(_key(run["model"]), run["model"])
    for data in files["data"].values():
        data["model"] = known.get(_key(data["model"]), data["model"])
        for part in data["parts"]:
            part["entry"] = known.get(_key(part["entry"]), part["entry"])
    lines = []
    for kind, jobs in files.items():
        lines += ["", f"# {kind}"]
        lines += [line for name, recipe in recipes.items() for line in _entry(f"recipe {name}", recipe)] * (
            kind == "runs"
        )
        if kind == "report":
            lines += [line for key, value in jobs[""].items() for line in _entry(key, value)]
        else:
            lines += _factored(jobs, grid=kind == "evals")
    return "\n".join(lines).lstrip() + "\n"


def _factored(jobs: dict[str, dict], *, grid: bool) -> list[str]:
    """Jobs without what they share: all of them, or in a grid of row/benchmark, those of one row or one benchmark."""
    flat = {name: _flat(config) for name, config in jobs.items()}
    groups = [("all", lambda name: "")] if len(jobs) > 1 else []
    if grid:
        groups += [("row", lambda name: name.split("/")[0]), ("benchmark", lambda name: name.split("/")[1])]
    left, read = {name: dict(values) for name, values in flat.items()}, {name: {} for name in flat}
    lines = []
    for what, of in [*groups, ("", lambda name: name)]:
        for group, values in _shared(left, of).items():
            lines += _entry(f"{what} {group}".strip(), values) if values else []
            for name in (name for name in flat if of(name) == group):
                read[name] |= values
                left[name] = {key: value for key, value in left[name].items() if key not in values}
    assert read == flat, "the text leaves something out"
    return lines


def _shared(flat: dict[str, dict], of) -> dict[str, dict]:
    """What all members of a group have in common, group by group; `of` names the group of a job."""
    groups: dict[str, dict] = {}
    for name, values in flat.items():
        group = of(name)
        before = groups.get(group, values)
        groups[group] = {key: value for key, value in values.items() if key in before and before[key] == value}
    return groups


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested settings as one level with dotted names; an empty mapping stays one."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _entry(name: str, values) -> list[str]:
    """One entry in YAML's flow style, wrapped."""
    text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=WIDTH)
    first, *rest = text.replace("\n...", "").strip().splitlines()
    return [f"{name}: {first}", *(f"  {line.strip()}" for line in rest)]


def _default(field):
    if field.default_factory is not None:
        return field.default_factory()
    if field.default is PydanticUndefined:
        return "..."
    plain = (
        field.default.model_dump(mode="json", exclude_defaults=True) if isinstance(field.default, BaseModel) else None
    )
    return field.default if plain is None else plain or "defaults"


def _key(value) -> str:
    return repr(value)


def jobs_text(jobs: Iterable[tuple[str, str, str]], asked: Iterable[list[str]], up: str) -> str:
    """Every planned job: the commands as patterns, then a line a job: the paths it fetches or tracks, its resources.

    jobs: (rule, target, shell command); asked: (rule, target, resource=value, ...); up: the way to the repository. In a
    pattern, {target} is the job's, and {paths} those paths.
    """
    resources = {}
    for rule, *rest in asked:
        target = rest.pop(0) if "=" not in rest[0] else ""
        resources[rule, target] = " ".join(rest)
    patterns: dict[str, dict[str, int]] = {}
    lines = []
    for rule, target, shell in jobs:
        shell = shell.replace(up, "../..")
        match = re.search(r"cache\.py \w+ (.*?) (&&|&>)", shell)
        paths = match[1] if match else ""
        pattern = shell.replace(f" {paths} ", " {paths} ") if paths else shell
        if target:
            pattern = re.sub(rf"(?<=/){re.escape(target)}(?=\.|/)", "{target}", pattern)
        assert pattern.replace("{target}", target).replace("{paths}", paths) == shell
        number = patterns.setdefault(rule, {}).setdefault(pattern, len(patterns[rule]) + 1)
        lines.append(f"{rule} {number} {target}  [{paths}] {resources.pop((rule, target))}".replace("  [] ", "  "))
    assert not resources, resources
    said = [f"{rule} {number}: {pattern}" for rule, all_of in patterns.items() for pattern, number in all_of.items()]
    return "\n".join([*said, "", *lines]) + "\n"
