"""`python -m compress_evals.quantization`: compares every quantization method at every bit width on one dense model.

Each row is one `compress.run`, whose artifact is compared with the dense model on facts (closed book and in context)
and on unseen prose. A row in `rows.jsonl` is identified by its recipe: it is measured once, possibly in another session
than other rows, and measured again only if an option of its recipe changes. `--print` only prints existing rows,
`--check` tests whether supposedly better methods are better. `compress qid --fit` reads the rows of one method.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from compress import Calibration, Recipe
from compress.errors import RecipeError
from compress.recipe import read_pass
from compress_evals.stats import verdict_text
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
LAYER_WINDOWS = 16  # windows of the text on which hidden states are compared
CALIBRATION = Calibration(data="mixed", samples=SAMPLES, length=LENGTH, seed=0)
BITS = (8, 4, 3, 2)
GROUPS = (16, 32, 64, 128, 0)  # 0 is a whole row; 16 is only for NVFP4
Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A pipeline: a function from bits and group size to its passes in recipe form, and the bits and groups it has."""

    steps: Callable[[int, int], Steps]
    bits: Sequence[int] = BITS
    groups: Sequence[int] = (32, 64, 128, 0)


def grid(*before: str, by: str = "gptq", **options: Any) -> Method:
    """A pipeline that ends in a quantizer with `bits` and `group`."""
    return Method(lambda b, g: [*({name: {}} for name in before), {by: {"bits": b, "group": g, **options}}])


def learned(name: str, options: dict[str, Any], *before: str, by: str = "gptq", **others: Any) -> Method:
    """A quantizing pipeline followed by a pass, `name`, that learns the rounding block by block."""
    first = grid(*before, by=by, **others).steps
    return Method(lambda b, g: [*first(b, g), {name: options}])


def fixed(bits: int, group: int, *steps: dict[str, Any]) -> Method:
    """A pipeline for a single format."""
    return Method(lambda b, g: list(steps), (bits,), (group,))


def below_8(method: Method) -> Method:
    """The method without 8 bits: there, plain rounding is within 0.0003 nats of dense, so it has nothing to improve."""
    return replace(method, bits=(4, 3, 2))


METHODS: dict[str, Method] = {
    "rtn": grid(by="rtn"),
    "rtn search": grid(by="rtn", search=True),
    "rtn output": grid(by="rtn", search="output"),
    "hqq": grid(by="hqq"),
    "awq": grid("awq", by="rtn"),
    "awq, rtn output": below_8(grid("awq", by="rtn", search="output")),
    "gptq": grid(),
    "gptq act": grid(order="activation"),
    "gptq gar": below_8(grid(order="groups")),
    "gptq gar search": below_8(grid(order="groups", search=True)),
    "awq, gptq": below_8(grid("awq")),
    "realign, gptq act": below_8(grid("realign", order="activation")),
    "quarot, gptq": grid("quarot"),
    "rotate, gptq": grid("rotate"),
    "rotate, gptq gar search": below_8(grid("rotate", order="groups", search=True)),
    "rtn output, flexround": learned("flexround", {}, by="rtn", search="output"),
    "gptq act, lrq": learned("lrq", {"rank": 64}, order="activation"),
    "sensitivity, gptq": replace(grid("sensitivity"), bits=(4, 3)),  # a mean of 8 or 2 leaves nothing to redistribute
    "vq kmeans": Method(lambda b, g: [{"vq": {"book": "kmeans", "bits": b, "dims": 2, "rotate": False}}], (3, 2), (0,)),
    "vq e8p": Method(lambda b, g: [{"vq": {"bits": b}}], (4, 3, 2), (0,)),
    "realign, vq e8p": Method(lambda b, g: [{"realign": {}}, {"vq": {"bits": b}}], (4, 3, 2), (0,)),
    "reallm": Method(
        lambda b, g: [{"reallm": {"bits": b, "rank": 8, "precision": "int8", "always": True}}], (2,), (0,)
    ),
    "nf4": fixed(4, 64, {"nf4": {}}),
    "nf4 double": fixed(4, 64, {"nf4": {"double": True}}),
    "mxfp4": fixed(4, 32, {"mxfp4": {}}),
    "nvfp4": fixed(4, 16, {"nvfp4": {}}),
    "fp8": fixed(8, 0, {"fp8": {}}),
    "int8 w8a8": fixed(8, 0, {"rtn": {"bits": 8, "group": 0, "symmetric": True, "inputs": "int8"}}),
    "smoothquant, int8 w8a8": fixed(
        8, 0, {"smoothquant": {}}, {"rtn": {"bits": 8, "group": 0, "symmetric": True, "inputs": "int8"}}
    ),
}
# from worst to best: no method of a step should have a higher KL than a method of the step before
LADDER = (("rtn",), ("hqq", "awq"), ("gptq",), ("rotate, gptq", "gptq act, lrq", "vq kmeans", "vq e8p"))
CELLS = "Each cell: bits a weight: KL, closed book, in context."
HEAD = f"""# Every way to quantize, on the built-in model

Printed by `python -m compress_evals.quantization`; one row is one run of `compress.run`, calibrated on {SAMPLES} x
{LENGTH} tokens of `mixed` where a pass needs data, seed 0.

- **Bits a weight** count everything that is stored for the matrices of the blocks: codes, scales, zeros, books.
- **KL** (nats a token), loss and bits per byte are of 77 kB of unseen prose, and no quality metric.
- **Closed book** is 960 questions of trained facts, **in context** 400 with three facts in context, in percent.
  **Flips** are the answers that became wrong or right.
- **Error** is the mean over blocks of the relative error of the hidden state after them, on {LAYER_WINDOWS} windows
  of the prose.
- **Seconds** are those of a run on one thread beside other work: they tell orders of magnitude only.
"""


