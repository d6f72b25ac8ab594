"""The weight of each model in each tensor: one number per model, or several by glob over tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite

from compress.errors import RecipeError, nearest
from compress.merging.method import Method

Weights = Mapping[str, float | Mapping[str, float]]
LARGEST = 100.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """The weights of one model: for a tensor, that of the last glob that matches its name, or 1 if none does."""

    rules: tuple[tuple[str, float], ...] = ()

    def of(self, name: str) -> float:
        """The weight in one tensor."""
        return next((weight for glob, weight in reversed(self.rules) if fnmatchcase(name, glob)), 1.0)


def shares(weights: Weights, labels: Iterable[str], names: Sequence[str], method: Method) -> dict[str, Share]:
    """Label -> share, from weights such as {"a": 0.5, "b": {"*": 1, "*.mlp.*": 0.2}}.

    Raises RecipeError for an unknown model, a glob that matches no tensor, a weight that is not a number in range,
    and, if the method is a mean, a tensor to which no model contributes.
    """
    found = dict.fromkeys(labels, Share())
    if not isinstance(weights, Mapping):
        raise RecipeError(f"weights: {weights!r} is not a mapping of models to weights")
    for label, told in weights.items():
        if label not in found:
            raise RecipeError(f"weights: no model is called {label!r}{nearest(str(label), found)}")
        rules = told.items() if isinstance(told, Mapping) else [("*", told)]
        found[label] = Share(rules=tuple((g, number(w, f"weights.{label}", g, method, names)) for g, w in rules))
    for name in names if method.shared else ():
        if not sum(share.of(name) for share in found.values()) > 0:
            raise RecipeError(
                f"weights: no model has a weight above 0 for {name}, but {method.name} is a mean and needs one"
            )
    return found


def number(weight: object, where: str, glob: object, method: Method, names: Sequence[str]) -> float:
    """The weight as a float, after checking it and its glob; raises RecipeError."""
    if not isinstance(glob, str) or not any(fnmatchcase(name, glob) for name in names):
        raise RecipeError(f"{where}: {glob!r} matches no tensor; tensors have names such as {names[0]}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isfinite(weight):
        raise RecipeError(f"{where}: {weight!r} is not a finite number")
    least = -LARGEST if method.signed else 0.0
    if not least <= weight <= LARGEST:
        raise RecipeError(
            f"{where}: {weight} is not allowed; with {method.name} it must be from {least:g} to {LARGEST:g}"
        )
    return float(weight)
