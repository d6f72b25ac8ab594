"""`python -m compress_evals.pruning`: every pruning method at every sparsity on one dense model, in one table.

Each row is a run of `compress.run` on the model, its artifact measured on facts that it was asked (closed book), on
facts in its context, and on unseen prose. Rows are appended to `rows.jsonl` as they are finished and not measured
again, so that the table survives an interruption. Differences between methods are tested on the same questions and
windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compress
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
from compress.model.source import locate
from compress_evals import stats
from compress_evals.fidelity import compare_windows, evaluation_text, text_windows
from compress_evals.folders import model_name, opened
from compress_evals.run import evaluate

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
BUDGETED = (  # 2:4 stays 2:4
    "global, magnitude", "owl, wanda", "owl, sparsegpt", "sensitivity, wanda", "sensitivity, alps, reconstruct",
    "sensitivity, realign, alps, reconstruct",
)  # fmt: skip
ON_TEXT = ("wanda", "sparsegpt", "wanda, dsnot", "wanda, swaps", "alps, reconstruct", "realign, alps, reconstruct")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method at one sparsity.

    `kl` and `loss` are sums over the tokens of each window of the text, `dense_loss` the dense model's; `right` are the
    answers to each task's questions, one character each; `errors` the mean over sites of error measures of the ledger.
    """

    method: str
    sparsity: str
    calibration: str
    source: str  # the model and the windows
    kl: list[float]
    loss: list[float]
    dense_loss: list[float]
    tokens: int
    right: dict[str, str]
    clusters: dict[str, list[str]]
    intervals: dict[str, tuple[float, float]]
    errors: dict[str, list[float]]
    seconds: float

    @property
    def mean_kl(self) -> float:
        """KL(dense || compressed), nats a token."""
        return sum(self.kl) / self.tokens

    def score(self, task: str) -> float:
        """The share of right answers."""
        return self.right[task].count("1") / len(self.right[task])


def wanted(calibration: str) -> list[tuple[str, float | str]]:
    """The rows of the table."""
    rows = [(name, s) for s in FRACTIONS for name in METHODS if name not in ONLY_GROUPS]
    rows += [(name, s) for s in GROUPS for name in METHODS if name not in (*ONLY_FRACTIONS, *BUDGETED)]
    return rows if calibration == "mixed" else [(name, s) for name, s in rows if name in ON_TEXT and s in (0.5, "2:4")]


class Bench:
    """A dense model, and what it says, beside which each method is measured."""

    def __init__(self, model: str, samples: int, length: int) -> None:
        self.source, self.samples, self.length = model, samples, length
        self.conditions = f"{model_name(model)}, {samples} x {length} tokens"
        self.dense, self.tokenizer = opened(locate(model), "cpu")
        self.windows = text_windows(self.tokenizer, evaluation_text(), 256)

    def measure(self, method: str, sparsity: float | str, data: str) -> Measured:
        """Run one method and measure its artifact; it is made in a temporary folder."""
        calibration = Calibration(data=data, samples=self.samples, length=self.length, seed=0)
        recipe = Recipe(passes=tuple(METHODS[method](sparsity)), calibration=calibration)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            report = compress.run(self.source, recipe, Path(folder) / "out")
            seconds = time.monotonic() - began
            made = json.loads((report.out / "compress.json").read_text(encoding="utf-8"))
            return self.of(report.out, made, method=method, sparsity=sparsity, data=data, seconds=seconds)

    def of(self, out: Path, made: Any, *, method: str, sparsity: float | str, data: str, seconds: float) -> Measured:
        """The measurements of an artifact."""
        model, _ = opened(out, "cpu")
        asked = evaluate(model, self.tokenizer, name=method, only=TASKS)
        found = compare_windows(self.dense, model, self.windows)
        sites = list(made["sites"].values())
        return Measured(
            method=method, sparsity=str(sparsity), calibration=data, seconds=round(seconds, 1),
            source=self.conditions, tokens=sum(len(f.kl) for f in found),
            kl=[float(f.kl.sum()) for f in found], loss=[float(f.compressed_loss.sum()) for f in found],
            dense_loss=[float(f.dense_loss.sum()) for f in found],
            right={t: "".join("1" if row.scores["acc"] > 0 else "0" for row in asked.rows[t]) for t in TASKS},
            clusters={t: [row.cluster for row in asked.rows[t]] for t in TASKS},
            intervals={t: (asked.tasks[t].score.low, asked.tasks[t].score.high) for t in TASKS},
            errors={key: means(sites, key) for key in ("mean_error", "squared_error") if key in sites[0]},
        )  # fmt: skip


