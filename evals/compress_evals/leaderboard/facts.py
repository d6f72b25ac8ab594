"""The facts at the head of a board: how it was measured, how certain it can be, and where the questions came from."""

from __future__ import annotations

from collections import Counter

from compress_evals.comparison import MUST_AGREE
from compress_evals.fidelity import usual_way
from compress_evals.leaderboard.collect import Board, Collection, Entry
from compress_evals.report import cut_to_fit, header_line
from compress_evals.results import Results
from compress_evals.wording import byte_size


def facts(board: Board) -> list[tuple[str, str]]:
    """Name and value of each fact at the head of a board, in order; facts without a value are left out."""
    dense = board.dense.results
    engine = dense.engine
    rows = [
        ("Dense model", f"{board.dense.name}{size_of(dense)}"),
        ("Asked", header_line(dense, board.clusters)),
        ("Matching", f"a loss of at most {100 * board.margin:g} % of the dense score, with 95 % confidence"),
        ("Data", sources(dense)),
        ("Noise floor", noise(dense)),
        ("Hardware", f"{_place(dense)}, batch {engine.batch_size}, torch {engine.torch}{_elsewhere(board)}"),
        ("Fidelity", _texts(board)),
        ("Harness", f"suite {engine.suite}, lm-eval {engine.lm_eval}, context {engine.max_length}, seed {dense.seed}"),
        ("Cut to fit", "; ".join(cut_to_fit(dense))),
        ("Skipped", "; ".join(f"{skipped.title}: {skipped.reason}" for skipped in dense.skipped.values())),
    ]
    return [(name, value) for name, value in rows if value]


def _place(results: Results) -> str:
    return f"{results.engine.device}, {results.engine.dtype}"


def _elsewhere(board: Board) -> str:
    """The devices and dtypes of the models that were not measured like dense, with their names, as text to append."""
    names: dict[str, list[str]] = {}
    for entry in board.compressed:
        names.setdefault(_place(entry.results), []).append(entry.name)
    names.pop(_place(board.dense.results), None)
    return "".join(f"; {place}: {', '.join(those)}" for place, those in names.items())


def _texts(board: Board) -> str:
    """On what most models' KL was measured, and which models' KL must not be compared with it."""
    measured = {e.name: e.results.vs.fidelity for e in board.compressed if e.results.vs and e.results.vs.fidelity}
    usual = usual_way(measured.values())
    if usual is None:
        return ""
    others = [name for name, found in measured.items() if found.way != usual]
    text, tokens, top = usual
    return (
        f"{tokens:,} tokens of the text with SHA-256 {text[:12]}"
        + (f"; KL over the {top} likeliest tokens and the rest, a lower bound" if top else "")
        + (f"; measured in another way, not to be compared: {', '.join(others)}" if others else "")
    )


def size_of(dense: Results) -> str:
    """The parameter count of the dense model and, if known, its bytes, as text to append."""
    size = dense.model.bytes_on_disk
    return f", {dense.model.parameters:,} parameters" + (f", {byte_size(size)}" if size else "")


def sources(dense: Results) -> str:
    """The sources of the questions, with the number of tasks for each."""
    counts = Counter(task.data.source if task.data else "not recorded" for task in dense.tasks.values())
    return ", ".join(f"{source} ({count} task{'s' * (count > 1)})" for source, count in sorted(counts.items()))


def noise(dense: Results) -> str:
    """How many of the dense model's answers flip when only the batch size changes, or "not measured"."""
    if not dense.noise:
        return "not measured"
    flips, n = sum(noise.flips for noise in dense.noise.values()), sum(noise.n for noise in dense.noise.values())
    sizes = ", ".join(sorted({str(noise.batch_size) for noise in dense.noise.values()}))
    within = "fewer flips than that are within the noise"
    return f"{flips} of {n:,} answers of dense flip when only the batch size changes, to {sizes}; {within}"


def told_apart(collection: Collection) -> list[list[tuple[str, str]]]:
    """For every board, the properties in which the boards differ, as name and value."""
    known = [_protocol(board) for board in collection.boards]
    differing = [name for name in known[0] if len({board[name] for board in known}) > 1]
    differing = [name for name in differing if name != "questions" or "tasks" not in differing]
    return [[(name, board[name]) for name in differing] for board in known]


def _protocol(board: Board) -> dict[str, str]:
    dense: Entry = board.dense
    results = dense.results
    return {
        "dense model": dense.name,
        "weights": (results.model.sha or "not recorded")[:12],
        **{field.replace("_", " "): str(getattr(results.engine, field)) for field in MUST_AGREE},
        "tasks": f"{len(results.tasks)} ({', '.join(results.tasks)})",
        "questions": " ".join(task.task_hash[:8] for task in results.tasks.values()),
        "data": sources(results),
        "margin": f"{100 * board.margin:g} %",
        "measured": f"{results.created}, {results.engine.device}, {results.engine.dtype}",
    }
