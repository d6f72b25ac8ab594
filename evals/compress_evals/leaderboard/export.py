"""Exports the leaderboard: JSON with every figure, CSV with one row per model, and Markdown to paste.

The JSON is described by its own schema, which is written beside it; the CSV's columns are described in the JSON. Both
raw and normalised scores are included, with the formula and the chance score, so that one can be derived from the
other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from compress_evals.leaderboard.collect import Board, Cell
from compress_evals.leaderboard.facts import facts
from compress_evals.leaderboard.naming import readable
from compress_evals.leaderboard.rank import Kept
from compress_evals.leaderboard.table import FamilyCell, Line, families
from compress_evals.report import GLYPHS
from compress_evals.results import Stored
from compress_evals.wording import byte_size, md, md_table, signed

SCHEMA = 1
KIND = "compress leaderboard"
FORMULAS = {
    "normalised": "(score - chance) / (1 - chance); a family's is the mean over its tasks",
    "kept": "(score - chance) / (dense score - chance), the mean over a family's tasks",
    "interval": "95 %: of scores Wilson at the effective sample size, of differences a paired cluster bootstrap, "
    "of what was kept the delta method over clusters",
    "rank": "by the worst family kept; shared by those that cannot be told apart from their group's first, 5 %, Holm",
}
OF_RUNS = (
    "A line of several runs is the mean over calibration seeds; its interval, verdict and rank account for the "
    "variance over questions and over runs."
)
OF_EACH = (
    "Mean, minimum and maximum over runs; then, in points, the standard deviation explained by flips of single "
    "questions (already part of the intervals) and the remaining between-run standard deviation."
)
COLUMNS = {
    "board": "number of the board; lines of different boards must not be compared",
    "rank": FORMULAS["rank"],
    "model": "name", "method": "passes of the recipe", "kind": "kind of compression",
    "removed": "share of weights, ranks, neurons or blocks removed by the recipe",
    "bits_per_weight": "bits stored for each weight of the blocks", "bytes": "bytes of all tensors",
    "times_smaller": "bytes of dense divided by those of the model", "speed": "decoding speed divided by that of dense",
    "worst_family": "the family that kept least", "worst_kept": FORMULAS["kept"],
    "worst_kept_low": "95 % interval", "worst_kept_high": "95 % interval", "mean_kept": "mean over families",
    "worst_verdict": "worst verdict of any family except controls", "kl": "KL(dense || compressed), nats per token",
    "kl_top": "if given, KL is over so many of the likeliest tokens and the rest: a lower bound",
    "bits_per_byte": "of plain text; not a quality metric",
    "text": "SHA-256 of the text of KL and bits per byte; different texts must not be compared",
    "runs": "number of calibration seeds that the line averages",
}  # fmt: skip
FAMILY_COLUMNS = {
    "score": "mean over questions", "low": "95 % interval of the score", "high": "95 % interval of the score",
    "normalised": FORMULAS["normalised"], "delta": "compressed minus dense",
    "delta_low": "95 % interval of the difference", "delta_high": "95 % interval of the difference",
    "verdict": "non-inferiority by the interval of the difference",
    "flips": "share of questions that flipped; of scores between 0 and 1, that changed",
    "disagreement": "share of questions answered differently", "kept": FORMULAS["kept"],
    "between": "between-run standard deviation of the score not explained by single questions; empty for a single run",
}  # fmt: skip


class Share(Stored):
    """A share of the dense score with its 95 % interval."""

    value: float
    low: float
    high: float


class FamilyOut(Stored):
    """One family of one model; scores and differences are fractions."""

    family: str
    control: bool = Field(description="shown, but not part of the mean or of the ranking")
    n: int = Field(description="questions")
    score: float = Field(description=FAMILY_COLUMNS["score"])
    low: float
    high: float
    dense: float = Field(description="score of the dense model")
    normalised: float = Field(description=FORMULAS["normalised"])
    kept: Share | None = Field(description=FORMULAS["kept"])
    delta: float = Field(description="compressed minus dense")
    delta_low: float
    delta_high: float
    verdict: str
    flips: float
    lost: int
    gained: int
    disagreement: float | None
    between: float | None = Field(description=FAMILY_COLUMNS["between"])


class TaskOut(Stored):
    """One task of one model."""

    title: str
    family: str
    n: int
    metric: str = Field(description="name of the headline metric")
    chance: float = Field(description="score of guessing")
    score: float = Field(description="raw")
    normalised: float = Field(description="(score - chance) / (1 - chance)")
    dense: float
    delta: float
    delta_low: float
    delta_high: float
    p_holm: float = Field(description="adjusted for every task of every model of the board")
    verdict: str


class RunOut(Stored):
    """One run of a line that is the mean of several."""

    name: str
    page: str = Field(description="address of its page, from the folder of the board")
    sha: str | None
    scores: dict[str, float] = Field(description="by family")
    kl: float | None


class ModelOut(Stored):
    """One line of the table."""

    name: str
    page: str = Field(description="address of its page, from the folder of the board")
    rank: int | None = Field(description=FORMULAS["rank"])
    method: str
    kind: str
    removed: float | None
    sha: str | None
    recipe: str | None
    bits_per_weight: float | None
    bytes: int | None
    times_smaller: float | None
    speed: float | None
    worst_family: str | None
    worst_kept: Share | None
    mean_kept: Share | None
    worst_verdict: str
    kl: float | None
    kl_top: int | None = Field(description=COLUMNS["kl_top"])
    bits_per_byte: float | None = Field(description=COLUMNS["bits_per_byte"])
    text: str | None = Field(description=COLUMNS["text"])
    families: tuple[FamilyOut, ...]
    tasks: dict[str, TaskOut]
    runs: tuple[RunOut, ...] = Field(description="empty for a single run")


class FailedOut(Stored):
    """A cell of a sweep that made no model."""

    id: str
    model: str
    recipe: str
    seed: int | None
    error: str | None


class BoardOut(Stored):
    """One table."""

    dense: str
    suite: str
    folder: str = Field(description="where its pages are, from the site's folder")
    protocol: dict[str, Any] = Field(description="what every result of the board was measured with")
    facts: dict[str, str] = Field(description="the facts at the head of the page")
    margin: float = Field(description="largest relative loss that counts as matching")
    data: dict[str, str | None] = Field(description="where each task's questions came from")
    task_hashes: dict[str, str]
    models: tuple[ModelOut, ...] = Field(description="sorted by the worst family, best first")
    failed: tuple[FailedOut, ...]


class LeaderboardOut(Stored):
    """Everything that the pages show, as data."""

    kind: Literal["compress leaderboard"] = "compress leaderboard"
    schema_version: Literal[1] = Field(default=1, alias="schema")
    formulas: dict[str, str]
    csv_columns: dict[str, str] = Field(description="columns of leaderboard.csv; those of a family begin with its name")
    boards: tuple[BoardOut, ...]


def as_data(boards: Sequence[tuple[Board, str, Sequence[Line], dict[str, list[Any]]]]) -> LeaderboardOut:
    """Boards, with their folders, lines and task tables, as one object."""
    family = {f"FAMILY {name}": about for name, about in FAMILY_COLUMNS.items()}
    return LeaderboardOut(
        formulas=FORMULAS,
        csv_columns={**COLUMNS, **family},
        boards=tuple(_board(board, folder, lines, rows) for board, folder, lines, rows in boards),
    )


def as_csv(boards: Sequence[tuple[Board, Sequence[Line]]]) -> str:
    """One row per model; every family of any board has columns, which are empty where a board has no such family."""
    names = list(dict.fromkeys(family for board, _ in boards for family in families(board)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(_plain(f"{name} {column}") for name in names for column in FAMILY_COLUMNS)])
    for number, (_, lines) in enumerate(boards, start=1):
        for line in lines:
            cells = {cell.family: cell for cell in line.families}
            row = [number, *_line_values(line)]
            row += [value for name in names for value in _family_values(cells.get(name))]
            writer.writerow([_plain(value) for value in row])
    return out.getvalue()


def as_markdown(board: Board, lines: Sequence[Line]) -> str:
    """One board as Markdown: its facts, its table and its failed cells."""
    columns = ("rank", "model", "worst family kept, %", "mean kept, %", "verdicts", "bits", "on disk", "times smaller")
    scores = tuple(f"{family}, %" for family in families(board))
    parts = [f"# What compression cost {md(readable(board.dense.name))}"]
    parts.append("\n".join(f"- {md(name)}: {md(readable(value))}" for name, value in facts(board)))
    parts.append(md_table((*columns, *scores), [_md_cells(line) for line in lines]))
    parts.append(
        "A rank is shared by models that cannot be told apart, at 5 % after Holm. Kept: (score − chance) ∕ "
        "(dense − chance). Brackets are 95 % intervals, numbers in parentheses differences from dense in points."
        + (f" {OF_RUNS}" if any(line.runs for line in lines) else "")
    )
    several = [line for line in lines if line.runs]
    if several:
        titles = ("model", "runs", "KL", *(f"{family}, %" for family in families(board)))
        parts += ["## Runs", OF_EACH, md_table(titles, [_md_runs(line) for line in several])]
    if board.failed:
        rows = [(c.recipe, c.id, " ".join((c.error or "").split())[:300]) for c in board.failed]
        parts += [
            "## Failed cells",
            md_table(("recipe", "cell", "error"), [[readable(x) for x in row] for row in rows]),
        ]
    return "\n\n".join(parts) + "\n"


def _board(board: Board, folder: str, lines: Sequence[Line], rows: dict[str, list[Any]]) -> BoardOut:
    results = board.dense.results
    return BoardOut(
        dense=board.dense.name,
        suite=results.engine.suite,
        folder=folder,
        protocol=results.engine.model_dump(),
        facts=dict(facts(board)),
        margin=board.margin,
        data=board.dense.sources,
        task_hashes={name: task.task_hash for name, task in results.tasks.items()},
        models=tuple(_model(line, rows[line.name]) for line in lines),
        failed=tuple(_failed(cell) for cell in board.failed),
    )


def _model(line: Line, rows: Sequence[Any]) -> ModelOut:
    results = line.entry.results
    values = dict(zip(list(COLUMNS)[1:], _line_values(line), strict=True))
    same = ("method", "kind", "removed", "bits_per_weight", "bytes", "times_smaller", "speed", "worst_family",
            "worst_verdict", "kl", "kl_top", "bits_per_byte", "text", "rank")  # fmt: skip
    return ModelOut(
        name=line.name,
        page=f"models/{line.slug}.html",
        sha=results.model.sha,
        recipe=results.model.recipe,
        worst_kept=_share(line.standing.kept),
        mean_kept=_share(line.standing.mean),
        families=tuple(map(_family, line.families)),
        tasks={row.task: _task(line, row) for row in rows},
        runs=tuple(map(_run, line.runs)),
        **{name: values[name] for name in same},
    )


def _run(line: Line) -> RunOut:
    return RunOut(
        name=line.name,
        page=f"models/{line.slug}.html",
        sha=line.entry.results.model.sha,
        scores={cell.family: cell.paired.compressed for cell in line.families},
        kl=line.fidelity.kl.value if line.fidelity else None,
    )


def _task(line: Line, row: Any) -> TaskOut:
    task, pair = line.entry.results.tasks[row.task], row.paired
    return TaskOut(
        title=row.title, family=row.family, n=pair.n, metric=task.headline, chance=task.chance, score=task.score.value,
        normalised=(task.score.value - task.chance) / (1 - task.chance), dense=pair.dense, delta=pair.delta,
        delta_low=pair.low, delta_high=pair.high, p_holm=row.p, verdict=pair.verdict,
    )  # fmt: skip


def _family(cell: FamilyCell) -> FamilyOut:
    pair = cell.paired
    return FamilyOut(
        family=cell.family, control=cell.control, n=pair.n, score=pair.compressed, low=cell.low, high=cell.high,
        dense=pair.dense, normalised=cell.normalised, kept=_share(cell.kept), delta=pair.delta, delta_low=pair.low,
        delta_high=pair.high, verdict=pair.verdict, flips=pair.flips, lost=pair.lost, gained=pair.gained,
        disagreement=cell.disagreement, between=_between(cell),
    )  # fmt: skip


def _between(cell: FamilyCell) -> float | None:
    return cell.runs.between if cell.runs.count > 1 else None


def _failed(cell: Cell) -> FailedOut:
    return FailedOut(id=cell.id, model=cell.model, recipe=cell.recipe, seed=cell.seed, error=cell.error)


def _share(kept: Kept | None) -> Share | None:
    return None if kept is None else Share(value=kept.value, low=kept.low, high=kept.high)


def _line_values(line: Line) -> list[Any]:
    """The values of COLUMNS except the first."""
    kept, mean, fidelity = line.standing.kept, line.standing.mean, line.fidelity
    return [
        line.standing.rank, line.name, line.method.label, line.method.family, line.method.removed, line.bits,
        line.bytes, line.ratio, line.speed.ratio if line.speed else None, line.standing.worst,
        kept.value if kept else None, kept.low if kept else None, kept.high if kept else None,
        mean.value if mean else None, line.worst_verdict, fidelity.kl.value if fidelity else None,
        fidelity.top if fidelity else None, fidelity.compressed_bits_per_byte if fidelity else None,
        fidelity.text_sha256 if fidelity else None, max(1, len(line.runs)),
    ]  # fmt: skip


def _family_values(cell: FamilyCell | None) -> list[Any]:
    if cell is None:
        return [None] * len(FAMILY_COLUMNS)
    pair = cell.paired
    return [
        pair.compressed, cell.low, cell.high, cell.normalised, pair.delta, pair.low, pair.high, pair.verdict,
        pair.flips, cell.disagreement, cell.kept.value if cell.kept else None, _between(cell),
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    """A CSV value that no spreadsheet interprets as a formula."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        text = readable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return "" if value is None else value


