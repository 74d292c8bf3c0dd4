"""From YAML files to checked declarations; every mistake becomes one line that names the file and the key."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from prefopt.errors import BadInput, nearest
from prefopt.planning.yaml_text import parsed_yaml
from prefopt.specs import (
    Config,
    DataSpec,
    DisagreementItemSpec,
    ExactItemSpec,
    GridItemSpec,
    ItemSpec,
    JudgeSpec,
    ModelSpec,
    VoteWeightItemSpec,
)
from prefopt.specs.base import plain_folder

Spec = TypeVar("Spec", bound=BaseModel)


@lru_cache(maxsize=16)
def _parsed(text: str) -> Any:
    """The text's content, once for all items that name the same file; nobody may change it."""
    return parsed_yaml(text)


def load_yaml(path: Path) -> Any:
    """Content of one YAML file, to be read only; BadInput names the file and line of what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    try:
        return _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from None


def parse(model: type[Spec] | Any, content: Any, where: str) -> Any:
    """Check ``content`` against a declaration; BadInput with the first mistake, its key and the nearest valid name."""
    try:
        return _validator(model).validate_python(content)
    except ValidationError as error:
        raise BadInput(f"{where}: {_first_mistake(model, error)}") from None


@cache
def _validator(model: Any) -> TypeAdapter[Any]:
    """What checks a declaration: built when first used, and once however many are checked."""
    return TypeAdapter(model)


def _first_mistake(model: Any, error: ValidationError) -> str:
    mistakes = error.errors(include_url=False)
    # where a name or a whole declaration may stand, a declaration was meant if one was given
    declared = [m for m in mistakes if not (isinstance(m["input"], dict) and _is_scalar_branch(m["loc"][-1:]))]
    mistakes = declared or mistakes
    # a misspelt key also makes its right spelling "missing": the misspelling is what the user has to see
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    location, known = _resolve(model, first["loc"])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{key}'; {nearest(location[-1], known)}"
    elif first["type"] == "missing":
        text = f"the key '{key}' is missing"
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    elif first["type"] in {"literal_error", "union_tag_invalid"}:
        expected = first["ctx"].get("expected") or first["ctx"]["expected_tags"]
        value = first["ctx"].get("tag", first["input"])
        known = re.findall("'([^']*)'", expected)
        text = f"{key}: unknown value {value!r}; {nearest(str(value), known)}"
    else:
        text = f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}"[:300]
    more = len(mistakes) - 1
    return text + (f" (and {more} more)" if more else "")


def _is_scalar_branch(tail: tuple[Any, ...]) -> bool:
    return bool(tail) and (tail[0] in {"str", "float"} or str(tail[0]).startswith("literal["))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _models_in(part)]


def _tagged(model: type[BaseModel], tag: Any) -> bool:
    kind = model.model_fields.get("kind")
    return kind is not None and tag in typing.get_args(kind.annotation)


def _resolve(model: Any, loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The key path a user sees (without union tags) and the keys that would be valid at its last step."""
    path: list[str] = []
    here = _models_in(model)
    known: list[str] = []
    for part in loc:
        tagged = [m for m in here if _tagged(m, part)]
        if tagged:
            here = tagged
            continue
        if isinstance(part, str) and (part in {m.__name__ for m in here} or part.startswith(("function-", "literal["))):
            here = [m for m in here if m.__name__ == part] or here
            continue
        known = sorted({name for m in here for name in m.model_fields})
        path.append(str(part))
        fields = [m.model_fields[part].annotation for m in here if part in m.model_fields]
        here = [m for annotation in fields for m in _models_in(annotation)] or here
    return path or [""], known


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """config.yaml with command-line overrides (``items`` may be one name or a comma-separated list)."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected keys such as items and results, found {type(content).__name__}")
    content = {**content, **(overrides or {})}
    if isinstance(content.get("items"), str):
        content["items"] = [name.strip() for name in content["items"].split(",") if name.strip()]
    if content.get("full") in ("true", "false"):  # Snakemake gives words of the command line as text
        content["full"] = content["full"] == "true"
    return parse(Config, content, str(path))


def check_place(*folders: Path) -> None:
    """BadInput where a run's folder has a name that job scripts cannot hold: executors write it into them unquoted."""
    for folder in folders:
        try:
            plain_folder(str(folder))
        except ValueError as error:
            raise BadInput(f"{str(folder)!r}: {error}; move the checkout") from None


