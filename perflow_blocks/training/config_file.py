"""Configurations from TOML, YAML or JSON files, with every mistake told at once."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from .config import DistillConfig, Section, cross_problems
from .rules import ConfigError, problems_of

Tree = dict[str, dict[str, Any]]
Inspect = Callable[[Mapping[str, Any]], Iterator[str]]


class _Text(str):
    """A value as it was typed, to be read by the type of its field."""


def load_config(
    path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None, *, inspect: Inspect | None = None
) -> DistillConfig:
    """The configuration of a file.

    Args:
        path: a .toml, .yaml, .yml or .json file with a table for each section of `DistillConfig`.
        overrides: by "section.field" the text of a value that replaces the file's: text as it is, everything else in
            JSON ("0.5", "true", "null", "[1, 0.4, 0]").
        inspect: gets the sections that could be made and says what else is wrong, such as a teacher that is not there.

    Raises:
        ConfigError: the file cannot be read, or with everything that is wrong: unknown keys, wrong types, values out
            of range, settings that do not go together, what `inspect` found.
    """
    tree = _read(Path(path))
    problems = list(_override(tree, overrides or {}))
    problems += [f"{name} is no section; the sections are {', '.join(_sections())}." for name in _unknown(tree)]
    made: dict[str, Any] = {}
    for name, kind in _sections().items():
        section, found = _section(name, kind, tree.get(name, {}))
        problems += found
        if section is not None:
            made[name] = section
    problems += cross_problems(made)
    if inspect is not None:
        problems += inspect(made)
    if problems:
        raise ConfigError(problems)
    return DistillConfig(**made)


def to_tree(config: DistillConfig) -> Tree:
    """The configuration as plain values, which `json.dumps` and `load_config` take; tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def by_name(tree: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The settings of a tree by "section.field", with their values."""
    for section, values in tree.items():
        for field, value in values.items():
            yield f"{section}.{field}", value


def _sections() -> dict[str, type[Section]]:
    kinds = get_type_hints(DistillConfig)
    return {field.name: kinds[field.name] for field in fields(DistillConfig)}


def _unknown(tree: Tree) -> list[str]:
    return [name for name in tree if name not in _sections()]


def _read(path: Path) -> Tree:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        match path.suffix:
            case ".toml":
                tree = tomllib.loads(text)
            case ".yaml" | ".yml":
                tree = _typed(yaml.safe_load(text))
            case ".json":
                tree = json.loads(text)
            case _:
                raise ConfigError([f"{path} is no .toml, .yaml, .yml or .json file; name one."])
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}; name a file of settings."]) from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is no valid {path.suffix[1:]} file ({error}); correct it."]) from error
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise ConfigError([f"{path} holds values outside of sections; write tables such as [model] and [output]."])
    return {name: dict(values) for name, values in tree.items()}


def _typed(value: Any) -> Any:
    """YAML takes 1e-4 for text, so its text is read by the type of the field."""
    if isinstance(value, dict):
        return {name: _typed(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    return _Text(value) if isinstance(value, str) else value


def _override(tree: Tree, overrides: Mapping[str, str]) -> Iterator[str]:
    for key, text in overrides.items():
        section, dot, field = key.partition(".")
        if not dot or section not in _sections():
            yield f"--{key} is no setting; write --section.field with a section of {', '.join(_sections())}."
        else:
            tree.setdefault(section, {})[field] = _Text(text)


def _section(name: str, kind: type[Any], values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The section, or None, and what is wrong with it."""
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}
    types = get_type_hints(kind)
    problems = [f"{name}.{key} is unknown; {_known(name, known)}" for key in values if key not in known]
    arguments: dict[str, Any] = {}
    wrong = 0
    for key, field in known.items():
        if key in values:
            try:
                arguments[key] = _value(types[key], values[key])
            except ValidationError as error:
                problems += [_sentence(f"{name}.{key}", values[key], detail) for detail in error.errors()[:1]]
                wrong += 1
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{name}.{key} is missing; set it.")
            wrong += 1
    try:
        # With a value of the wrong type the others are still checked, as long as nothing that is required is lacking.
        section = kind(**arguments)
    except TypeError:
        return None, problems
    except ValueError as error:
        # Of what is left out nothing more is true than that it is wrong.
        left_out = [re.compile(rf"{name}\.{key}\b") for key in known if key in values and key not in arguments]
        found = [text for text in problems_of(error) if not any(pattern.search(text) for pattern in left_out)]
        return None, [*problems, *found]
    return (None if wrong else section), problems


def _value(kind: Any, value: Any) -> Any:
    """
    Raises:
        ValidationError: the value is not of the type.
    """
    adapter = TypeAdapter(kind)
    readings = [json.dumps(value, default=str)]
    if isinstance(value, _Text):
        for reading in (None, "null") if value == "null" else (str(value),):
            try:
                return adapter.validate_python(reading, strict=True)
            except ValidationError:
                continue
        readings = [value]
    if (numbers := _numbers(value)) != value:
        readings.append(json.dumps(numbers, default=str))
    errors: list[ValidationError] = []
    for text in readings:
        try:
            return adapter.validate_json(text, strict=True)
        except ValidationError as error:
            errors.append(error)
    raise errors[0]


def _numbers(value: Any) -> Any:
    """With the numbers that JSON or YAML takes for text, such as .5 and 1e-4, as numbers."""
    if isinstance(value, _Text):
        if value.startswith("["):
            with suppress(yaml.YAMLError):
                return _numbers(_typed(yaml.safe_load(value)))
        with suppress(ValueError):
            return float(value)
    return [_numbers(entry) for entry in value] if isinstance(value, list) else value


def _sentence(key: str, value: Any, detail: Any) -> str:
    text = str(detail["msg"])
    reason = text[0].lower() + text[1:]
    if detail["type"] == "json_invalid":
        reason = "it can be read neither as text nor as JSON for this setting"
    return f"{key}={value if isinstance(value, _Text) else json.dumps(value, default=str)} is wrong: {reason}."


def _known(name: str, known: Mapping[str, Any]) -> str:
    return f"{name} has {', '.join(known)}."
