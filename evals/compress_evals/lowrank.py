"""`python -m compress_evals.lowrank`: compares low rank, sparse plus low rank and their alternatives at equal bytes.

Each row is one `compress.run` that removes a share of the bytes of the block matrices. What remains is stored as
factors in 16 bits, as kept weights in 16 bits with a one-bit bitmap, or as a quantizer stores it. Models are compared
with the dense one on facts (closed book and in context) and on unseen prose. Rows are appended to `rows.jsonl` and not
measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from compress import Calibration, Recipe
from compress.errors import RecipeError
from compress.recipe import read_pass
from compress_evals.table import (
    Bench,
    Scored,
    append,
    bold,
    foreign,
    kl_p,
    paired,
    percent,
    read,
    recipe_key,
    recipe_key_of,
)

FACTS, CONTEXT = TASKS = ("facts_trained", "facts_context3")
SAMPLES, LENGTH = 128, 256
CALIBRATION = Calibration(data="mixed", samples=SAMPLES, length=LENGTH, seed=0)
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
PLAIN = 16  # bits of an uncompressed number
Steps = list[dict[str, Any]]


def sparse(removed: float) -> float:
    """The sparsity that removes this share of the bytes, given that the bitmap costs one bit per weight."""
    return round(removed + 1 / PLAIN, 4)


def factored(*before: str | dict[str, Any], by: str = "svd-llm", **options: Any) -> Callable[[float], Steps]:
    """A pipeline that ends in the low-rank pass `by`."""
    first = [{step: {}} if isinstance(step, str) else step for step in before]
    return lambda removed: [*first, {by: {"removed": removed, **options}}]


def pruned(*before: str, by: str, after: Sequence[str] = (), **options: Any) -> Callable[[float], Steps]:
    """A pipeline around the pruning pass `by`, whose result is stored with a bitmap."""
    return lambda removed: [
        *({step: {}} for step in before),
        {by: {"sparsity": sparse(removed), **options}},
        *({step: {}} for step in after),
    ]


def tuned(first: Callable[[float], Steps]) -> Callable[[float], Steps]:
    """The pipeline `first` followed by fine-tuning on the outputs of the blocks."""
    return lambda removed: [*first(removed), {"finetune": {}}]


METHODS: dict[str, Callable[[float], Steps]] = {
    "svd": factored(by="svd"),
    "asvd": factored(by="asvd"),
    "welore, svd": factored("welore", by="svd"),
    "svd-llm": factored(),
    "svd-llm shared": factored(shared=True),
    "ranks energy, svd-llm": factored({"ranks": {"measure": "energy"}}),
    "ranks, svd-llm": factored("ranks"),
    "sensitivity, svd-llm": factored("sensitivity"),
    "realign, svd-llm": factored("realign"),
    "ranks, realign, svd-llm shared": factored("ranks", "realign", shared=True),
    "ranks, realign, svd-llm, finetune": tuned(factored("ranks", "realign")),
    "wanda": pruned(by="wanda"),
    "sparsegpt": pruned(by="sparsegpt"),
    "alps": pruned(by="alps"),
    "sensitivity, realign, alps, reconstruct": pruned("sensitivity", "realign", by="alps", after=("reconstruct",)),
    "realign, alps, finetune": tuned(pruned("realign", by="alps")),
    "oats": pruned(by="oats"),
    "oats refit": pruned(by="oats", rank_share=0.1, refit=True),
    "sensitivity, realign, oats refit": pruned("sensitivity", "realign", by="oats", rank_share=0.1, refit=True),
    "realign, oats refit, finetune": tuned(pruned("realign", by="oats", rank_share=0.1, refit=True)),
}
SUM, PURE = "oats refit", ("wanda", "sparsegpt", "svd-llm")
QUANTIZED: dict[float, Steps] = {  # whole bits per weight and one scale per row: no more bytes than the other methods
    0.4: [{"gptq": {"bits": 8, "group": 0}}],
    0.5: [{"gptq": {"bits": 7, "group": 0}}],
    0.6: [{"gptq": {"bits": 6, "group": 0}}],
}
HEAD = f"""# Low rank, sparse plus low rank, and their rivals at the same bytes

Printed by `python -m compress_evals.lowrank`; one row is one run of `compress.run` on the built-in model, calibrated
on {SAMPLES} x {LENGTH} tokens of `mixed`, seed 0.

- **Bytes** count everything that is stored for the matrices of the blocks: factors and kept weights in 16 bits,
  bitmaps, codes, scales. For a low-rank pass the share of bytes removed is that of the parameters; a pruned matrix
  drops {1 / PLAIN:.2%} more of its weights to pay for its bitmap.