def item_files(config_dir: Path, patterns: list[str]) -> list[Path]:
    """Declaration files of the named items, sorted; BadInput for a name or pattern that matches none."""
    folder = config_dir / "experiments"
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            matches = sorted(folder.glob(f"{pattern}.yaml")) if ".." not in Path(pattern).parts else []
        except (ValueError, NotImplementedError, OSError):  # no pattern, such as a path from the root
            matches = []
        if not matches:
            every = [str(p.relative_to(folder).with_suffix("")) for p in sorted(folder.rglob("*.yaml"))]
            raise BadInput(f"no item '{pattern}' below {folder}; {nearest(pattern, every)}")
        found.update(dict.fromkeys(matches))
    return list(found)


AnyItem = ItemSpec | GridItemSpec | DisagreementItemSpec | VoteWeightItemSpec | ExactItemSpec


def load_item(path: Path) -> AnyItem:
    """One declaration, with names of data, models and judges replaced by their entries of datasets.yaml and so on.

    A declaration with a ``study`` is an exact item, which has neither; one with ``conditions`` is a grid, those with
    ``annotated`` or ``betas`` are about several annotators.
    """
    content = load_yaml(path)
    if _is_exact(content):
        return parse(ExactItemSpec, content, str(path))
    config_dir = next(p.parent for p in path.parents if p.name == "experiments")
    kinds = [kind for key, kind in _KINDS.items() if isinstance(content, dict) and key in content]
    item = parse(kinds[0] if kinds else ItemSpec, content, str(path))
    entries = {kind: config_dir / f"{name}.yaml" for kind, name in _ENTRIES.items()}
    return _resolved(item, entries)


# Which item a declaration is, by a key that only this kind has.
_KINDS = {"conditions": GridItemSpec, "annotated": DisagreementItemSpec, "betas": VoteWeightItemSpec}
_ENTRIES = {"data": "datasets", "model": "models", "judge": "judges"}
_ORACLE = "oracle"  # a judge that has a name and no entry


def _resolved(value: Any, files: Mapping[str, Path]) -> Any:
    """A declaration with every name of a data set, model or judge in it, at any depth, replaced by what it names."""
    if isinstance(value, dict):
        return {key: _resolved(part, files) for key, part in value.items()}
    if not isinstance(value, BaseModel):
        return value
    fields = {
        "classifier": (files["data"], DataSpec),
        "data": (files["data"], DataSpec),
        "model": (files["model"], ModelSpec),
        "judge": (files["judge"], JudgeSpec),
    }
    update = {}
    for name in type(value).model_fields:
        part = getattr(value, name)
        named = name in fields and isinstance(part, str) and (name, part) != ("judge", _ORACLE)
        resolved = _resolved(_named(part, *fields[name]) if named else part, files)
        if resolved is not part:
            update[name] = resolved
    return value.model_copy(update=update) if update else value


def _is_exact(content: Any) -> bool:
    """By the study or by the scale, so that a misspelt ``study`` is told as that."""
    if not isinstance(content, dict):
        return False
    head = content.get("item")
    return "study" in content or (isinstance(head, dict) and head.get("scale") == "exact")


def _named(value: Any, file: Path, model: Any) -> Any:
    if not isinstance(value, str):
        return value
    entries = load_yaml(file) or {}
    if not isinstance(entries, dict):
        raise BadInput(f"{file}: {type(entries).__name__}, expected names with their declarations")
    if value not in entries:
        raise BadInput(f"{file}: no entry '{value}'; {nearest(value, map(str, entries))}")
    return parse(model, entries[value], f"{file}: {value}")
