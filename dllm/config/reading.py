"""From YAML files to a checked project: reading, merging, and errors of one line that name file, key and value."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dllm.config.entries import Project
from dllm.config.references import NOUNS, problems
from dllm.config.settings import did_you_mean, lower_first, message_of

JOBS = ("runs", "evaluations", "samples", "speed", "report", "reported")
"""Sections of what is made and shown; entries of the others cost nothing until one of these uses them."""

CONFIG_FILES = ("models", "datasets", "experiments", "benchmarks", "reported")

TOKENS = ("mask_token", "end_token", "end_of_turn", "chat_template")
"""Settings of a model that belong to its tokenizer."""

Mapping = dict[str, Any]
Location = tuple[str | int, ...]
"""Keys from the top of the configuration to a value."""
Origin = Callable[[Location], str]
"""The file in which the value at a location is written."""
Model = TypeVar("Model", bound=BaseModel)

_SHORT = reprlib.Repr()
"""How a wrong value is shown: a list of a thousand entries would be no line."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


class ConfigError(ValueError):
    """A mistake in a configuration: one line with file, key, value, what is allowed and the next step."""


# --------------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # ten times faster, where it is built
    """YAML 1.2's floats (1e-4 is a number) and no duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    """A mapping, refusing a key written twice (the later one would silently win); `<<` may be overridden."""
    written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key.start_mark)
        if written.count(key.value) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
# an integer must stay an integer although the float pattern above also matches it
_Loader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _check_depth(text: str) -> None:
    """Raises RecursionError for what is nested deeper than any configuration: libyaml would overflow its stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 100:
            raise RecursionError


def read_yaml(path: str | Path) -> Mapping:
    """The mapping in a YAML file. Raises ConfigError (one line) if it is missing, unreadable or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; check the path, or run the workflow from the repository root"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text in UTF-8; check the path and its encoding") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
    try:
        _check_depth(text)
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a configuration; see docs/configuration.md") from None
    except (ValueError, ArithmeticError, TypeError, AttributeError) as error:  # a date, a number, a tag of YAML's own
        raise ConfigError(f"{path}: not valid YAML: a value cannot be read ({error}); put quotes around it") from None
    if not isinstance(content, dict):
        what = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{path}: holds {what}, not a mapping; see docs/configuration.md")
    return content


def read_config(path: str | Path, model: type[Model]) -> Model:
    """A job's config file as `model`. Raises ConfigError with file, key and value."""
    content = read_yaml(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_describe(error, model, lambda location: str(path))) from None


# --------------------------------------------------------------------------------------------------------------------
# Merging


def load_project(config_directory: str | Path | None, *overlays: str | Path | Mapping) -> Project:
    """The merged and checked project: `config/*.yaml` with overlays on top, later ones over earlier ones.

    An overlay is a YAML file, or an already read mapping (called "overlay" in messages). In an overlay, null removes
    an entry, and `replaces` names the sections of which it keeps nothing that was there before; `replaces: all` stands
    for all of `JOBS`. Paths of the project start from the directory that holds `config_directory`; without one, there
    are the overlays alone, and paths start from the current directory.
    Raises ConfigError, one line naming file, key, value, what is allowed and the next step.
    """
    merged: Mapping = {}
    origins: dict[Location, str] = {}
    removals: dict[tuple[str, str], str] = {}
    last = ""
    files = [] if config_directory is None else [Path(config_directory) / f"{stem}.yaml" for stem in CONFIG_FILES]
    for source in (*files, *overlays):
        content, last = (source, "overlay") if isinstance(source, dict) else (read_yaml(source), str(source))
        before = _entry_names(merged)
        _merge(merged, _emptied(merged, content, last), last, origins)
        removals |= dict.fromkeys(before - _entry_names(merged), last)

    def origin(location: Location) -> str:
        known = (origins[location[:size]] for size in range(len(location), 0, -1) if location[:size] in origins)
        return next(known, last)

    _inherit(merged, origin)
    _drop_scores_without_a_column(merged, removals)
    _take_tokens(merged)
    try:
        project = Project.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_describe(error, Project, origin)) from None
    for location, line in problems(project):
        for (section, gone), where in removals.items():
            if f"= {gone!r} is n" in line and NOUNS.get(section, section) in line:
                line = f"{line.removesuffix('.')}; {where} removes it"
                break
        raise ConfigError(f"{origin(location)}: {line}")
    return project.below(Path() if config_directory is None else Path(config_directory).resolve().parent)


def _drop_scores_without_a_column(merged: Mapping, removals: dict[tuple[str, str], str]) -> None:
    """Leave out published scores on benchmarks that an overlay removed."""
    reported, benchmarks = merged.get("reported"), merged.get("benchmarks")
    if not isinstance(reported, dict) or not isinstance(benchmarks, dict):
        return
    gone = {name for section, name in removals if section == "benchmarks"} - benchmarks.keys()
    for row in reported.values():
        if isinstance(row, dict) and isinstance(row.get("scores"), dict):
            row["scores"] = {name: score for name, score in row["scores"].items() if name not in gone}


def _entry_names(merged: Mapping) -> set[tuple[str, str]]:
    """(section, name) of every entry."""
    return {(key, str(name)) for key, section in merged.items() if isinstance(section, dict) for name in section}