@dataclass(frozen=True, kw_only=True)
class Measured(Scored):
    """One method at one bit width and group size.

    `degradation` is the cross-entropy lost, in nats per token; `error` is the result of `layer_error`; `text_bytes` is
    the size of the text behind `loss`, in UTF-8 bytes. The dense model is a row of 16 bits with an empty recipe.
    """

    bits: int
    group: int
    recipe: dict[str, Any]
    bits_per_weight: float
    degradation: float
    error: float
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the evaluation text."""
        return sum(self.loss) / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class Wanted:
    """A place in the table and the recipe that fills it."""

    method: str
    bits: int
    group: int
    recipe: Recipe


def missing(name: str) -> str | None:
    """The missing pass of a method, as text, or None; raises RecipeError for any other fault of its recipe."""
    method = METHODS[name]
    try:
        recipe_of(name, method.bits[0], method.groups[0])
    except RecipeError as error:
        if "unknown pass" not in str(error):
            raise
        return f"{name}: {str(error).partition(';')[0]}"
    return None


def recipe_of(name: str, bits: int, group: int) -> Recipe:
    """The recipe of a row; raises RecipeError if a pass or an option does not exist."""
    steps = METHODS[name].steps(bits, group)
    return Recipe(passes=tuple(read_pass(s, f"passes[{i}]") for i, s in enumerate(steps)), calibration=CALIBRATION)


def wanted(methods: Sequence[str], bits: Sequence[int], groups: Sequence[int]) -> list[Wanted]:
    """The rows of the table, by method, bits and group; raises RecipeError for a method that cannot be run."""
    return [
        Wanted(name, b, g, recipe_of(name, b, g))
        for name in methods
        for b in METHODS[name].bits
        for g in METHODS[name].groups
        if b in bits and g in groups
    ]


def chosen(rows: Sequence[Measured], places: Sequence[Wanted]) -> list[Measured]:
    """The dense row, then the rows of `places` that have been measured, in order."""
    found = {recipe_key_of(row.recipe): row for row in rows if row.recipe}
    dense = [row for row in rows if not row.recipe]
    return dense + [
        replace(found[k], method=place.method) for place in places if (k := recipe_key(place.recipe)) in found
    ]


class LayerBench(Bench):
    """A bench that also compares the hidden states between blocks."""

    def scored(self, model: Any, method: str, seconds: float) -> dict[str, Any]:
        """The fields of `Measured` that are measured on a loaded model."""
        scored = super().scored(model, method, seconds)
        lost = (sum(scored["loss"]) - sum(scored["dense_loss"])) / scored["tokens"]
        size = sum(window.size for window in self.windows)
        error = layer_error(self.dense, model, [window.ids for window in self.windows[:LAYER_WINDOWS]])
        return scored | {"degradation": lost, "error": error, "text_bytes": size}


@torch.inference_mode()
def layer_error(dense: Any, compressed: Any, windows: Sequence[Sequence[int]]) -> float:
    """The mean over blocks of |h' - h| / |h|, where h is the hidden state after the block at all tokens.

    All windows must have the same length.
    """
    ids_BT = torch.tensor(windows)
    before, after = (m(input_ids=ids_BT, output_hidden_states=True).hidden_states[1:] for m in (dense, compressed))
    errors = [(a.float() - b.float()).norm() / b.float().norm() for b, a in zip(before, after, strict=True)]
    return float(torch.stack(errors).mean())


def measure(bench: LayerBench, place: Wanted) -> Measured:
    """Run one recipe and measure its artifact."""
    made, scored = bench.run(place.recipe, place.method)
    stored = made["sizes"]["bits_per_weight"]
    recipe = place.recipe.to_dict()
    return Measured(**scored, bits=place.bits, group=place.group, recipe=recipe, bits_per_weight=stored)


def dense_row(bench: LayerBench) -> Measured:
    """The row of the dense model."""
    scored = bench.scored(bench.dense, "dense", 0.0)
    return Measured(**scored, bits=16, group=0, recipe={}, bits_per_weight=16.0)


# -- tables ----------------------------------------------------------------------------------------


def group_name(group: int) -> str:
    """The group size as a column heading."""
    return f"group {group}" if group else "row"


def compact(rows: Sequence[Measured], bits: int) -> str:
    """A Markdown table with one line per method and one column per group; the best KL of each column is in bold."""
    same = [row for row in rows if row.bits == bits]
    groups = [g for g in GROUPS if any(row.group == g for row in same)]
    lines = ["| method | " + " | ".join(map(group_name, groups)) + " |", "|" + "---|" * (1 + len(groups))]
    lowest = {g: min(row.mean_kl for row in same if row.group == g) for g in groups}
    for name in dict.fromkeys(row.method for row in same):
        cells = []
        for g in groups:
            row = next((row for row in same if (row.method, row.group) == (name, g)), None)
            cells.append("" if row is None else cell(row, row.mean_kl == lowest[g]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: Measured, best: bool) -> str:
    """A cell of the compact table: bits per weight, KL, and the closed-book and in-context scores."""
    kl = bold(f"{row.mean_kl:.4f}", best)
    return f"{row.bits_per_weight:.2f}: {kl}, {100 * row.score(FACTS):.1f}, {100 * row.score(CONTEXT):.1f}"


def full(rows: Sequence[Measured], dense: Measured) -> str:
    """A Markdown table with all figures of every row."""
    head = ["method", "bits", "group", "bits a weight", "KL", "loss - dense", "perplexity", "bits per byte",
            "closed book", "flips", "in context", "flips", "error", "seconds"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.method, f"{row.bits}", f"{row.group or 'row'}", f"{row.bits_per_weight:.3f}"]
        cells += [f"{row.mean_kl:.5f}", f"{row.degradation:.5f}", f"{row.perplexity:.2f}", f"{row.bits_per_byte:.4f}"]
        for task in TASKS:
            pair = paired(row, dense, task)
            cells += [percent(row, task), f"-{pair.lost} +{pair.gained}"]
        lines.append("| " + " | ".join([*cells, f"{row.error:.5f}", f"{row.seconds:.0f}"]) + " |")
    return "\n".join(lines)


def document(rows: Sequence[Measured], conditions: str) -> str:
    """The whole document as Markdown; the first of `rows` must be the dense model."""
    dense, *rest = rows
    scores = f"{percent(dense, FACTS)} closed book, {percent(dense, CONTEXT)} in context"
    text = f"perplexity {dense.perplexity:.2f}, {dense.bits_per_byte:.4f} bits per byte"
    lines = [HEAD, f"{date.today()}, {conditions}, cpu; dense: {scores}, {text}"]
    for bits in BITS:
        if any(row.bits == bits for row in rest):
            lines += ["", f"## {bits} bits", "", CELLS, "", compact(rest, bits)]
    lines += ["", "## All figures", "", "Brackets are 95 % intervals.", "", full(rest, dense)]
    return "\n".join(lines) + "\n"


# -- checks ----------------------------------------------------------------------------------------


def ladder(rows: Sequence[Measured]) -> list[str]:
    """Compare each method with those of the step before on the ladder, at the same bits and group, one line each.

    VIOLATED is a higher KL at p < 0.05 in a paired test on the same windows, `tie` a difference that is not
    significant.
    """
    lines = []
    for place in dict.fromkeys((row.bits, row.group) for row in rows):
        at = {row.method: row for row in rows if (row.bits, row.group) == place}
        steps = [step for names in LADDER if (step := [at[name] for name in names if name in at])]
        for before, after in pairwise(steps):
            lines += [rung(worse, better) for worse in before for better in after]
    return lines


def rung(worse: Measured, better: Measured) -> str:
    """One comparison of the ladder, as a line."""
    p = kl_p(better, worse)
    verdict = "tie" if p >= 0.05 else "holds" if better.mean_kl < worse.mean_kl else "VIOLATED"
    return (
        f"{worse.bits} bits, {group_name(worse.group)}: {worse.method} {worse.mean_kl:.5f} >= "
        f"{better.method} {better.mean_kl:.5f} (p = {p:.2g}): {verdict}"
    )


def knowledge(rows: Sequence[Measured]) -> list[str]:
    """At 2 bits: whether the best method of no more stored bits (within 1 %) keeps three times rtn's closed-book facts.

    That is impossible if rtn keeps more than a third.
    """
    lines = []
    for plain in rows:
        if plain.method == "rtn" and plain.bits == 2:
            equal = [row for row in rows if row.bits_per_weight <= 1.01 * plain.bits_per_weight]
            best = max(equal, key=lambda row: row.score(FACTS))
            before, after = plain.right[FACTS].count("1"), best.right[FACTS].count("1")
            verdict = "holds" if after > 0 and after >= 3 * before else "VIOLATED"
            if 3 * before > len(plain.right[FACTS]):
                verdict = "out of reach, since rtn keeps more than a third"
            lines.append(
                f"2 bits, {group_name(plain.group)}, {plain.bits_per_weight:.2f} bits a weight: {best.method} keeps "
                f"{100 * best.score(FACTS):.1f} % closed book, rtn {100 * plain.score(FACTS):.1f} %; three times: "
                f"{verdict}"
            )
    return lines


def lossless(rows: Sequence[Measured], dense: Measured) -> list[str]:
    """Whether GPTQ at 4 bits in groups of 64 matches the dense model, one line per task."""
    lines = []
    for row in rows:
        if (row.method, row.bits, row.group) == ("gptq", 4, 64):
            for task in TASKS:
                pair = paired(row, dense, task)
                verdict = "holds" if pair.verdict in ("matching", "improved") else "VIOLATED"
                span = f"{100 * pair.delta:+.1f} points, {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
                lines.append(f"4 bits, group 64: gptq on {task} is {verdict_text(pair)} ({span}): {verdict}")
    return lines


# -- the command -----------------------------------------------------------------------------------


def parsed(words: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of the command, and its parsed options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="see --list")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=BITS)
    parser.add_argument(
        "--groups", nargs="+", type=int, choices=GROUPS, default=GROUPS, help="weights per scale; 0: one scale per row"
    )
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--out", type=Path, default=Path("out/quantization"))
    parser.add_argument("--list", action="store_true", help="print the methods and their passes")
    parser.add_argument("--print", action="store_true", help="only print existing rows")
    parser.add_argument("--check", action="store_true", help="also check that methods expected to be better are better")
    return parser, parser.parse_args(words)


def listed() -> str:
    """Each method with its bits, groups, passes at its first width, and any pass that is missing here."""
    lines = []
    for name, method in METHODS.items():
        steps = json.dumps(method.steps(method.bits[0], method.groups[0]))
        widths = f"bits {' '.join(map(str, method.bits))}, groups {' '.join(map(str, method.groups))}"
        reason = missing(name)
        lines.append(f"{name}: {widths}: {steps}" + (f" -- unavailable: {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def selected(names: Sequence[str] | None) -> list[str]:
    """The given methods, in the order of METHODS; by default all that can be run, with a note of those that cannot."""
    if names is not None:
        return [name for name in METHODS if name in names]
    for reason in filter(None, map(missing, METHODS)):
        sys.stderr.write(f"unavailable, left out: {reason}\n")
    return [name for name in METHODS if missing(name) is None]


def fill(bench: LayerBench, path: Path, places: Sequence[Wanted]) -> None:
    """Measure and append the rows of `places` that the file does not have yet, the dense model first."""
    rows = read(path, Measured)
    if all(row.recipe for row in rows):
        append(path, dense_row(bench))
    done = {recipe_key_of(row.recipe) for row in rows}
    for place in places:
        if recipe_key(place.recipe) not in done:
            sys.stderr.write(f"{place.method}, {place.bits} bits, {group_name(place.group)}\n")
            append(path, measure(bench, place))


def main() -> None:
    """Measure the missing rows and print the tables."""
    parser, arguments = parsed()
    if arguments.list:
        sys.stdout.write(listed())
        return
    try:
        places = wanted(selected(arguments.methods), arguments.bits, arguments.groups)
    except RecipeError as error:
        parser.error(f"--methods: {error}")
    path = arguments.out / "rows.jsonl"
    rows = read(path, Measured)
    if not arguments.print:
        asked = "all questions" if arguments.limit is None else f"{arguments.limit} questions a task"
        bench = LayerBench(arguments.model, f"{SAMPLES} x {LENGTH} tokens, {asked}", TASKS, arguments.limit)
        wrong = foreign(path, rows, bench.conditions)
        if wrong is not None:
            parser.error(wrong)
        arguments.out.mkdir(parents=True, exist_ok=True)
        fill(bench, path, places)
        rows = read(path, Measured)
    found = chosen(rows, places)
    if len(found) < 2:
        parser.error(f"--print: {path} holds no row of these methods; measure some first")
    text = document(found, found[0].source)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if arguments.check:
        checks = [*ladder(found[1:]), *knowledge(found[1:]), *lossless(found[1:], found[0])]
        sys.stdout.write("\n".join(["", *checks]) + "\n")


if __name__ == "__main__":
    main()
