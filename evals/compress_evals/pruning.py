"""`python -m compress_evals.pruning`: compares every pruning method at every sparsity on one dense model.

Each row is one `compress.run` on the model, whose artifact is measured on facts (closed book and in context) and on
unseen prose. Rows are appended to `rows.jsonl` as they finish and are not measured again, so an interrupted run can be
continued. Differences between methods are tested in pairs, on the same questions and windows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import (
    ALPS,
    OWL,
    RIA,
    Calibration,
    DSnoT,
    Global,
    Magnitude,
    Pass,
    Realign,
    Recipe,
    Reconstruct,
    Sensitivity,
    SparseGPT,
    Swaps,
    Wanda,
)
from compress_evals.table import Bench, Scored, append, bold, foreign, percent, versus
from compress_evals.table import read as rows_of

TASKS = ("facts_trained", "facts_question", "facts_context3", "facts_open")
FRACTIONS: tuple[float | str, ...] = (0.3, 0.5, 0.6, 0.7)
GROUPS: tuple[float | str, ...] = ("2:4", "4:8", "1:4")
Steps = Callable[[Any], list[Pass]]

METHODS: dict[str, Steps] = {
    "magnitude": lambda s: [Magnitude(sparsity=s)],
    "wanda": lambda s: [Wanda(sparsity=s)],
    "wanda alpha": lambda s: [Wanda(sparsity=s, alpha=True)],
    "ria": lambda s: [RIA(sparsity=s)],
    "ria permuted": lambda s: [RIA(sparsity=s, permute=True)],
    "sparsegpt": lambda s: [SparseGPT(sparsity=s)],
    "alps": lambda s: [ALPS(sparsity=s)],
    "wanda, dsnot": lambda s: [Wanda(sparsity=s), DSnoT()],
    "wanda, dsnot reference": lambda s: [Wanda(sparsity=s), DSnoT(form="reference")],
    "magnitude, dsnot": lambda s: [Magnitude(sparsity=s), DSnoT()],
    "wanda, swaps": lambda s: [Wanda(sparsity=s), Swaps()],
    "wanda, reconstruct": lambda s: [Wanda(sparsity=s), Reconstruct()],
    "wanda, swaps, reconstruct": lambda s: [Wanda(sparsity=s), Swaps(), Reconstruct()],
    "sparsegpt, swaps, reconstruct": lambda s: [SparseGPT(sparsity=s), Swaps(), Reconstruct()],
    "global, magnitude": lambda s: [Global(), Magnitude(sparsity=s)],
    "owl, wanda": lambda s: [OWL(), Wanda(sparsity=s)],
    "owl, sparsegpt": lambda s: [OWL(), SparseGPT(sparsity=s)],
    "sensitivity, wanda": lambda s: [Sensitivity(), Wanda(sparsity=s)],
    "alps, reconstruct": lambda s: [ALPS(sparsity=s), Reconstruct()],
    "sensitivity, alps, reconstruct": lambda s: [Sensitivity(), ALPS(sparsity=s), Reconstruct()],
    "realign, wanda": lambda s: [Realign(), Wanda(sparsity=s)],
    "realign, sparsegpt": lambda s: [Realign(), SparseGPT(sparsity=s)],
    "realign, alps, reconstruct": lambda s: [Realign(), ALPS(sparsity=s), Reconstruct()],
    "sensitivity, realign, alps, reconstruct": lambda s: [Sensitivity(), Realign(), ALPS(sparsity=s), Reconstruct()],
}
ONLY_FRACTIONS = ("wanda alpha",)
ONLY_GROUPS = ("ria permuted",)
BUDGETED = (  # not run with N:M patterns: a budget pass cannot change 2:4
    "global, magnitude", "owl, wanda", "owl, sparsegpt", "sensitivity, wanda", "sensitivity, alps, reconstruct",
    "sensitivity, realign, alps, reconstruct",
)  # fmt: skip
ON_TEXT = ("wanda", "sparsegpt", "wanda, dsnot", "wanda, swaps", "alps, reconstruct", "realign, alps, reconstruct")


@dataclass(frozen=True, kw_only=True)
class Measured(Scored):
    """One method at one sparsity; `errors` are the ledger's error measures, averaged over sites."""

    sparsity: str
    calibration: str
    errors: dict[str, list[float]]


def wanted(calibration: str) -> list[tuple[str, float | str]]:
    """The method and sparsity of every row of the table."""
    rows = [(name, s) for s in FRACTIONS for name in METHODS if name not in ONLY_GROUPS]
    rows += [(name, s) for s in GROUPS for name in METHODS if name not in (*ONLY_FRACTIONS, *BUDGETED)]
    return rows if calibration == "mixed" else [(name, s) for name, s in rows if name in ON_TEXT and s in (0.5, "2:4")]