def _md_cells(line: Line) -> list[str]:
    kept, mean = line.standing.kept, line.standing.mean
    verdicts = "; ".join(f"{GLYPHS[verdict]} {verdict}: {families}" for verdict, families in line.verdict_lists())
    worst = f"{_interval(kept)} {line.standing.worst}" if kept else "–"
    runs = f" ({len(line.runs)} runs)" if line.runs else ""
    return [
        str(line.standing.rank or "–"), readable(line.name) + runs, worst,
        f"{100 * mean.value:.1f}" if mean else "–", verdicts,
        "–" if line.bits is None else f"{line.bits:.2f}", "–" if line.bytes is None else byte_size(line.bytes),
        "–" if line.ratio is None else f"{line.ratio:.2f}",
        *(f"{100 * cell.paired.compressed:.1f} ({signed(cell.paired.delta)})" for cell in line.families),
    ]  # fmt: skip


def _md_runs(line: Line) -> list[str]:
    divergences = [run.fidelity.kl.value for run in line.runs if run.fidelity]
    least = "≥ " if line.fidelity and line.fidelity.top else ""
    cells = [readable(line.name), str(len(line.runs)), least + _range(divergences, "{:.4f}")]
    for i, cell in enumerate(line.families):
        scores = [100 * run.families[i].paired.compressed for run in line.runs]
        cells.append(f"{_range(scores, '{:.1f}')}; {100 * cell.runs.flips:.1f}; {100 * cell.runs.between:.1f}")
    return cells


def _range(values: Sequence[float], form: str) -> str:
    """`55.1 (52.7 to 57.3)`: the mean, the smallest and the largest value."""
    if not values:
        return "–"
    mean, low, high = (form.format(value) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def _interval(kept: Kept) -> str:
    return f"{100 * kept.value:.1f} [{100 * kept.low:.1f}, {100 * kept.high:.1f}]"
