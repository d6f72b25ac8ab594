"""Strict options: the fields of a frozen dataclass, checked against their annotations.

`Annotated[int, Field(ge=2, description="...")]` on a field gives its type, its range and its help text.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compress.errors import RecipeError, nearest

Kind = TypeVar("Kind")


@cache
def validators(kind: Any) -> dict[str, TypeAdapter[Any]]:
    """A validator for each field of a dataclass, by field name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(kind)}


def check_options(options: Any, where: str) -> None:
    """Raise RecipeError, naming `where` and the first field whose value has the wrong type or range."""
    kind: Any = type(options)
    for name, validator in validators(kind).items():
        value = getattr(options, name)
        try:
            validator.validate_python(value, strict=True)
        except ValidationError as error:
            reasons = dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors())
            raise RecipeError(f"{where}.{name}: {value!r} is not allowed; it must be {' or '.join(reasons)}") from error


def build(kind: Callable[..., Kind], options: Any, where: str) -> Kind:
    """An instance of `kind` from a mapping; raises RecipeError, naming `where`, for an unknown or invalid option."""
    known = validators(kind)
    if not isinstance(options, Mapping):
        raise RecipeError(f"{where}: expected options as `name: value`, got {options!r}")
    for name in options:
        if name not in known:
            raise RecipeError(f"{where}: unknown option {name!r}{nearest(str(name), known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error


def describe(kind: type) -> list[dict[str, Any]]:
    """The name, type with limits, default and help of each option, for tables."""
    rows = []
    for f in fields(kind):
        schema = validators(kind)[f.name].json_schema()
        kinds = [s.get("type", "") for s in schema.get("anyOf", [])] or [schema.get("type", "")]
        limits = [f"{sign} {schema[k]}" for k, sign in LIMITS.items() if k in schema]
        allowed = " | ".join(map(str, schema["enum"])) if "enum" in schema else " | ".join(kinds)
        rows.append(
            {
                "name": f.name,
                "type": " ".join([allowed, *limits]),
                "default": None if f.default is MISSING else f.default,
                "help": schema.get("description", ""),
            }
        )
    return rows


LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