def measure(bench: Bench, method: str, sparsity: float | str, calibration: Calibration) -> Measured:
    """Run one method and measure its artifact."""
    made, scored = bench.run(Recipe(passes=tuple(METHODS[method](sparsity)), calibration=calibration), method)
    sites = list(made["sites"].values())
    errors = {key: means(sites, key) for key in ("mean_error", "squared_error") if key in sites[0]}
    return Measured(**scored, sparsity=str(sparsity), calibration=calibration.data, errors=errors)


def means(sites: Sequence[Any], key: str) -> list[float]:
    """The mean over sites of an error before and after refinement."""
    return [sum(site[key][i] for site in sites) / len(sites) for i in (0, 1)]


def read(path: Path) -> list[Measured]:
    """The rows measured so far."""
    return rows_of(path, Measured)


def table(rows: Sequence[Measured]) -> str:
    """A Markdown table, grouped by calibration and sparsity, with the best of each column in bold."""
    head = ["sparsity", "method", "KL", "perplexity", "trained facts", "new question", "3 facts in context",
            "open book", "seconds"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys((row.calibration, row.sparsity) for row in rows):
        same = [row for row in rows if (row.calibration, row.sparsity) == key]
        lowest = min(row.mean_kl for row in same)
        highest = {task: max(row.score(task) for row in same) for task in TASKS}
        for row in same:
            cells = [f"{row.sparsity} {row.calibration}", row.method]
            cells.append(bold(f"{row.mean_kl:.4f}", row.mean_kl == lowest))
            cells.append(f"{row.perplexity:.2f}")
            cells += [bold(percent(row, task), row.score(task) == highest[task]) for task in TASKS]
            lines.append("| " + " | ".join([*cells, f"{row.seconds:.0f}"]) + " |")
    return "\n".join(lines)


def errors_table(rows: Sequence[Measured]) -> str:
    """A Markdown table of the mean and squared layer errors before and after each refinement that recorded them."""
    lines = ["| sparsity | method | mean error | squared error |", "|---|---|---|---|"]
    for row in rows:
        if "mean_error" in row.errors:
            cells = [" -> ".join(f"{v:.5f}" for v in row.errors[key]) for key in ("mean_error", "squared_error")]
            lines.append(f"| {row.sparsity} {row.calibration} | {row.method} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def verdicts(rows: Sequence[Measured]) -> list[str]:
    """The best method by KL at each calibration and sparsity, compared with plain SparseGPT and Wanda."""
    lines = []
    for key in dict.fromkeys((row.calibration, row.sparsity) for row in rows):
        same = {row.method: row for row in rows if (row.calibration, row.sparsity) == key}
        best = min(same.values(), key=lambda row: row.mean_kl)
        others = [same[name] for name in ("sparsegpt", "wanda") if name in same and best.method != name]
        lines += [f"- {best.sparsity} {best.calibration}: {versus(best, other, TASKS)}" for other in others]
    return lines


def main() -> None:
    """Measure the missing rows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", default=[str(s) for s in (*FRACTIONS, *GROUPS)])
    parser.add_argument("--calibrations", nargs="+", default=["mixed", "text"])
    parser.add_argument("--out", type=Path, default=Path("out/pruning"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows.jsonl"
    bench = Bench(arguments.model, f"{arguments.samples} x {arguments.length} tokens", TASKS)
    found = read(path)
    wrong = foreign(path, found, bench.conditions)
    if wrong is not None:
        parser.error(wrong)
    done = {(row.calibration, row.sparsity, row.method) for row in found}
    for data in arguments.calibrations:
        calibration = Calibration(data=data, samples=arguments.samples, length=arguments.length, seed=0)
        for method, sparsity in wanted(data):
            chosen = method in arguments.methods and str(sparsity) in arguments.sparsities
            if not chosen or (data, str(sparsity), method) in done:
                continue
            sys.stderr.write(f"{data} {sparsity} {method}\n")
            append(path, measure(bench, method, sparsity, calibration))
    rows = sorted(read(path), key=lambda row: (row.calibration, ":" in row.sparsity, row.sparsity))
    head = f"{bench.conditions}, seed 0, cpu; 95 % intervals; p values are not corrected for choosing the best"
    lines = [head, "", table(rows), "", errors_table(rows), "", *verdicts(rows)]
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
