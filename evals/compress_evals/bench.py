"""`python -m compress_evals.bench`: runs and evaluates every packaged recipe on one or more dense models.

Prints one table (mean over the models, and the range), writes `bench.json`, and plots quality against size. Run it on
models from several training seeds before trusting a ranking. Artifacts are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compress
from compress.recipe import load, packaged
from compress_evals.folders import evaluate_folders, model_name
from compress_evals.results import Results

TASKS = ("facts_trained", "facts_question", "facts_cloze", "facts_mc", "facts_context3", "facts_open", "facts_copy")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One recipe on one model: size, KL divergence on the evaluation text, and the score of each task."""

    recipe: str
    model: str
    bytes: int
    bits_per_weight: float
    kl: float
    bits_per_byte: float
    scores: dict[str, float]
    retained: float


def measure(model: str, recipes: Sequence[str], limit: int | None, folder: Path) -> list[Measured]:
    """Run and evaluate each recipe on one dense model."""
    outs = []
    for name in recipes:
        sys.stderr.write(f"{model}: {name}\n")
        out = folder / name
        recipe = load(packaged()[name])
        compress.run(model, recipe, out)
        outs.append(out)
    dense, *found = evaluate_folders(outs, model, limit=limit)
    name = model_name(model)
    return [of_dense(dense, found[0], name)] + [of(result, dense, name) for result in found]


def of_dense(dense: Results, any_compressed: Results, model: str) -> Measured:
    """The dense model as a row of the table."""
    fidelity = any_compressed.vs.fidelity if any_compressed.vs else None
    return Measured(
        recipe="dense", model=model, bytes=dense.model.bytes_on_disk or 0, bits_per_weight=16.0, kl=0.0,
        bits_per_byte=fidelity.dense_bits_per_byte if fidelity else 0.0,
        scores={task: dense.tasks[task].score.value for task in TASKS}, retained=1.0,
    )  # fmt: skip


def of(result: Results, dense: Results, model: str) -> Measured:
    """One evaluated artifact as a row of the table."""
    fidelity: Any = result.vs.fidelity if result.vs else None
    scores = {task: result.tasks[task].score.value for task in TASKS}
    kept = [scores[task] / dense.tasks[task].score.value for task in TASKS]
    return Measured(
        recipe=result.model.name, model=model, bytes=result.model.bytes_on_disk or 0,
        bits_per_weight=result.model.bits_per_weight or 16.0, kl=fidelity.kl.value,
        bits_per_byte=fidelity.compressed_bits_per_byte, scores=scores, retained=statistics.mean(kept),
    )  # fmt: skip


def table(rows: Sequence[Measured]) -> str:
    """A Markdown table with one line per recipe: the mean over models, with the range in parentheses."""
    head = ["recipe", "bits/weight", "bytes", "KL", "bits/byte", *[task.removeprefix("facts_") for task in TASKS]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row.recipe for row in rows):
        same = [row for row in rows if row.recipe == name]
        cells = [name, f"{same[0].bits_per_weight:.2f}", f"{same[0].bytes:,}"]
        cells += [spread([row.kl for row in same], 3), spread([row.bits_per_byte for row in same], 3)]
        cells += [spread([100 * row.scores[task] for row in same], 1) for task in TASKS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """`mean (lowest-highest)`, or the value itself if there is only one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Plot knowledge kept against size: one point per recipe, bars for the range over models, coloured by `colour`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "compress"  # fixed ids, so that the file is reproducible
    figure, axes = pyplot.subplots(figsize=(8.6, 4.8), layout="constrained")
    points = []
    for name in dict.fromkeys(row.recipe for row in rows):
        kept = [100 * row.retained for row in rows if row.recipe == name]
        size = next(row.bytes for row in rows if row.recipe == name) / 1e6
        points.append((name, size, statistics.mean(kept), min(kept), max(kept)))
    for (name, x, y, low, high), label_y in zip(points, spread_labels(points), strict=True):
        axes.errorbar(x, y, [[y - low], [high - y]], fmt="o", capsize=3, color=colour(name))
        axes.annotate(
            name, (x, y), (x + 0.12, label_y), fontsize=8, va="center", color=colour(name),
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#999999"},
        )  # fmt: skip
    axes.set_xlabel("bytes of all tensors, MB")
    axes.set_ylabel("knowledge kept, % of dense (mean of seven tasks)")
    axes.set_ylim(0, 112)
    axes.set_xlim(right=max(point[1] for point in points) + 0.7)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def colour(name: str) -> str:
    """The colour of a recipe, by the kinds of weights that the passes of the packaged recipe of that name produce.

    Blue for quantized, green for low rank, purple for quantized combined with pruning or low rank, orange for all other
    recipes, grey for dense.
    """
    if name == "dense":
        return "#555555"
    steps = load(packaged()[name]).passes
    made = {str(getattr(step, "gives", "")) for step in steps}
    masked = any(getattr(step, "sparsity", None) is not None for step in steps)
    if "quantized" in made:
        return "#7b3fa0" if masked or made & {"factored", "split"} else "#1f6fb4"
    return "#2e8540" if "factored" in made else "#d5641c"


def spread_labels(points: Sequence[tuple[str, float, float, float, float]]) -> list[float]:
    """A height for each label, as near to its point as the other points and the labels placed before it allow."""
    taken: list[tuple[float, float, float]] = []
    heights = []
    for name, x, y, _, _ in points:
        left, right = x + 0.1, x + 0.12 + 0.075 * len(name)
        others = taken + [(a - 0.05, a + 0.05, b) for _, a, b, _, _ in points if (a, b) != (x, y)]
        near = [height for a, b, height in others if a < right and left < b]
        tries = (y + sign * step * 4.5 for step in range(12) for sign in (1, -1))
        free = next((h for h in tries if h < 109 and all(abs(h - t) >= 4.4 for t in near)), y)
        taken.append((left, right, free))
        heights.append(free)
    return heights


def main() -> None:
    """Parse the arguments, measure, and print the table."""
    names = list(packaged())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["builtin"])
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    parser.add_argument("--limit", type=int, default=None, help="questions per task")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Measured] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(model, arguments.recipes, arguments.limit, Path(folder))
        (arguments.out / "bench.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(f"{len(arguments.models)} models, limit {arguments.limit}, cpu, scores in %\n{table(rows)}\n")
    draw(rows, arguments.out / "quality.svg")


if __name__ == "__main__":
    main()
