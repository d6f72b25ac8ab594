"""The columns of the table on a board's page: their labels, their sort order, and the content of their cells.

Columns are shown and hidden by group. A cell has a sort value and a text; nothing here is HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compress_evals.fidelity import Fidelity, usual_way
from compress_evals.leaderboard.rank import Kept
from compress_evals.leaderboard.table import SEVERITY, FamilyCell, Line
from compress_evals.wording import byte_size, signed

GROUPS = {
    "kept": "Kept of dense, %",
    "verdicts": "Verdicts",
    "runs": "Runs",
    "size": "Size",
    "speed": "Decoding",
    "scores": "Scores, %",
    "differences": "Differences, points",
    "flips": "Flips, %",
    "answers": "Different answers, %",
    "fidelity": "Fidelity",
}
FOLDED = ("differences", "flips", "answers")  # hidden at first if scripts run; always shown without scripts
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The content of a cell: `text`, with `small` beside it; `verdict` sets its colour.

    `lists` are families by verdict. `sort` is None if there is nothing to show; such cells sort last.
    """

    sort: float | None = None
    text: str = NOTHING
    small: str = ""
    verdict: str = ""
    lists: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; `first` is the sort direction of the first click, `grey` marks a column that affects no ranking."""

    group: str
    label: str
    about: str
    cell: Callable[[Line], Cell]
    first: str = "descending"
    grey: bool = False


def columns(lines: Sequence[Line], families: Sequence[str]) -> list[Column]:
    """The columns, in order, in which at least one of these lines has a value."""
    every = [*_kept(), _verdicts(), *_runs(), *_size(), _speed(), *_by_family(families), *_fidelity(lines)]
    return [column for column in every if not lines or any(column.cell(line).sort is not None for line in lines)]


def _kept() -> Iterator[Column]:
    yield Column(
        group="kept",
        label="Worst family",
        about="the share of the dense score above chance that the worst family kept, with its 95 % interval",
        cell=lambda line: _share(line.standing.kept, line.standing.worst or ""),
    )
    yield Column(
        group="kept",
        label="Mean",
        about="the mean over families of the share kept; it does not affect the ranking",
        cell=lambda line: _share(line.standing.mean),
    )


def _verdicts() -> Column:
    return Column(
        group="verdicts",
        label="Families by verdict",
        about="each family's verdict, worst first; sorted by how many fail, then by how many drop, without controls",
        cell=lambda line: Cell(
            sort=_severity(line),
            text="",
            verdict=line.worst_verdict,
            lists=tuple(line.verdict_lists()),
        ),
        first="ascending",
    )


def _runs() -> Iterator[Column]:
    yield Column(
        group="runs",
        label="Seeds",
        about="number of calibration seeds that the line averages; intervals, verdicts and ranks include their spread",
        cell=lambda line: Cell(sort=len(line.runs), text=str(len(line.runs))) if line.runs else Cell(),
    )
    yield Column(
        group="runs",
        label="Between runs, points",
        about="between-run standard deviation not explained by single questions, for the family where it is largest",
        cell=_apart,
    )


def _apart(line: Line) -> Cell:
    counted = [cell for cell in line.families if not cell.control and cell.runs.count > 1]
    if not counted:
        return Cell()
    most = max(counted, key=lambda cell: cell.runs.between)
    between = 100 * most.runs.between
    return Cell(sort=between, text=f"{between:.1f}", small=most.family if between else "")


def _size() -> Iterator[Column]:
    yield Column(
        group="size",
        label="Bits per weight",
        about="bits stored for each weight of the blocks, scales and masks included",
        cell=lambda line: _number(line.bits, "{:.2f}"),
        first="ascending",
    )
    yield Column(
        group="size",
        label="On disk",
        about="bytes of all tensors, embeddings included",
        cell=lambda line: Cell() if line.bytes is None else Cell(sort=line.bytes, text=byte_size(line.bytes)),
        first="ascending",
    )
    yield Column(
        group="size",
        label="Times smaller",
        about="bytes of dense over bytes of this model",
        cell=lambda line: _number(line.ratio, "{:.2f}×"),
    )


def _speed() -> Column:
    def cell(line: Line) -> Cell:
        if line.speed is None:
            return Cell()
        speed = line.speed
        return Cell(sort=speed.ratio, text=f"{speed.ratio:.2f}×", small=f"{speed.low:.2f} to {speed.high:.2f}")

    return Column(
        group="speed",
        label="Tokens/s against dense",
        about="greedy decoding of one sequence, as a multiple of dense in the same process: median, lowest, highest",
        cell=cell,
    )


def _by_family(families: Sequence[str]) -> Iterator[Column]:
    kinds = {
        "scores": ("the mean over questions with its 95 % interval", _score),
        "differences": ("compressed minus dense with its 95 % interval, and the verdict", _difference),
        "flips": ("questions that dense answers right and this model wrong, and the reverse", _flips),
        "answers": ("questions answered differently, right or wrong", _answers),
    }
    for group, (about, cell) in kinds.items():
        for i, family in enumerate(families):
            yield Column(
                group=group,
                label=family,
                about=f"{family}: {about}",
                cell=lambda line, i=i, cell=cell: cell(line.families[i]),  # type: ignore[misc]
                first="descending" if group in ("scores", "differences") else "ascending",
            )


def _fidelity(lines: Sequence[Line]) -> Iterator[Column]:
    usual = usual_way(line.fidelity for line in lines if line.fidelity)

    def cell(found: Fidelity | None, value: float, text: str) -> Cell:
        if found is None:
            return Cell()
        return Cell(sort=value, text=text) if found.way == usual else Cell(text=text, small="measured otherwise")

    def bits(line: Line) -> float:
        return line.fidelity.compressed_bits_per_byte if line.fidelity else 0.0

    yield Column(
        group="fidelity",
        label="KL, nats",
        about="KL(dense || compressed) per token on text that no calibration set contains; ≥ marks a lower bound, over "
        "the likeliest tokens and the rest",
        cell=lambda line: cell(line.fidelity, line.fidelity.kl.value if line.fidelity else 0.0, line.kl),
        first="ascending",
    )
    yield Column(
        group="fidelity",
        label="Bits per byte: not a quality metric",
        about="how well the same text is compressed: it moves little while knowledge is lost, and does not affect the "
        "ranking",
        cell=lambda line: cell(line.fidelity, bits(line), f"{bits(line):.3f}"),
        first="ascending",
        grey=True,
    )


def _score(cell: FamilyCell) -> Cell:
    pair = cell.paired
    small = f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return Cell(sort=pair.compressed, text=f"{100 * pair.compressed:.1f}", small=small, verdict=pair.verdict)


def _difference(cell: FamilyCell) -> Cell:
    pair = cell.paired
    return Cell(
        sort=pair.delta,
        text=signed(pair.delta),
        small=f"[{signed(pair.low)}, {signed(pair.high)}]",
        verdict=pair.verdict,
        lists=((pair.verdict, ""),),
    )


def _flips(cell: FamilyCell) -> Cell:
    pair = cell.paired
    if not pair.binary:
        return Cell()
    return Cell(sort=pair.flips, text=f"{100 * pair.flips:.1f}", small=f"{pair.lost} lost, {pair.gained} gained")


def _answers(cell: FamilyCell) -> Cell:
    return _number(None if cell.disagreement is None else 100 * cell.disagreement, "{:.1f}")


def _share(kept: Kept | None, small: str = "") -> Cell:
    if kept is None:
        return Cell()
    interval = f"[{100 * kept.low:.1f}, {100 * kept.high:.1f}]".replace("-", "−")
    return Cell(sort=kept.value, text=f"{100 * kept.value:.1f}".replace("-", "−"), small=f"{interval} {small}".strip())


def _number(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(sort=value, text=form.format(value).replace("-", "−"))


def _severity(line: Line) -> float:
    """A sort value for the verdicts, without controls: by the number of fails, then of drops, then of inconclusive."""
    counts = [sum(not c.control and c.paired.verdict == verdict for c in line.families) for verdict in SEVERITY]
    return float(sum(count * 100.0 ** (len(SEVERITY) - i) for i, count in enumerate(counts[:3])))
