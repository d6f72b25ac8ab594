"""`python -m compress_evals.deltas FINETUNED...`: compares what each delta method keeps, at equal bytes.

Each row is one `compress.run` on the difference between a fine-tune (`compress.builtin.finetune`) and the built-in
model, at a budget in bits per weight. It is compared with the original fine-tune on the ability's own held-out
questions, on the base model's facts, and by KL divergence on both kinds of text. The first two rows are the fine-tune
itself and the base model. Rows are appended to `NAME/rows.jsonl` and not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import compress
from compress import Calibration, Delta, Recipe
from compress.builtin.abilities import Ability, ability
from compress.builtin.documents import Question
from compress.builtin.finetune import replay
from compress.builtin.gates import exact_match
from compress.codecs import METHODS as SHIPPED
from compress.codecs import UNSIZED, kept_within, nearest_auto
from compress.errors import CompressError, RecipeError
from compress.model.source import locate, read_json
from compress.recipe import read_pass
from compress_evals import stats
from compress_evals.fidelity import Window, compare_windows
from compress_evals.table import (
    Bench,
    Scored,
    append,
    bold,
    foreign,
    paired,
    percent,
    read,
    recipe_key,
    recipe_key_of,
)

OWN, FACTS = "own", "facts_trained"
BUDGETS = (2.0, 1.0, 0.5)  # bits per weight: 1/8, 1/16 and 1/32 of bfloat16
SLACK = 1.1  # factor by which a method may exceed the budget: scales come on top of the one bit of a sign
EXACT = 1.005  # factor up to which a mean number of bits counts as within the budget
PLAIN = 16  # bits of an uncompressed number
CODED = 4  # bits of a quantized number
FACTOR = 4.25  # bits per entry of a 4-bit factor, including its share of the scales
LOST = 0.1  # the base may score at most this share of the fine-tune's score on an ability that it never had
SAMPLES, LENGTH = 128, 256
DOCUMENTS = 4000  # enough for the calibration windows
DATA = "tuning.jsonl"
CALIBRATION = Calibration(data=DATA, samples=SAMPLES, length=LENGTH, seed=0)
TRUE, BARE = "fine-tune", "base"
Steps = list[dict[str, Any]]
Method = Callable[[float], Steps | None]

HEAD = f"""# What a delta kept of a fine-tune, at equal bytes

Printed by `python -m compress_evals.deltas`; one row is one run of `compress.run` on the difference of a fine-tune
from the built-in model, calibrated on {SAMPLES} x {LENGTH} tokens of what it was tuned on.

- **Bits a weight and bytes** are of the block matrices, all that is stored for them; the folder holds norms and JSON
  too.
- **KL** (nats a token) to the true fine-tune: on its own questions with their answers, and on 77 kB of unseen prose.
- **Answers** in percent of what the true fine-tune answers, with a paired 95 % interval: the ability's own held-out
  questions, and 960 of the base's facts.
