"""Shared by the tables of methods: a bench that compares an artifact with its dense model, and persistent rows.

Not here: the methods themselves (`pruning.py`, `quantization.py` and others). A row is appended to a file as soon as it
is measured, so that an interrupted table can be continued. It stores figures for each window and each question, so that
methods can later be compared in paired tests.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import compress
from compress import Recipe
from compress.errors import RecipeError
from compress.model.source import locate
from compress.recipe import from_dict
from compress_evals import stats
from compress_evals.fidelity import compare_windows, evaluation_text, text_windows
from compress_evals.folders import model_name, opened
from compress_evals.run import evaluate

LENGTH = 256  # tokens of a window of the text


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The measurements of a compressed model.

    `kl` and `loss` hold, for each window of the text, the sum over its tokens; `dense_loss` holds those of the dense
    model. `right` has one character per question of each task, `1` for a right answer and `0` for a wrong one.
    `seconds` is the time of the compression.
    """

    method: str
    source: str  # the model and the windows
    kl: list[float]
    loss: list[float]
    dense_loss: list[float]
    tokens: int
    right: dict[str, str]
    clusters: dict[str, list[str]]
    intervals: dict[str, tuple[float, float]]
    seconds: float

    @property
    def mean_kl(self) -> float:
        """KL(dense || compressed), in nats per token."""
        return sum(self.kl) / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity on the text; not a quality metric."""
        return math.exp(sum(self.loss) / self.tokens)

    def score(self, task: str) -> float:
        """The share of right answers."""
        return self.right[task].count("1") / len(self.right[task])


Row = TypeVar("Row", bound=Scored)


class Bench:
    """A dense model and its evaluation text, with which each method is compared."""

    def __init__(self, model: str, conditions: str, tasks: Sequence[str], limit: int | None = None) -> None:
        self.model, self.tasks, self.limit = model, tasks, limit
        self.conditions = f"{model_name(model)}, {conditions}"
        self.dense, self.tokenizer = opened(locate(model), "cpu")
        self.windows = text_windows(self.tokenizer, evaluation_text(), LENGTH)

    def run(self, recipe: Recipe, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a recipe in a temporary folder; returns the artifact's compress.json and the fields of `Scored`."""
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            report = compress.run(self.model, recipe, Path(folder) / "out")
            seconds = time.monotonic() - began
            made = json.loads((report.out / "compress.json").read_text(encoding="utf-8"))
            return made, self.scored(opened(report.out, "cpu")[0], method, seconds)

    def scored(self, model: Any, method: str, seconds: float) -> dict[str, Any]:
        """The fields of `Scored` for a model."""
        asked = evaluate(model, self.tokenizer, name=method, limit=self.limit, only=self.tasks)
        found = compare_windows(self.dense, model, self.windows)
        return {
            "method": method,
            "source": self.conditions,
            "tokens": sum(len(f.kl) for f in found),
            "kl": [float(f.kl.sum()) for f in found],
            "loss": [float(f.compressed_loss.sum()) for f in found],
            "dense_loss": [float(f.dense_loss.sum()) for f in found],
            "right": {t: "".join("1" if row.scores["acc"] > 0 else "0" for row in asked.rows[t]) for t in self.tasks},
            "clusters": {t: [row.cluster for row in asked.rows[t]] for t in self.tasks},
            "intervals": {t: (asked.tasks[t].score.low, asked.tasks[t].score.high) for t in self.tasks},
            "seconds": round(seconds, 1),
        }


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows measured so far; empty if there is no file."""
    if not path.exists():
        return []
    return [kind(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def recipe_key(recipe: Recipe) -> str:
    """The key of a recipe: all its options in canonical form, so that equivalent recipes have equal keys."""
    return json.dumps(recipe.to_dict(), sort_keys=True)


def recipe_key_of(recipe: dict[str, Any]) -> str:
    """The key of the recipe that made a row; empty for dense, or if the recipe is no longer valid.

    An option that is newer than the row takes its default, so that only recipes which set it are measured again.
    """
    try:
        return recipe_key(from_dict(recipe)) if recipe else ""
    except RecipeError:
        return ""


def append(path: Path, row: Scored) -> None:
    """Append a row to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def foreign(path: Path, rows: Sequence[Scored], conditions: str) -> str | None:
    """The reason why rows measured under `conditions` must not be added to a file; None if they may."""
    other = next((row.source for row in rows if row.source != conditions), None)
    return (
        None
        if other is None
        else f"--out: {path} holds rows measured under other conditions ({other}); choose another folder"
    )


def kl_p(one: Scored, other: Scored) -> float:
    """The two-sided p value of the paired difference in KL on the same windows (sign-flip test)."""
    return stats.sign_flip([a - b for a, b in zip(one.kl, other.kl, strict=True)])


def paired(one: Scored, other: Scored, task: str) -> stats.Paired:
    """The paired comparison of `one` (as compressed) with `other` (as dense) on the same questions."""
    before, after = ([int(c) for c in row.right[task]] for row in (other, one))
    return stats.paired(before, after, one.clusters[task])


def versus(one: Scored, other: Scored, tasks: Sequence[str]) -> str:
    """A line that compares `one` with `other` on the same windows and questions, with p values."""
    parts = [f"KL {one.mean_kl:.4f} against {other.mean_kl:.4f} (p = {kl_p(one, other):.2g})"]
    for task in tasks:
        pair = paired(one, other, task)
        parts.append(f"{task} {100 * pair.delta:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}, "
                     f"p = {pair.p:.2g})")  # fmt: skip
    return f"{one.method} against {other.method}: " + "; ".join(parts)


def percent(row: Scored, task: str) -> str:
    """The share of right answers with its 95 % interval."""
    low, high = row.intervals[task]
    return f"{100 * row.score(task):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def bold(text: str, yes: bool) -> str:
    """The text, in Markdown bold if `yes`."""
    return f"**{text}**" if yes else text
