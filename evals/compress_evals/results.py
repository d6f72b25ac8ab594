"""The data model of one model's results, with saving, loading and validation.

A result is a folder: `results.json` (schema 2) and `samples/<task>.jsonl.gz`, one row per question. The same
measurement gives the same bytes except for its date, timings and package versions. Not here: measuring (`run.py`) and
comparing (`comparison.py`). The task hash covers every document, prompt and target, so that only results with the same
questions can be compared.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import ArtifactError, first_line, why
from compress.partial import put
from compress_evals.fidelity import Fidelity
from compress_evals.stats import Paired

SCHEMA = 2
RESULTS_FILE = "results.json"
SAMPLES_FOLDER = "samples"
MOST_ITERS = 1_000_000  # a hundred times the default; bounded because pages resample as often as a result says


class Stored(BaseModel):
    """Base of everything that is stored: frozen, without unknown fields, and with infinities kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, ser_json_inf_nan="strings")


class Row(Stored):
    """One question with its metric values and, if known, the model's answer.

    `said` is the answer: the generated text, or the most likely choice. `hash` covers document, prompt and target.
    """

    id: str
    cluster: str
    tier: str = ""
    hash: str
    scores: dict[str, float]
    said: str | None = None


class Metric(Stored):
    """A mean over questions with its 95 % interval; `higher` says whether higher is better."""

    value: float
    low: float
    high: float
    higher: bool = True


class TierScore(Stored):
    """The headline metric over the facts of one exposure tier."""

    n: int
    value: float
    low: float
    high: float


class Data(Stored):
    """The source of a task's questions, and the hash of the data that were read."""

    source: Literal["built in", "data folder", "hub"]
    name: str
    sha256: str


class Skipped(Stored):
    """A task that could not be asked, and why."""

    title: str
    family: str
    reason: str


class TaskResult(Stored):
    """The result of one task, with every metric; `truncated` counts the prompts that were cut to fit the context."""

    title: str
    family: str
    headline: str
    chance: float = Field(ge=0, lt=1)
    version: str
    n: int = Field(ge=1)
    shots: int
    task_hash: str
    metrics: dict[str, Metric]
    tiers: dict[str, TierScore]
    truncated: int
    seconds: float
    data: Data
    control: bool = False

    @property
    def score(self) -> Metric:
        """The headline metric."""
        return self.metrics[self.headline]

    @property
    def headroom(self) -> float:
        """The score above chance, which can be lost; 0 unless the whole 95 % interval of the score is above chance."""
        return self.score.value - self.chance if self.score.low > self.chance else 0.0


class ModelFacts(Stored):
    """The measured model, its size, and how it was compressed; None where that was not recorded."""

    name: str
    sha: str | None = None
    parameters: int
    bytes_on_disk: int | None = None
    bits_per_weight: float | None = None
    recipe: str | None = None
    calibration: dict[str, Any] | None = None


class Engine(Stored):
    """The software and settings of a measurement.

    `bos` says whether every prompt began with the BOS token, those that were cut to the context included.
    `chat_template` is the sha256 of the chat template that was applied to the prompts, None if none was.
    """

    suite: str
    lm_eval: str
    torch: str
    transformers: str
    device: str
    dtype: str
    batch_size: int
    max_length: int
    bos: bool
    chat_template: str | None = None


class Example(Stored):
    """A question that flipped: the end of its prompt, the expected answer, and each model's answer."""

    id: str
    prompt: str
    wanted: str
    dense: str
    compressed: str


class TaskComparison(Stored):
    """One task of a comparison: the paired statistics, and p adjusted by Holm's method over all its tasks.

    `disagreement` is the share of questions that the two models answered differently, right or wrong, or None if an
    answer is unknown. `agreement` is the mean ROUGE-L between the texts of both models, for summaries only. `lost` and
    `gained` are examples of the flips, not all of them.
    """

    title: str
    family: str
    control: bool = False
    p_holm: float
    paired: Paired
    disagreement: float | None = None
    agreement: float | None = None
    lost: tuple[Example, ...] = ()
    gained: tuple[Example, ...] = ()


class GapChange(Stored):
    """The benefit of a passage to both models: the score with it minus the score without it, on the same questions."""

    dense: float
    compressed: float
    delta: float
    low: float
    high: float


class Noise(Stored):
    """The flips of the dense model against itself when only the batch size changes: the noise floor of flips."""

    batch_size: int
    n: int
    flips: int