- **KL** (nats a token) and perplexity are of 77 kB of unseen prose, and no quality metric.
- **Closed book** is 960 questions of trained facts, **in context** 400 with three facts in context, in percent.
- **Seconds** are those of a run beside other work: orders of magnitude only.
"""


@dataclass(frozen=True, kw_only=True)
class Measured(Scored):
    """One method at one share of the bytes removed."""

    removed: float
    recipe: dict[str, Any]
    bits_per_weight: float


def steps_of(method: str, removed: float) -> Steps | None:
    """The passes of a row; None if the method has none at this share."""
    return QUANTIZED.get(removed) if method == "gptq" else METHODS[method](removed)


def recipe_of(method: str, removed: float) -> Recipe | None:
    """The recipe of a row; None if the method has none at this share.

    Raises RecipeError if a pass or an option does not exist.
    """
    steps = steps_of(method, removed)
    if steps is None:
        return None
    return Recipe(passes=tuple(read_pass(s, f"passes[{i}]") for i, s in enumerate(steps)), calibration=CALIBRATION)


def measure(bench: Bench, method: str, removed: float, recipe: Recipe) -> Measured:
    """Run one recipe and measure its artifact."""
    made, scored = bench.run(recipe, method)
    bits = made["sizes"]["bits_per_weight"]
    return Measured(**scored, removed=removed, recipe=recipe.to_dict(), bits_per_weight=bits)


def fill(bench: Bench, path: Path, methods: Sequence[str], shares: Sequence[float]) -> None:
    """Measure and append the rows that the file does not have yet, the dense model first."""
    rows = read(path, Measured)
    if all(row.recipe for row in rows):
        dense = bench.scored(bench.dense, "dense", 0.0)
        append(path, Measured(**dense, removed=0.0, recipe={}, bits_per_weight=float(PLAIN)))
    done = {recipe_key_of(row.recipe) for row in rows}
    for removed in shares:
        for method in methods:
            recipe = recipe_of(method, removed)
            if recipe is not None and recipe_key(recipe) not in done:
                sys.stderr.write(f"{method}, {removed:.0%} removed\n")
                append(path, measure(bench, method, removed, recipe))


def table(rows: Sequence[Measured], dense: Measured) -> str:
    """A Markdown table with one line per row, and the best of each column at each share in bold."""
    head = ["removed", "method", "bits a weight", "KL", "perplexity", "closed book", "flips", "in context", "flips",
            "seconds"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for removed in sorted({row.removed for row in rows}):
        same = [row for row in rows if row.removed == removed]
        lowest = min(row.mean_kl for row in same)
        for row in same:
            cells = [f"{removed:.0%}", row.method, f"{row.bits_per_weight:.2f}"]
            cells += [bold(f"{row.mean_kl:.4f}", row.mean_kl == lowest), f"{row.perplexity:.2f}"]
            for task in TASKS:
                pair = paired(row, dense, task)
                best = row.score(task) == max(other.score(task) for other in same)
                cells += [bold(percent(row, task), best), f"-{pair.lost} +{pair.gained}"]
            lines.append("| " + " | ".join([*cells, f"{row.seconds:.0f}"]) + " |")
    return "\n".join(lines)


def checks(rows: Sequence[Measured]) -> list[str]:
    """Paired comparisons at each share of sparse plus low rank with pure forms, on the same windows.

    The sum `SUM` is compared with each of `PURE`, and the best sum with the best sparse and the best low-rank method.
    """
    lines = []
    for removed in sorted({row.removed for row in rows}):
        same = {row.method: row for row in rows if row.removed == removed and row.method != "gptq"}
        if SUM in same:
            lines += [against(same[SUM], same[name], name) for name in PURE if name in same]
        sums = [row for name, row in same.items() if "oats" in name]
        sparse = [row for name, row in same.items() if "oats" not in name and "sparsity" in str(row.recipe)]
        factored = [row for row in same.values() if "sparsity" not in str(row.recipe)]
        for kind, others in (("sparse", sparse), ("low rank", factored)):
            if sums and others:
                one, other = (min(group, key=lambda row: row.mean_kl) for group in (sums, others))
                lines.append(against(one, other, f"the best {kind}, {other.method}"))
    return lines


def against(one: Measured, other: Measured, name: str) -> str:
    """One line that compares a sum with a pure form by KL, with a paired test."""
    p = kl_p(one, other)
    verdict = "tie" if p >= 0.05 else "better" if one.mean_kl < other.mean_kl else "WORSE"
    figures = f"{one.mean_kl:.4f} against {name} {other.mean_kl:.4f} (p = {p:.2g})"
    return f"- {one.removed:.0%}: {one.method} {figures}: {verdict}"


def document(rows: Sequence[Measured]) -> str:
    """The whole document as Markdown."""
    dense = next(row for row in rows if not row.recipe)
    rest = [row for row in rows if row.recipe]
    scores = f"{percent(dense, FACTS)} closed book, {percent(dense, CONTEXT)} in context"
    lines = [HEAD, f"{date.today()}, {dense.source}, cpu; dense: {scores}, perplexity {dense.perplexity:.2f}", ""]
    return "\n".join([*lines, table(rest, dense), "", *checks(rest)]) + "\n"


def main() -> None:
    """Measure the missing rows and print the table."""
    names = [*METHODS, "gptq"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--removed", nargs="+", type=float, choices=SHARES, default=SHARES)
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--out", type=Path, default=Path("out/lowrank"))
    parser.add_argument("--print", action="store_true", help="only print existing rows")
    arguments = parser.parse_args()
    path = arguments.out / "rows.jsonl"
    if not arguments.print:
        asked = "all questions" if arguments.limit is None else f"{arguments.limit} questions a task"
        bench = Bench(arguments.model, f"{SAMPLES} x {LENGTH} tokens, {asked}", TASKS, arguments.limit)
        wrong = foreign(path, read(path, Measured), bench.conditions)
        if wrong is not None:
            parser.error(wrong)
        arguments.out.mkdir(parents=True, exist_ok=True)
        try:
            fill(bench, path, arguments.methods, arguments.removed)
        except RecipeError as error:
            parser.error(f"--methods: {error}")
    rows = read(path, Measured)
    if len(rows) < 2:
        parser.error(f"--print: {path} holds no row yet; measure some first")
    order = {name: i for i, name in enumerate(names)}
    text = document(sorted(rows, key=lambda row: order.get(row.method, -1)))
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