- **Seconds** are those of a run beside other work: orders of magnitude only.
"""


AUTO, NEAREST = "auto, unbiased", "auto, nearest"  # `compress delta extract --method auto` keeps the better of the two


def own_windows(tokenizer: Any, questions: Sequence[Question]) -> list[Window]:
    """A window for each question with its answer: after a BOS token, with every token scored."""
    found = []
    for text in (f"{q.prompt} {q.answer}." for q in questions):
        ids = (tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids)
        found.append(Window(ids=ids, scored_from=1, size=len(text.encode())))
    return found


def write_documents(task: Ability, seed: int, count: int, path: Path) -> None:
    """Write calibration documents drawn like the tuning data, half of them replay."""
    rng = random.Random(f"calibration {seed}")
    drawn = ["".join(draw(rng)) for _ in range(count // 2) for draw in (task.document, replay)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn), encoding="utf-8")


def shipped(name: str) -> Method:
    """A method of `compress delta extract`; it gives None for budgets that the method cannot reach."""

    def steps(bits: float) -> Steps | None:
        try:
            return SHIPPED[name](bits)
        except RecipeError:
            return None

    return steps


def coded_factors(bits: float) -> Steps:
    """Whitened low-rank factors in four bits, rounded with error feedback."""
    return [{"svd-llm": {"removed": round(1 - bits / FACTOR, 5)}}, {"gptq": {"bits": 4, "group": 0, "factors": True}}]


def few(by: str, bits: float) -> Steps:
    """A few entries in four bits with their positions, selected by `by` without compensating for the others."""
    share = kept_within(bits, CODED)
    return [{by: {"sparsity": round(1 - share, 5), "scope": "matrix"}}, {"rtn": {"bits": CODED, "group": -1}}]


def coded_sparse(bits: float) -> Steps | None:
    """Fewer entries of two bits each, for the budgets at which the shipped sparse delta keeps signs."""
    share = kept_within(0.95 * bits, 2)
    return [{"sparsegpt": {"sparsity": round(1 - share, 5), "bits": 2, "group": 0}}] if bits < 1.5 else None


def quantized(bits: float) -> Steps | None:
    """Every entry quantized to two bits; None for any other budget."""
    return [{"gptq": {"bits": 2, "group": 0}}] if bits == 2 else None


def sampled(bits: float) -> Steps:
    """DARE with entries sampled by importance: unbiased like DARE, but positions must be stored."""
    return [{"dare": {"density": round(kept_within(bits, PLAIN), 5), "keep": "importance"}}]


def published_signs(bits: float) -> Steps | None:
    """BitDelta with one scale per matrix, the mean magnitude; None unless the budget is one bit."""
    return [{"bitdelta": {"scale": "matrix", "fit": "mean"}}] if bits == 1 else None


def nearest_signs(bits: float) -> Steps | None:
    """BitDelta with the scales of the nearest matrix, whose norm is too small; None below one bit."""
    return [{"bitdelta": {"levels": int(bits)}}] if bits >= 1 else None


METHODS: dict[str, Method] = {
    **{AUTO if name == "auto" else name: shipped(name) for name in SHIPPED if name not in UNSIZED},
    NEAREST: nearest_auto,
    "bitdelta, nearest": nearest_signs,
    "delta-come, nearest": lambda bits: [{"delta-come": {"bits": bits}}],
    "bitdelta as published": published_signs,
    "delta-come as published": lambda bits: [{"delta-come": {"bits": bits, "bands": "published", "whitened": False}}],
    "dare importance": sampled,
    "svd": lambda bits: [{"svd": {"removed": 1 - bits / PLAIN}}],
    "svd-llm, gptq": coded_factors,
    "magnitude, rtn": partial(few, "magnitude"),
    "wanda, rtn": partial(few, "wanda"),
    "sparsegpt, 2 bits": coded_sparse,
    "dare as published": lambda bits: [{"dare": {"density": bits / PLAIN}}],
    "gptq": quantized,
}


@dataclass(frozen=True, kw_only=True)
class Measured(Scored):
    """One method at one budget.

    `right` also holds the answers to the ability's own questions; `own_kl` is the KL summed over each of their windows.
    """

    budget: float
    recipe: dict[str, Any]
    bits_per_weight: float
    bytes: int  # of the block matrices
    folder_bytes: int
    own_kl: list[float]
    own_tokens: int
    probe_kl: float = float("nan")  # on the run's own probe

    @property
    def both(self) -> float:
        """The mean of the KL divergences on both texts, in nats per token."""
        return (self.mean_own_kl + self.mean_kl) / 2

    @property
    def shares(self) -> list[float]:
        """The contribution of each window to `both`."""
        texts = ((self.own_kl, self.own_tokens), (self.kl, self.tokens))
        return [x / (2 * tokens) for kl, tokens in texts for x in kl]

    @property
    def mean_own_kl(self) -> float:
        """KL(fine-tune || delta) on the ability's own questions and answers, in nats per token."""
        return sum(self.own_kl) / self.own_tokens