class Speed(Stored):
    """The speed of greedy generation of one sequence, alternating with the dense model in one process.

    `dense` and `compressed` are medians over `runs`, in tokens per second. `ratio` is compressed over dense, `low` and
    `high` are its smallest and largest value over the runs.
    """

    prompt: int
    new: int
    runs: int
    dense: float
    compressed: float
    ratio: float
    low: float
    high: float


class Worst(Stored):
    """The family that kept the smallest fraction, `retained`, of its dense score above chance."""

    family: str
    retained: float


class Comparison(Stored):
    """A compressed model against its dense original, on the same questions."""

    dense: str
    compressed: str
    dense_bytes: int | None
    margin: float
    seed: int = Field(ge=0)
    iters: int = Field(ge=1, le=MOST_ITERS)
    tasks: dict[str, TaskComparison]
    worst: Worst | None
    gaps: dict[str, GapChange] = Field(default_factory=dict)
    fidelity: Fidelity | None
    speed: Speed | None = None
    notes: tuple[str, ...] = ()


class Results(Stored):
    """The measurement of one model; `rows` are stored in files beside the JSON, `vs` is the result of `compare`.

    `notes` record deviations from what was asked for, such as a batch that did not fit in memory.
    """

    schema_version: Literal[2] = Field(default=2, alias="schema")
    created: str
    seed: int = Field(ge=0)
    limit: int | None
    model: ModelFacts
    engine: Engine
    tasks: dict[str, TaskResult]
    skipped: dict[str, Skipped] = Field(default_factory=dict)
    seconds: float
    noise: dict[str, Noise] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    vs: Comparison | None = None
    rows: dict[str, tuple[Row, ...]] = Field(default_factory=dict, exclude=True)


def versus(result: Results) -> Comparison:
    """The comparison of a result with dense; raises ArtifactError if it has not been compared."""
    if result.vs is None:
        raise ArtifactError(f"{result.model.name} has not been compared with a dense result")
    return result.vs


def task_hash(rows: Sequence[Row]) -> str:
    """The hash of all questions of a task, in order."""
    return hashlib.sha256("\n".join(row.hash for row in rows).encode()).hexdigest()


def save(results: Results, folder: Path) -> Path:
    """Write the result into `folder` and return the path of its `results.json`, which is written last."""
    samples = folder / SAMPLES_FOLDER
    samples.mkdir(parents=True, exist_ok=True)
    for task, rows in results.rows.items():
        put(samples / f"{task}.jsonl.gz", methodcaller("write_bytes", _compressed(rows)))
    target = folder / RESULTS_FILE
    put(target, methodcaller("write_bytes", (results.model_dump_json(by_alias=True, indent=1) + "\n").encode()))
    return target


def load(folder: Path) -> Results:
    """Read a result written by `save`, from its folder or its `results.json`.

    Raises ArtifactError if it is missing, malformed or of another schema, or if its rows do not belong to it.
    Results are untrusted input, so everything that their readers rely on is checked here.
    """
    folder = folder.parent if folder.name == RESULTS_FILE else folder
    results = _parse(folder / RESULTS_FILE)
    rows = {task: _rows(folder / SAMPLES_FOLDER / f"{task}.jsonl.gz") for task in results.tasks}
    for task, result in results.tasks.items():
        if len(rows[task]) != result.n or task_hash(rows[task]) != result.task_hash:
            raise ArtifactError(
                f"{folder}: samples of {task} do not belong to {RESULTS_FILE}; run the evaluation again"
            )
        if result.headline not in result.metrics or not all(_scored(row, result.headline) for row in rows[task]):
            raise ArtifactError(f"{folder}: not every question of {task} has a finite {result.headline}")
    if not results.tasks or (results.vs is not None and results.vs.tasks.keys() != results.tasks.keys()):
        raise ArtifactError(f"{folder}: no task was asked, or other tasks were compared; run the evaluation again")
    return results.model_copy(update={"rows": rows})


def _scored(row: Row, metric: str) -> bool:
    return math.isfinite(row.scores.get(metric, math.nan))


def _parse(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such results; write them with `compress eval`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {why(error)}") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise ArtifactError(f"{path}: results schema {found!r}, but this version reads schema {SCHEMA}")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {place}: {first['msg']} ({error.error_count()} errors)") from None


def _rows(path: Path) -> tuple[Row, ...]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        # split at "\n" only: str.splitlines also splits at U+2028, which JSON leaves unescaped
        return tuple(Row.model_validate_json(line) for line in text.split("\n") if line)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: the questions of this result are missing") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ArtifactError(f"{path}: not readable: {first_line(error)}") from None


def _compressed(rows: Sequence[Row]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as stream:
        for row in rows:
            stream.write((row.model_dump_json(exclude_defaults=True) + "\n").encode())
    return buffer.getvalue()