def means(sites: Sequence[Any], key: str) -> list[float]:
    """The mean over sites of the error before and after."""
    return [sum(site[key][i] for site in sites) / len(sites) for i in (0, 1)]


def read(path: Path) -> list[Measured]:
    """The rows measured so far."""
    if not path.exists():
        return []
    return [Measured(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[Measured]) -> str:
    """Markdown: one block of lines for each calibration and sparsity, the best of each column in bold."""
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
            cells.append(f"{math.exp(sum(row.loss) / row.tokens):.2f}")
            for task in TASKS:
                low, high = row.intervals[task]
                text = f"{100 * row.score(task):.1f} ({100 * low:.1f}-{100 * high:.1f})"
                cells.append(bold(text, row.score(task) == highest[task]))
            lines.append("| " + " | ".join([*cells, f"{row.seconds:.0f}"]) + " |")
    return "\n".join(lines)


def bold(text: str, yes: bool) -> str:
    """Markdown bold, perhaps."""
    return f"**{text}**" if yes else text


def errors_table(rows: Sequence[Measured]) -> str:
    """Markdown: mean and squared layer error before and after each refinement that recorded them."""
    lines = ["| sparsity | method | mean error | squared error |", "|---|---|---|---|"]
    for row in rows:
        if "mean_error" in row.errors:
            cells = [" -> ".join(f"{v:.5f}" for v in row.errors[key]) for key in ("mean_error", "squared_error")]
            lines.append(f"| {row.sparsity} {row.calibration} | {row.method} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def versus(one: Measured, other: Measured) -> str:
    """A line: how `one` differs from `other` on the same windows and questions, with p values."""
    differences = [a - b for a, b in zip(one.kl, other.kl, strict=True)]
    p = stats.sign_flip(differences)
    parts = [f"KL {one.mean_kl:.4f} against {other.mean_kl:.4f} (p = {p:.2g})"]
    for task in TASKS:
        before, after = ([int(c) for c in row.right[task]] for row in (other, one))
        pair = stats.paired(before, after, one.clusters[task])
        parts.append(f"{task} {100 * pair.delta:+.1f} points ({100 * pair.low:+.1f} to {100 * pair.high:+.1f}, "
                     f"p = {pair.p:.2g})")  # fmt: skip
    return f"{one.sparsity} {one.calibration}: {one.method} against {other.method}: " + "; ".join(parts)


def verdicts(rows: Sequence[Measured]) -> list[str]:
    """The best method by KL of each sparsity against plain SparseGPT and Wanda."""
    lines = []
    for key in dict.fromkeys((row.calibration, row.sparsity) for row in rows):
        same = {row.method: row for row in rows if (row.calibration, row.sparsity) == key}
        best = min(same.values(), key=lambda row: row.mean_kl)
        lines += [versus(best, same[name]) for name in ("sparsegpt", "wanda") if name in same and best.method != name]
    return lines


def main() -> None:
    """Measure what is missing, print the tables."""
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
    bench = Bench(arguments.model, arguments.samples, arguments.length)
    found = read(path)
    other = next((row.source for row in found if row.source != bench.conditions), None)
    if other is not None:
        parser.error(f"--out: {path} holds rows of {other}; choose another folder")
    done = {(row.calibration, row.sparsity, row.method) for row in found}
    for data in arguments.calibrations:
        for method, sparsity in wanted(data):
            chosen = method in arguments.methods and str(sparsity) in arguments.sparsities
            if not chosen or (data, str(sparsity), method) in done:
                continue
            sys.stderr.write(f"{data} {sparsity} {method}\n")
            row = bench.measure(method, sparsity, data)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    rows = sorted(read(path), key=lambda row: (row.calibration, ":" in row.sparsity, row.sparsity))
    head = f"{bench.conditions}, seed 0, cpu; 95 % intervals; p values are not corrected for choosing the best"
    lines = [head, "", table(rows), "", errors_table(rows), "", *verdicts(rows)]
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