def _emptied(merged: Mapping, content: Mapping, source: str) -> Mapping:
    """The content of an overlay without `replaces`, `all` or a list of sections, which are emptied in `merged`."""
    replaced = content.get("replaces", [])
    if replaced == "all":
        merged |= {section: {} for section in JOBS}
        replaced = []
    for section in replaced if isinstance(replaced, list) else [replaced]:
        if not isinstance(merged.get(section), dict):
            known = [name for name, value in merged.items() if isinstance(value, dict)]
            raise ConfigError(
                f"{source}: replaces = {section!r} is no section of the files before it. "
                f"{did_you_mean(section, known)} Write it as a list: replaces: [runs, evaluations]"
            )
        merged[section] = {}
    return {key: value for key, value in content.items() if key != "replaces"}


def _merge(base: Mapping, update: Mapping, source: str, origins: dict[Location, str], path: Location = ()) -> None:
    """Lay `update` over `base` in place, mapping by mapping, and note where each key came from."""
    for key, value in update.items():
        here = (*path, key)
        if value is None and path:
            base.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(base.get(key), dict) or key == "new":  # two architectures are never mixed
                base[key] = {}
            _merge(base[key], value, source, origins, here)
        else:
            base[key] = value
        origins[here] = source


def _inherit(merged: Mapping, origin: Origin) -> None:
    """Replace `like: other` in runs and recipes by the other entry's settings, where the entry has none."""
    for section in ("runs", "recipes"):
        entries = merged.get(section)
        if isinstance(entries, dict):
            merged[section] = {name: _resolved(section, entries, name, origin) for name in entries}


def _take_tokens(merged: Mapping) -> None:
    """Give a model with the tokenizer of another model that one's special tokens, where its entry has none."""
    models, datasets = merged.get("models"), merged.get("datasets") or {}
    if not isinstance(models, dict):
        return
    for entry in models.values():
        other = entry
        for _ in range(2):  # a new model's tokenizer may be that of a model that shares another one's
            name = other.get("tokenizer") if isinstance(other, dict) else None
            other = models.get(name) if isinstance(name, str) and name not in datasets else None
            if isinstance(other, dict):
                entry |= {key: other[key] for key in TOKENS if key in other and key not in entry}


def _resolved(section: str, entries: Mapping, name: str, origin: Origin, chain: tuple[str, ...] = ()) -> Any:
    """An entry with everything it takes over from the entries it is like."""
    entry = entries[name]
    if not isinstance(entry, dict) or "like" not in entry:
        return entry
    other = entry["like"]
    where = f"{origin((section, name, 'like'))}: {section}.{name}.like = {other!r}"
    if other not in entries:
        raise ConfigError(f"{where} is no entry of {section}. {did_you_mean(other, entries)}")
    if other in chain:
        raise ConfigError(f"{where} goes round in a circle: {' -> '.join((*chain, name))}")
    parent = _resolved(section, entries, other, origin, (*chain, name))
    budget = {"steps", "epochs"} & entry.keys()
    inherited = {key: value for key, value in parent.items() if not (budget and key in ("steps", "epochs"))}
    return _overlaid(inherited, {key: value for key, value in entry.items() if key != "like"})


def _overlaid(base: Mapping, update: Mapping) -> Mapping:
    """Two mappings merged, mapping by mapping; `update` wins."""
    result = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlaid(result[key], value) if both else value
    return result


# --------------------------------------------------------------------------------------------------------------------
# Errors


REMOVED = {
    "layout": "rows are always packed; leave it out",
    "head_chunk": "a budget of memory decides how many logits are held at a time; leave it out",
}
"""Settings that there once were, and what to do instead."""


def _describe(error: ValidationError, model: type[BaseModel], origin: Origin) -> str:
    """The first error of a validation as one line: file: key = value, what is wrong, what is allowed."""
    errors = error.errors()
    # a misspelt key also leaves its right spelling missing: the misspelling says more
    problem = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    where = f"{origin(location)}: {key}" if key else origin(location)
    if location and location[-1] == "[key]":
        section = ".".join(map(str, location[:-2]))
        return f"{origin(location)}: {section}: the name {problem['input']!r} is no text; write it in quotes"
    if location and location[-1] in REMOVED:
        return f"{where} was removed: {REMOVED[str(location[-1])]}"
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a setting. {did_you_mean(str(location[-1]), _fields_at(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where} is missing; it is needed here"
    if problem["type"] == "value_error":
        return f"{where}: {message_of(problem)}"
    return f"{where} = {_SHORT.repr(problem['input'])}: {lower_first(message_of(problem))}"


def _fields_at(annotation: Any, location: Location) -> list[str]:
    """Names of the settings allowed at a location below a type (as far as can be told, for did-you-mean)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return list(annotation.model_fields)
        field = annotation.model_fields.get(str(location[0]))
        return _fields_at(field.annotation, location[1:]) if field else []
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if not arguments:
        return []
    # the keys of a dict and the places of a list are free; a union `Model | None` has no level of its own
    return _fields_at(arguments[-1], location[1:] if get_origin(annotation) in (dict, list) else location)
