"""Measures how much two runs of the same recipe differ if only the order of floating-point sums changes.

`python -m compress_evals.rounding --recipes gptq-int2 wanda-50` runs each recipe twice, with calibration windows going
through a block 1,024 and 4,096 tokens at a time, which changes only the order in which numbers are added. It asks both
artifacts the same questions and compares them with each other. Confidence intervals are over questions: an interval
that excludes zero shows that two runs differ significantly although nothing about the method changed. A recipe that
reads no data is the control: both of its artifacts have the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import compress
from compress.model import travellers
from compress.recipe import load, packaged
from compress_evals.comparison import compare
from compress_evals.folders import evaluate_folders
from compress_evals.results import Results, versus
from compress_evals.stats import Paired

TASKS = ("facts_trained", "facts_question", "facts_context3", "facts_open")
TOKENS = (1024, 4096)
RECIPES = ("rtn-int4", "wanda-50", "gptq-int4", "sparsegpt-50", "wanda-2of4", "vq-2bit", "wanda-2of4-gptq-int4",
           "gptq-int2", "owl-70", "ria-2of4-permuted")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Again:
    """One recipe run twice: KL of each run from dense in nats per token, and the second run compared with the first."""

    recipe: str
    kl: tuple[float, float]
    tasks: dict[str, Paired]


@contextmanager
def at_once(tokens: int) -> Iterator[None]:
    """Within this context, calibration windows go through a block about `tokens` tokens at a time."""
    before, travellers.CPU_TOKENS = travellers.CPU_TOKENS, tokens
    try:
        yield
    finally:
        travellers.CPU_TOKENS = before


def again(model: str, name: str, tokens: Sequence[int], limit: int | None, folder: Path) -> Again:
    """Run a packaged recipe twice and compare both artifacts; `folder` also holds the cache of the dense model."""
    outs = []
    for count in tokens:
        with at_once(count):
            outs.append(compress.run(model, load(packaged()[name]), folder / f"{name}-{count}").out)
    _, first, second = evaluate_folders(outs, model, only=TASKS, limit=limit, cache=folder / "cache")
    tasks = compare(first, second).tasks
    return Again(
        recipe=name, kl=(divergence(first), divergence(second)),
        tasks={task: tasks[task].paired for task in TASKS},
    )  # fmt: skip


def divergence(result: Results) -> float:
    """KL(dense || compressed) in nats per token; 0 if it was not measured."""
    found = versus(result).fidelity
    return 0.0 if found is None else found.kl.value


def table(rows: Sequence[Again]) -> str:
    """A Markdown table with one line per recipe: differences in points with 95 % intervals, and the share of flips."""
    titles = [f"{task.removeprefix('facts_')} (n = {pair.n})" for task, pair in rows[0].tasks.items()]
    cells = [["recipe", "KL, of each", *titles], ["---"] * (2 + len(titles))]
    cells += [[row.recipe, ", ".join(f"{kl:.4f}" for kl in row.kl), *map(told, row.tasks.values())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def told(paired: Paired) -> str:
    """A table cell such as `+0.4 (-0.9 to +1.7), 3.2 % flipped`."""
    return (
        f"{100 * paired.delta:+.1f} ({100 * paired.low:+.1f} to {100 * paired.high:+.1f}), "
        f"{100 * paired.flips:.1f} % flipped"
    )


def main() -> None:
    """Parse the arguments, run, and print the table."""
    names = list(packaged())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument(
        "--recipes", nargs="+", default=["rtn-int4", "wanda-50", "gptq-int4", "gptq-int2"], choices=names
    )
    parser.add_argument(
        "--tokens",
        nargs=2,
        type=int,
        default=TOKENS,
        help="calibration tokens per forward pass, in the first and in the second run",
    )
    parser.add_argument("--limit", type=int, default=None, help="questions per task")
    arguments = parser.parse_args()
    if arguments.tokens[0] == arguments.tokens[1]:
        parser.error("--tokens: give two different numbers")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes:
            sys.stderr.write(f"{arguments.model}: {name}\n")
            rows.append(again(arguments.model, name, arguments.tokens, arguments.limit, Path(folder)))
    sys.stdout.write(
        f"{arguments.model}, cpu, calibration {' and '.join(map(str, arguments.tokens))} tokens per forward pass; "
        f"second minus first, points\n{table(rows)}\n"
    )


if __name__ == "__main__":
    main()