class DeltaBench(Bench):
    """The original fine-tune and its answers, with which each delta of it is compared."""

    def __init__(self, finetuned: Path, base: str = "builtin", limit: int | None = None) -> None:
        made = read_json(finetuned / "finetune.json", "finetune.json")
        self.base, self.seed = base, made["seed"]
        self.ability: Ability = ability(made["ability"], self.seed)
        asked = "all questions" if limit is None else f"{limit} questions a task"
        super().__init__(str(finetuned), f"{made['ability']} of seed {self.seed}, {asked}", (FACTS,), limit)
        self.questions = self.ability.questions[:limit]
        self.own = own_windows(self.tokenizer, self.questions)

    def write_documents(self, path: Path) -> None:
        """Write the calibration documents of a delta."""
        write_documents(self.ability, self.seed, DOCUMENTS, path)

    def delta(self, recipe: Recipe, method: str, budget: float) -> Measured:
        """Run a recipe on the difference in a temporary folder, and measure the base with the delta added."""
        with tempfile.TemporaryDirectory() as folder:
            data, out = Path(folder) / DATA, Path(folder) / "out"
            self.write_documents(data)
            whole = replace(
                recipe, calibration=replace(recipe.calibration, data=str(data)), delta=Delta(base=self.base)
            )
            began = time.monotonic()
            compress.run(self.model, whole, out)
            seconds = time.monotonic() - began
            made = read_json(out / "compress.json", "compress.json")
            scored = self.scored(compress.load(out, base=self.base), method, seconds)
            return Measured(
                **scored,
                budget=budget,
                recipe=recipe.to_dict(),
                bits_per_weight=made["sizes"]["bits_per_weight"],
                bytes=sum(site["bytes"] for site in made["sites"].values()),
                folder_bytes=sum(file.stat().st_size for file in out.iterdir()),
                probe_kl=made["probe"]["kl"],
            )

    def scored(self, model: Any, method: str, seconds: float) -> dict[str, Any]:
        """The fields of `Measured` that are measured on a loaded model."""
        fields = super().scored(model, method, seconds)
        answers = exact_match(model, self.tokenizer, self.questions)
        found = compare_windows(self.dense, model, self.own)
        clusters = [question.cluster for question in self.questions]
        interval = stats.mean_interval([float(right) for right in answers], clusters)
        return {
            **fields,
            "right": fields["right"] | {OWN: "".join("1" if right else "0" for right in answers)},
            "clusters": fields["clusters"] | {OWN: clusters},
            "intervals": fields["intervals"] | {OWN: interval},
            "own_kl": [float(f.kl.sum()) for f in found],
            "own_tokens": sum(len(f.kl) for f in found),
        }

    def anchors(self) -> list[Measured]:
        """The rows of the fine-tune itself, which must lose nothing, and of the base, which never had the ability."""
        whole = sum(p.numel() for n, p in self.dense.named_parameters() if ".layers." in n and p.ndim == 2)
        sizes = [(TRUE, self.dense, whole * PLAIN // 8), (BARE, compress.load(locate(self.base)), 0)]
        return [
            Measured(
                **self.scored(model, name, 0.0),
                budget=8 * size / whole,
                recipe={},
                bits_per_weight=8 * size / whole,
                bytes=size,
                folder_bytes=size,
            )
            for name, model, size in sizes
        ]


def recipe_of(method: str, bits: float) -> Recipe | None:
    """The recipe of a method at a budget; None if the method cannot reach it.

    Raises RecipeError if a pass or an option does not exist.
    """
    steps = METHODS[method](bits)
    if steps is None:
        return None
    return Recipe(passes=tuple(read_pass(s, f"passes[{i}]") for i, s in enumerate(steps)), calibration=CALIBRATION)


def fill(bench: DeltaBench, path: Path, methods: Sequence[str], budgets: Sequence[float]) -> None:
    """Measure and append the rows that the file does not have yet."""
    if not read(path, Measured):
        for row in bench.anchors():
            append(path, row)
    done = {recipe_key_of(row.recipe) for row in read(path, Measured)}
    for bits in budgets:
        for method in methods:
            recipe = recipe_of(method, bits)
            if recipe is not None and recipe_key(recipe) not in done:
                sys.stderr.write(f"{path.parent.name}: {method}, {bits:g} bits\n")
                append(path, bench.delta(recipe, method, bits))
                done.add(recipe_key(recipe))


def chosen(rows: Sequence[Measured]) -> list[Measured]:
    """What `--method auto` keeps at each budget: the one of its two candidates with the lower KL on the run's probe."""
    made = [row for row in rows if row.method in (AUTO, NEAREST)]
    budgets = sorted({row.budget for row in made}, reverse=True)
    pairs = [[row for row in made if row.budget == budget] for budget in budgets]
    return [replace(min(pair, key=lambda row: row.probe_kl), method="auto") for pair in pairs if len(pair) == 2]


def kept(row: Measured, true: Measured, task: str) -> str:
    """The score of a delta in percent of the original fine-tune's, with its paired 95 % interval."""
    pair = paired(row, true, task)
    if not pair.dense:
        return "-"
    share, low, high = (100 * (1 + x / pair.dense) for x in (pair.delta, pair.low, pair.high))
    return f"{share:.1f} ({max(0.0, low):.1f}-{high:.1f})"


def line(row: Measured, rivals: Sequence[Measured], true: Measured) -> str:
    """A row of the table, with each figure in bold that none of `rivals` exceeds."""
    cells = [f"{row.budget:g}", row.method, f"{row.bits_per_weight:.2f}", f"{row.bytes:,}", f"{row.folder_bytes:,}"]
    best = bool(row.recipe)
    cells.append(bold(f"{row.mean_own_kl:.4f}", best and row.mean_own_kl == min(r.mean_own_kl for r in rivals)))
    cells.append(bold(f"{row.mean_kl:.4f}", best and row.mean_kl == min(r.mean_kl for r in rivals)))
    for task in (OWN, FACTS):
        cells.append(bold(kept(row, true, task), best and row.score(task) == max(r.score(task) for r in rivals)))
    return "| " + " | ".join([*cells, f"{row.seconds:.0f}"]) + " |"


def table(rows: Sequence[Measured], true: Measured) -> str:
    """A Markdown table with one line per row, and the best of each column at each budget in bold."""
    head = ["budget", "method", "bits a weight", "bytes", "folder", "own KL", "prose KL", "own kept",
            "base's facts kept", "seconds"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget in sorted({row.budget for row in rows}, reverse=True):
        same = [row for row in rows if row.budget == budget]
        lines += [line(row, same, true) for row in same]
    return "\n".join(lines)


def checks(rows: Sequence[Measured]) -> list[str]:
    """The claims, one per line, each ending in its verdict; the verdict is in capitals if the claim does not hold."""
    anchors = {row.method: row for row in rows if not row.recipe}
    true, bare = anchors[TRUE], anchors[BARE]
    exact = max(true.own_kl + true.kl) == 0
    lost = bare.score(OWN) <= LOST * true.score(OWN)
    lines = [
        f"- the fine-tune beside itself has no divergence: {'holds' if exact else 'FAILS'}",
        f"- the base answers {percent(bare, OWN)} of the ability's questions: {'holds' if lost else 'FAILS'}",
    ]
    for budget in sorted({row.budget for row in rows if row.recipe}, reverse=True):
        lines += checks_at(budget, [row for row in rows if row.recipe and row.budget == budget])
    return lines


def checks_at(budget: float, rows: Sequence[Measured]) -> list[str]:
    """The claims at one budget: which methods exceed it, and whether `auto` is worse than the best other within it."""
    over = [row for row in rows if row.bits_per_weight > EXACT * budget]
    far = [f"{row.method} {row.bits_per_weight:.2f}" for row in over if row.bits_per_weight > SLACK * budget]
    named = ", ".join(f"{row.method} ({row.bits_per_weight:.2f})" for row in over) or "none"
    lines = [
        f"- {budget:g} bits: over it by scales: {named}; none by more than a tenth: {'TOO LARGE' if far else 'holds'}"
    ]
    fixed = [row for row in rows if row not in over and not row.method.startswith("auto")]
    best = min(fixed, key=lambda row: row.both, default=None)
    made = [row for row in rows if row.method == "auto" and best is not None]
    return [*lines, *(line for row in made if best for line in (alone(row, fixed), against(row, best)))]


def against(one: Measured, other: Measured) -> str:
    """Compare `auto` with the best fixed method by a sign-flip test over the same windows of questions and prose."""
    pairs = zip(one.shares, other.shares, strict=True)
    p = stats.sign_flip([a - b for a, b in pairs])
    verdict = "tie" if p >= 0.05 else "better" if one.both < other.both else "WORSE"
    figures = f"KL on both texts {one.both:.4f} against {other.method} {other.both:.4f} (p = {p:.2g})"
    return f"- {one.budget:g} bits: {one.method} {figures}: {verdict}"


def alone(one: Measured, fixed: Sequence[Measured]) -> str:
    """The same on the ability's own questions alone, without a verdict; `fixed` is chosen by these alone, too."""
    best = min(fixed, key=lambda row: row.mean_own_kl)
    figures = f"{one.mean_own_kl:.4f} against {best.method} {best.mean_own_kl:.4f}"
    return f"- {one.budget:g} bits: {one.method} KL on its own questions alone {figures}"


def failed(lines: Sequence[str]) -> bool:
    """Whether any of the claims does not hold."""
    return any(line.rpartition(": ")[2].isupper() for line in lines)


def section(name: str, rows: Sequence[Measured]) -> str:
    """The Markdown section of one fine-tune."""
    true = next(row for row in rows if row.method == TRUE)
    scores = f"{percent(true, OWN)} own, {percent(true, FACTS)} of the base's facts"
    order = {method: i for i, method in enumerate(["auto", *METHODS])}
    rows = sorted([*rows, *chosen(rows)], key=lambda row: order.get(row.method, -1))
    opening = f"## {name}\n\n{date.today()}, {true.source}, cpu; the true fine-tune: {scores}"
    return "\n\n".join([opening, table(rows, true), "\n".join(checks(rows))])


def measure(folder: Path, arguments: argparse.Namespace) -> list[Measured]:
    """The rows of one fine-tune, after measuring the missing ones; raises CompressError if they cannot be added."""
    path = arguments.out / folder.resolve().name / "rows.jsonl"
    if not arguments.print:
        bench = DeltaBench(folder, limit=arguments.limit)
        wrong = foreign(path, read(path, Measured), bench.conditions)
        if wrong is not None:
            raise RecipeError(wrong)
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(bench, path, arguments.methods, arguments.bits)
    rows = read(path, Measured)
    if not rows:
        raise RecipeError(f"--print: {path} holds no row yet; measure some first")
    return rows


def main() -> int:
    """Measure the missing rows and print the table; returns 1 with `--check` if a claim does not hold, else 0."""
    names = list(METHODS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("finetuned", nargs="+", type=Path, help="folders made by compress.builtin.finetune")
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--bits", nargs="+", type=float, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--out", type=Path, default=Path("out/deltas"))
    parser.add_argument("--print", action="store_true", help="only print existing rows")
    parser.add_argument("--check", action="store_true", help="fail if a claim does not hold")
    arguments = parser.parse_args()
    try:
        found = {folder.resolve().name: measure(folder, arguments) for folder in arguments.finetuned}
    except CompressError as error:
        parser.error(str(error))
    text = "\n\n".join([HEAD, *(section(name, rows) for name, rows in found.items())]) + "\n"
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(arguments.check and any(failed(checks([*rows, *chosen(rows)])) for rows in found.values()))


if __name__ == "__main__":
    sys.exit(main())
