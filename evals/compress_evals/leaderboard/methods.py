"""Derives from a recipe's stored text the method, its family, and how much it removed.

Not here: running recipes. The text is parsed as strict YAML but not validated, because a result may come from a newer
version or name a third-party pass. A recipe that cannot be read counts as the method "other".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError
from compress.passes import PASSES
from compress.recipe import parse

FAMILIES = ("pruning", "quantization", "lowrank", "hybrid", "delta")
WORDS = {"lowrank": "low rank"}
SHARES = ("sparsity", "removed", "neurons", "fraction", "blocks")  # pass options that give the share removed
BUDGETS = (*SHARES, "bits")
UNKNOWN = "other"


@dataclass(frozen=True, kw_only=True)
class Method:
    """The method of a recipe: `label` names its passes, `family` its kinds of compression.

    `removed` is the share of weights, ranks, neurons or blocks that the recipe removes, the largest if several passes
    have one; None if none has. `settings` is everything else that shapes the model, its calibration included: models
    of one label and equal settings differ in nothing but their budget.
    """

    label: str
    family: str
    removed: float | None = None
    settings: str = ""


def method_of(recipe: str | None) -> Method:
    """The method of a recipe, from its text."""
    data = _read(recipe)
    steps = _steps(data)
    if not steps:
        return Method(label=UNKNOWN, family=UNKNOWN)
    found = [_share(options[key]) for _, options in steps for key in SHARES if key in options]
    removed = [share for share, _ in found if share is not None]
    pattern = " n:m" if any(is_pattern for _, is_pattern in found) else ""
    kinds = {kind for name, _ in steps if (kind := _kind(name))}
    return Method(
        label=" + ".join(name for name, _ in steps) + pattern,
        family=" + ".join(WORDS.get(kind, kind) for kind in FAMILIES if kind in kinds) or UNKNOWN,
        removed=max(removed) if removed else None,
        settings=_settings(data, steps),
    )


def _read(recipe: str | None) -> Mapping[str, Any]:
    try:
        data = parse(recipe or "", "recipe")
    except RecipeError:
        return {}
    return data if isinstance(data, Mapping) else {}


def _settings(data: Mapping[str, Any], steps: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    drawn = data.get("calibration")
    drawn = {key: value for key, value in drawn.items() if key != "seed"} if isinstance(drawn, Mapping) else drawn
    rest = {key: value for key, value in data.items() if key not in ("passes", "limits", "calibration")}
    options = [
        (name, {key: of(value) if key in BUDGETS else value for key, value in own.items()}) for name, own in steps
    ]
    try:
        return json.dumps([rest, drawn, options], sort_keys=True, default=str)
    except (TypeError, ValueError):  # keys of several types, integers too long for text
        return ""


def of(value: Any) -> str | None:
    """What of a budget is no budget: the M of an N:M pattern, between whose groups of 4 and 8 there is no curve."""
    return f"of {value.partition(':')[2]}" if isinstance(value, str) and ":" in value else None


def _steps(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    listed = data.get("passes")
    steps: list[tuple[str, Mapping[str, Any]]] = []
    for step in listed if isinstance(listed, list) else ():
        named = {step: {}} if isinstance(step, str) else step
        if not isinstance(named, Mapping) or len(named) != 1:
            return []
        ((name, options),) = named.items()
        steps.append((str(name), options if isinstance(options, Mapping) else {}))
    return steps


def _share(value: Any) -> tuple[float | None, bool]:
    """The share removed, and whether it is an N:M pattern: `2:4` keeps 2 of every 4. None if it is neither."""
    if isinstance(value, float) and 0 <= value <= 1:
        return value, False
    kept = re.fullmatch(r"(\d{1,3}):(\d{1,3})", str(value))
    if kept and 0 < int(kept[1]) <= int(kept[2]):
        return 1 - int(kept[1]) / int(kept[2]), True
    return None, False


def _kind(name: str) -> str | None:
    """The kind of compression of a pass, which is the package of its module; None for an unknown pass."""
    known = PASSES.get(name)
    folder = known.__module__.split(".")[-2] if known else None
    return folder if folder in FAMILIES else None
